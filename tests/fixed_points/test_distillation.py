"""Where distillation from a part of the teacher ends, by gradients of its losses, enumerated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, gradient, log_probs, unclipped
from fixed_point_cases import problem_of, small_ebm
from toy_policies import close, responses, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.divergences import tv
from rl_ebm.fixed_points.distillation import teacher_tables
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import forward_log_marginals, log_policy, sequence_log_probs

ENTRY = AGENTS["on-policy-distillation"]
PARTIAL = [v for v in ENTRY.variants if "support" in v]
IDS = ["-".join(map(str, v.values())) for v in PARTIAL]
in_every_way = pytest.mark.parametrize("options", PARTIAL, ids=IDS)
BOUNDARY = {"forward-teacher-top-2-drop", "token-k2-reward"}
KAPPA = {
    "k1": lambda u: u,
    "k2": lambda u: u * u / 2,
    "k3": lambda u: (-u).exp() - 1 + u,
}


def kl(p, q):
    """sum p log(p / q) over what p holds; nothing is normalised."""
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if float(a.detach()) > 0)


def part(p, kept, outside):
    """Probabilities of the tokens that are kept, as plain numbers."""
    found = [p[i] for i in kept]
    if outside == "renormalise":
        return [x / sum(found) for x in found]
    if outside == "bucket" and len(kept) < len(p):
        return [*found, sum(p[i] for i in range(len(p)) if i not in kept)]
    return found


def state_loss(pi, teacher, options):
    """The loss of a state by its definition, with the gradient that a loss has of its draws."""
    if options["support"] != "token":
        source = teacher if options["support"] == "teacher-top" else pi
        order = sorted(range(len(pi)), key=lambda i: (-float(source[i].detach()), i))
        kept = sorted(order[: options["top_k"]])
        p, q = (part(x, kept, options["outside"]) for x in (teacher, pi))
        return kl(p, q) if options["divergence"] == "forward" else kl(q, p)
    drawn, u = pi.detach(), (pi.log() - teacher.log()).clamp(min=-100)
    kappa = KAPPA[options["kl_estimator"]](u)
    if options["kl_in"] == "reward":
        return (drawn * kappa.detach() * pi.log()).sum()
    weight = pi if options["kl_weight"] == "ratio" else drawn
    return (weight * kappa).sum()


def without_gradient(options):
    """k1 in the loss, as it is."""
    return (options.get("kl_estimator"), options.get("kl_weight")) == ("k1", "none")


def rows_of(log_pi, teacher, options):
    """The gradient of every state's loss, with one logit for each action, by depth."""
    found = []
    for p_rows, t_rows in zip(log_pi, teacher, strict=True):
        slopes = torch.zeros_like(p_rows)
        for i, (p, t) in enumerate(zip(p_rows, t_rows, strict=True)):
            real = ~torch.isneginf(t)
            if int(real.sum()) < 2:
                continue
            logits = p[real].clone().requires_grad_()
            loss = state_loss(logits.softmax(0), t[real].exp(), options)
            slopes[i, real] = torch.autograd.grad(loss, logits, allow_unused=True)[0]
        found.append(slopes)
    return found


@in_every_way
@pytest.mark.parametrize("kind", KINDS[:3:2], ids=KIND_IDS[:3:2])
def test_the_expected_gradient_of_the_agent_is_the_sum_over_its_states(options, kind):
    problem = case(kind)
    policy = problem.table()
    agent = unclipped("on-policy-distillation", problem, policy, **options)
    total = torch.zeros_like(policy.table)
    for p, row in enumerate(log_probs(policy, problem.space, len(problem.truth))):
        for y in range(len(responses(problem.space))):
            total += math.exp(row[y]) * gradient(agent, problem.batch([(p, y)]))
    space, star = problem.space, problem.star()
    for p in range(len(problem.truth)):
        log_pi = [log_policy(t[p].detach()) for t in policy.tables()]
        teacher = [log_policy(t[p].detach()) for t in star.tables()]
        want = rows_of(log_pi, teacher, options)
        if options.get("discount"):
            want = discounted(space, log_pi, teacher)
        marginals = forward_log_marginals(log_pi, space)
        want = torch.cat([m.exp()[:, None] * w for m, w in zip(marginals, want, strict=True)])
        away = float(want.abs().max())
        assert (away > 1e-2) != without_gradient(options)
        close(total[p], want, 1e-6)


