"""SMC: unbiased for Z whatever the twists, exact where policy and twists are."""

from __future__ import annotations

import math

import pytest
import torch
from brute_force import EnumeratedEBM, log_sum_exp
from toy_policies import (
    PROMPTS,
    Only,
    close,
    everything,
    responses,
    scores_of,
    seeded,
    tabular,
    transformer,
)

import rl_ebm
from rl_ebm.certificates.smc import smc, systematic
from rl_ebm.policies import Tabular

INF = math.inf
SPACES = [rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(3, 4, eos_id=1)]
by_space = pytest.mark.parametrize("space", SPACES, ids=["fixed", "eos"])


def reward_of(space, scores):
    """A reward function with one score for each response (and prompt), by Python look-up."""
    place = {y: i for i, y in enumerate(responses(space))}
    table = scores.tolist()

    def reward(tokens, lengths, prompt_ids=None):
        ids = [None] * len(tokens) if prompt_ids is None else prompt_ids.tolist()
        values = [
            (table if p is None else table[p])[place[tuple(y[:n])]]
            for y, n, p in zip(tokens.tolist(), lengths.tolist(), ids, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    return reward


def ebm_of(space, scale=2.0, beta=0.7, prompts=None, forbid=0.0, reference=True, seed=0):
    scores = scale * scores_of(space, None if prompts is None else len(prompts), seed=seed)
    forbidden = torch.rand(scores.shape, generator=seeded(5), dtype=torch.float64) < forbid
    reward = reward_of(space, scores.masked_fill(forbidden, -INF))
    p_ref = tabular(space, seed=7) if reference else None
    return rl_ebm.EBM(space, reward, beta, p_ref, prompts)


def log_z_of(ebm, prompt=0):
    """By listing all responses."""
    tokens, lengths, _, _ = everything(ebm.space)
    ids = torch.full((len(tokens),), prompt)
    return log_sum_exp(ebm.log_weight(tokens, lengths, ids).tolist())


def check_unbiased(log_z, want):
    """The mean of the estimates of Z within 4 of its standard errors."""
    ratio = (log_z - want).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))


def optimistic(tokens, depth, prompt_ids):
    """A poor twist: it likes token 2, and nothing of it is right."""
    return 0.8 * (tokens[:, :depth] == 2).double().sum(1) - 0.3


# Exact cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "forbid"), [(1.0, 0.0), (30.0, 0.0), (1.0, 0.4)])
@by_space
def test_exact_twists_and_policy_leave_no_variance(space, scale, forbid):
    ebm = ebm_of(space, scale, forbid=forbid)
    result = smc(ebm, rl_ebm.solve(ebm), 7, generator=seeded(), runs=50, ess_threshold=1)
    close(result.log_z, torch.full((50,), log_z_of(ebm), dtype=torch.float64), 1e-9)
    close(result.log_weights, torch.full((50, 7), -math.log(7), dtype=torch.float64), 1e-9)
    close(result.ess, torch.full((50, space.max_length), 7.0, dtype=torch.float64), 1e-9)


@by_space
def test_the_exact_policy_needs_no_twists(space):
    ebm = ebm_of(space)
    exact = Only(rl_ebm.solve(ebm), "logits")
    result = smc(ebm, exact, 5, generator=seeded(), runs=20)
    close(result.log_z, torch.full((20,), log_z_of(ebm), dtype=torch.float64), 1e-9)
    assert not bool(result.resampled.any())


@by_space
def test_exact_twists_given_as_a_function_are_those_of_the_policy(space):
    ebm = ebm_of(space)
    solution = rl_ebm.solve(ebm)
    slow = EnumeratedEBM(_immediate(solution), space.eos_id)

    def value(tokens, depth, prompt_ids):
        rows = [
            0.0 if space.eos_id in y[:depth] else slow.value(tuple(y[:depth]))
            for y in tokens.tolist()
        ]
        return torch.tensor(rows, dtype=torch.float64)

    policy = tabular(space, seed=3)
    policy.load_state_dict({"table": torch.cat(solution.tables(), dim=1)})
    result = smc(ebm, policy, 5, value, generator=seeded(), runs=20)
    close(result.log_z, torch.full((20,), log_z_of(ebm), dtype=torch.float64), 1e-9)


def _immediate(solution):
    sizes = [solution.space.num_prefixes(t) for t in range(solution.space.max_length)]
    return [solution.r_rows(t, slice(0, n)) for t, n in enumerate(sizes)]


# Unbiasedness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("twists", [None, optimistic])
@by_space
def test_estimates_of_z_are_unbiased(space, twists, threshold):
    ebm = ebm_of(space)
    policy = tabular(space, seed=1)
    result = smc(ebm, policy, 8, twists, seeded(2), runs=4000, ess_threshold=threshold)
    check_unbiased(result.log_z, log_z_of(ebm))
    assert bool(result.resampled.any()) == (twists is not None and threshold > 0)


