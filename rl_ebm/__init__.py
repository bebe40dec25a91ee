"""Distil energy-based models over token sequences into autoregressive policies, verified."""

from rl_ebm import policies, rewards
from rl_ebm.ebm import EBM
from rl_ebm.exact import solve
from rl_ebm.soft_bellman import q_from_r, r_from_q
from rl_ebm.tokens import Batch, TokenSpace
