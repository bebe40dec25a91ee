"""Policies: anything with ``logits(tokens, prompt_ids=None) -> (B, T, A)``.

``HuggingFace`` is imported when it is asked for: it needs the extra ``hf``.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies.automaton import AutomatonPolicy
from rl_ebm.policies.base import Policy, Trainable
from rl_ebm.policies.checks import check
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.expression import parse_reference
from rl_ebm.policies.hmm import fit_hmm
from rl_ebm.policies.mlp import MLP, MLPConfig
from rl_ebm.policies.ngram import fit_ngram
from rl_ebm.policies.pairs import read_pairs, write_pairs
from rl_ebm.policies.scoring import (
    log_pi_rows,
    log_prob,
    mask_logits,
    q_values,
    tree_logits,
    tree_q_values,
)
from rl_ebm.policies.tabular import Tabular, Uniform
from rl_ebm.policies.transformer import Transformer

if TYPE_CHECKING:
    from rl_ebm.policies.hf import HuggingFace as HuggingFace

# Not HuggingFace: a star import stays light.
__all__ = [
    "MLP",
    "AutomatonPolicy",
    "MLPConfig",
    "Policy",
    "Tabular",
    "Trainable",
    "Transformer",
    "TransformerConfig",
    "Uniform",
    "check",
    "fit_hmm",
    "fit_ngram",
    "log_pi_rows",
    "log_prob",
    "mask_logits",
    "parse_reference",
    "q_values",
    "read_pairs",
    "sample",
    "tree_logits",
    "tree_q_values",
    "write_pairs",
]


def __getattr__(name: str) -> Any:
    if name != "HuggingFace":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("transformers") is None:
        raise ImportError(
            "rl_ebm.policies.HuggingFace needs the extra hf: pip install '.[hf]' in a checkout "
            "of rl-ebm"
        )
    from rl_ebm.policies.hf import HuggingFace

    return HuggingFace
