"""The problems that a solved EBM poses to an objective: one for each prompt."""

from __future__ import annotations

from rl_ebm.exact.base import Solution, lists
from rl_ebm.exact.dispatch import TooLargeError
from rl_ebm.fixed_points import Problem
from rl_ebm.messages.words import count_text
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.verification.verify import check_solution


def problems(solution: Solution) -> list[Problem]:
    """The problem of every prompt of a solved EBM.

    Raises:
        TypeError: no exact solution.
        TooLargeError: an automaton's EBM with more prefixes than are listed.
        ValueError: a response that the reference allows has reward -inf: no objective but those
            that are the EBM itself has a gradient there.
    """
    check_solution(solution, "pass rl_ebm.solve(ebm)", unsolved="")
    ebm, space = solution.ebm, solution.space
    if not lists(solution):
        raise TooLargeError(
            f"{count_text(space.num_sequences)} sequences are too many to list, and what an "
            "objective converges to is found from all of them: make vocab_size or max_length "
            "smaller"
        )
    if solution.forbids_responses:
        raise ValueError(
            "some responses have reward -inf, where penalised objectives have no finite gradient: "
            "give a table whose scores are finite (forbid tokens by the reference instead)"
        )
    found = []
    for p in range(ebm.num_prompts):
        log_ref, g = [], []
        for t in range(space.max_length):
            rows = slice(0, space.num_prefixes(t))
            log_ref.append(solution.log_ref_rows(t, rows, p))
            g.append(solution.reward_rows(t, rows, p) / ebm.beta)
        q = [
            solution.reduced_q_rows(t, slice(0, space.num_prefixes(t)), p)
            for t in range(space.max_length)
        ]
        log_target = sequence_log_probs([log_policy(x) for x in q], space)
        found.append(Problem(space, log_ref, g, log_target, ebm.beta))
    return found
