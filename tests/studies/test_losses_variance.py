"""Exact variances of gradients against all groups, one by one, each by autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.measures import variance_of_group, variance_of_one

SPACES = {"fixed": (2, 2, None), "eos": (2, 3, 1), "three": (3, 2, 0)}
NAMES = sorted(SPACES)


def problem(name, beta=0.7, forbidden=False):
    """An EBM with a reference that is not uniform, and its solution."""
    space = rl_ebm.TokenSpace(*SPACES[name])
    reference = Tabular(space, scale=0.8, generator=seeded(3), dtype=torch.float64)
    if forbidden:
        reference.table.data[0, 0, 0] = -torch.inf
    scores = torch.randn(space.num_sequences, generator=seeded(4), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scores, beta, reference))


def case_of(loss, name, kind="policy-gradient", advantages="centred", sampler=None, **options):
    what = asked(loss, kind, advantages, sampler, None, 1, None)
    (case,) = cases_of(what, problem(name, **options))
    return case


class Brute:
    """The responses of a case in lists, their log pi by autograd from a table of one leaf."""

    def __init__(self, case, theta):
        r = case.responses
        self.mask, self.states, self.tokens = r.mask, r.states, r.tokens
        self.log_ref, self.reward, self.count = r.log_ref, r.reward, len(r.reward)
        self.forbidden = torch.isneginf(r.start)
        self.leaf = theta.masked_fill(self.forbidden, 0.0).requires_grad_()
        self.law = self.log_pi(range(self.count)).sum(1).exp().detach()
        assert float(self.law.sum()) == pytest.approx(1, abs=1e-12)

    def log_pi(self, rows):
        rows = list(rows)
        table = torch.log_softmax(self.leaf.masked_fill(self.forbidden, -torch.inf), 1)
        found = table[self.states[rows], self.tokens[rows]]
        return torch.where(self.mask[rows], found, 0.0)

    def gradient(self, value):
        (found,) = torch.autograd.grad(value, self.leaf)
        return torch.where(self.forbidden, 0.0, found)

    def over(self, size, gradient_of, law=None):
        """E|g|^2 - |E g|^2 over all groups of a size."""
        law = (self.law if law is None else law).tolist()
        second, mean = 0.0, torch.zeros_like(self.leaf)
        for rows in itertools.product(range(self.count), repeat=size):
            g = gradient_of(list(rows)).detach()
            p = math.prod(law[i] for i in rows)
            second += p * float(g.square().sum())
            mean = mean + p * g
        return second - float(mean.square().sum())


def with_penalty(log_pi, log_pi_old, log_ref, advantages, mask):
    """A ratio, and a k3 whose gradient is no multiple of the advantage; means over tokens."""
    x = log_ref - log_pi
    each = -(log_pi - log_pi_old).exp() * advantages + 0.4 * (x.exp() - x - 1)
    return ((each * mask).sum(1) / mask.sum(1)).mean()


def summed(log_pi, log_pi_old, log_ref, advantages, mask):
    return -(log_pi * advantages * mask).sum(1).mean()


def constant(log_pi, log_pi_old, log_ref, advantages, mask):
    """A sum over the rows: its groups are told as means, as those of all losses."""
    return -(log_pi.exp() / log_pi_old.exp() * advantages * mask).sum() / 5.0


def in_group(how, x):
    gain = x - x.mean()
    if how == "leave-one-out":
        return torch.stack([x[i] - (x.sum() - x[i]) / (len(x) - 1) for i in range(len(x))])
    if how == "group-std":
        spread = x.std()
        return gain * 0 if float(spread) < 1e-12 else gain / spread
    return gain


def group_gradient(brute, loss, advantages_of, total=False):
    def of(rows):
        log_pi = brute.log_pi(rows)
        gain = advantages_of(rows)
        gain = gain if gain.ndim == 2 else gain[:, None].expand(log_pi.shape)
        mask = brute.mask[rows]
        gain = torch.where(mask, gain, 0.0)
        g = brute.gradient(loss(log_pi, log_pi.detach(), brute.log_ref[rows], gain, mask))
        return g / len(rows) if total else g

    return of


LAWS = {"reference": lambda c: c.responses.start, "target": lambda c: c.target}


@pytest.mark.parametrize("where", LAWS)
@pytest.mark.parametrize("how", ["centred", "leave-one-out", "group-std"])
@pytest.mark.parametrize("loss", [with_penalty, summed, constant], ids=lambda x: x.__name__)
def test_groups_of_advantages_that_are_coupled(loss, how, where):
    for name, size in [("fixed", 3), ("eos", 2), ("three", 2)]:
        case = case_of(loss, name, advantages=how, forbidden=name == "three")
        theta = LAWS[where](case)
        brute = Brute(case, theta)
        of = group_gradient(
            brute, loss, lambda rows, b=brute: in_group(how, b.reward[rows]), loss is constant
        )
        found = variance_of_group(case.flow, theta, size)
        assert found == pytest.approx(brute.over(size, of), rel=1e-9), (name, size)


@pytest.mark.parametrize("name", NAMES)
def test_one_response_and_groups_whose_returns_are_their_own(name):
    def paid(rewards, log_pi_old, log_ref, mask):
        return rewards - 0.3 * ((log_pi_old - log_ref) * mask).sum(1)

    def paid_by_token(rewards, log_pi_old, log_ref, mask):
        return rewards[:, None] - 0.3 * (log_pi_old - log_ref) * mask

    for advantages in (paid, paid_by_token):
        case = case_of(with_penalty, name, advantages=advantages)
        theta = case.target
        brute = Brute(case, theta)

        def gain(rows, b=brute, f=advantages):
            return f(b.reward[rows], b.log_pi(rows).detach(), b.log_ref[rows], b.mask[rows])

        of = group_gradient(brute, with_penalty, gain)
        assert variance_of_one(case.flow, theta) == pytest.approx(brute.over(1, of), rel=1e-9)
        assert variance_of_group(case.flow, theta, 2) == pytest.approx(brute.over(2, of), rel=1e-9)


@pytest.mark.parametrize("how", ["centred", "leave-one-out", "group-std"])
def test_one_response_of_a_group_without_end(how):
    case = case_of(with_penalty, "eos", advantages=how)
    brute = Brute(case, case.target)
    mean = brute.law @ brute.reward
    gain = brute.reward - mean
    if how == "group-std":
        gain = gain / (brute.law @ gain.square()).sqrt()
    of = group_gradient(brute, with_penalty, lambda rows: gain[rows])
    found = variance_of_one(case.flow, case.target)
    assert found == pytest.approx(brute.over(1, of), rel=1e-9)


def test_one_response_of_another_sampler():
    case = case_of(summed, "three", sampler="reference")
    brute = Brute(case, case.target)
    law = Brute(case, case.responses.start).law
    gain = brute.reward - law @ brute.reward
    of = group_gradient(brute, summed, lambda rows: gain[rows])
    found = variance_of_one(case.flow, case.target)
    assert found == pytest.approx(brute.over(1, of, law), rel=1e-9)


def test_groups_that_are_too_many_are_drawn():
    case = case_of(summed, "three", advantages="group-std")
    theta, size = case.responses.start, 10
    brute = Brute(case, theta)
    score = torch.stack([brute.gradient(-brute.log_pi([i]).sum()) for i in range(brute.count)])
    second, mean, total = 0.0, torch.zeros_like(score[0]), 0.0
    # A group by how often each response is in it.
    for rows in itertools.combinations_with_replacement(range(brute.count), size):
        times = [rows.count(i) for i in range(brute.count)]
        p = math.factorial(size) / math.prod(math.factorial(n) for n in times)
        p *= math.prod(brute.law[i].item() for i in rows)
        gain = in_group("group-std", brute.reward[list(rows)])
        g = (gain[:, None, None] * score[list(rows)]).mean(0)
        second, mean, total = second + p * float(g.square().sum()), mean + p * g, total + p
    assert total == pytest.approx(1)
    exact = second - float(mean.square().sum())
    found = variance_of_group(case.flow, theta, size)
    assert isinstance(found, Interval)
    width = found.high - found.low
    assert abs(found.estimate - exact) < width  # two half widths of 95 %
    assert width < 0.2 * exact


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_distillation(share):
    def reverse(student_logits, teacher_logits, tokens, mask):
        p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return (((p.exp() * (p - q)).sum(-1) * mask).sum(1) / mask.sum(1)).mean()

    for name in NAMES:
        case = case_of(reverse, name, "distillation", sampler=share)
        brute, teacher = Brute(case, case.responses.start), Brute(case, case.target)
        own = torch.where(brute.forbidden, -1e4, case.teacher)
        law = share * brute.law + (1 - share) * teacher.law

        def of(rows, b=brute, q=own):
            logits = torch.where(b.forbidden, -1e4, b.leaf)[b.states[rows]]
            value = reverse(logits, q[b.states[rows]], b.tokens[rows], b.mask[rows])
            return b.gradient(value)

        theta = case.responses.start
        found = variance_of_one(case.flow, theta)
        assert found == pytest.approx(brute.over(1, of, law), rel=1e-9)
        found = variance_of_group(case.flow, theta, 2)
        assert found == pytest.approx(brute.over(2, of, law), rel=1e-9)


@pytest.mark.parametrize("sampler", ["reference", "policy"])
def test_a_preference(sampler):
    def loss(chosen_log_pi, rejected_log_pi, chosen_log_ref, rejected_log_ref):
        x = (chosen_log_pi - chosen_log_ref) - (rejected_log_pi - rejected_log_ref)
        return (-torch.nn.functional.logsigmoid(0.7 * x) - 0.1 * chosen_log_pi).mean()

    for name in NAMES:
        case = case_of(loss, name, "preference", sampler=sampler)
        brute = Brute(case, case.target)
        law = brute.law if sampler == "policy" else Brute(case, case.responses.start).law
        second, mean = 0.0, torch.zeros_like(brute.leaf)
        for i, j in itertools.product(range(brute.count), repeat=2):
            p = float(law[i] * law[j]) * 2 / (1 + math.exp(brute.reward[j] - brute.reward[i]))
            a, b = brute.log_pi([i]).sum(1), brute.log_pi([j]).sum(1)
            g = brute.gradient(loss(a, b, brute.log_ref[i].sum(), brute.log_ref[j].sum()))
            second, mean = second + p * float(g.square().sum()), mean + p * g
        exact = second - float(mean.square().sum())
        assert variance_of_one(case.flow, case.target) == pytest.approx(exact, rel=1e-9), name
        found = variance_of_group(case.flow, case.target, 4)
        assert found == pytest.approx(exact / 4, rel=1e-9)


def with_square(log_pi, log_pi_old, log_ref, advantages, mask):
    """A ratio, and k2: where a token is rare, its gradient is not as large as k3's."""
    each = -(log_pi - log_pi_old).exp() * advantages + 0.2 * (log_ref - log_pi).square()
    return ((each * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("where", LAWS)
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_draws_vary_as_is_said(name, where, size):
    """Groups are drawn, and each group's own gradient is taken, as a training step's would be."""
    case = case_of(with_square, name, advantages="leave-one-out" if size > 1 else "centred")
    theta = LAWS[where](case)
    brute, count = Brute(case, theta), 100_000
    rows = torch.multinomial(brute.law, count * size, True, generator=seeded(7)).view(count, size)
    gain = brute.reward[rows] - brute.law @ brute.reward
    if size > 1:
        gain = (gain - gain.mean(1, keepdim=True)) * size / (size - 1)
    mask = brute.mask.double()

    def loss(leaf, rows, gain):
        table = torch.log_softmax(leaf, 1)
        log_pi = table[brute.states[rows], brute.tokens[rows]] * mask[rows]
        gains = gain[:, None].expand(log_pi.shape) * mask[rows]
        return with_square(log_pi, log_pi.detach(), brute.log_ref[rows], gains, mask[rows])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=10_000)
    g = each(theta, rows, gain).flatten(1)
    off = (g - g.mean(0)).square().sum(1)
    error = float(off.std()) / math.sqrt(count)
    found = (
        variance_of_one(case.flow, theta)
        if size == 1
        else variance_of_group(case.flow, theta, size)
    )
    assert not isinstance(found, Interval)
    assert float(off.mean()) == pytest.approx(found, abs=4 * error)
    assert error < 0.05 * found
