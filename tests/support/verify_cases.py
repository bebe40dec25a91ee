"""EBMs with their truth, and the verifier's report by its definitions: loops over everything."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import pytest
import torch
from brute_force import (
    INF,
    SPACES,
    EnumeratedEBM,
    entropy,
    js,
    kl,
    log_softmax,
    log_sum_exp,
    prefixes,
    tv,
)
from toy_policies import (
    PROMPTS,
    Plain,
    close,
    everything,
    logits_by_prefix,
    responses,
    scores_of,
    seeded,
    transformer,
)

import rl_ebm
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tokens import TokenSpace
from rl_ebm.verification.figures import FIGURES

ALL_SPACES = [*SPACES, (2, 1, 0), (2, 4, 1)]  # the last two never branch
KINDS = ["plain", "table", "values", "transformer", "uniform", "solution", "near"]
REFERENCES = [None, "uniform", "tabular", "plain", "endless"]

KEYS = {
    *("mode", "num_sequences", "log_z", "kl_target_policy", "kl_policy_target", "tv", "js"),
    *("entropy_target", "entropy_policy", "expected_reward_target", "expected_reward_policy"),
    *("mass_impossible", "logits_linf", "logits_span", "log_ratio_span"),
    *("bellman_residual_max", "bellman_residual_mean", "bounds", "per_depth", "worst_prefixes"),
}
"""promised; what else a report has is in the slow one as well"""


class Case(NamedTuple):
    ebm: rl_ebm.EBM
    truths: list[EnumeratedEBM]
    scores: list[list[float]]


def case(shape, beta=1.0, reference=None, prompted=False, forbid=0.0, seed=0, scale=1.0):
    """An EBM and its truth; the first response is always possible."""
    space, prompts = TokenSpace(*shape), PROMPTS if prompted else None
    num_prompts = 3 if prompted else 1
    scores = scale * scores_of(space, num_prompts, seed=seed)
    drop = torch.rand(scores.shape, generator=seeded(seed + 1)) < forbid
    drop[:, 0] = False
    scores = scores.masked_fill(drop, -INF)
    tables = logit_tables(space, num_prompts, seed + 2, forbid, dead=forbid / 3)
    if reference == "uniform":
        p_ref = Uniform(space)
        tables = [torch.zeros_like(t) for t in tables]
    elif reference == "tabular":
        p_ref = Tabular.from_tables(tables, space, prompts)
    elif reference is not None:  # unmasked logits; "endless": never EOS at the last position
        if reference == "endless" and space.eos_id is not None:
            tables[-1][..., space.eos_id] = -INF
        p_ref = Plain(space, tables)
    else:
        p_ref = tables = None
    ebm = rl_ebm.EBM(space, scores if prompted else scores[0], beta, p_ref, prompts)
    rows = scores.tolist()
    truths = [
        truth(space, rows[i], beta, tables and [t[i] for t in tables]) for i in range(len(rows))
    ]
    return Case(ebm, truths, rows)


def logit_tables(space, num_prompts=1, seed=0, forbid=0.0, dead=0.0, scale=1.5):
    """Random logits; -inf at some actions, and everywhere at some states; never at the first
    action (EOS mode: EOS) of the way to the first response."""
    keep = 0 if space.eos_id is None else space.eos_id
    tables = []
    for t in range(space.max_length):
        shape = (num_prompts, space.num_prefixes(t), space.vocab_size)
        table = scale * torch.randn(shape, generator=seeded(seed + t), dtype=torch.float64)
        drop = torch.rand(shape, generator=seeded(seed + 99 + t)) < forbid
        drop[..., keep] = False
        lost = torch.rand(shape[:2], generator=seeded(seed + 999 + t)) < dead
        lost[:, 0] = False
        tables.append(table.masked_fill(drop | lost[..., None], -INF))
    return tables


def truth(space, scores, beta, ref_logits=None):
    """The EBM of one prompt: r from the scores and the reference's raw logits, and log p_ref."""
    reward = dict(zip(responses(space), scores, strict=True))
    last, r, ref = space.max_length - 1, [], {}
    for t in range(space.max_length):
        rows = []
        for i, s in enumerate(prefixes(space.vocab_size, t, space.eos_id)):
            log_ref = [0.0] * space.vocab_size
            if space.eos_id is not None and t == last:
                log_ref = [0.0 if a == space.eos_id else -INF for a in range(space.vocab_size)]
            elif ref_logits is not None:
                log_ref = log_softmax(ref_logits[t][i].tolist())
            rows.append([x + reward.get((*s, a), 0.0) / beta for a, x in enumerate(log_ref)])
            ref[s] = log_ref
        r.append(torch.tensor(rows, dtype=torch.float64))
    found = EnumeratedEBM(r, space.eos_id)
    found.log_refs = [math.fsum(ref[y[:t]][a] for t, a in enumerate(y)) for y in found.sequences]
    return found


