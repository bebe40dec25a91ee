r"""Weighted automata over token sequences, in log space: a deterministic part and a hidden one.

A machine gives the response y = a_0 ... a_{n-1}, EOS included, the log-weight

    log W(y) = sum_t log_weight[k_t, a_t] + final[k_n]
               + log sum_h exp(log_end[h_{n-1}]) prod_t exp(...)

* **deterministic part**: state k_0 = start, k_{t+1} = next[k_t, a_t];
* **hidden part**: h_0 from log_initial, the token a_t with log_emission[h_t, a_t], then h_{t+1}
  with log_transition[h_t, h_{t+1}]; no transition after the last token, but log_end of the state
  that gave it. A machine with one hidden state has all its weights in the deterministic part.

Every product of finite-state energies is of this kind: products of deterministic parts, and of
hidden ones, are again such. K x A numbers and H x (H + A) numbers; no A x S x S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from rl_ebm.automata.logspace import log_matmul


def check_machine(machine: object) -> None:
    """Raise TypeError unless something is a Machine."""
    if not isinstance(machine, Machine):
        raise TypeError(
            f"machine must be an rl_ebm.automata.Machine, got {type(machine).__name__}: the "
            "constructors Automaton.contains, .regex, .weighted, ... make rewards"
        )


@dataclass(frozen=True)
class Machine:
    """A weighted automaton over the A tokens of a vocabulary; see the module's docstring.

    Attributes:
        next: deterministic transitions, (K, A), any integer type.
        log_weight: their log-weights, (K, A) float64.
        final: log-weight of ending in a state, (K,).
        start: first state for each prompt, (P,), or (1,) for the same for all.
        log_initial: of the hidden states, (P, H) or (1, H).
        log_transition: (H, H), from the row's to the column's.
        log_emission: (H, A).
        log_end: log-weight of ending in a hidden state, (H,).
    """

    next: Integer[Tensor, "K A"]
    log_weight: Float[Tensor, "K A"]
    final: Float[Tensor, "K"]
    start: Int64[Tensor, "P1"]
    log_initial: Float[Tensor, "P2 H"]
    log_transition: Float[Tensor, "H H"]
    log_emission: Float[Tensor, "H A"]
    log_end: Float[Tensor, "H"]

    @property
    def num_states(self) -> int:
        """K, of the deterministic part."""
        return self.next.shape[0]

    @property
    def num_hidden(self) -> int:
        """H, of the hidden part; 1 where there is none."""
        return self.log_transition.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.next.shape[1]

    @property
    def num_prompts(self) -> int:
        """For how many prompts it tells its starts apart; 1 where they are the same."""
        return max(self.start.shape[0], self.log_initial.shape[0])

    @property
    def forbids(self) -> bool:
        """Whether some response may have the weight 0; never False where one has.

        None has where no weight of the deterministic part is 0, and the hidden part can go on with
        every token from every state.
        """
        if any(bool(torch.isneginf(x).any()) for x in (self.log_weight, self.final, self.log_end)):
            return True
        before = [~torch.isneginf(x) for x in (self.log_initial, self.log_transition)]
        speaks = ~torch.isneginf(self.log_emission)
        if bool(speaks.all()):
            return any(not bool(x.any(1).all()) for x in before)
        return any(bool((x.float() @ speaks.float() == 0).any()) for x in before)

    @property
    def device(self) -> torch.device:
        return self.log_weight.device

    def to(self, device: torch.device | str) -> Machine:
        return Machine(**{name: x.to(device) for name, x in vars(self).items()})

    def scaled(self, factor: float) -> Machine:
        """All log-weights times a factor, for which the machine must be deterministic."""
        assert self.num_hidden == 1, "a power of a sum over paths has no finite states"
        return replace(
            self,
            log_weight=self.log_weight * factor,
            final=self.final * factor,
        )

    # Reading ----------------------------------------------------------------------------------

    def begin(self, prompt_ids: Int64[Tensor, "B"]) -> Reading:
        """Nothing read yet."""
        prompt_ids = prompt_ids.long()
        row = prompt_ids if self.start.shape[0] > 1 else torch.zeros_like(prompt_ids)
        hidden = prompt_ids if self.log_initial.shape[0] > 1 else torch.zeros_like(prompt_ids)
        return Reading(self.start[row], self.log_initial[hidden])

    def read(self, state: Reading, tokens: Int64[Tensor, "B"]) -> Reading:
        """One more token of each row, with others to follow."""
        tokens = tokens.long()  # uint8 as an index is a mask
        log_alpha = state.log_alpha + self.log_weight[state.k, tokens][:, None]
        k = self.next[state.k, tokens].long()
        if self.num_hidden == 1:
            return Reading(k, log_alpha)
        x = log_alpha + self.log_emission[:, tokens].T
        return Reading(k, log_matmul(x, self.log_transition))

    def log_probs(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"]
    ) -> Float[Tensor, "B T"]:
        """log-weight of each token after those before it, float64; after an impossible one -inf.

        Of a machine whose weights are probabilities: log p(a_t|s_t), without the rows.
        """
        reading = self.begin(prompt_ids)
        out = torch.empty(tokens.shape, dtype=torch.float64, device=tokens.device)
        for t, token in enumerate(tokens.long().unbind(1)):
            before = torch.logsumexp(reading.log_alpha, 1)
            after = torch.logsumexp(reading.log_alpha + self.log_emission[:, token].T, 1)
            after = after + self.log_weight[reading.k, token]
            dead = torch.isneginf(before)
            out[:, t] = (after - before.masked_fill(dead, 0.0)).masked_fill(dead, -torch.inf)
            reading = self.read(reading, token)
        return out

    def total(self, state: Reading, tokens: Int64[Tensor, "B"]) -> Float[Tensor, "B"]:
        """log W of responses that end with one more token."""
        tokens = tokens.long()
        last = self.log_weight[state.k, tokens] + self.final[self.next[state.k, tokens].long()]
        x = state.log_alpha + self.log_emission[:, tokens].T + self.log_end
        return torch.logsumexp(x, 1) + last


@dataclass(frozen=True)
class Reading:
    """Where a machine stands after a prefix.

    Attributes:
        k: deterministic state, (B,).
        log_alpha: log-weight of the prefix and of each hidden state before the next token, (B, H).
    """

    k: Int64[Tensor, "B"]
    log_alpha: Float[Tensor, "B H"]


def deterministic(
    next: Integer[Tensor, "K A"],
    log_weight: Float[Tensor, "K A"],
    final: Float[Tensor, "K"] | None = None,
    start: Int64[Tensor, "P"] | None = None,
) -> Machine:
    """A machine without a hidden part; by default it starts in state 0 and ends at no cost."""
    log_weight = log_weight.double()
    zero = log_weight.new_zeros(1, 1)
    return Machine(
        next=next.to(torch.int32),
        log_weight=log_weight,
        final=log_weight.new_zeros(len(next)) if final is None else final.double(),
        start=torch.zeros(1, dtype=torch.int64, device=next.device) if start is None else start,
        log_initial=zero,
        log_transition=zero,
        log_emission=zero.expand(1, next.shape[1]),
        log_end=zero[0],
    )


def hidden(
    log_initial: Float[Tensor, "*P H"],
    log_transition: Float[Tensor, "H H"],
    log_emission: Float[Tensor, "H A"],
    log_end: Float[Tensor, "H"] | None = None,
) -> Machine:
    """A hidden Markov machine: initial, transition and emission log-weights, normalised or not.

    ``log_end`` of the last state, where it is given.
    """
    log_end = log_transition.new_zeros(len(log_transition)) if log_end is None else log_end
    log_end = log_end.double()
    log_initial = log_initial.double().view(-1, log_initial.shape[-1])
    log_transition, log_emission = log_transition.double(), log_emission.double()
    if log_transition.shape[0] == 1:
        # One hidden state is a deterministic part: its first token has no transition before it.
        assert log_initial.shape[0] == 1
        rows = torch.cat([log_emission + log_initial, log_emission + log_transition])
        next_ = torch.ones(rows.shape, dtype=torch.int32, device=rows.device)
        return deterministic(next_, rows, log_end.repeat(2))
    a = log_emission.shape[1]
    return Machine(
        next=torch.zeros(1, a, dtype=torch.int32, device=log_emission.device),
        log_weight=log_emission.new_zeros(1, a),
        final=log_emission.new_zeros(1),
        start=torch.zeros(1, dtype=torch.int64, device=log_emission.device),
        log_initial=log_initial,
        log_transition=log_transition,
        log_emission=log_emission,
        log_end=log_end,
    )
