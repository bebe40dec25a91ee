from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.ebm import EBM
from rl_ebm import rewards, policies