def check_solution(solution, truths, tolerance=1e-10):
    """log Z, q*, V, conditionals and log-probabilities of every prefix and response."""
    space, num_prompts = solution.space, len(truths)
    assert solution.mode == "exact-tree"
    assert solution.logits_are_values
    assert solution.log_z.dtype == torch.float64
    close(solution.log_z, torch.tensor([t.log_z for t in truths], dtype=torch.float64), tolerance)
    tables = solution.tables()
    want = [torch.stack(rows) for rows in zip(*[t.q_tables() for t in truths], strict=True)]
    for got, q, v in zip(tables, want, solution.v, strict=True):
        close(got, q, tolerance)
        close(v.double(), torch.logsumexp(q, -1), tolerance)
    tokens, lengths, ids, pairs = everything(space, num_prompts)
    want = torch.tensor([truths[i].log_probs[n] for i, n in pairs], dtype=torch.float64)
    close(solution.log_prob(tokens, lengths, ids), want, tolerance)
    tokens, lengths, ids, pairs = everything(space, num_prompts, pad=0)
    rows = solution.logits(tokens, ids)
    assert rows.dtype == torch.float64
    for (i, n), logits in zip(pairs, rows.tolist(), strict=True):
        y, t = responses(space)[n], truths[i]
        for depth in range(len(y)):
            log_s = t.prefix_log_prob(y[:depth])
            conditional = [
                t.prefix_log_prob((*y[:depth], a)) - log_s if log_s > -INF else -INF
                for a in range(space.vocab_size)
            ]
            if log_s > -INF:
                assert log_softmax(logits[depth]) == pytest.approx(
                    conditional, tolerance, tolerance
                )
            q = truths[i].q(y[:depth])
            assert [x == -INF for x in logits[depth]] == [x == -INF for x in q]


# The report, the slow way -----------------------------------------------------------------------


def slow_reports(policy, case):
    """One dictionary for each prompt, with the keys of a report."""
    rows = logits_by_prefix(policy, case.ebm.space, len(case.truths))
    values = bool(getattr(policy, "logits_are_values", False))
    return [
        slow_report({s: q for (j, s), q in rows.items() if j == i}, values, *each)
        for i, each in enumerate(zip(case.truths, case.scores, strict=True))
    ]


def slow_report(q, values, truth, scores):
    """By the definitions over whole responses and single states.

    Args:
        q: masked raw logits by prefix.
    """
    log_pi = {s: log_softmax(row) for s, row in q.items()}
    p = truth.log_probs
    pi = [path_sum(log_pi, y) for y in truth.sequences]
    reached = {s: path_sum(log_pi, s) for s in q}
    states = [(s, truth.prefix_log_prob(s)) for depth in truth.states for s in depth]
    visits = {s: log_s for s, log_s in states if log_s > -INF}
    q_star = {s: truth.q(s) for s in visits}
    errors = {s: logit_error(q[s], q_star[s], log_pi[s]) for s in visits}
    largest, mean = residuals(q, q_star, truth.r, visits) if values else (None, None)
    impossible = math.fsum(math.exp(b) for a, b in zip(p, pi, strict=True) if a == -INF)
    return {
        "mode": "exact-tree",
        "num_sequences": len(p),
        "log_z": truth.log_z,
        "log_z_policy": log_sum_exp(q[()]) if values else None,
        "mass_impossible": impossible,
        **distances(p, pi, truth.log_refs),
        "expected_reward_target": truth.expectation(scores),
        "expected_reward_policy": expected(pi, scores),
        "logits_linf": max(e.linf for e in errors.values()),
        "logits_span": max(e.span for e in errors.values()),
        "bellman_residual_max": largest,
        "bellman_residual_mean": mean,
        "bounds": slow_bounds(truth, errors, reached, impossible),
        "per_depth": by_depth(truth, visits, errors),
        "worst_prefixes": worst_prefixes(visits, reached, errors),
    }


