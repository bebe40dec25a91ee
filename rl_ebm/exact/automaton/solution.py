"""The exact solution of an EBM whose reward and reference are automata, whatever A and T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import Machine, Reading
from rl_ebm.ebm import EBM
from rl_ebm.exact.automaton.sampling import sample_paths
from rl_ebm.exact.automaton.summary import summarise_automaton
from rl_ebm.exact.automaton.values import Values, find_values, q_rows
from rl_ebm.exact.base import Rows
from rl_ebm.exact.figures import Summary
from rl_ebm.messages.arguments import check_generator
from rl_ebm.policies.base import resolve_prompt_ids
from rl_ebm.policies.decoding import check_draws
from rl_ebm.rewards.base import machine_of
from rl_ebm.tokens import Batch, length_mask


@dataclass
class _Decoding:
    state: Prefixes
    t: int = 0


@dataclass(frozen=True)
class Prefixes:
    """What the machines know of some prefixes.

    Attributes:
        whole: of reference and reward together; its log-weights begin with those of the prefix.
        reference: of the reference alone; None for the counting measure.
        reward: of R alone, in reward units.
    """

    whole: Reading
    reference: Reading | None
    reward: Reading

    @property
    def log_ref(self) -> Float[Tensor, "B 1"]:
        """log p_ref of the prefix."""
        if self.reference is None:
            return self.whole.log_alpha.new_zeros(len(self.whole.k), 1)
        return torch.logsumexp(self.reference.log_alpha, 1, keepdim=True)


class AutomatonSolution:
    r"""q* from forward vectors of the prefix and backward vectors of what may follow:
    V(s) = log(alpha_s . B_t) - log p_ref(s), O(T S^2) after one pass over the weights.

    Attributes:
        ebm: what was solved.
        log_z: log Z(x) of every prompt, (P,), float64, nats.
        mode: ``"exact-automaton"``.
        values: backward vectors.
    """

    mode = "exact-automaton"
    lists_all = False
    logits_are_values = True

    def __init__(self, ebm: EBM, reference: Machine | None, reward: Machine) -> None:
        self.ebm, self.space, self.prompts = ebm, ebm.space, ebm.prompts
        self.reference, self.reward = reference, reward
        # R itself, in its own units: sums of them are often exact, those of R / beta are not.
        payment = machine_of(ebm.reward_model)
        assert payment is not None, "solve hands over what has a machine"
        self.payment = payment
        self.values: Values = find_values(reference, reward, ebm.space)
        self.log_z = self.values.log_z.expand(ebm.num_prompts)

    @property
    def device(self) -> torch.device:
        return self.log_z.device

    @property
    def forbids(self) -> bool:
        """Whether some action has q* = -inf where the space allows it, or may have."""
        return self.forbids_responses or self.values.machine.forbids

    @property
    def forbids_responses(self) -> bool:
        """Whether some response may have reward ``-inf``."""
        return self.ebm.reward_model.forbids

    def summary(self, top: int = 10, prompt: int = 0) -> Summary:
        """Figures of a prompt from forward and backward vectors."""
        return summarise_automaton(self, top, prompt)

    # Reading prefixes -------------------------------------------------------------------------

    def begin(self, prompt_ids: Int64[Tensor, "B"]) -> Prefixes:
        """Nothing read yet."""
        reference = None if self.reference is None else self.reference.begin(prompt_ids)
        whole = self.values.machine.begin(prompt_ids)
        return Prefixes(whole, reference, self.payment.begin(prompt_ids))

    def read(self, state: Prefixes, tokens: Int64[Tensor, "B"]) -> Prefixes:
        """One more token of each row."""
        reference = state.reference
        if self.reference is not None and reference is not None:
            reference = self.reference.read(reference, tokens)
        whole = self.values.machine.read(state.whole, tokens)
        return Prefixes(whole, reference, self.payment.read(state.reward, tokens))

    def q(self, state: Prefixes, t: int | Int64[Tensor, "B"]) -> Float[Tensor, "B A"]:
        """q* after some prefixes of t tokens, float64."""
        position = torch.zeros_like(state.whole.k) + t
        q = q_rows(self.values, self.space, position, state.whole.k, state.whole.log_alpha)
        log_ref = state.log_ref
        # After an impossible prefix q is -inf already.
        return q.sub_(log_ref.masked_fill(torch.isneginf(log_ref), 0.0))

    # As a policy ------------------------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """Exact q* before every token, float64; ``-inf`` where forbidden.

        Raises:
            TypeError: tokens that are no tensor of integers.
            ValueError: tokens of another shape or out of range, or prompt ids that are.
        """
        tokens = self.space.check_tokens(tokens)
        found = self.prefixes(tokens, self._prompt_ids(tokens, prompt_ids))
        b, t_max = tokens.shape
        t = torch.arange(t_max, device=tokens.device).expand(b, -1)
        return self.q(found, t.flatten()).view(b, t_max, -1)

    def prefixes(self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"]) -> Prefixes:
        """All prefixes of some sequences, those of one sequence together, shorter first."""
        state, found = self.begin(prompt_ids), []
        for t in range(self.space.max_length):
            state = self.read(state, tokens[:, t - 1]) if t else state
            found.append(state)
        reference = [x.reference for x in found if x.reference is not None]
        return Prefixes(
            _stack([x.whole for x in found]),
            _stack(reference) if reference else None,
            _stack([x.reward for x in found]),
        )

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        return _Decoding(self.begin(prompt_ids))

    def step(self, state: _Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """q* at the next position, after one more token of each row."""
        if tokens is not None:
            state.state, state.t = self.read(state.state, tokens), state.t + 1
        return self.q(state.state, state.t)

    def log_prob(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"] | None = None,
        prompt_ids: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """Exact log p*(y|x), float64, nats; ``-inf`` at impossible responses.

        Raises:
            ValueError: tokens, lengths or prompt ids that are none of the space's.
        """
        lengths = self.space.check(tokens, lengths)
        prompt_ids = self._prompt_ids(tokens, prompt_ids)
        tokens = tokens.long().masked_fill(~length_mask(lengths, self.space.max_length), 0)
        machine, values = self.values.machine, self.values
        state = machine.begin(prompt_ids)
        out = torch.empty(len(tokens), dtype=torch.float64, device=tokens.device)
        for t in range(self.space.max_length):
            total = machine.total(state, tokens[:, t])
            if self.space.eos_id is not None and t == self.space.max_length - 1:
                total = torch.logsumexp(state.log_alpha + values.end_last[:, state.k].T, 1)
            out = torch.where(lengths == t + 1, total, out)
            state = machine.read(state, tokens[:, t])
        # Both are rounded, and of large numbers the difference can come out above 0.
        return (out - self.log_z[prompt_ids]).clamp(max=0.0)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        prompt_ids: Int64[Tensor, "n"] | None = None,
    ) -> Batch:
        """Exact samples of p*; with several prompts, ``prompt_ids`` says which each answers.

        Raises:
            TypeError: an n that is no integer.
            ValueError: a negative n; prompt ids missing, of another length than n, or out of range.
        """
        n = check_draws(n, self.space, self.device)
        prompt_ids = resolve_prompt_ids(n, prompt_ids, self.ebm.num_prompts, self.device)
        check_generator(generator, self.device)
        return sample_paths(self.values, self.space, prompt_ids, generator)

    def _prompt_ids(self, tokens: Tensor, prompt_ids: Tensor | None) -> Tensor:
        return resolve_prompt_ids(len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device)

    # By rows of a depth, where prefixes can be listed -------------------------------------------

    def q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """q* of some prefixes of one depth, float64; ``prompt`` one for all, or one each."""
        return self.q(self._prefixes(depth, rows, prompt), depth)

    def reduced_q_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """q* itself: an automaton's R has no table that something could be taken off."""
        return self.q_rows(depth, rows, prompt)

    def r_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """r of some prefixes: log p_ref, plus R / beta where an action ends the response."""
        reward = self.reward_rows(depth, rows, prompt)
        return reward / self.ebm.beta + self.log_ref_rows(depth, rows, prompt)

    def log_ref_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """log p_ref of some prefixes; 0 everywhere for the counting measure."""
        state = self._prefixes(depth, rows, prompt)
        log_ref = state.log_ref.expand(-1, self.space.vocab_size)
        if self.reference is not None and state.reference is not None:
            machine, here = self.reference, state.reference
            x = torch.logsumexp(here.log_alpha[..., None] + machine.log_emission, 1)
            dead = torch.isneginf(state.log_ref)
            log_ref = x + machine.log_weight[here.k] - state.log_ref.masked_fill(dead, 0.0)
            log_ref = log_ref.masked_fill(dead, -torch.inf)
            if self.space.eos_id is not None and depth == self.space.max_length - 1:
                log_ref[:, self.space.eos_id] = 0.0
        return log_ref.masked_fill(~self.space.action_mask(log_ref.device)[depth], -torch.inf)

    def reward_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """R of the response that ends with each action at some prefixes; 0 where none ends."""
        state = self._prefixes(depth, rows, prompt).reward
        machine, eos = self.payment, self.space.eos_id
        if eos is None and depth < self.space.max_length - 1:
            return state.log_alpha.new_zeros(len(state.k), self.space.vocab_size)
        last = machine.log_emission + machine.log_end[:, None]
        x = torch.logsumexp(state.log_alpha[..., None] + last, 1)
        reward = x + machine.log_weight[state.k] + machine.final[machine.next[state.k].long()]
        if eos is None:
            return reward
        return torch.zeros_like(reward).index_copy(
            1, torch.tensor([eos], device=reward.device), reward[:, eos, None]
        )

    def _prefixes(self, depth: int, rows: Rows, prompt: int | Tensor) -> Prefixes:
        device = str(self.device)
        if isinstance(rows, slice):
            tokens = self.space.prefixes(depth, rows.start, rows.stop, device)
        else:
            powers = [self.space.branching**i for i in reversed(range(depth))]
            digits = [rows // p % self.space.branching for p in powers]
            tokens = self.space.unrank(torch.stack(digits, 1)) if digits else rows[:, None][:, :0]
        ids = torch.full((len(tokens),), 0, device=device) + prompt
        state = self.begin(ids)
        for column in tokens.unbind(1):
            state = self.read(state, column)
        return state


def _stack(readings: list[Reading]) -> Reading:
    """Those of all positions, (T, B), as (B * T)."""
    k = torch.stack([x.k for x in readings], 1).flatten()
    return Reading(k, torch.stack([x.log_alpha for x in readings], 1).flatten(0, 1))
