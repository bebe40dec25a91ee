"""The scripts that check the paper: what they fit, and that every one of them runs."""

import csv
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.paper import common, fit, laws
from benchmarks.paper.bounds import against
from benchmarks.paper.chain import Chain, kl_terms
from benchmarks.paper.common import HERE, SECTIONS, Options, collect
from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.policies import log_prob
from rl_ebm.studies import seeds as intervals
from rl_ebm.tokens import Batch

SCRIPTS = [name for name in SECTIONS if (HERE / f"{name}.py").exists()]


# What is fitted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "a", "t", "ebm", "arm"),
    [(2, 8, 4, 3633, 3752), (3, 8, 4, 76609, 77064), (2, 4, 8, None, 3684), (3, 4, 8, None, 76804)],
)
def test_the_models_have_as_many_parameters_as_the_papers(layers, a, t, ebm, arm):
    space, config = TokenSpace(a, t), fit.SIZES[layers]
    assert fit.parameters(fit.make_arm(space, config, 0)) == arm
    if ebm is not None:
        assert fit.parameters(fit.make_ebm(space, config, 0)) == ebm


def test_zipf_gives_rank_k_a_share_of_one_over_k():
    space = TokenSpace(3, 2)
    harmonic = sum(1 / k for k in range(1, 10))
    want = [math.log(1 / k / harmonic) for k in range(1, 10)]
    torch.testing.assert_close(laws.zipf(space), torch.tensor(want).double())
    permuted = laws.permuted_zipf(space, seed=1)
    torch.testing.assert_close(permuted.sort(descending=True).values, torch.tensor(want).double())
    assert not torch.equal(permuted, laws.zipf(space))
    assert not torch.equal(permuted, laws.permuted_zipf(space, seed=2))


def test_a_normal_law_is_a_softmax_whose_log_ratios_scale_with_one_over_t():
    space = TokenSpace(3, 2)
    hot, cold = (laws.normal(space, t, seed=0) for t in (1.0, 0.25))
    assert float(hot.exp().sum()) == pytest.approx(1)
    torch.testing.assert_close(cold - cold[0], 4 * (hot - hot[0]))


def test_lookahead_lets_the_first_token_choose_what_the_last_may_be():
    space = TokenSpace(4, 3)
    log_p = laws.lookahead(space, seed=0, penalty=5.0).view(4, 4, 4)
    assert torch.equal(log_p, log_p[:, :1].expand_as(log_p))  # the middle token changes nothing
    good = log_p[:, 0] == log_p.max()
    torch.testing.assert_close(log_p[:, 0][~good], (log_p.max() - 5).expand(int((~good).sum())))
    counts = good.sum(1).tolist()
    assert all(1 <= n <= 3 for n in counts)
    assert len(set(counts)) > 1  # V of the first token is not constant


def test_pairs_are_summed_as_scores_or_as_logits():
    space = TokenSpace(3, 4)
    tokens, _ = space.sequences()
    terms = list(laws._pairs(space, 4, 1.5))
    assert not torch.equal(terms[1][:27], terms[1][27:54])  # the first token matters
    picked = sum(x.gather(1, tokens[:, [t]])[:, 0] for t, x in enumerate(terms))
    log_p = laws.pairwise(space, 4)
    torch.testing.assert_close(log_p - log_p[0], picked - picked[0])
    # A sum over pairs has no interaction of three tokens: its mixed third differences vanish.
    r, log_q = (f(space, 4).view(3, 3, 3, 3) for f in (laws.pairwise, laws.additive_logits))
    third = [x.diff(dim=0).diff(dim=1).diff(dim=2).abs().max() for x in (r, log_q)]
    assert float(third[0]) < 1e-12
    assert float(third[1]) > 0.01
    for log_law in (r, log_q):
        assert float(log_law.exp().sum()) == pytest.approx(1)
    # The logits before the last token, of the additive law, are the terms up to a constant.
    last = log_q.flatten(0, 2).log_softmax(1)
    torch.testing.assert_close(last, terms[3].view(27, 3, 3)[:, 0].log_softmax(1))


def test_parity_has_the_same_value_at_every_prefix_of_a_depth():
    solution = solve(EBM(TokenSpace(4, 3), laws.parity(TokenSpace(4, 3), 1)))
    for v in solution.v:
        torch.testing.assert_close(v, v[..., :1].expand_as(v))


def test_geometric_intervals_are_students_on_the_logarithms():
    logs = torch.tensor([0.0, 1.0, 5.0]).double()
    half = 4.3026527 * float(logs.std()) / math.sqrt(3)
    want = [math.exp(2 + k * half) for k in (0, -1, 1)]
    assert intervals.geometric(logs.exp().tolist()) == pytest.approx(want)
    assert intervals.geometric([4.0])[1:] == (0.0, pytest.approx(math.exp(700)))
    assert intervals.geometric_interval([]) == "not run"
    assert intervals.geometric_interval([4.0]) == "4 (one run)"


