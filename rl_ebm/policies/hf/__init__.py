"""Causal models of Hugging Face as policies; imported when asked for, it needs the extra hf."""

from rl_ebm.policies.hf.policy import HuggingFace

__all__ = ["HuggingFace"]