@by_space
def test_values_of_the_policy_are_its_twists(space):
    ebm = ebm_of(space, scale=1.0)
    q = [t + 0.5 * torch.randn(t.shape, generator=seeded(4)) for t in rl_ebm.solve(ebm).tables()]
    values = Tabular.from_tables(q, space, logits_are_values=True)
    result = smc(ebm, values, 16, generator=seeded(3), runs=4000)
    check_unbiased(result.log_z, log_z_of(ebm))
    assert 0 < float(result.resampled.double().mean()) < 1
    plain = smc(ebm, Tabular.from_tables(q, space), 16, generator=seeded(3), runs=4000)
    check_unbiased(plain.log_z, log_z_of(ebm))


@by_space
def test_impossible_responses_and_particles_that_die(space):
    ebm = ebm_of(space, forbid=0.7)
    result = smc(ebm, tabular(space, seed=1), 4, optimistic, seeded(2), runs=4000)
    check_unbiased(result.log_z, log_z_of(ebm))
    assert bool(torch.isneginf(result.log_weights).any())
    dead = torch.isneginf(result.log_z)
    assert bool(dead.any())
    assert bool(torch.isneginf(result.log_weights[dead]).all())
    assert not bool(torch.isneginf(result.log_weights[~dead]).all(1).any())
    assert not bool(torch.isnan(result.log_z).any() | torch.isnan(result.log_weights).any())


@by_space
def test_without_a_reference(space):
    ebm = ebm_of(space, reference=False)
    result = smc(ebm, tabular(space, seed=1), 8, optimistic, seeded(2), runs=4000)
    check_unbiased(result.log_z, log_z_of(ebm))


@by_space
def test_every_run_answers_its_prompt(space):
    ebm = ebm_of(space, prompts=PROMPTS)
    ids = torch.arange(3).repeat(3000)
    policy = tabular(space, PROMPTS, seed=1)
    result = smc(ebm, policy, 6, optimistic, seeded(2), runs=9000, prompt_ids=ids)
    for prompt in range(3):
        check_unbiased(result.log_z[ids == prompt], log_z_of(ebm, prompt))
    assert torch.equal(result.particles.prompt_ids, ids.repeat_interleave(6))


@by_space
def test_a_cache_is_read_again_after_resampling(space):
    ebm = ebm_of(space)
    policy = transformer(space)
    policy.head.weight.data *= 0.2  # all lengths
    policy.head.bias.data.zero_()
    reward = ebm.reward_model.function
    ebm = rl_ebm.EBM(space, reward, reference=transformer(space, seed=1))
    cached = smc(ebm, policy, 9, optimistic, seeded(2), runs=30, ess_threshold=1)
    ebm = rl_ebm.EBM(space, reward, reference=Only(ebm.reference, "logits"))
    plain = smc(ebm, Only(policy, "logits"), 9, optimistic, seeded(2), runs=30, ess_threshold=1)
    assert bool(cached.resampled[:, :-1].any())
    assert torch.equal(cached.particles.tokens, plain.particles.tokens)
    close(cached.log_z, plain.log_z, 1e-9)


@pytest.mark.parametrize("way", ["forbidden", "dead end", "twist"])
@by_space
def test_what_is_lost_on_the_way_makes_z_smaller(space, way):
    ebm = ebm_of(space)
    table = tabular(space, seed=1)
    twists = optimistic
    if way == "dead end":  # it goes there, and finds nothing that it may do
        table.table.data[0, space.state_offset(1) + space.rank(torch.tensor(2))] = -INF
    elif way == "forbidden":
        table.table.data[0, 0, 2] = -INF
    else:  # no weight at first, and some later, when it is too late

        def twists(tokens, depth, prompt_ids):
            log_psi = optimistic(tokens, depth, prompt_ids)
            return log_psi.masked_fill((tokens[:, 0] == 2) & (depth < 3), -INF)

    result = smc(ebm, table, 8, twists, seeded(2), runs=4000)
    tokens, lengths, _, _ = everything(space)
    rest = tokens[:, 0] != 2
    log_w = ebm.log_weight(tokens, lengths)[rest]
    check_unbiased(result.log_z, log_sum_exp(log_w.tolist()))


# Shapes and limits -------------------------------------------------------------------------------


