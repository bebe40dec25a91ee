"""Hidden Markov policies fitted to responses by expectation-maximisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rl_ebm.automata import hidden, log_matmul
from rl_ebm.messages.arguments import check_generator, finite, flag, whole
from rl_ebm.messages.words import bytes_text, count_text
from rl_ebm.policies.automaton import AutomatonPolicy
from rl_ebm.tokens import Batch, TokenSpace, check_space, length_mask
from rl_ebm.tokens.batches import check_batch

MAX_ITERATIONS = 100_000
"""of EM, which converges long before"""
MAX_SMOOTHING = 1e100
"""far beyond any count, far below where its sums overflow"""
MAX_BYTES = 2**31
"""that fitting may take"""
Parameters = tuple[Tensor, Tensor, Tensor]
"""log of initial (H,), transition (H, H) and emission (H, A) probabilities"""


def fit_hmm(
    space: TokenSpace,
    responses: Batch,
    num_states: int,
    iterations: int = 50,
    smoothing: float | int = 0.01,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> tuple[AutomatonPolicy, list[float]]:
    """Baum-Welch: EM on the likelihood of responses, from a random start.

    Args:
        responses: what to fit, prompts are not read.
        num_states: H, hidden states.
        iterations: rounds of EM.
        smoothing: added to every expected count; 0 for the plain maximum of the likelihood.
        generator: of the start, on the CPU; None for the global one.
        progress: show a bar; None: where standard error is a terminal.

    Returns:
        The policy, and the mean log-likelihood of a response before every round and at the end,
        nats: it never falls (with smoothing, the posterior's density does not).

    Raises:
        ValueError: a number out of range, or no responses.
    """
    num_states = whole("num_states", num_states, 1)
    iterations = whole("iterations", iterations, 1, MAX_ITERATIONS)
    smoothing = finite("smoothing", smoothing, 0.0, MAX_SMOOTHING)
    check_space(space)
    check_batch(responses, space, "responses")
    check_generator(generator, torch.device("cpu"))
    flag("progress", progress, unset=True)
    _check_memory(space, len(responses), num_states)
    if len(responses) == 0:
        raise ValueError("there are no responses to fit")
    space.check(responses.tokens, responses.lengths)
    batch = responses.to("cpu").clean()
    shapes = ((num_states,), (num_states, num_states), (num_states, space.vocab_size))
    initial, transition, emission = (
        torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
        for shape in shapes
    )
    law: Parameters = (initial, transition, emission)
    likelihood = []
    hide = None if progress is None else not progress
    for _ in tqdm(range(iterations), desc="EM", disable=hide):
        counts, log_likelihood = expected_counts(law, batch)
        likelihood.append(log_likelihood)
        initial, transition, emission = (_normalised(x + smoothing) for x in counts)
        law = (initial, transition, emission)
    likelihood.append(expected_counts(law, batch)[1])
    return AutomatonPolicy(space, hidden(*law)), likelihood


def _check_memory(space: TokenSpace, n: int, h: int) -> None:
    """Raise ValueError where the tables of a round of EM would be too large."""
    numbers = 4 * n * space.max_length * h + 4 * h * (h + space.vocab_size)
    if 8 * numbers > MAX_BYTES:
        raise ValueError(
            f"{count_text(h)} hidden states and {n:,} responses of {space.max_length:,} tokens at "
            f"most need {bytes_text(8 * numbers)} to be fitted, {bytes_text(MAX_BYTES)} are "
            "allowed: use fewer states or responses"
        )


def expected_counts(law: Parameters, batch: Batch) -> tuple[Parameters, float]:
    """Expected uses of every initial state, transition and emission, and the mean log-likelihood.

    Forward and backward in log space; no transition follows the last token.
    """
    initial, transition, emission = law
    tokens, lengths = batch.tokens, batch.lengths
    n, t_max = tokens.shape
    h = len(initial)
    real = length_mask(lengths, t_max)
    spoken = emission[:, tokens].permute(1, 2, 0)  # (n, T, H)
    forward = torch.empty(n, t_max, h, dtype=torch.float64)
    forward[:, 0] = initial + spoken[:, 0]
    for t in range(1, t_max):
        forward[:, t] = log_matmul(forward[:, t - 1], transition) + spoken[:, t]
    backward = torch.zeros(n, t_max, h, dtype=torch.float64)
    for t in reversed(range(t_max - 1)):
        going_on = real[:, t + 1, None]
        step = log_matmul(spoken[:, t + 1] + backward[:, t + 1], transition.T)
        backward[:, t] = torch.where(going_on, step, 0.0)
    rows = torch.arange(n)
    total = torch.logsumexp(forward[rows, lengths - 1], 1)
    gamma = (forward + backward - total[:, None, None]).exp() * real[..., None]
    first = gamma[:, 0].sum(0)
    spoke = torch.zeros_like(emission).index_add_(1, tokens[real], gamma[real].T.contiguous())
    moved = torch.zeros_like(transition)
    for t in range(t_max - 1):
        here = real[:, t + 1]
        if not bool(here.any()):
            break
        left = forward[here, t] - total[here, None]
        right = spoken[here, t + 1] + backward[here, t + 1]
        moved += (log_matmul(left.T, right) + transition).exp()
    return (first, moved, spoke), float(total.mean())


def _normalised(counts: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """log of the shares; of a state that was never used, uniform ones."""
    total = counts.sum(-1, keepdim=True)
    share = torch.where(total > 0, counts / total.clamp(min=1e-300), 1.0 / counts.shape[-1])
    return share.log()
