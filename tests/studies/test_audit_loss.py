"""Anybody's loss: its limit is that of our closed forms, of the EBM, of brute force."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

import rl_ebm
from rl_ebm.divergences import KL_TERMS, tv
from rl_ebm.fixed_points import Penalty, groups, penalised
from rl_ebm.fixed_points.finite import group_fixed_point
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import q_from_r, sequence_log_probs
from rl_ebm.studies.losses import beyond
from rl_ebm.studies.problems import problems

BETA = 0.7


def make(kind: str, seed: int = 0) -> rl_ebm.EBM:
    """A random EBM: its reward, and in all but "plain" a reference that is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    space = rl_ebm.TokenSpace(3, 3 if kind == "eos" else 2, eos_id=1 if kind == "eos" else None)
    if kind in ("plain", "tiny"):
        space = rl_ebm.TokenSpace(4 if kind == "plain" else 2, 2)
    reward = torch.randn(space.num_sequences, generator=generator, dtype=torch.float64)
    tables = [
        torch.randn(space.num_prefixes(t), space.vocab_size, generator=generator).double()
        for t in range(space.max_length)
    ]
    if kind == "forbids":
        tables[0][0, 0] = tables[1][1, 2] = -torch.inf
    reference = None if kind in ("plain", "tiny") else Tabular.from_tables(tables, space)
    return rl_ebm.EBM(space, reward, beta=BETA, reference=reference)


def users(estimator: str, place: str, level: str, mean_tokens: bool):
    """The loss that a user would write, and what he would pay as a reward."""
    kappa = KL_TERMS[estimator]

    def reduced(x, mask):
        sums = (x * mask).sum(1)
        return (sums / mask.sum(1) if mean_tokens else sums).mean()

    def penalty(u, mask):
        return (kappa(u) * mask).sum(1) if level == "token" else kappa((u * mask).sum(1))

    def paid(rewards, log_pi_old, log_ref, mask):
        return rewards - BETA * penalty(log_pi_old - log_ref, mask)

    def loss(log_pi, log_pi_old, log_ref, advantages, mask):
        value = reduced(-advantages * torch.exp(log_pi - log_pi_old), mask)
        if place == "reward":
            return value
        if level == "token":
            return value + BETA * reduced(kappa(log_pi - log_ref), mask)
        lengths = mask.sum(1) if mean_tokens else 1
        return value + BETA * (penalty(log_pi - log_ref, mask) / lengths).mean()

    return loss, paid


@pytest.mark.parametrize(
    ("kind", "estimator", "level", "mean_tokens"),
    [
        pytest.param("plain", "k1", "token", False, marks=pytest.mark.slow),
        ("plain", "k3", "sequence", False),
        pytest.param("reference", "k2", "token", False, marks=pytest.mark.slow),
        ("eos", "k2", "sequence", False),
        ("eos", "k2", "token", True),
        pytest.param("eos", "k3", "token", True, marks=pytest.mark.slow),
        pytest.param("forbids", "k1", "token", False, marks=pytest.mark.slow),
        ("forbids", "k3", "token", False),
    ],
)
def test_a_penalty_in_the_loss_ends_where_its_closed_form_does(kind, estimator, level, mean_tokens):
    ebm = make(kind)
    loss, _ = users(estimator, "loss", level, mean_tokens)
    found = rl_ebm.audit_loss(loss, rl_ebm.solve(ebm), beyond=False)
    (problem,) = problems(rl_ebm.solve(ebm))
    limit = penalised(problem, Penalty(estimator, "loss", level, mean_tokens=mean_tokens))
    assert tv(found.log_laws[0], limit.log_law) < 1e-8
    assert found.degenerate == limit.degenerate == (estimator == "k1")
    assert found.combines == "rows"
    assert found.survivors == (
        None if estimator != "k1" else {"responses": 1, "likeliest": [_best(ebm, problem)]}
    )


def _best(ebm, problem):
    place = int(problem.g_responses.masked_fill(~problem.allowed, -torch.inf).argmax())
    tokens, lengths = ebm.space.sequences(place, place + 1)
    return {"tokens": tokens[0, : int(lengths)].tolist(), "probability": 1.0}


