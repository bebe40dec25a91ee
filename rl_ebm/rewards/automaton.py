"""Rewards with finite-state structure: solved exactly whatever the vocabulary and the length.

R(y) is what a weighted automaton (:mod:`rl_ebm.automata`) adds up along a response. Sums of
rewards are products of their automata.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import (
    MAX_TABLE,
    Machine,
    chains,
    check_machine,
    counters,
    distances,
    minimise,
    patterns,
    phrases,
    product,
    weighted,
)
from rl_ebm.automata.weights import check_values
from rl_ebm.messages.arguments import shown
from rl_ebm.rewards.base import Prompts
from rl_ebm.rewards.limits import machine_limits
from rl_ebm.tokens import TokenSpace, check_space


class Automaton:
    """A reward that a weighted automaton pays; made by one of the constructors, or by ``a + b``.

    Args:
        space: the responses.
        machine: over the space's vocabulary, its weights in reward units. With a hidden part the
            reward is the log of a sum over hidden paths, and an exact solution needs beta = 1.

    Raises:
        ValueError: a machine for another vocabulary, or with a weight that is NaN or +inf.
    """

    called = False

    def __init__(self, space: TokenSpace, machine: Machine) -> None:
        check_space(space)
        check_machine(machine)
        if machine.vocab_size != space.vocab_size:
            raise ValueError(
                f"the machine reads {machine.vocab_size} tokens, the space has {space.vocab_size}"
            )
        weights = (
            machine.log_weight,
            machine.final,
            machine.log_emission,
            machine.log_transition,
            machine.log_end,
        )
        for x in (*weights, machine.log_initial):
            check_values(x, "a weight of the machine")
        self.space, self.machine = space, minimise(machine)
        self.forbids = self.machine.forbids

    # Constructors -----------------------------------------------------------------------------

    @classmethod
    def contains(
        cls,
        space: TokenSpace,
        phrase: Sequence[int] | str,
        score: float | int = 1.0,
        alphabet: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> Automaton:
        """``score``, once, where the phrase occurs in the response.

        Args:
            phrase: token ids; or text, with an alphabet or a tokenizer as for :meth:`regex`: it
                occurs in the text that the tokens make together, however they split it.

        Raises:
            ValueError: an empty phrase, an id out of range, EOS before its end, a phrase that no
                response can hold, or a score that is NaN or +inf.
        """
        if isinstance(phrase, str):
            return cls._of_text(space, phrase, score, alphabet, tokenizer)
        _check_ids_alone(alphabet, tokenizer)
        return cls(space, phrases.contains(space, phrase, score))

    @classmethod
    def avoids(
        cls,
        space: TokenSpace,
        phrase: Sequence[int] | str,
        alphabet: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> Automaton:
        """``-inf`` where the phrase occurs in the response, else 0. Raises as contains."""
        return cls.contains(space, phrase, -torch.inf, alphabet, tokenizer)

    @classmethod
    def counts(
        cls, space: TokenSpace, phrase: Sequence[int], score: float | int = 1.0
    ) -> Automaton:
        """``score`` for each occurrence of the phrase, overlapping ones too. Raises as contains."""
        return cls(space, phrases.counts(space, phrase, score))

    @classmethod
    def _of_text(
        cls,
        space: TokenSpace,
        text: str,
        score: float | int,
        alphabet: Sequence[str] | None,
        tokenizer: Any,
    ) -> Automaton:
        """Pays where a text occurs."""
        if alphabet is None and tokenizer is None:
            raise ValueError(
                f"the phrase {shown(text)} is text: give alphabet= or tokenizer=, or token ids"
            )
        if not text:
            raise ValueError("the phrase is empty: give at least one character")
        return cls.regex(space, patterns.containing(text), score, alphabet, tokenizer)

    @classmethod
    def regex(
        cls,
        space: TokenSpace,
        pattern: str,
        score: float | int = 1.0,
        alphabet: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> Automaton:
        """``score`` where the whole response, without its EOS, matches a regular expression.

        The syntax is that of :mod:`re`, without look-around, back-references and flags.

        Args:
            pattern: over the text that the tokens make together; without an alphabet over token
                ids: each digit is one where there are ten tokens at most, else each number is
                one, and white space is left out.
            alphabet: the text of every token, (A,), or of every token but EOS.
            tokenizer: of transformers or tokenizers, instead: the text is what its ``decode``
                makes of the response, without special tokens.

        Raises:
            ValueError: a pattern that cannot be used, with the position of the fault, or that no
                response can match.
        """
        return cls(space, patterns.regex(space, pattern, score, alphabet, tokenizer))

    @classmethod
    def ngram(cls, space: TokenSpace, log_weights: Float[Tensor, "..."]) -> Automaton:
        """The sum of ``log_weights[y_t, ..., y_{t+n-1}]`` over all n tokens in a row, EOS included.

        Args:
            log_weights: (A,) * n in reward units, ``-inf`` legal.
        """
        return cls(space, chains.ngram(space, log_weights))

    @classmethod
    def chain(
        cls,
        space: TokenSpace,
        fields: Float[Tensor, "T A"],
        couplings: Float[Tensor, "T1 A A"] | None = None,
    ) -> Automaton:
        """Weights of every position, and of every two neighbours: a Potts chain.

        Args:
            fields: ``fields[t, a]`` is paid for token a at position t.
            couplings: ``couplings[t, a, b]`` for a at t and b at t + 1, (T - 1, A, A).
        """
        return cls(space, chains.chain(space, fields, couplings))

    @classmethod
    def hmm(
        cls,
        space: TokenSpace,
        log_initial: Float[Tensor, "H"],
        log_transition: Float[Tensor, "H H"],
        log_emission: Float[Tensor, "H A"],
    ) -> Automaton:
        """log sum_z initial[z_0] prod_t emission[z_t, y_t] prod_t transition[z_t, z_{t+1}].

        Over the hidden paths z; weights, normalised or not. Solved exactly at
        beta = 1: no other power of a sum over paths has finitely many states.
        """
        return cls(space, chains.hmm(space, log_initial, log_transition, log_emission))

    @classmethod
    def weighted(
        cls,
        space: TokenSpace,
        log_initial: Float[Tensor, "S"],
        log_weight: Float[Tensor, "A S1 S2"],
        log_end: Float[Tensor, "S3"] | None = None,
    ) -> Automaton:
        """log of initial^T M[y_0] ... M[y_{n-1}] end: any weighted automaton, by its matrices.

        Only transitions of finite weight are kept: where each token leads from a state to one
        other at most, a deterministic machine; else each pair of states that some token joins is a
        hidden state, and an exact solution needs beta = 1, as for :meth:`hmm`.

        Args:
            log_weight: (A, S, S); entry (a, i, j) is paid for token a from state i to state j,
                ``-inf`` where it does not lead there.
            log_end: of the last state; None for 0.

        Raises:
            ValueError: tables of other shapes, or too many pairs of states.
        """
        return cls(space, weighted(space, log_initial, log_weight, log_end))

    @classmethod
    def modular(
        cls,
        space: TokenSpace,
        scores: Float[Tensor, "m"] | Sequence[float],
        values: Int64[Tensor, "A"] | Sequence[int] | None = None,
    ) -> Automaton:
        """``scores[s]`` where the values of all tokens but EOS sum to s modulo ``len(scores)``.

        Two scores are parity. By default a token's value is its id.
        """
        return cls(space, counters.modular(space, scores, values))

    @classmethod
    def brackets(
        cls, space: TokenSpace, opening: int, closing: int, depth: int, score: float | int = 1.0
    ) -> Automaton:
        """``score`` where brackets are balanced and at most ``depth`` deep; others are free."""
        return cls(space, counters.brackets(space, opening, closing, depth, score))

    @classmethod
    def hamming(
        cls, space: TokenSpace, word: Sequence[int], score: float | int = -1.0
    ) -> Automaton:
        """``score`` times the positions at which the response and the word differ.

        The response is taken without its EOS; where one is longer, each further token differs.
        """
        return cls(space, distances.hamming(space, word, score))

    @classmethod
    def edit_distance(
        cls, space: TokenSpace, word: Sequence[int], score: float | int = -1.0
    ) -> Automaton:
        """``score`` times the Levenshtein distance of the response, without its EOS, to a word."""
        return cls(space, distances.edit_distance(space, word, score))

    # As a reward ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def __add__(self, other: Automaton) -> Automaton:
        """The sum of two rewards."""
        if not isinstance(other, Automaton):
            return NotImplemented
        if other.space != self.space:
            raise ValueError(f"one reward is for {self.space}, the other for {other.space}")
        both = product(self.machine, other.machine, MAX_TABLE)
        return Automaton(self.space, both.machine)

    def __radd__(self, other: int) -> Automaton:
        """0 + reward, so that ``sum`` works."""
        return self if other == 0 else NotImplemented

    def limits(self, space: TokenSpace, prompt: int = 0) -> tuple[float, float]:
        """(least, largest) R; infinite with a hidden part, or with many states."""
        return machine_limits(self.machine, space, prompt)

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Automaton:
        if space != self.space:
            raise ValueError(f"the reward was made for {self.space}, the EBM is over {space}")
        count = self.machine.num_prompts
        if count not in (1, len(prompts or [[]])):
            raise ValueError(
                f"the reward tells {count} prompts apart, there are {len(prompts or [[]])}"
            )
        return self

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B"]:
        machine = self.machine
        state, lengths = machine.begin(prompt_ids), lengths.long()
        out = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        width = tokens.shape[1]
        if len(tokens) and tokens.device.type == "cpu":  # elsewhere to look would wait
            width = int(lengths.max())
        for t in range(width):
            out = torch.where(lengths == t + 1, machine.total(state, tokens[:, t]), out)
            state = machine.read(state, tokens[:, t])
        return out

    def to(self, device: torch.device | str) -> Automaton:
        moved = Automaton.__new__(Automaton)
        moved.space, moved.forbids = self.space, self.forbids
        moved.machine = self.machine.to(device)
        return moved


def _check_ids_alone(alphabet: object, tokenizer: object) -> None:
    if alphabet is not None or tokenizer is not None:
        raise ValueError("token ids need no alphabet and no tokenizer: they are for text")


def total(rewards: Sequence[Automaton]) -> Automaton:
    """The sum of several rewards.

    Raises:
        ValueError: none is given.
    """
    if not rewards:
        raise ValueError("a sum of rewards needs at least one")
    return reduce(lambda a, b: a + b, rewards)
