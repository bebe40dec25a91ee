"""An MLP over the one-hot prefix: a policy for small spaces, where steps must be cheap.

Its first layer reads which token stands at each place, how many there are, and which prompt is
answered. Of one-hot inputs that is a sum of rows of a table; so all prefixes of a response cost one
cumulative sum, one more token is one addition, and no prefix is read twice. It shares nothing
between places: a phrase is another one at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.messages.arguments import flag, shown, whole
from rl_ebm.messages.memory import check_fits
from rl_ebm.messages.words import count_text
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.networks.values import ValueHead
from rl_ebm.policies.base import num_prompts, prompt_rows
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts

MAX_LAYERS = 1000
"""more take long to be made, however narrow they are"""


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an MLP."""

    layers: int = 2
    """hidden layers; the first reads the one-hot prefix"""
    hidden: int = 256
    """width of each"""

    def __post_init__(self) -> None:
        for name, size in (("layers", self.layers), ("hidden", self.hidden)):
            object.__setattr__(self, name, whole(name, size, 1))
        if self.layers > MAX_LAYERS:
            raise ValueError(f"layers must be at most {MAX_LAYERS}, got {self.layers}")


@dataclass
class Read:
    """What a batch has read, for decoding one token at a time.

    Attributes:
        total: sum of the rows of the first layer, (B, H).
        length: tokens read.
    """

    total: Tensor
    length: int = 0


class MLP(nn.Module):
    """A multilayer perceptron over one-hot prefixes, with ReLU.

    Args:
        space: the responses.
        config: sizes.
        prompts: what the policy answers, which it tells apart and does not read; None without.
        logits_are_values: whether its raw logits are trained to be q.
        value_head: whether V has weights of its own; None where raw logits are q.

    Raises:
        ValueError: a network that does not fit into memory.
    """

    def __init__(
        self,
        space: TokenSpace,
        config: MLPConfig | None = None,
        prompts: GivenPrompts | None = None,
        logits_are_values: bool = False,
        value_head: bool | None = None,
    ) -> None:
        super().__init__()
        check_space(space)
        config = MLPConfig() if config is None else config
        if not isinstance(config, MLPConfig):
            raise TypeError(
                "config must be an MLPConfig, for example MLPConfig(layers=2, hidden=256), got "
                f"{shown(config)}"
            )
        self.space, self.config = space, config
        self.prompts = None if prompts is None else check_prompts(prompts)
        flag("logits_are_values", logits_are_values)
        self.logits_are_values = logits_are_values
        inputs = (space.max_length - 1) * space.vocab_size
        _check_sizes(config, inputs + space.max_length + num_prompts(self), space.vocab_size)
        # About max_length + 1 rows are added up, to numbers of size 1.
        scale = (space.max_length + 1) ** -0.5
        self.token = nn.Parameter(scale * torch.randn(inputs, config.hidden))
        self.place = nn.Parameter(scale * torch.randn(space.max_length, config.hidden))
        self.prompt = nn.Parameter(scale * torch.randn(num_prompts(self), config.hidden))
        widths = [config.hidden] * config.layers + [space.vocab_size]
        rest = chain.from_iterable((nn.ReLU(), nn.Linear(a, b)) for a, b in pairwise(widths))
        self.rest = nn.Sequential(*rest)
        flag("value_head", value_head, unset=True)
        wanted = logits_are_values if value_head is None else value_head
        self.value_head = ValueHead(space, config.hidden, num_prompts(self)) if wanted else None

    @property
    def crops(self) -> bool:
        """Whether a batch is read up to its longest response alone: a GPU would be waited for."""
        return self.token.device.type == "cpu"

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """Logits before every token, or q; row t has read ``tokens[:, :t]``."""
        tokens = self.space.check_tokens(tokens, fewer=True)
        width = tokens.shape[1]
        # The table of each place stands behind that of the place before.
        offsets = self.space.vocab_size * torch.arange(width - 1, device=tokens.device)
        read = F.embedding(tokens[:, :-1] + offsets, self.token).cumsum(1)
        rows = prompt_rows(self, len(tokens), prompt_ids)
        first = self.prompt[rows][:, None] + self.place[:width]
        features: Tensor = self.rest[:-1](first + F.pad(read, (0, 0, 1, 0)))
        out: Tensor = self.rest[-1](features)
        if self.value_head is None:
            return out
        return self.value_head.of_sequences(out, features, tokens, rows)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> Read:
        """Rows that have read nothing."""
        return Read(self.prompt[prompt_rows(self, len(prompt_ids), prompt_ids)])

    def step(self, state: Read, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """Logits of the next position, after reading one token of each row (None: nothing yet).

        Of q log pi alone, which is what one draws by.
        """
        if tokens is not None:
            row = tokens.long() + self.space.vocab_size * state.length
            state.total = state.total + F.embedding(row, self.token)
            state.length += 1
        out: Tensor = self.rest(state.total + self.place[state.length])
        return out

    @property
    def tree_bytes_per_node(self) -> int:
        """About what one node of a tree takes while it is evaluated without gradients."""
        return 4 * (4 * self.config.hidden + 2 * self.space.vocab_size)

    def tree_logits(
        self, tree: PrefixTree, prompt_ids: Int64[Tensor, "P"]
    ) -> Float[Tensor, "P N A"]:
        """q at every node of a tree, for each of the prompts."""
        read = self.place[tree.depth]
        for level in range(1, tree.ancestors.shape[1]):
            row = tree.tokens[tree.ancestors[:, level]] + self.space.vocab_size * (level - 1)
            # Past its own depth an ancestor is the node itself, which has been read.
            row = torch.where(tree.depth >= level, row, 0)
            there = (tree.depth >= level)[:, None]
            read = read + F.embedding(row, self.token) * there
        rows = prompt_rows(self, len(prompt_ids), prompt_ids)
        first = self.prompt[rows]
        features: Tensor = self.rest[:-1](first[:, None] + read)
        out: Tensor = self.rest[-1](features)
        if self.value_head is None:
            return out
        return self.value_head.of_tree(out, features, tree, rows)


def _check_sizes(config: MLPConfig, inputs: int, outputs: int) -> None:
    """Raise ValueError where the weights do not fit into memory, before they are made."""
    h = config.hidden
    count = inputs * h + (config.layers - 1) * (h * h + h) + h * outputs + outputs
    check_fits(
        4 * count,
        f"an MLP of {count_text(count)} parameters (layers={config.layers}, hidden={h}, "
        f"{inputs:,} inputs)",
        "make it smaller, or use a Transformer",
    )