@pytest.mark.parametrize(
    ("kind", "advantages", "mean_tokens"),
    [
        ("plain", "centred", False),
        ("reference", "group-std", False),
        ("eos", "leave-one-out", True),
        ("forbids", "group-std", True),
    ],
)
def test_k1_in_the_reward_ends_at_the_ebm(kind, advantages, mean_tokens):
    _, paid = users("k1", "reward", "sequence", False)
    loss, _ = users("k1", "reward", "sequence", mean_tokens)

    def combined(*inputs):
        returns = paid(*inputs)
        off = returns - returns.mean()
        if advantages == "leave-one-out":
            return off * len(off) / max(len(off) - 1, 1)
        return off / (returns.std() + 1e-300) if advantages == "group-std" and len(off) > 1 else off

    found = rl_ebm.audit_loss(
        loss, rl_ebm.solve(make(kind)), advantages=combined, beyond=False, name="mine"
    )
    assert found.is_target
    assert found.tv < 1e-10
    assert found.objective == "mine"
    assert found.depends_on_sampler is False
    assert found.gradient_at_target == {"norm": 0.0, "signal_to_noise": 0.0, "favours": []}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_other_penalties_in_the_reward_leave_the_inside(estimator, level):
    solution = rl_ebm.solve(make("plain"))
    loss, paid = users(estimator, "reward", level, False)
    found = rl_ebm.audit_loss(loss, solution, advantages=paid, beyond=False)
    limit = penalised(problems(solution)[0], Penalty(estimator, "reward", level))
    assert found.degenerate
    assert limit.degenerate
    assert tv(found.log_laws[0], limit.log_law) < 1e-6


def test_the_std_of_a_group_moves_a_penalty_in_the_loss_as_its_root_says():
    solution = rl_ebm.solve(make("reference"))
    loss, _ = users("k2", "loss", "token", False)
    found = rl_ebm.audit_loss(loss, solution, advantages="group-std", beyond=False)
    limit = penalised(problems(solution)[0], Penalty("k2", "loss", group_std=True))
    assert tv(found.log_laws[0], limit.log_law) < 1e-8


def teacher_of(ebm: rl_ebm.EBM) -> torch.Tensor:
    (problem,) = problems(rl_ebm.solve(ebm))
    q = q_from_r([a + b for a, b in zip(problem.log_ref, problem.g, strict=True)], ebm.space)
    return torch.cat(q)


DISTILLATION = {
    "forward": lambda s, t: (t.exp() * (t - s)).sum(-1),
    "reverse": lambda s, t: (s.exp() * (s - t)).sum(-1),
}


@pytest.mark.parametrize(
    ("name", "kind", "sampler"),
    [
        ("forward", "plain", None),
        ("forward", "eos", 0.3),
        ("reverse", "eos", "teacher"),
        ("reverse", "forbids", "reference"),
    ],
)
def test_a_divergence_from_the_teacher_ends_at_the_ebm_whoever_draws(name, kind, sampler):
    def loss(student_logits, teacher_logits, tokens, mask):
        each = DISTILLATION[name](log_softmax(student_logits, -1), log_softmax(teacher_logits, -1))
        return (each * mask).sum() / mask.sum()

    found = rl_ebm.audit_loss(
        loss, rl_ebm.solve(make(kind)), kind="distillation", sampler=sampler, beyond=False
    )
    assert found.is_target
    assert found.tv < 1e-10
    assert found.combines == ("tokens" if kind == "eos" else "rows")


def test_the_value_of_k1_has_no_gradient_under_the_student_and_is_stationary():
    def loss(student_logits, teacher_logits, tokens, mask):
        gap = log_softmax(student_logits, -1) - log_softmax(teacher_logits, -1)
        return (gap.gather(-1, tokens[..., None])[..., 0] * mask).sum(1).mean()

    ebm = make("reference")
    found = rl_ebm.audit_loss(loss, rl_ebm.solve(ebm), kind="distillation", beyond=False)
    (problem,) = problems(rl_ebm.solve(ebm))
    assert tv(found.log_laws[0], problem.start_law) < 1e-12
    assert found.kl_reference == pytest.approx(0.0, abs=1e-12)


