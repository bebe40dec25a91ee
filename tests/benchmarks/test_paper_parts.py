"""The measures that the paper's scripts report, against closed forms and enumeration."""

import math

import pytest
import torch

from benchmarks.paper import (
    common,
    contrast,
    figures,
    figures_tables,
    function_space,
    sampled_ebm,
    samples,
    traces,
    weights,
)
from benchmarks.paper.chain import Chain
from benchmarks.paper.fit import SMALL, gap, log_law, make_arm, scores
from rl_ebm import TokenSpace


def setting(method, law="normal"):
    return sampled_ebm.make_setting(sampled_ebm.Sampled(method, law, 3, 3, 1.0, 3e-3, 0))


def test_deviations_find_a_planted_error():
    job = function_space.Identities(3, 3, None, 2, seed=0)
    found = dict(function_space.deviations(job))
    assert list(found) == list(function_space.IDENTITIES)
    assert max(found.values()) < 1e-12
    space = TokenSpace(3, 3)
    tables = function_space.tables(space, 1, torch.Generator().manual_seed(0))
    total = function_space.along(tables, space)
    tokens, _ = space.sequences()
    at = {tuple(y): i for i, y in enumerate(tokens.tolist())}
    y = (2, 0, 1)
    want = tables[0][0, 0, 2] + tables[1][0, 2, 0] + tables[2][0, 2 * 3 + 0, 1]
    assert float(total[0, at[y]]) == pytest.approx(float(want))
    other = [x.clone() for x in tables]
    other[1][0, 0, 0] += 0.25
    assert function_space.largest(other, tables) == pytest.approx(0.25)


@pytest.mark.slow
def test_descent_reaches_the_conditional_entropy():
    rows = function_space.measure(function_space.Descent(2, 2, 2, steps=4000, seed=0))
    last = {row["what"]: row["value"] for row in rows}
    assert abs(last["EBM risk - H(Y|X)"]) < 1e-9
    assert abs(last["ARM risk - H(Y|X)"]) < 1e-9
    assert last["|log pi of the ARM - of M(EBM)|"] < 1e-4
    assert last["-E log rho(X, Y) - H(Y|X)"] > 0.1


def test_effective_rank_counts_directions_of_equal_size():
    x = torch.eye(4).double().repeat(50, 1)
    x = torch.cat([x, -x])  # centred, the same variance in each of 4 directions
    assert weights.effective_rank(x) == pytest.approx(4)
    line = torch.randn(100, 1).double() @ torch.randn(1, 6).double()
    assert weights.effective_rank(line) == pytest.approx(1, abs=1e-6)


def test_cka_is_one_up_to_a_rotation_and_small_for_noise():
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4000, 6, generator=g).double() for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g).double())[0]
    assert weights.cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert weights.cka(x, noise) < 0.02


def test_positions_do_not_make_two_models_alike():
    space = TokenSpace(2, 3)
    g = torch.Generator().manual_seed(0)
    offsets = 10 * torch.randn(2, 1, 4, 6, generator=g).double()  # two models, positions 0 to 3
    x, y = torch.randn(2, 2000, 4, 6, generator=g).double() + offsets
    x, y = (weights.at_positions(z, space) for z in (x, y))
    assert x.shape == (6000, 6)  # the last position is left out
    torch.testing.assert_close(x.view(2000, 3, 6).mean(0), torch.zeros(3, 6).double())
    assert weights.cka(x, y) < 0.02


def test_the_probe_reads_what_is_linear_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 5, generator=g).double()
    noise = torch.randn(2000, generator=g).double()
    linear = x @ torch.arange(5).double() + 7
    assert weights.probe(x, linear) < 1e-4
    # Whatever the offset and the size of a feature.
    assert weights.probe(100 + x * torch.tensor([1, 1e-3, 1, 1e3, 1]), linear) < 1e-4
    assert weights.probe(x, noise) == pytest.approx(1, abs=0.02)
    half = linear / linear.std() + noise
    assert weights.probe(x, half) == pytest.approx(0.5, abs=0.05)


