"""Distil energy-based models over token sequences into autoregressive policies, verified.

space = rl_ebm.TokenSpace(vocab_size=8, max_length=4)
ebm = rl_ebm.EBM(space, reward, beta=1.0)
solution = rl_ebm.solve(ebm)
policy, report = rl_ebm.train(ebm, agent="soft-q", seconds=60)
"""

import os
from importlib.metadata import version

# While they wait, torch's OpenMP threads spin: beside any other process a training step here
# is then tens of times slower. Read when torch is loaded; a value of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rl_ebm import agents, envs, policies, rewards
from rl_ebm.certificates import Certificate, certify
from rl_ebm.checkpoint import RunError
from rl_ebm.ebm import EBM
from rl_ebm.estimates import Interval
from rl_ebm.exact import AutomatonSolution, TooLargeError, TreeSolution, solve
from rl_ebm.report import Report
from rl_ebm.report_sampled import SampledReport
from rl_ebm.runs import load
from rl_ebm.soft_bellman import q_from_r, r_from_q
from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.train import resume, train
from rl_ebm.training import TrainConfig
from rl_ebm.verify import verify

__version__ = version("rl-ebm")

__all__ = [
    "EBM",
    "AutomatonSolution",
    "Batch",
    "Certificate",
    "Interval",
    "Report",
    "RunError",
    "SampledReport",
    "TokenSpace",
    "TooLargeError",
    "TrainConfig",
    "TreeSolution",
    "agents",
    "certify",
    "envs",
    "load",
    "policies",
    "q_from_r",
    "r_from_q",
    "resume",
    "rewards",
    "solve",
    "train",
    "verify",
]