def ipo_by_normal_equations(problem, tau: float) -> torch.Tensor:
    """The law whose log-ratios u minimise E[(u(y) - u(y') - (2 p - 1) / (2 tau))^2] over all pairs.

    With pairs from the reference that is u(y) = E_{y'}[2 sigma(R - R') - 1] / (2 tau) up to a
    constant: the target is a sum over y' and not of the form f(y) - f(y').
    """
    r = problem.beta * problem.g_responses
    mu = problem.log_ref_responses.exp()
    wanted = (2 * torch.sigmoid(r[:, None] - r) - 1) / (2 * tau)
    return torch.log_softmax(problem.log_ref_responses + wanted @ mu, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eos", "forbids"])
def test_preferences_end_where_their_normal_equations_say(kind):
    solution = rl_ebm.solve(make(kind))

    def dpo(chosen, rejected, chosen_ref, rejected_ref):
        return -logsigmoid(BETA * (chosen - chosen_ref - rejected + rejected_ref)).mean()

    def ipo(chosen, rejected, chosen_ref, rejected_ref):
        gap = chosen - chosen_ref - rejected + rejected_ref
        return (gap - 1 / (2 * BETA)).square().mean()

    first = rl_ebm.audit_loss(dpo, solution, kind="preference", beyond=False)
    assert first.is_target
    assert first.tv < 1e-12
    second = rl_ebm.audit_loss(ipo, solution, kind="preference", beyond=False)
    (problem,) = problems(solution)
    assert tv(second.log_laws[0], ipo_by_normal_equations(problem, BETA)) < 1e-10
    assert not second.is_target


@pytest.mark.slow
def test_what_a_saturating_loss_pushes_ever_less_dies_all_the_same():
    """1 - sigmoid(beta u) of the chosen one plus sigmoid(beta u) of the rejected one: the expected
    gradient by u(y) is -2 mu(y) (wins - losses) beta sigmoid'(beta u), which fades as y dies. At
    the rest of those that win more than they lose it is some number times pi(y)."""
    solution = rl_ebm.solve(make("tiny"))

    def loss(chosen, rejected, chosen_ref, rejected_ref):
        up, down = BETA * (chosen - chosen_ref), BETA * (rejected - rejected_ref)
        return (1 - up.sigmoid() + down.sigmoid()).mean()

    found = rl_ebm.audit_loss(loss, solution, "preference", beyond=False)
    (problem,) = problems(solution)
    reward, log_mu = BETA * problem.g_responses, problem.log_ref_responses
    margin = (2 * torch.sigmoid(reward[:, None] - reward) - 1) @ log_mu.exp()
    wins = margin > 0
    assert 0 < int(wins.sum()) < len(wins)

    def at(level: float) -> torch.Tensor:
        """u with margin sigmoid'(beta u) = level exp(u): the right side grows, by bisection."""
        low, high = torch.full_like(margin, -50), torch.full_like(margin, 50)
        for _ in range(200):
            u = (low + high) / 2
            over = level * u.exp() > margin * (BETA * u).sigmoid() * (-BETA * u).sigmoid()
            low, high = torch.where(over, low, u), torch.where(over, u, high)
        return (log_mu + u).exp() * wins

    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle).sum() > 1 else (low, middle)
    assert found.degenerate
    assert found.survivors["responses"] == int(wins.sum())
    assert float((found.log_laws[0].exp() - at(low)).abs().sum()) < 1e-6


def test_it_agrees_with_brute_force_over_all_responses_by_autograd():
    """A loss that no closed form has, against plain descent of its own expected value."""
    ebm = make("eos", seed=3)
    (problem,) = problems(rl_ebm.solve(ebm))
    space = ebm.space
    tokens, lengths = space.sequences()
    mask = torch.arange(space.max_length) < lengths[:, None]
    states = space.state_ids(tokens)
    start = torch.cat(problem.start())

    def loss(log_pi, log_pi_old, log_ref, advantages, mask):
        u = log_pi - log_ref
        policy = -advantages * (log_pi - log_pi_old).exp().clamp(0.5, 1.5)
        each = policy + BETA * (0.5 * u.square() + 0.2 * u.exp())
        return (each * mask).sum() / mask.sum()

    theta = start.clone().masked_fill(torch.isneginf(start), -50.0)
    rewards = BETA * problem.g_responses
    for _ in range(6000):  # each step in units of how often an action is drawn
        theta.requires_grad_()
        table = log_softmax(theta, -1)
        log_pi = table[states, tokens].masked_fill(~mask, 0.0)
        law = log_pi.detach().sum(1).exp()
        gain = (rewards - law @ rewards)[:, None].expand(mask.shape)
        ratio = (log_pi - log_pi.detach()).exp().clamp(0.5, 1.5)
        u = log_pi - start[states, tokens].masked_fill(~mask, 0.0)
        each = (-gain * ratio + BETA * (0.5 * u.square() + 0.2 * u.exp())) * mask
        value = (law * each.sum(1)).sum() / (law @ lengths.double())
        (gradient,) = torch.autograd.grad(value, theta)
        mass = torch.zeros_like(theta).index_put(
            (states[mask], tokens[mask]), law[:, None].expand(mask.shape)[mask], accumulate=True
        )
        theta = theta.detach() - 0.3 * gradient / mass.clamp(min=1e-12)
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    law = sequence_log_probs(list(log_softmax(theta, -1).split(sizes)), space)
    found = rl_ebm.audit_loss(loss, rl_ebm.solve(ebm), beyond=False)
    assert found.combines == "tokens"
    assert tv(found.log_laws[0], law) < 1e-8


