"""What is said of an EBM: figures, and its likeliest responses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """A response with its exact probability and its reward."""

    tokens: list[int]
    probability: float
    score: float


@dataclass(frozen=True)
class Summary:
    """The EBM of one prompt, in nats and reward units.

    None where a figure has no exact value: see :func:`rl_ebm.exact.summarise_automaton`.
    """

    log_z: float
    entropy: float | None
    expected_reward: float | None
    num_sequences: int
    top: list[Response]
