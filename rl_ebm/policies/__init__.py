"""Policies: anything with ``logits(tokens, prompt_ids=None) -> (B, T, A)``."""

from rl_ebm.backbone import TransformerConfig
from rl_ebm.policies.automaton import AutomatonPolicy
from rl_ebm.policies.hmm import fit_hmm
from rl_ebm.policies.ngram import fit_ngram
from rl_ebm.policies.scoring import (
    Policy,
    Trainable,
    log_pi_rows,
    log_prob,
    mask_logits,
    q_values,
    sample,
    tree_logits,
    tree_q_values,
)
from rl_ebm.policies.tabular import Tabular, Uniform
from rl_ebm.policies.transformer import Transformer

__all__ = [
    "AutomatonPolicy",
    "Policy",
    "Tabular",
    "Trainable",
    "Transformer",
    "TransformerConfig",
    "Uniform",
    "fit_hmm",
    "fit_ngram",
    "log_pi_rows",
    "log_prob",
    "mask_logits",
    "q_values",
    "sample",
    "tree_logits",
    "tree_q_values",
]
