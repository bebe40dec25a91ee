"""Distil energy-based models over token sequences into autoregressive policies, verified.

space = rl_ebm.TokenSpace(vocab_size=8, max_length=4)
ebm = rl_ebm.EBM(space, reward, beta=1.0)
solution = rl_ebm.solve(ebm)
policy, report = rl_ebm.train(ebm, agent="soft-q", seconds=60)
"""

import os
from pathlib import Path

# While they wait, torch's OpenMP threads spin: beside any other process a training step here
# is then tens of times slower. Read when torch is loaded; a value of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _find_folder(name: str) -> None:
    """Let ``rl_ebm.agents`` and ``rl_ebm.envs`` be found where nothing links to them.

    Both stand beside this folder in a checkout and are linked into it. A copy without symbolic
    links (Windows, a zip) has a small file in their place, or nothing.
    """
    here = Path(__file__).parent
    if (here / name).is_dir():
        return
    if not (here.parent / name / "__init__.py").is_file():
        raise ImportError(
            f"{here} has no folder {name}, and none stands beside it: install rl-ebm again, from "
            "a whole copy of its repository"
        )
    if str(here.parent) not in __path__:
        __path__.append(str(here.parent))


_find_folder("agents")
_find_folder("envs")

from rl_ebm import agents, envs, policies, rewards
from rl_ebm.certificates import Certificate, certify
from rl_ebm.ebm import EBM
from rl_ebm.exact import AutomatonSolution, TooLargeError, TreeSolution, solve
from rl_ebm.packages.version import VERSION
from rl_ebm.soft_bellman import q_from_r, r_from_q
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.audit import audit
from rl_ebm.studies.diagnose import diagnose
from rl_ebm.studies.losses.audit import audit_loss
from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.training.checkpoint import RunError
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.directory import load
from rl_ebm.training.run import resume, train
from rl_ebm.verification.report import Report
from rl_ebm.verification.sampled_report import SampledReport
from rl_ebm.verification.verify import verify

__version__ = VERSION

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
    "audit",
    "audit_loss",
    "certify",
    "diagnose",
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