@by_space
def test_particles_are_responses_with_their_weights(space):
    ebm = ebm_of(space)
    policy = tabular(space, seed=1)
    result = smc(ebm, policy, 400, optimistic, seeded(), runs=3)
    batch = result.particles
    assert torch.equal(space.check(batch.tokens, batch.lengths), batch.lengths)
    close(result.log_weights.exp().sum(1), torch.ones(3).double())
    # Weighted particles estimate expectations under the target.
    solution = rl_ebm.solve(ebm)
    tokens, lengths, _, _ = everything(space, pad=0)
    law = solution.log_prob(tokens, lengths).exp()
    want = float((law * (tokens[:, 0] == 2)).sum())
    got = (result.log_weights.exp().flatten() * (batch.tokens[:, 0] == 2)).sum() / 3
    assert float(got) == pytest.approx(want, abs=0.1)


@by_space
def test_one_particle_is_importance_sampling(space):
    ebm = ebm_of(space)
    policy = tabular(space, seed=1)
    result = smc(ebm, policy, 1, optimistic, seeded(), runs=30)
    batch = result.particles
    log_pi = rl_ebm.policies.log_prob(policy, space, batch.tokens, batch.lengths)
    close(result.log_z, (ebm.log_weight(batch.tokens, batch.lengths) - log_pi).detach(), 1e-9)
    close(result.ess, torch.ones_like(result.ess))


def test_all_impossible_is_minus_infinity():
    space = SPACES[0]
    ebm = rl_ebm.EBM(space, lambda tokens, lengths: torch.full((len(tokens),), -INF))
    result = smc(ebm, tabular(space), 4, optimistic, seeded(), runs=2)
    assert result.log_z.tolist() == [-INF, -INF]
    assert bool(torch.isneginf(result.log_weights).all())
    assert result.ess[:, -1].tolist() == [0, 0]


def test_ended_particles_take_part_in_resampling_and_stay_as_they_are():
    space = SPACES[1]
    ebm = ebm_of(space)
    result = smc(ebm, tabular(space, seed=1), 50, optimistic, seeded(), runs=20, ess_threshold=1)
    assert set(result.particles.lengths.tolist()) == {1, 2, 3, 4}


def test_the_same_seed_gives_the_same_run():
    ebm = ebm_of(SPACES[1])
    first, second = (
        smc(ebm, tabular(SPACES[1]), 6, optimistic, seeded(8), runs=3) for _ in range(2)
    )
    assert torch.equal(first.log_z, second.log_z)


def test_a_module_is_evaluated_and_left_in_its_mode():
    space = SPACES[0]
    policy = transformer(space).train()
    seen = []
    policy.register_forward_hook(lambda *_: None)
    step = policy.step
    policy.step = lambda *args: (seen.append(policy.training), step(*args))[1]
    smc(ebm_of(space), policy, 2, generator=seeded())
    assert seen
    assert not any(seen)
    assert policy.training


def test_systematic_resampling_is_within_one_of_its_share():
    log_w = torch.randn(40, 25, generator=seeded(), dtype=torch.float64)
    log_w[:, -3:] = -INF
    log_w[:, [0, 4]] = -INF
    shift = torch.rand(40, 1, generator=seeded(1), dtype=torch.float64)
    shift[0], shift[1] = 0.0, 1 - 2.0**-53
    chosen = systematic(log_w, shift)
    counts = torch.stack([torch.bincount(row, minlength=25) for row in chosen])
    share = 25 * log_w.softmax(-1)
    assert bool(((counts - share).abs() < 1 + 1e-9).all())
    assert int(counts[:, [0, 4, -1, -2, -3]].sum()) == 0
    many = systematic(log_w[:1].expand(20_000, -1), torch.rand(20_000, 1, generator=seeded(2)))
    mean = torch.bincount(many.flatten(), minlength=25) / 20_000
    close(mean.double(), share[0], 0.02)


# Errors -----------------------------------------------------------------------------------------


def test_wrong_arguments():
    space = SPACES[0]
    ebm, policy = ebm_of(space), tabular(space)
    with pytest.raises(ValueError, match="num_particles and runs"):
        smc(ebm, policy, 0)
    with pytest.raises(ValueError, match="num_particles and runs"):
        smc(ebm, policy, 1, runs=0)
    with pytest.raises(ValueError, match="ess_threshold must be"):
        smc(ebm, policy, 1, ess_threshold=1.5)
    with pytest.raises(ValueError, match="one number for each particle"):
        smc(ebm, policy, 2, lambda *_: torch.zeros(1))
    with pytest.raises(ValueError, match="NaN or"):
        smc(ebm, policy, 2, lambda tokens, *_: torch.full((len(tokens),), INF))
    with pytest.raises(ValueError, match="other prompts"):
        smc(ebm, tabular(space, PROMPTS), 2)
    with pytest.raises(ValueError, match="give prompt_ids"):
        smc(ebm_of(space, prompts=PROMPTS), policy, 2, runs=2)