def test_the_schedule_is_a_trapezoid():
    schedule = fit.Schedule(steps=1000, lr=0.5, ramp=100)
    assert schedule.rate(0) == pytest.approx(0.005)
    assert schedule.rate(99) == schedule.rate(500) == schedule.rate(900) == 0.5
    assert schedule.rate(999) == pytest.approx(0.005)
    assert max(fit.Schedule(steps=3).rate(k) for k in range(3)) <= fit.Schedule().lr


def test_the_schedules_beta2_is_adams(monkeypatch):
    seen, adam = [], torch.optim.Adam
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *args, **kwargs: seen.append(kwargs) or adam(*args, **kwargs)
    )
    space = TokenSpace(2, 2)
    policy = fit.make_arm(space, fit.SMALL, 0)
    list(fit.watch(policy, laws.zipf(space), fit.Schedule(steps=1, beta2=0.7)))
    assert seen == [{"lr": 3e-3, "betas": (0.9, 0.7)}]


def test_the_arms_risk_is_the_kl_by_enumeration():
    space = TokenSpace(3, 3)
    policy, log_rho = fit.make_arm(space, fit.SMALL, 0), laws.normal(space, 0.5, 0)
    tokens, lengths = space.sequences()
    log_p = log_prob(policy, space, tokens, lengths).double()
    want = torch.sum(log_rho.exp() * (log_rho - log_p))
    want.backward()
    want, log_p = want.detach(), log_p.detach()
    gradient = policy.head.weight.grad.clone()
    policy.zero_grad()

    got = fit.descend_arm(policy, log_rho)()

    assert float(got) == pytest.approx(float(want), abs=1e-5)
    torch.testing.assert_close(policy.head.weight.grad, gradient, atol=1e-5, rtol=1e-4)
    assert fit.gap(log_rho, log_p) == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("chunk", [8192, 10])
def test_the_ebms_risk_is_its_negative_log_likelihood(chunk, monkeypatch):
    space = TokenSpace(3, 3)
    reward, log_rho = fit.make_ebm(space, fit.SMALL, 0), laws.normal(space, 0.5, 0)
    tokens, lengths = space.sequences()
    score = reward(tokens, lengths, torch.zeros_like(lengths))
    want = -(log_rho.exp() * torch.log_softmax(score.double(), 0)).sum()
    want.backward()
    want, score = want.detach(), score.detach()
    gradients = [p.grad.clone() for p in reward.parameters()]
    reward.zero_grad()
    monkeypatch.setattr(fit, "CHUNK", chunk)

    got = fit.descend_ebm(reward, log_rho)()

    assert float(got) == pytest.approx(float(want), abs=1e-5)
    for p, gradient in zip(reward.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.scores(reward), score.double(), atol=1e-5, rtol=1e-5)


def test_a_fit_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    space = TokenSpace(3, 2)
    log_rho, schedule = laws.normal(space, 0.5, 0), fit.Schedule(steps=8)
    monkeypatch.setattr(fit, "EVERY", 2)

    def run(stop, checkpoint):
        policy, log = fit.make_arm(space, fit.SMALL, 0), []
        for step in fit.fit(policy, fit.descend_arm(policy, log_rho), schedule, log, checkpoint):
            if not log or log[-1]["step"] != step:
                log.append({"step": step})
            if step == stop:
                break
        return policy, [row["step"] for row in log]

    whole, steps = run(None, None)
    path = tmp_path / "part.pt"
    run(5, path)
    assert path.exists()
    resumed, resumed_steps = run(None, path)

    assert resumed_steps == steps == list(range(9))
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not path.exists()