@pytest.mark.parametrize(("kind", "label"), [("tiny", "-H(fp)"), ("reference", "KL(fp, ref)")])
def test_without_a_reference_the_text_says_that_it_is_the_entropy(kind, label):
    ebm = make(kind)
    loss, paid = users("k1", "reward", "token", False)
    found = rl_ebm.audit_loss(loss, rl_ebm.solve(ebm), advantages=paid, beyond=False)
    assert label in str(found)
    if kind == "tiny":
        law = torch.softmax(ebm.reward_model.scores.double().flatten() / BETA, 0)
        assert found.kl_reference == pytest.approx(float((law * law.log()).sum()), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("listed", [2**18, 0])
def test_groups_of_a_size_end_where_their_own_fixed_point_does(listed, monkeypatch):
    """Our iteration of closed forms against the flow; groups listed, and integrated over."""
    monkeypatch.setattr(groups, "LISTED", listed)
    solution = rl_ebm.solve(make("tiny"))
    loss, _ = users("k3", "loss", "token", False)
    found = rl_ebm.audit_loss(loss, solution, advantages="group-std", groups=[3, 5])
    (problem,) = problems(solution)
    assert list(found.groups) == ["3", "5"]
    for size in (3, 5):
        law = group_fixed_point(problem, "k3", size)
        assert found.groups[str(size)]["tv"] == pytest.approx(
            float(tv(law, problem.log_target)), abs=1e-6
        )


@pytest.mark.slow
def test_sizes_of_groups_that_are_none_are_refused_and_many_rewards_not_tried(monkeypatch):
    solution = rl_ebm.solve(make("tiny"))
    loss, _ = users("k3", "loss", "token", False)
    for sizes, error in (([1], ValueError), ([2.5], TypeError), (4, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="groups"):
            rl_ebm.audit_loss(loss, solution, groups=sizes)
    with pytest.raises(ValueError, match="groups are of policy gradients"):
        rl_ebm.audit_loss(loss, solution, "preference", groups=[2])
    monkeypatch.setattr(beyond, "KINDS", 3)
    found = rl_ebm.audit_loss(loss, solution, advantages="group-std")
    assert found.groups["8"]["tv"] is None
    assert "4 different returns take minutes: ask for them" in str(found)


@pytest.mark.slow
def test_prompts_are_averaged():
    space = rl_ebm.TokenSpace(3, 2)
    reward = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, _ = users("k2", "loss", "token", False)
    ebm = rl_ebm.EBM(space, reward, beta=BETA, prompts=[[0], [1]])
    whole = rl_ebm.audit_loss(loss, rl_ebm.solve(ebm), beyond=False)
    parts = [
        rl_ebm.audit_loss(loss, rl_ebm.solve(rl_ebm.EBM(space, r, beta=BETA)), beyond=False)
        for r in reward
    ]
    assert whole.tv == pytest.approx(sum(p.tv for p in parts) / 2, abs=1e-10)
    assert whole.log_laws.shape == (2, 9)


@pytest.mark.slow
def test_the_answer_has_the_keys_of_audit_and_is_json():
    solution = rl_ebm.solve(make("tiny"))
    loss, _ = users("k3", "loss", "token", False)
    found = rl_ebm.audit_loss(loss, solution, options={"beta": BETA})
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(rl_ebm.audit(solution)[0]) <= set(told)
    assert told["options"] == {"kind": "policy-gradient", "advantages": "mean", "beta": BETA}
    assert set(told["groups"]) == {"2", "4", "8", "16"}
    assert "not the EBM" in str(found)
    # In groups whose mean has the own return in it, advantages are (G - 1) / G of what they were.
    (problem,) = problems(solution)
    for size in (2, 16):
        shrunk = problem.with_returns(problem.g_responses * (size - 1) / size)
        law = penalised(shrunk, Penalty("k3", "loss")).log_law
        known = float(tv(law, problem.log_target))
        assert told["groups"][str(size)]["tv"] == pytest.approx(known, abs=1e-8)
    # A late sampler comes to the same rest where its updates are small; bfloat16 is near it.
    assert told["sampler"]["4 updates late"]["tv"] == pytest.approx(found.tv, abs=1e-6)
    assert told["sampler"]["bfloat16, corrected"]["tv"] == pytest.approx(found.tv, abs=5e-3)


@pytest.mark.slow
def test_inner_steps_leave_a_rest_where_it_is():
    """Where the first step of a batch is at rest, so are the others."""
    solution = rl_ebm.solve(make("plain"))

    def loss(log_pi, log_pi_old, log_ref, advantages, mask):
        ratio = (log_pi - log_pi_old).exp()
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -((clipped - BETA * 0.5 * (log_pi - log_ref).square()) * mask).sum(1).mean()

    one = rl_ebm.audit_loss(loss, solution, beyond=False)
    more = rl_ebm.audit_loss(loss, solution, inner_steps=3, beyond=False)
    assert more.degenerate == one.degenerate is False
    assert more.tv == pytest.approx(one.tv, abs=1e-7)
    assert more.options["inner_steps"] == 3