def test_features_end_in_what_the_head_reads():
    space = TokenSpace(3, 3)
    tokens, lengths = space.sequences()
    policy = make_arm(space, SMALL, 0)
    last = weights.features(policy, space)[-1]
    torch.testing.assert_close(
        policy.head(last.float()), policy.logits(tokens), atol=1e-5, rtol=1e-5
    )
    for kind in ("EBM", "EBM-causal"):
        reward = weights.make(weights.Weights(kind, "normal", 3, 3, 1, 0), space)
        last = weights.features(reward, space)[-1].float()
        torch.testing.assert_close(
            reward.head(last.mean(1))[:, 0],
            reward(tokens, lengths, torch.zeros_like(lengths)),
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_causal_ebm_alone_does_not_see_later_tokens():
    space = TokenSpace(3, 3)
    for kind, blind in (("EBM", False), ("EBM-causal", True)):
        reward = weights.make(weights.Weights(kind, "normal", 3, 3, 1, 0), space)
        first = weights.features(reward, space)[-1].view(3, 9, 4, -1)[:, :, 1]
        assert torch.allclose(first, first[:, :1].expand_as(first)) == blind


def test_rank_correlation_and_slope():
    assert weights.spearman([1.0, 2.0, 3.0], [1.0, 10.0, 100.0]) == pytest.approx(1)
    assert weights.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    points = [(n, 3 / n**0.7) for n in (100, 10_000)]
    assert samples.exponent(*points) == pytest.approx(0.7)


def test_the_empirical_law_is_that_of_the_draws():
    log_rho = torch.log_softmax(torch.arange(5).double(), 0)
    share = samples.empirical(log_rho, 100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(share.exp(), log_rho.exp(), atol=0.01, rtol=0)
    few = samples.empirical(log_rho, 1, torch.Generator().manual_seed(0))
    assert int(torch.isneginf(few).sum()) == 4
    log_p = torch.log_softmax(torch.randn(5).double(), 0)
    assert samples.likelihood(log_p, few) == pytest.approx(float(log_p[few == 0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", traces.LOSSES)
def test_the_trace_losses_have_the_gradient_of_the_answers_kl(kind):
    answers, space = TokenSpace(2, 2), TokenSpace(2, 3)
    policy = make_arm(space, traces.TINY, 0).double()
    log_star = torch.log_softmax(torch.randn(4, generator=torch.Generator().manual_seed(1)), 0)
    log_star = log_star.double()
    weight = policy.head.weight

    log_joint = traces.joint(policy).view(-1, answers.num_sequences)
    log_p = torch.logsumexp(log_joint, 0)
    assert float(log_p.detach().exp().sum()) == pytest.approx(1)
    want = torch.autograd.grad((log_p.exp() * (log_p - log_star)).sum(), weight)[0]

    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        log_joint = traces.joint(policy).view(-1, answers.num_sequences)
        value = traces.loss(log_joint, log_star, kind, generator)
        draws.append(torch.autograd.grad(value, weight)[0])
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - want).abs() < 5 * error + 1e-4).all())
    assert float(want.abs().max()) > 20 * float(error.max()), "too noisy to see anything"


@pytest.mark.parametrize(("method", "scale", "steps"), [("gibbs", 20, 120), ("metropolis", 5, 120)])
@pytest.mark.slow
def test_chains_draw_from_the_ebm_when_it_stands_still(method, scale, steps):
    s = setting(method)
    with torch.no_grad():
        s.reward.head.weight.mul_(scale)  # far from uniform
        s.policy.head.weight.mul_(0.2)  # a proposal that is far off needs many steps
    step = contrast.METHODS[method](s)
    s.set_rate(1.0)
    counts = torch.zeros(27).double()
    for i in range(steps):
        drawn = step()
        if i >= steps // 6:
            lengths = torch.full((len(drawn),), 3)
            counts += torch.bincount(s.space.sequence_indices(drawn, lengths), minlength=27)
    p = torch.softmax(scores(s.reward), 0)
    uniform_tv = float((p - 1 / 27).abs().sum() / 2)
    assert uniform_tv > 0.2
    assert float((p - counts / counts.sum()).abs().sum() / 2) < 0.05


@pytest.mark.slow
def test_nce_learns_the_log_partition_function():
    s = setting("nce")
    with torch.no_grad():
        s.log_z.add_(1.0)
    step = contrast.nce(s)
    start = float((s.law.log_rho.exp() * (s.law.log_rho + math.log(27))).sum())
    for i in range(1000):
        s.set_rate(i / 1000)
        step()
    r = scores(s.reward)
    kl = float((s.law.log_rho.exp() * (s.law.log_rho - torch.log_softmax(r, 0))).sum())
    assert kl < 0.2 * start
    assert float(s.log_z.detach()) == pytest.approx(float(torch.logsumexp(r, 0)), abs=0.1)


@pytest.mark.slow
def test_the_policy_of_min_max_draws_its_own_negatives():
    s = setting("min-max")
    before = [p.clone() for p in s.policy.parameters()]
    step = contrast.min_max(s)
    s.set_rate(1.0)
    drawn = torch.cat([step() for _ in range(20)])
    assert all(torch.equal(a, b) for a, b in zip(before, s.policy.parameters(), strict=True))
    counts = torch.bincount(s.space.sequence_indices(drawn, torch.full((len(drawn),), 3)))
    shares = torch.nn.functional.pad(counts / counts.sum(), (0, 27 - len(counts)))
    law = log_law(s.policy).exp()
    assert float((law - 1 / 27).abs().sum() / 2) > 0.2  # one that uniform draws would miss
    assert float((law - shares).abs().sum() / 2) < 0.05
    s.set_rate(0.0)
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before, s.policy.parameters(), strict=True))


