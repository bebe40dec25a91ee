"""Policies with automaton structure: n-grams of tokens or of classes, and hidden Markov models.

As references they make an EBM whose reward is an automaton exactly solvable at any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import (
    Columns,
    Machine,
    Reading,
    check_machine,
    deterministic,
    log_matmul,
    row_sums,
)
from rl_ebm.policies.base import resolve_prompt_ids
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts

_TOLERANCE = 1e-6
"""by which the probabilities of a state may miss 1"""


@dataclass
class _Decoding:
    reading: Reading


class AutomatonPolicy:
    """p(a|s) of a machine whose tokens have total probability 1 in every state.

    Args:
        space: the responses.
        machine: log-probabilities; they are checked.
        prompts: those of the EBM, where the machine starts otherwise for each.

    Raises:
        ValueError: another vocabulary, another number of prompts, or probabilities of a state that
            do not sum to 1.
    """

    def __init__(
        self,
        space: TokenSpace,
        machine: Machine,
        prompts: GivenPrompts | None = None,
    ) -> None:
        check_space(space)
        check_machine(machine)
        self.prompts = None if prompts is None else check_prompts(prompts)
        if machine.vocab_size != space.vocab_size:
            raise ValueError(
                f"the machine reads {machine.vocab_size} tokens, the space has {space.vocab_size}"
            )
        count = len(self.prompts or [[]])
        if machine.num_prompts not in (1, count):
            raise ValueError(
                f"the machine tells {machine.num_prompts} prompts apart, there are {count}"
            )
        if bool((machine.final != 0).any() or (machine.log_end != 0).any()):
            raise ValueError("the final weights of a policy must be 0: nothing is paid at the end")
        off = row_sums(machine).abs().max()
        off = torch.maximum(off, torch.logsumexp(machine.log_transition, 1).abs().max())
        off = torch.maximum(off, torch.logsumexp(machine.log_initial, 1).abs().max())
        if not float(off) < _TOLERANCE:
            raise ValueError(
                "the probabilities of a state do not sum to 1 (the log of their sum is "
                f"{float(off):.3g} away from 0): normalise them"
            )
        self.space, self.machine = space, machine
        self.emission = Columns.of(machine.log_emission)

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def forbids(self) -> bool:
        """Whether some token may have probability 0 in some state."""
        return self.machine.forbids

    def to(self, device: torch.device | str) -> AutomatonPolicy:
        moved = AutomatonPolicy.__new__(AutomatonPolicy)
        parts = {"machine": self.machine.to(device), "emission": self.emission.to(device)}
        moved.__dict__.update(self.__dict__, **parts)
        return moved

    def rows(self, reading: Reading) -> Float[Tensor, "B A"]:
        """log p(.|s) after some prefixes, float64; all ``-inf`` after an impossible one."""
        total = torch.logsumexp(reading.log_alpha, 1, keepdim=True)
        dead = torch.isneginf(total)
        if self.machine.num_hidden == 1:
            rows = self.machine.log_weight[reading.k]
        else:
            belief = reading.log_alpha - total.masked_fill(dead, 0.0)
            rows = log_matmul(belief, self.emission)
            rows += self.machine.log_weight[reading.k]
        return rows.masked_fill_(dead, -torch.inf)

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """log p(.|s) before every token, float64."""
        tokens, prompt_ids = self._checked(tokens, prompt_ids)
        state = self.start(prompt_ids)
        shape = (*tokens.shape, self.space.vocab_size)
        out = torch.empty(shape, dtype=torch.float64, device=tokens.device)
        for t in range(self.space.max_length):
            out[:, t] = self.step(state, tokens[:, t - 1] if t else None)
        return out

    def log_probs(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T"]:
        """log p(a_t|s_t) of the tokens alone: what their rows have, without the rows."""
        return self.machine.log_probs(*self._checked(tokens, prompt_ids))

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        return _Decoding(self.machine.begin(prompt_ids))

    def step(self, state: _Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """log p at the next position, after one more token of each row."""
        if tokens is not None:
            state.reading = self.machine.read(state.reading, tokens)
        return self.rows(state.reading)

    def _checked(self, tokens: Tensor, prompt_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = self.space.check_tokens(tokens)
        count = self.machine.num_prompts
        # A machine that starts alike for all prompts reads none.
        known = count if count > 1 or prompt_ids is None else None
        return tokens, resolve_prompt_ids(len(tokens), prompt_ids, known, tokens.device)


def uniform_machine(space: TokenSpace) -> Machine:
    """Every token alike: what the uniform policy is before the last position."""
    row = torch.full((1, space.vocab_size), 1.0 / space.vocab_size, dtype=torch.float64).log()
    return deterministic(torch.zeros(row.shape, dtype=torch.int32), row)
