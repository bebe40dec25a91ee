"""Token sequences: the space of them, batches of them, and prompts."""

from rl_ebm.tokens.space import Batch, TokenSpace, check_space, length_mask

__all__ = ["Batch", "TokenSpace", "check_space", "length_mask"]