def test_the_exact_partition_function_with_all_the_data_is_the_risk(monkeypatch):
    s = setting("exact")
    draws = torch.multinomial(s.law.log_rho.exp(), 100_000, replacement=True, generator=s.generator)
    monkeypatch.setattr(s, "data", lambda: s.law.tokens[draws])
    s.set_rate(1.0)
    gradients = []
    for method in ("exact", "risk"):
        contrast.METHODS[method](s)()
        gradients.append(s.reward.head.weight.grad.clone())
    assert float(gradients[1].abs().max()) > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.02, rtol=0)


def test_the_bias_is_that_of_what_is_drawn_for_the_ebm_as_it_is():
    s = setting("gibbs")
    with torch.no_grad():
        s.reward.head.weight.mul_(5)
    r = scores(s.reward)
    before = [p.clone() for p in s.reward.parameters()]

    def always_best() -> torch.Tensor:
        return s.law.tokens[r.argmax()].expand(10, -1)

    want = float(r.max() - (torch.softmax(r, 0) * r).sum())
    assert sampled_ebm.bias(s, always_best, "gibbs")["bias"] == pytest.approx(want, abs=1e-5)
    assert sampled_ebm.bias(s, contrast.METHODS["risk"](s), "risk") == {}
    found = sampled_ebm.bias(s, always_best, "nce")
    assert found == {
        "log_z_error": pytest.approx(math.log(27) - float(torch.logsumexp(r, 0)), abs=1e-6)
    }
    sampled_ebm.bias(s, contrast.METHODS["gibbs"](s), "gibbs")
    assert all(torch.equal(a, b) for a, b in zip(before, s.reward.parameters(), strict=True))
    rows = [
        {"run": "a", "spent": x, "seconds": 10.0, "bias": b}
        for x, b in ((0.1, 9.0), (3, 1.0), (7, 2.0), (9, 9.0))
    ]
    assert sampled_ebm.along(rows, "bias") == [1.5]
    assert sampled_ebm.along(rows, "other") == []


@pytest.mark.slow
def test_beyond_enumeration_the_kl_is_estimated_with_its_error():
    s = setting("nce", "chain")
    assert isinstance(s.law, contrast.ChainLaw)
    with torch.no_grad():  # far from the law, from each other and from uniform
        s.reward.head.weight.mul_(3)
        s.policy.head.weight.mul_(2)
    tokens, lengths = s.space.sequences()
    log_rho = s.law.log_p(tokens)
    torch.testing.assert_close(
        log_rho, torch.log_softmax(s.law.chain.reward(tokens, lengths), 0), atol=1e-9, rtol=0
    )
    exact = {"kl": gap(log_rho, log_law(s.reward)), "policy_kl": gap(log_rho, log_law(s.policy))}
    found = [sampled_ebm.estimate(s, 400, seed) for seed in range(60)]
    for key, want in exact.items():
        assert want > 0.2
        values = torch.tensor([x[key] for x in found]).double()
        error = float(torch.tensor([x[f"{key}_error"] for x in found]).mean())
        assert abs(float(values.mean()) - want) < 5 * error / math.sqrt(60)
        assert 0.7 * error < float(values.std()) < 1.4 * error
    # All weights are equal where the EBM is the mixture itself: then every draw counts.
    mixture = torch.stack([log_rho, log_law(s.policy), torch.full_like(log_rho, -math.log(27))])
    log_m = torch.logsumexp(mixture, 0) - math.log(3)
    index = s.space.sequence_indices
    s.r = lambda x: log_m[index(x, torch.full((len(x),), 3))]
    assert sampled_ebm.estimate(s, 400, 0)["ess"] == pytest.approx(1.0)
    assert all(x["ess"] < 0.9 for x in found)


