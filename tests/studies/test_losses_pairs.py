"""Losses of pairs: with lengths, with scores that are no log-ratios, and where rows are sorted."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import rl_ebm
from rl_ebm.divergences import tv
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses import drawn_pairs
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.problems import problems

BETA = 0.7


def solved(eos: bool = True, seed: int = 0) -> rl_ebm.Solution:
    """A random EBM of 15 responses of 1 to 3 tokens, or of 9, with a reference that is drawn."""
    generator = torch.Generator().manual_seed(seed)
    space = rl_ebm.TokenSpace(3, 3 if eos else 2, eos_id=1 if eos else None)
    reward = torch.randn(space.num_sequences, generator=generator, dtype=torch.float64)
    reference = Tabular.from_tables(reference_tables(space), space)
    return rl_ebm.solve(rl_ebm.EBM(space, reward, beta=BETA, reference=reference))


def reference_tables(space: rl_ebm.TokenSpace) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    depths = range(space.max_length)
    return [torch.randn(space.num_prefixes(t), 3, generator=generator).double() for t in depths]


def known(solution: rl_ebm.Solution) -> tuple[torch.Tensor, ...]:
    """R, log p_ref and the length of every response, and the law of what is chosen."""
    (problem,) = problems(solution)
    reward, log_ref = BETA * problem.g_responses, problem.log_ref_responses
    wins = torch.sigmoid(reward[:, None] - reward)
    law = 2 * log_ref.exp() * (wins @ log_ref.exp())
    return reward, log_ref, solution.space.sequences()[1].double(), law


def normalised(log_ratio, log_ref: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """p_ref exp(log_ratio(c)) with the c that makes it a law: by bisection, as it grows with c."""
    for _ in range(200):
        c = (low + high) / 2
        total = float((log_ref + log_ratio(c)).logsumexp(0))
        low, high = (c, high) if total < 0 else (low, c)
    return torch.log_softmax(log_ref + log_ratio(low), 0)


def test_ipo_of_means_over_tokens():
    """The scores s = u / n have the normal equations of IPO, and u = n (s + c) a level."""
    solution = solved()

    def ipo(chosen, rejected, chosen_ref, rejected_ref, chosen_length, rejected_length):
        gap = (chosen - chosen_ref) / chosen_length - (rejected - rejected_ref) / rejected_length
        return (gap - 1 / (2 * BETA)).square().mean()

    found = rl_ebm.audit_loss(ipo, solution, "preference", beyond=False)
    reward, log_ref, lengths, _ = known(solution)
    s = (2 * torch.sigmoid(reward[:, None] - reward) - 1) @ log_ref.exp() / (2 * BETA)
    law = normalised(lambda c: lengths * (s + c), log_ref, -30, 30)
    assert tv(found.log_laws[0], law) < 1e-10


@pytest.mark.parametrize("share", ["each", "chosen", "rejected"])
def test_what_is_chosen_is_fitted_by_how_its_tokens_count(share):
    """A mean over the tokens of each counts a response 1 / n times; one over all, whole."""
    solution = solved()

    def loss(chosen, rejected, chosen_ref, rejected_ref, chosen_length, rejected_length):
        if share == "each":
            return -(chosen / chosen_length).mean()
        return -chosen.sum() / (chosen_length if share == "chosen" else rejected_length).sum()

    found = rl_ebm.audit_loss(loss, solution, "preference", beyond=False)
    _, _, lengths, law = known(solution)
    want = law / lengths if share == "each" else law
    assert tv(found.log_laws[0], (want / want.sum()).log()) < 1e-10
    assert found.combines == ("rows" if share == "each" else "tokens")


@pytest.mark.slow
def test_the_variance_of_a_mean_over_tokens():
    """The gradient by one pair, at p_ref: its log pi by every logit, over the mean length."""
    solution = solved()

    def loss(chosen, rejected, chosen_ref, rejected_ref, chosen_length, rejected_length):
        return -chosen.sum() / chosen_length.sum()

    found = rl_ebm.audit_loss(loss, solution, "preference")
    _, _, lengths, law = known(solution)
    space = solution.space
    logits = torch.cat(reference_tables(space)).requires_grad_()
    forced = torch.arange(3) != space.eos_id  # the last token can only end a response
    last = torch.arange(len(logits)) >= len(logits) - space.num_prefixes(space.max_length - 1)
    tokens, count = space.sequences()
    states = space.state_ids(tokens)
    rows = []
    for i in range(space.num_sequences):
        at = states[i, : int(count[i])]
        allowed = logits.masked_fill(last[:, None] & forced, -torch.inf)
        log_pi = allowed.log_softmax(1)[at, tokens[i, : int(count[i])]].sum()
        (gradient,) = torch.autograd.grad(log_pi, logits)
        rows.append(gradient.flatten())
    each = torch.stack(rows) / float(law @ lengths)
    want = float(law @ each.square().sum(1)) - float((law @ each).square().sum())
    assert found.variance["reference"]["one"] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("eos", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_of_other_divergences(name, eos):
    """-log sigmoid of beta (f'(pi / p_ref) differences) is least where f' = R / beta + c, exactly
    (Wang et al. 2023, f-DPO): c is what makes it a law. These losses are not convex in log pi."""
    solution = solved(eos)
    score, inverse, top = {
        "forward_kl": (lambda u: 1 - torch.exp(-u), lambda x: -torch.log1p(-x), 1.0),
        "js": (
            lambda u: math.log(2) + logsigmoid(u),
            lambda x: x - math.log(2) - torch.log(-torch.expm1(x - math.log(2))),
            math.log(2),
        ),
        "alpha": (
            lambda u: 2 * (1 - torch.exp(-u / 2)), lambda x: -2 * torch.log1p(-x / 2), 2.0,
        ),
    }[name]  # fmt: skip

    def loss(chosen, rejected, chosen_ref, rejected_ref):
        gap = score(chosen - chosen_ref) - score(rejected - rejected_ref)
        return -logsigmoid(BETA * gap).mean()

    found = rl_ebm.audit_loss(loss, solution, "preference", beyond=False)
    reward, log_ref, *_ = known(solution)
    highest = top - float(reward.max()) / BETA - 1e-14
    law = normalised(lambda c: inverse(reward / BETA + c), log_ref, -1e3, highest)
    assert tv(found.log_laws[0], law) < 1e-9
    assert not found.is_target


def test_a_loss_that_sorts_its_batch_couples_its_rows():
    """AOT: near the reference the sorted log-ratios stand in the order of those of p_ref."""

    def aot(chosen, rejected, chosen_ref, rejected_ref):
        own, theirs = (chosen - rejected).sort().values, (chosen_ref - rejected_ref).sort().values
        return -logsigmoid(BETA * (own - theirs)).mean()

    with pytest.raises(LossError, match="couples the rows"):
        rl_ebm.audit_loss(aot, solved(), "preference", beyond=False)


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("pairs", [2**17, 20])
def test_a_mean_over_tokens_beside_one_over_pairs(pairs, monkeypatch):
    """-log sigmoid of the gap, and -log pi of the chosen one by token: the expected gradient by
    every log pi, a sum over pairs in Python, is a number times pi, however pairs make batches."""
    monkeypatch.setattr(drawn_pairs, "PAIRS", pairs)
    solution = solved()

    def loss(chosen, rejected, chosen_ref, rejected_ref, chosen_length, rejected_length):
        gap = chosen - chosen_ref - rejected + rejected_ref
        return -logsigmoid(BETA * gap).mean() - chosen.sum() / chosen_length.sum()

    found = rl_ebm.audit_loss(loss, solution, "preference", beyond=False)
    assert found.combines == "both"
    reward, log_ref, lengths, law = known(solution)
    u = found.log_laws[0] - log_ref
    slopes = [0.0] * len(u)
    mean = float(law @ lengths)
    for y in range(len(u)):
        for z in range(len(u)):
            p = 2 * math.exp(log_ref[y] + log_ref[z]) / (1 + math.exp(reward[z] - reward[y]))
            push = BETA / (1 + math.exp(BETA * (u[y] - u[z])))
            slopes[y] -= p * (push + 1 / mean)
            slopes[z] += p * push
    total = math.fsum(slopes)
    for y, slope in enumerate(slopes):
        assert slope == pytest.approx(math.exp(found.log_laws[0][y]) * total, abs=1e-10)


@pytest.mark.parametrize("scale", [1e-8, pytest.param(1e8, marks=SLOW)])
def test_a_factor_of_the_loss_moves_no_limit(scale):
    def dpo(chosen, rejected, chosen_ref, rejected_ref):
        return -scale * logsigmoid(BETA * (chosen - chosen_ref - rejected + rejected_ref)).mean()

    found = rl_ebm.audit_loss(dpo, solved(), "preference", beyond=False)
    assert found.is_target
    assert found.tv < 1e-10


def test_a_loss_that_fails_far_from_where_it_goes_is_audited():
    def dpo(chosen, rejected, chosen_ref, rejected_ref):
        gap = chosen - chosen_ref - rejected + rejected_ref
        assert float(gap.detach().abs().max()) < 9
        return -logsigmoid(BETA * gap).mean()

    assert rl_ebm.audit_loss(dpo, solved(), "preference", beyond=False).is_target


def test_a_loss_that_fails_where_it_goes_is_told_in_a_sentence():
    def dpo(chosen, rejected, chosen_ref, rejected_ref):
        gap = chosen - chosen_ref - rejected + rejected_ref
        if float(gap.detach().abs().max()) > 2:
            raise ValueError("too far")
        return -logsigmoid(BETA * gap).mean()

    with pytest.raises(LossError, match="ValueError: too far"):
        rl_ebm.audit_loss(dpo, solved(), "preference", beyond=False)


def test_lengths_are_given_where_six_arguments_are_taken():
    seen = []

    def loss(*inputs):
        seen.append(len(inputs))
        return -logsigmoid(BETA * (inputs[0] - inputs[1] - inputs[2] + inputs[3])).mean()

    assert rl_ebm.audit_loss(loss, solved(), "preference", beyond=False).is_target
    assert set(seen) == {4}

    def five(a, b, c, d, e):
        return (a - b).mean()

    with pytest.raises(LossError, match="chosen_log_pi"):
        rl_ebm.audit_loss(five, solved(), "preference", beyond=False)
