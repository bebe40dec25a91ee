r"""Verify a policy against an exact solution: every prefix, exactly.

The policy's tree is walked by blocks (:mod:`rl_ebm.policies.walk`), and each block adds its share
of every figure by the chain rule. Nothing is sampled, and nothing of the size of the tree is
kept. What the figures mean stands in :mod:`rl_ebm.verification.figures`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm import bounds
from rl_ebm.ebm import EBM
from rl_ebm.exact import Solution, is_solution, lists
from rl_ebm.messages.arguments import flag, whole
from rl_ebm.policies.base import Policy, evaluating, is_policy, logits_are_values
from rl_ebm.policies.outputs import check_kind
from rl_ebm.policies.walk import DEFAULT_MEMORY, prompts_at_once, walk, walk_prompts
from rl_ebm.soft_bellman import log_policy
from rl_ebm.statistics.interval import check_confidence
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.every_prefix import Accumulator
from rl_ebm.verification.figures import SUMS
from rl_ebm.verification.report import Report, combine, reports
from rl_ebm.verification.sampled_report import AnyReport

KEPT = 100
"""prompts up to which a report keeps the figures of each unasked"""


@torch.no_grad()
def verify(
    policy: Policy,
    solution: Solution,
    memory: int = DEFAULT_MEMORY,
    samples: int | None = None,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    per_prompt: bool | None = None,
) -> AnyReport:
    """Compare any policy with the exact one: at every prefix, or along samples of both.

    Args:
        policy: anything with ``logits``.
        solution: of :func:`rl_ebm.solve`.
        memory: about how many bytes one evaluation of the policy may take.
        samples: responses of target and policy each, for :func:`verify_sampled`; None for every
            prefix where :func:`rl_ebm.exact.lists` says so, else for 1,000.
        confidence: of the intervals around what is sampled.
        generator: for the samples; None for the global one.
        per_prompt: whether the report keeps the figures of each prompt; None for up to
            :data:`KEPT` prompts.

    Returns:
        The report. With several prompts its figures are maxima for ``*_linf``, ``*_span`` and
        ``*_max``, means for the rest, and ``per_prompt`` has each prompt's own.

    Raises:
        TypeError: no policy, or no solution.
        ValueError: a policy for other prompts, one whose logits are NaN or +inf, or one whose
            probabilities cannot be known: rows that have read later tokens, or depend on chance
            (:mod:`rl_ebm.policies.checks`).
    """
    check_kind(policy)
    check_solution(solution)
    memory = min(whole("memory", memory, 1), 2**62)
    flag("per_prompt", per_prompt, unset=True)
    check_confidence(confidence)
    if samples is None and lists(solution):
        return verify_listed(policy, solution, memory, per_prompt)
    samples = 1000 if samples is None else whole("samples", samples)
    report = verify_sampled(policy, solution, samples, confidence, generator, memory)
    keep = len(report.per_prompt) <= KEPT if per_prompt is None else per_prompt
    return report if keep else replace(report, per_prompt=[])


def check_solution(
    solution: object,
    hint: str = "verify(policy, rl_ebm.solve(ebm))",
    unsolved: str = "; or, where it cannot be solved, rl_ebm.certify(policy, ebm)",
) -> None:
    """Raise TypeError unless something is an exact solution.

    Args:
        hint: what to do instead, for the sentence, and
        unsolved: what of an EBM that is too large.
    """
    if is_solution(solution):
        return
    what = f"a {type(solution).__name__}"
    if isinstance(solution, EBM):
        what, hint = "the EBM itself", hint + unsolved
    elif is_policy(solution):
        what = f"another policy ({type(solution).__name__})"
    raise TypeError(f"solution must be what rl_ebm.solve(ebm) gives, got {what}: {hint}")


@torch.no_grad()
def verify_listed(
    policy: Policy,
    solution: Solution,
    memory: int = DEFAULT_MEMORY,
    per_prompt: bool | None = None,
) -> Report:
    """Compare any policy with the exact one, prefix by prefix; see :func:`verify`."""
    check_kind(policy)
    check_solution(solution)
    values = logits_are_values(policy)
    count = solution.ebm.num_prompts
    keep = count <= KEPT if per_prompt is None else per_prompt
    prompts = torch.arange(count)
    found: list[Report] = []
    with evaluating(policy):
        solution.ebm.check_policy(policy)
        for part in prompts.split(prompts_at_once(policy, solution.space, memory)):
            tree = Accumulator(solution, part, values, SUMS, worst_of_each=keep)
            for block in walk_prompts(policy, solution.space, part, memory):
                tree.add(block)
            found += reports(tree)
    if count == 1:
        return found[0]
    combined = combine(found)
    return combined if keep else replace(combined, per_prompt=[])


class State(NamedTuple):
    """Logits of the states of one depth, centred over the allowed actions; 0 at the others."""

    q: Float[Tensor, "n A"]
    q_star: Float[Tensor, "n A"]
    allowed: Bool[Tensor, "n A"]
    """p*(s) > 0 and q*(s, a) finite"""
    linf: Float[Tensor, "n"]
    """max |q* - q| over the allowed actions"""
    log_edge: Float[Tensor, "n A"]
    """log p* of the prefix with the action"""


@torch.no_grad()
def logit_errors(policy: Policy, solution: Solution, prompt: int = 0) -> list[State]:
    """Exact and learned logits of every state of a prompt, by depth: for pictures.

    It keeps the whole tree: meant for small ones.
    """
    space = solution.space
    depths: list[list[State]] = [[] for _ in range(space.max_length)]
    log_s_star = torch.zeros(1, dtype=torch.float64, device=solution.device)
    marginals = []
    for t in range(space.max_length):
        marginals.append(log_s_star)
        q_star = solution.reduced_q_rows(t, slice(0, space.num_prefixes(t)), prompt)
        log_s_star = space.gather_children(log_s_star[:, None] + log_policy(q_star))
    with evaluating(policy):
        for t, start, stop, logits in walk(policy, space, prompt):
            q_star = solution.reduced_q_rows(t, slice(start, stop), prompt)
            log_s = marginals[t][start:stop, None]
            q_star = q_star.masked_fill(torch.isneginf(log_s), -torch.inf)
            allowed = torch.isfinite(q_star)
            q = bounds.centre(logits.to(q_star.device).masked_fill(~allowed, 0.0), q_star)
            exact = bounds.centre(q_star.masked_fill(~allowed, 0.0), q_star)
            linf = (exact - q).abs().amax(-1)
            log_edge = log_s + log_policy(q_star)
            depths[t].append(State(q, exact, allowed, linf, log_edge))
    return [State(*(torch.cat(parts) for parts in zip(*d, strict=True))) for d in depths]