def test_a_law_draws_what_it_says():
    chain = Chain.random(TokenSpace(3, 3), 1.5, 0)
    tokens, lengths = chain.space.sequences()
    log_rho = torch.log_softmax(chain.reward(tokens, lengths), 0)
    for law in (contrast.ChainLaw(chain), contrast.Enumerated(chain.space, log_rho)):
        drawn = law.draw(20_000, torch.Generator().manual_seed(0))
        index = chain.space.sequence_indices(drawn, torch.full((20_000,), 3))
        share = torch.bincount(index, minlength=27).double() / 20_000
        assert float((share - log_rho.exp()).abs().sum() / 2) < 0.03
        torch.testing.assert_close(law.log_p(drawn), log_rho[index])


def test_the_best_rate_is_that_of_the_smallest_kl_at_the_end():
    rows = [{"lr": lr, "kl": kl} for lr, kl in ((1e-2, 0.1), (1e-2, 5.0), (1e-3, 9.0), (1e-3, 0.5))]
    assert sampled_ebm.best_rate(rows) == 1e-3


def test_the_rate_is_that_of_the_smallest_area_once_all_were_tried():
    def rows(gaps):
        return [{"layers": 2, "lr": lr, "gap": g} for lr, g in gaps]

    some = [(1e-3, 0.1), (1e-3, 0.1), (1e-4, 9.0)]
    assert figures.chosen_rate(rows([*some, (3e-3, 0.5)]), 2) == 1e-3
    assert figures.chosen_rate(rows(some), 2) == 3e-3  # one was not tried
    assert figures.chosen_rate(rows([*some, (3e-3, 0.5)]), 3) == 3e-3


def test_few_values_are_shown_with_their_range_and_against_the_papers():
    assert common.spread([1.0, 100.0, 3.0]) == "3 (1 to 1e+02)"
    assert common.spread([]) == "not run"
    assert figures_tables.compared([], 1.0) == "not run / 1"
    assert figures_tables.compared([2.0, 4.0, 8.0], 16.0).endswith("/ 16 (0.25 x)")


def test_what_the_last_steps_gain_is_told_by_the_runs():
    """Of each seed by itself; what an EBM was not trained beside is told apart."""
    rows = [
        {"model": "choice", "init": init, "beta2": 0.9, "seed": seed, "step": step, "gap": gap}
        for init, factor in (("flax", 20.0), ("torch", 2.0))
        for seed in (0, 1)
        for step, gap in ((500, 9.0), (4900, 10.0**-seed * factor), (5000, 10.0**-seed))
    ]
    choices = [("flax", 0.9), ("torch", 0.9), ("torch", 0.5)]
    assert figures_tables.gains(rows, "flax", 0.9, 100) == pytest.approx([20.0, 20.0])
    told = figures_tables.orders(rows, choices)
    assert told.startswith("an order of magnitude or more with flax's with 0.9 (20 x); less with")
    assert told.endswith("torch's with 0.9 (2 x)")
    (_, _, *_, gained), (*_, other), missing = figures_tables.choice_lines(rows, choices)[1:]
    assert (gained.split()[0], other.split()[0], missing[-1]) == ("20", "2", "not run")
    arm = {"model": "ARM", "vocab_size": 4, "max_length": 8, "layers": 2, "lr": 1.0, "step": 5000}
    arms = [
        arm
        | {"run": str(i), "seed": i, "ebm": i == 0, "gap": 1.0}
        | dict.fromkeys(("before", "after", "invariant"), 2.0 + i)
        for i in range(3)
    ]
    assert figures_tables.to_the_law(arms, [(4, 8, 2)]).startswith("3 to 4, 3 to 4 and 3 to 4")
    assert figures_tables.invariants(arms, [(4, 8, 2)]) == "2 (one run) (V=4, T=8, N=2)"
    (line,) = figures_tables.gap_lines(arms, [], [(4, 8, 2)])
    assert line[3:] == (
        "not run / 8.2e-06",
        "2 (one run) / 14 (0.14 x)",
        "2 (one run) / 0.039 (51 x)",
    )


def test_a_bar_in_a_cell_does_not_split_it():
    assert common.table(["a"], [["|q|"], ["b"]]).splitlines() == [
        "| a |",
        "|---|",
        "| \\|q\\| |",
        "| b |",
    ]
