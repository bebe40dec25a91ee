"""What torchgfn needs to know of an EBM: its environment, and networks behind its estimators.

Imported only where torchgfn is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.preprocessors import Preprocessor
from gfn.states import DiscreteStates
from torch import Tensor, nn

from benchmarks.peers.policies import one_hot
from rl_ebm import EBM
from rl_ebm.policies import Transformer
from rl_ebm.tokens import TokenSpace


class Sequences(DiscreteEnv):
    """An EBM over responses of fixed length: append a token T times, then exit.

    A state is the prefix with -1 behind it; action A is the exit. It is a tree: each state has
    one parent, so no backward policy is needed.
    """

    def __init__(self, ebm: EBM) -> None:
        self.ebm = ebm
        length = ebm.space.max_length
        super().__init__(
            n_actions=ebm.space.vocab_size + 1,
            s0=torch.full((length,), -1, dtype=torch.int64),
            state_shape=(length,),
        )

    def make_states_class(self) -> type[DiscreteStates]:
        class Prefixes(super().make_states_class()):  # type: ignore[misc]
            def _compute_forward_masks(self) -> Tensor:
                whole = self.tensor[..., -1:] >= 0
                return torch.cat(
                    [(~whole).expand(*whole.shape[:-1], self.n_actions - 1), whole], -1
                )

        return Prefixes

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        depth = (states.tensor >= 0).sum(-1, keepdim=True)
        return self.States(states.tensor.scatter(-1, depth, actions.tensor))

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        depth = (states.tensor >= 0).sum(-1, keepdim=True)
        return self.States(states.tensor.scatter(-1, depth - 1, -1))

    def log_reward(self, states: DiscreteStates) -> Tensor:
        return self.ebm.log_weight(states.tensor).float()


class OneHot(Preprocessor):
    """Its ``KHotPreprocessor`` for prefixes: zeros where there is no token yet."""

    def __init__(self, space: TokenSpace) -> None:
        super().__init__(output_dim=space.max_length * space.vocab_size)
        self.vocab_size = space.vocab_size

    def preprocess(self, states: DiscreteStates) -> Tensor:
        return one_hot(states.tensor, self.vocab_size)


class LastRow(nn.Module):
    """The Transformer of this library on prefixes: the features or logits at the last position.

    Args:
        transformer: the network.
        head: what reads its features; None for its own logits, and a 0 for the exit.
    """

    def __init__(self, transformer: Transformer, head: nn.Module | None = None) -> None:
        super().__init__()
        self.transformer, self.head = transformer, head

    def forward(self, prefixes: Tensor) -> Tensor:
        flat = prefixes.flatten(0, -2)
        # A whole response has no next token: its row is masked, any will do.
        last = (flat >= 0).sum(-1).clamp(max=flat.shape[-1] - 1)
        if self.head is None:
            rows = self.transformer.logits(flat.clamp(min=0))
            rows = nn.functional.pad(rows, (0, 1))
        else:
            head, self.transformer.head = self.transformer.head, self.head
            rows = self.transformer.logits(flat.clamp(min=0))
            self.transformer.head = head
        out = rows[torch.arange(len(flat)), last]
        return out.reshape(*prefixes.shape[:-1], -1)


def steps_read(length: int) -> int:
    """How many tokens its recurrent estimator reads for a response and the exit: it hands the whole
    prefix to a model whose cache has the earlier ones already, so each is read again at each step.
    """
    return 1 + length * (length + 1) // 2


class CarryPolicy:
    """Its ``TransformerDiscreteSequenceModel`` as its recurrent estimator drives it.

    What it has read before token t is: start, y[:1], y[:2], ..., y[:t]. That is one causal pass
    over the responses, each prefix written out, with a row of logits at the end of each.
    """

    def __init__(self, model: nn.Module, space: TokenSpace) -> None:
        self.model, self.vocab_size = model, space.vocab_size
        lengths = torch.arange(1, space.max_length)
        self.places = torch.cat([torch.arange(int(n)) for n in lengths]).long()
        self.ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).long()

    def start(self, prompt_ids: Tensor) -> list[Any]:
        """Its cache, and the tokens of the prefixes so far."""
        carry = self.model.init_carry(len(prompt_ids), prompt_ids.device)
        return [carry, prompt_ids.new_zeros(len(prompt_ids), 0)]

    @torch.no_grad()
    def step(self, state: list[Any], tokens: Tensor | None) -> Tensor:
        """Of the next token, after the start or one more token of each row."""
        carry, prefix = state
        if tokens is None:
            read = torch.full((len(prefix), 1), self.model.vocab_size)
        else:
            read = prefix = torch.cat([prefix, tokens[:, None]], dim=1)
        rows, carry = self.model(read, carry)
        state[:] = carry, prefix
        return rows[:, -1, : self.vocab_size]

    @torch.no_grad()
    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        start = torch.full_like(tokens[:, :1], self.model.vocab_size)
        read = torch.cat([start, tokens[:, self.places]], dim=1)
        rows, _ = self.model(read, self.model.init_carry(len(tokens), tokens.device))
        return rows[:, self.ends, : self.vocab_size]