def test_flax_init_scales_weights_by_their_fan_in():
    model = fit.make_arm(TokenSpace(8, 4), fit.LARGE, 0)
    up, token = model.backbone.blocks[0].up, model.backbone.token.weight.detach()
    weight = up.weight.detach()
    assert float(weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(weight.abs().max()) <= 2.3 * 64**-0.5  # cut off at two standard deviations
    assert not up.bias.any()
    assert float(token.std()) == pytest.approx(64**-0.5, rel=0.1)


def test_bounds_and_kls_of_a_pair_of_logits_by_enumeration():
    space = TokenSpace(2, 2)
    g = torch.Generator().manual_seed(0)
    q, q_star = (2 * torch.randn(3, 2, generator=g).double() for _ in range(2))

    def law(rows):
        pi = rows.softmax(-1)
        return {(a, b): float(pi[0, a] * pi[1 + a, b]) for a in range(2) for b in range(2)}

    p, star, found = law(q), law(q_star), against(q, q_star, space)
    assert found["kl"] == pytest.approx(sum(p[y] * math.log(p[y] / star[y]) for y in p))
    assert found["kl_target_policy"] == pytest.approx(
        sum(star[y] * math.log(star[y] / p[y]) for y in p)
    )
    spans = [float(row.max() - row.min()) for row in q_star - q]
    assert found["linf"] == pytest.approx(max(spans) / 2)  # two actions: half the span
    assert found["prop3"] == pytest.approx(2 * 2 * max(spans) / 2)
    # With two actions a split leaves no span: the bound is the KL.
    assert found["split"] == pytest.approx(found["kl"])
    assert found["split_target"] == pytest.approx(found["kl_target_policy"])
    assert found["occupancy"] > found["kl"]
    assert found["far_states"] == pytest.approx(sum(s > 1 for s in spans) / 3)
    weight = [1.0, *(sum(star[a, b] for b in range(2)) for a in range(2))]
    assert found["far"] == pytest.approx(
        sum(w for w, s in zip(weight, spans, strict=True) if s > 1) / 2
    )


# What runs them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    size: int
    seed: int


def squares(job):
    return [{"step": k, "value": job.size * k**2} for k in range(3)]


def refuses(job):
    raise AssertionError("it was in the results")


@pytest.mark.slow
def test_jobs_whose_rows_are_there_are_not_run_again(tmp_path):
    options = Options(out=tmp_path, workers=1)
    jobs = [Job(2, 0), Job(3, 1)]
    first = collect("squares", jobs, squares, options)
    assert [row["value"] for row in first] == [0, 2, 8, 0, 3, 12]
    assert [row["seed"] for row in first] == [0, 0, 0, 1, 1, 1]

    again = collect("squares", jobs[1:], refuses, options)

    assert [row["value"] for row in again] == [0, 3, 12]
    with pytest.raises(AssertionError, match="it was in the results"):
        collect("squares", jobs, refuses, Options(out=tmp_path, workers=1, fresh=True))
    with pytest.raises(AssertionError, match="it was in the results"):
        collect("squares", [*jobs, Job(4, 0)], refuses, options)


@pytest.mark.slow
def test_when_the_time_is_over_what_is_there_is_kept(tmp_path):
    jobs, over = [Job(2, 0), Job(3, 1)], Options(out=tmp_path, workers=1, minutes=0)
    assert collect("squares", jobs, refuses, over, partial=True) == []
    collect("squares", jobs[:1], squares, Options(out=tmp_path, workers=1))
    with pytest.raises(SystemExit, match="1 runs are left: the same command goes on"):
        collect("squares", jobs, refuses, over)
    rows = collect("squares", jobs, refuses, over, partial=True)
    assert [row["value"] for row in rows] == [0, 2, 8]


def test_the_report_is_made_of_its_sections():
    intro = (HERE / "intro.md").read_text().strip()
    sections = [HERE / "results" / f"{name}.md" for name in SECTIONS]
    texts = [p.read_text().strip() for p in sections if p.exists()]
    report = (HERE / "README.md").read_text()
    assert report.startswith(intro + "\n\n- **")
    assert report.endswith("\n\n".join(texts) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_in_miniature(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.paper.{name}", "--quick", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=common.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "README.md").read_text()
    assert f"](results/{name}.png)" in report
    assert "nan" not in report.lower().split()
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000
    with open(tmp_path / "results" / f"{name}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 2


# A chain's exact solution ---------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_chain_is_solved_as_enumeration_solves_it(shared):
    space = TokenSpace(3, 4)
    chain = Chain.random(space, 1.5, 0, shared)
    assert bool((chain.couplings == chain.couplings[0]).all()) == shared
    solution = solve(EBM(space, chain.reward))
    tokens, lengths = space.sequences()
    batch = Batch(tokens, lengths, torch.zeros_like(lengths))
    want = solution.log_prob(tokens)

    torch.testing.assert_close(chain.log_z, solution.log_z[0])
    log_pi, want_log_pi = (x.logits(tokens).log_softmax(-1) for x in (chain, solution))
    torch.testing.assert_close(log_pi, want_log_pi)
    torch.testing.assert_close(chain.reward(tokens, lengths), want + solution.log_z[0])
    torch.testing.assert_close(chain.log_prob(batch), want)
    assert chain.entropy() == pytest.approx(-float((want.exp() * want).sum()))
    state = chain.start(batch.prompt_ids)
    for t in range(space.max_length):
        row = chain.step(state, tokens[:, t - 1] if t else None)
        torch.testing.assert_close(row, chain.logits(tokens)[:, t])


def test_kl_terms_have_the_kl_as_their_mean():
    space = TokenSpace(3, 3)
    one, other = (Chain.random(space, 1.0, seed) for seed in range(2))
    tokens, lengths = space.sequences()
    log_p, log_q = (x.logits(tokens).log_softmax(-1) for x in (one, other))
    batch = Batch(tokens, lengths, torch.zeros_like(lengths))
    p, q = one.log_prob(batch), other.log_prob(batch)
    got = (p.exp() * kl_terms(log_p, log_q, lengths)).sum()
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum())