class LogitError(NamedTuple):
    """Of one state: logits less q* over the actions that q* allows."""

    delta: list[float]  # less its mean; 0 at other actions
    linf: float
    span: float
    kl: float


def path_sum(log_pi, y):
    """Log-probability of the tokens of y."""
    return sum(log_pi[y[:t]][a] for t, a in enumerate(y))


def logit_error(q, q_star, log_pi):
    delta = {a: q[a] - x for a, x in enumerate(q_star) if x > -INF}
    mean, lost = sum(delta.values()) / len(delta), -INF in delta.values()
    row = [0.0 if a not in delta else INF if lost else delta[a] - mean for a in range(len(q_star))]
    span = INF if lost else max(delta.values()) - min(delta.values())
    return LogitError(row, max(map(abs, row)), span, kl(log_softmax(q_star), log_pi))


def distances(p, pi, ref):
    """What two laws of responses, and that of the reference, say of each other."""
    ratios = [b - a if a > -INF else INF for a, b in zip(p, pi, strict=True) if max(a, b) > -INF]
    return {
        "kl_target_policy": kl(p, pi),
        "kl_policy_target": kl(pi, p),
        "tv": tv(p, pi),
        "js": js(p, pi),
        "hellinger2": 1 - math.fsum(math.exp((a + b) / 2) for a, b in zip(p, pi, strict=True)),
        "entropy_target": entropy(p),
        "entropy_policy": entropy(pi),
        "kl_target_reference": kl(p, ref),
        "kl_policy_reference": kl(pi, ref),
        "log_ratio_span": INF if -INF in ratios or INF in ratios else max(ratios) - min(ratios),
    }


def expected(log_p, scores):
    """-inf where an impossible response has probability."""
    pairs = [(b, x) for b, x in zip(log_p, scores, strict=True) if b > -INF]
    return sum(math.exp(b) * x if x > -INF else -INF for b, x in pairs)


def residuals(q, q_star, r, visits):
    """Soft Bellman residuals, where q* allows the action: the largest, and the mean by visits."""
    worst, means = [], []
    for s, log_s in visits.items():
        sizes = []
        for a in [a for a, x in enumerate(q_star[s]) if x > -INF]:
            v_next = log_sum_exp(q[(*s, a)]) if (*s, a) in q else 0.0
            parts = (q[s][a], r[s][a], v_next)
            sizes.append(INF if -INF in parts else abs(parts[0] - parts[1] - parts[2]))
        worst.append(max(sizes))
        means.append(math.exp(log_s) * (sum(sizes) / len(sizes)))
    weight = math.fsum(map(math.exp, visits.values()))
    return max(worst), math.fsum(means) / weight


def slow_bounds(truth, errors, reached, impossible):
    """Of KL(policy, target); infinite where the policy leaves the support of the target."""
    top = INF if impossible > 0 else max(e.span for e in errors.values())
    n = truth.max_length - (truth.eos_id is not None)
    here = [math.exp(reached[s]) * k(e.span) for s, e in errors.items() if reached[s] > -INF]
    return {
        "prop3": truth.max_length * top,
        "span": n * k(top) if n else 0.0,
        "occupancy": INF if impossible > 0 else math.fsum(here),
    }


def by_depth(truth, visits, errors):
    """One dictionary for each depth."""
    depths = [[s for s in visits if len(s) == t] for t in range(truth.max_length)]
    return [
        {
            "depth": t,
            "states": len(here),
            "linf": max((errors[s].linf for s in here), default=0.0),
            "mean_kl": math.fsum(math.exp(visits[s]) * errors[s].kl for s in here),
        }
        for t, here in enumerate(depths)
    ]