def discounted(space, log_pi, teacher):
    """Gradients at each state where k1 is paid, discount 1: of the KL of all that follows."""
    found, value = [], None
    for p, t in zip(reversed(log_pi), reversed(teacher), strict=True):
        cost = (p - t).nan_to_num(nan=0.0)
        if value is not None:
            cost = cost + space.spread(value, fill=0.0)
        value = (p.exp() * cost).sum(-1)
        found.append(p.exp() * (cost - value[:, None]))
    return found[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 0)], ids=["eos"])
@pytest.mark.parametrize("seed", [0])
@in_every_way
def test_a_flow_by_small_steps_ends_at_what_is_predicted(options, shape, seed):
    ebm = small_ebm(shape, beta=0.7, seed=seed)
    problem = problem_of(ebm)
    point = ENTRY.limit(ENTRY.config(**options), problem)
    if options.get("kl_estimator") == "k3" and options["kl_in"] == "reward":
        assert (point.log_law, point.degenerate, point.how) == (None, True, "not computed")
        return
    if point.log_law is None:
        assert options["support"] == "student-top" or options["kl_in"] == "reward"
        assert point.how == "not settled"
        return
    close(float(point.log_law.exp().sum()), 1.0, 1e-12)
    teacher, log_pi = teacher_tables(problem), problem.start()
    # Where the tokens change that are compared, how far a step goes past that counts.
    fastest = {"student-top": 0.05, "teacher-top": 2.0}.get(options["support"], 0.5)
    for _ in range(4000):
        slopes = rows_of(log_pi, teacher, options)
        if options.get("discount"):
            slopes = discounted(problem.space, log_pi, teacher)
        steepest = max(float(s.abs().max()) for s in slopes)
        rate = min(fastest, 0.2 / max(steepest, 1e-3))
        log_pi = [log_policy(p - rate * s) for p, s in zip(log_pi, slopes, strict=True)]
        if steepest < 1e-9:
            break
    law = sequence_log_probs(log_pi, problem.space)
    name = IDS[PARTIAL.index(options)]
    assert float(tv(point.log_law, law)) < (0.05 if point.degenerate else 2e-3)
    if name in BOUNDARY:
        assert point.degenerate
    if without_gradient(options):
        close(point.log_law, problem.start_law, 0.0)
        assert point.sampler
    elif point.how == "closed form" and options["support"] == "token":
        close(point.log_law, problem.log_target, 0.0)


def test_at_the_limit_of_a_part_that_stays_the_gradient_vanishes_and_what_is_kept_is_right():
    problem = problem_of(small_ebm((4, 2, None), beta=0.7, seed=3))
    teacher, start = teacher_tables(problem), problem.start()
    for options in PARTIAL[:3]:
        how = options | {"divergence": "reverse"}
        for config in (options, how):
            point = ENTRY.limit(ENTRY.config(**config), problem)
            found = tables_of(problem, point.log_law)
            slopes = rows_of(found, teacher, config)
            if not point.degenerate:
                assert max(float(s.abs().max()) for s in slopes) < 1e-9
            for rows in zip(found, teacher, start, strict=True):
                p, t, s = (x[~rows[0].isnan().any(1)] for x in rows)  # states that are reached
                kept = t.argsort(-1, descending=True)[:, :2]
                mass = p.exp().gather(1, kept).sum(1)
                share = t.gather(1, kept) - t.exp().gather(1, kept).sum(1, keepdim=True).log()
                if config["outside"] == "bucket":
                    close(p.gather(1, kept).exp(), t.gather(1, kept).exp(), 1e-9)
                close(p.gather(1, kept) - mass.log()[:, None], share, 1e-9)
                if config["outside"] == "drop" and config["divergence"] == "reverse":
                    close(mass, t.exp().gather(1, kept).sum(1) / math.e, 1e-9)
                if config["outside"] == "renormalise":  # logits outside stay, the sum inside too
                    rest = t.argsort(-1, descending=True)[:, 2:]
                    shift = (p - s).gather(1, rest)
                    close(shift[:, :1].expand_as(shift), shift, 1e-9)
                    inside = (p - s).gather(1, kept).mean(1)
                    close(inside, shift[:, 0], 1e-9)