def worst_prefixes(visits, reached, errors):
    """The ten of the largest error; those of rounding are left out."""
    # Stable: of equals the first state.
    worst = sorted(visits, key=lambda s: -errors[s].linf)
    return [
        {
            "prefix": list(s),
            "probability_target": math.exp(visits[s]),
            "probability_policy": math.exp(reached[s]),
            "delta": errors[s].delta,
            "kl": errors[s].kl,
        }
        for s in worst[:10]
        if errors[s].linf > 1e-9
    ]


def k(span):
    """K(L): the largest KL that logits within L of each other can make."""
    if span == INF:
        return INF
    if span < 1e-2:
        return span**2 / 8 - span**4 / 576
    u = span / -math.expm1(-span)
    return u - 1 - math.log(u)


def assert_same(got, want, tolerance=1e-9, path="report"):
    """Equal figures, "Infinity" read as float; no NaN, nothing missing, nothing more."""
    if isinstance(want, dict):
        assert set(got) == set(want), path
        for key in want:
            assert_same(got[key], want[key], tolerance, f"{path}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), path
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same(g, w, tolerance, f"{path}[{i}]")
    elif isinstance(want, float):
        x = float(got)
        same = x == want or abs(x - want) <= tolerance * max(1.0, abs(want))
        assert same, f"{path}: got {x}, expected {want}"
    else:
        assert got == want, f"{path}: got {got}, expected {want}"


# Reports of policies ------------------------------------------------------------------------------


def make_policy(kind, exact, forbid=0.0, seed=0):
    """A policy that is never stuck at a state which it reaches."""
    space, prompts, n = exact.ebm.space, exact.ebm.prompts, len(exact.truths)
    tables = logit_tables(space, n, seed + 50, forbid)
    if kind == "plain":
        return Plain(space, tables)
    if kind in ("table", "values"):
        return Tabular.from_tables(tables, space, prompts, kind == "values")
    if kind == "transformer":
        return transformer(space, prompts, seed)
    if kind == "uniform":
        return Uniform(space)
    if kind == "solution":
        return rl_ebm.solve(case_like(exact, seed).ebm)
    near = [
        t.masked_fill(torch.isneginf(t), 0.3) + 1e-3 * noise.masked_fill(torch.isneginf(noise), 0)
        for t, noise in zip(rl_ebm.solve(exact.ebm).tables(), tables, strict=True)
    ]
    return Tabular.from_tables(near, space, prompts, True)


def case_like(exact, seed):
    space = exact.ebm.space
    shape = (space.vocab_size, space.max_length, space.eos_id)
    return case(shape, 0.9, None, exact.ebm.prompts is not None, 0.0, seed + 77)


def figures(report):
    """As JSON; a round trip refuses NaN and numbers that JSON has not."""
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def wrong_ones(prefixes):
    """Without those whose error is rounding."""
    return [w for w in prefixes if max(abs(float(x)) for x in w["delta"]) > 1e-9]


def tied(want):
    worst = [max(map(abs, w["delta"])) for w in want["worst_prefixes"]]
    return worst.count(INF) > 1


def compare(report, wants, tolerance=1e-9):
    """A report against the slow one of each prompt."""
    got = figures(report)
    parts = got.pop("per_prompt", None)
    assert (parts is None) == (len(wants) == 1)
    for i, (part, want) in enumerate(zip(parts or [got], wants, strict=True)):
        part.pop("per_prompt", None)
        for prefix in part["worst_prefixes"]:
            assert prefix.pop("prompt_id") == i
        part["worst_prefixes"] = wrong_ones(part["worst_prefixes"])
        if tied(want):  # which of equally bad prefixes are named has its own test
            want = want | {"worst_prefixes": part["worst_prefixes"]}
        for figure in FIGURES:
            value = part.get(figure.key)
            assert figure.infinite or value is None or math.isfinite(float(value)), figure.key
        assert_same(part, want, tolerance)
    return got