def tables_of(problem, log_law):
    """log pi by depth of a law over responses of a fixed length."""
    found, mass = [], log_law
    for _ in range(problem.space.max_length):
        rows = mass.view(-1, problem.space.vocab_size)
        mass = rows.logsumexp(1)
        found.append(rows - mass[:, None])
    return found[::-1]


def test_a_reward_of_k2_rests_at_the_teacher_only_from_its_stable_side():
    space = rl_ebm.TokenSpace(2, 1)
    config = ENTRY.config(support="token", kl_estimator="k2")
    for common, degenerate in ((0.7, False), (0.8, False), (0.95, True)):
        # The teacher has 0.9 of the common token; rarer than that, it is pulled up to it.
        ref = torch.tensor([[common, 1 - common]], dtype=torch.float64).log()
        scores = torch.tensor([0.9 / common, 0.1 / (1 - common)], dtype=torch.float64).log()
        ebm = rl_ebm.EBM(space, scores, 1.0, Tabular.from_tables([ref], space))
        point = ENTRY.limit(config, problem_of(ebm))
        assert point.degenerate is degenerate
        want = [1.0, 0.0] if degenerate else [0.9, 0.1]
        close(point.log_law.exp(), torch.tensor(want, dtype=torch.float64), 1e-9)


def test_the_top_tokens_of_a_large_k_are_all_of_them():
    problem = problem_of(small_ebm((3, 3, 0), seed=3))
    for support in ("teacher-top", "student-top"):
        for outside in ("renormalise", "drop", "bucket"):
            for divergence in ("forward", "reverse", "js"):
                config = ENTRY.config(
                    support=support, outside=outside, divergence=divergence, top_k=3
                )
                close(ENTRY.limit(config, problem).log_law, problem.log_target, 1e-9)
                assert config.ends_at_target is None
    assert ENTRY.config().ends_at_target is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"discount": 1.5}, r"discount must be in \[0, 1\], got 1.5"),
        ({"kl_estimator": "k2"}, "use support='token', or leave them out"),
        ({"discount": 0.5}, "discount is of rewards: use support='token'"),
        ({"support": "token", "divergence": "forward"}, "use divergence='reverse' with support"),
        ({"support": "token", "on_policy": 0.5}, "use on_policy=1 with support='token'"),
        ({"support": "token", "kl_weight": "ratio"}, "use kl_in='loss'"),
        ({"support": "token", "kl_in": "loss", "discount": 1}, "use kl_in='reward', or leave"),
    ],
)
def test_options_that_say_nothing_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ENTRY.config(**options)


def test_a_teacher_that_forbids_is_asked_about_no_drawn_token():
    ebm = small_ebm((3, 2, None), forbid=True)
    solution = rl_ebm.solve(ebm)
    table = Tabular(ebm.space)
    with pytest.raises(ValueError, match="the teacher forbids some actions"):
        ENTRY.agent(ebm, table, ENTRY.config(support="token"), None, solution)


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["renormalise", "bucket"])
def test_the_agent_ends_there_by_plain_gradients_and_elsewhere_by_adam(outside):
    space = rl_ebm.TokenSpace(4, 2)
    reference = Tabular(space, scale=0.7, generator=seeded(0))
    ebm = rl_ebm.EBM(space, torch.randn(16, generator=seeded(1)), 0.7, reference)
    config = ENTRY.config(
        batch_size=256, lr=2.0, support="teacher-top", top_k=2, outside=outside, max_grad_norm=1e9
    )
    want = ENTRY.limit(config, problem_of(ebm)).log_law
    far = []
    for plain, lr in ((True, 2.0), (False, 0.05)):
        policy = Tabular.from_tables([t[0].detach() for t in reference.tables()], space)
        agent = ENTRY.agent(ebm, policy, replace(config, lr=lr), seeded(2), rl_ebm.solve(ebm))
        if plain:
            groups = [{"params": agent.learner.parameters, "factor": 1.0}]
            agent.learner.optimizer = torch.optim.SGD(groups, lr=lr)
        for k in range(400):
            agent.update(ebm.score(agent.sample()), k / 400)
        tables = [log_policy(t[0].double().detach()) for t in policy.tables()]
        far.append(float(tv(sequence_log_probs(tables, space), want)))
    assert far[0] < 2e-3 < far[1]
