"""DPO and IPO: their losses by loops, gradients over all pairs, limits by minimising, files."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, differentiable_log_probs, gradient, unclipped
from fixed_point_cases import problem_of, small_ebm
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.agents.dpo import dpo_loss, ipo_loss, neighbours
from rl_ebm.divergences import tv
from rl_ebm.policies import Tabular, Uniform, log_prob, read_pairs, write_pairs
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.tokens import Batch

SMOOTHED = {"label_smoothing": 0.2}
CASES = [("dpo", {}), ("dpo", SMOOTHED), ("ipo", {}), ("ipo", {"tau": 0.3})]
CASE_IDS = ["dpo", "cdpo", "ipo", "ipo-0.3"]
in_every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
in_tiny_kinds = pytest.mark.parametrize(
    "kind", [((2, 2, None), None, False), ((3, 2, 0), None, True)], ids=["fixed", "eos-reference"]
)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def pair_loss(name, options, beta, margin):
    """The loss of a pair as a number, or as a tensor."""
    log = math.log if isinstance(margin, float) else torch.log
    exp = math.exp if isinstance(margin, float) else torch.exp
    if name == "ipo":
        return (margin - 1 / (2 * options.get("tau", beta))) ** 2
    eps = options.get("label_smoothing", 0.0)
    p = 1 / (1 + exp(-beta * margin))
    return -(1 - eps) * log(p) - eps * log(1 - p)


def test_the_losses_are_means_over_the_pairs_of_their_definition():
    a, b, c, d = (-3 * torch.rand(5, generator=seeded(i), dtype=torch.float64) for i in range(4))
    margins = ((a - c) - (b - d)).tolist()
    for options in ({}, SMOOTHED):
        want = math.fsum(pair_loss("dpo", options, 0.7, m) for m in margins) / 5
        assert float(dpo_loss(a, b, c, d, 0.7, **options)) == pytest.approx(want, rel=1e-12)
    want = math.fsum(pair_loss("ipo", {"tau": 0.4}, 1.0, m) for m in margins) / 5
    assert float(ipo_loss(a, b, c, d, tau=0.4)) == pytest.approx(want, rel=1e-12)
    # One argument is the leaf: who is rejected is pushed down.
    for loss in (dpo_loss, ipo_loss):
        x, y = (z.clone().requires_grad_() for z in (a, b))
        up, down = torch.autograd.grad(loss(x, y, a, b), (x, y))
        assert (up < 0).all()
        close(up, -down, 1e-12)


def test_rows_of_one_prompt_are_paired_in_their_order_wherever_they_stand():
    ids = torch.tensor([1, 0, 1, 2, 1, 0, 0, 1, 0])
    first, second, counts = neighbours(ids)
    found = sorted(zip(first[counts].tolist(), second[counts].tolist(), strict=True))
    assert found == [(0, 2), (1, 5), (4, 7), (6, 8)]
    assert not neighbours(torch.tensor([3]))[2].numel()
    assert not neighbours(torch.tensor([0, 1, 2]))[2].any()


@in_every_case
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_the_loss_of_a_step_is_the_mean_over_its_pairs(name, options, kind):
    problem = case(kind)
    policy, batch = problem.table(), problem.batch(pad=1)
    agent = unclipped(name, problem, policy, labels="exact", **options)
    log_pi = differentiable_log_probs(policy.table, problem.space).detach()
    beta, n = problem.ebm.beta, log_pi.shape[1]
    terms = []
    for p in range(len(problem.truth)):
        log_ref = torch.zeros(n) if problem.ebm.reference is None else reference_of(problem, p)
        reward = batch.reward[p * n : (p + 1) * n].double()
        for i in range(0, n - 1, 2):
            margin = float(log_pi[p, i] - log_ref[i] - log_pi[p, i + 1] + log_ref[i + 1])
            chosen = sigma(float(reward[i] - reward[i + 1]))
            terms.append(chosen * pair_loss(name, options, beta, margin))
            terms[-1] += (1 - chosen) * pair_loss(name, options, beta, -margin)
    want = math.fsum(terms) / len(terms)
    assert float(agent.update(batch)["losses/loss"]) == pytest.approx(want, rel=1e-5)


def reference_of(problem, p):
    """log p_ref of every response to a prompt."""
    table = problem.ebm.reference.table.detach()
    return differentiable_log_probs(table, problem.space)[p]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_drawn_label_is_one_way_or_the_other_by_its_probability(name):
    problem = case(((2, 2, None), None, False))
    batch = problem.batch([(0, 0), (0, 3)])
    chosen = sigma(float(batch.reward[0] - batch.reward[1]))
    agent, n = unclipped(name, problem), 400
    table = agent.policy.table.detach().clone()
    log_pi = differentiable_log_probs(table, problem.space)[0]
    margin = float(log_pi[0] - log_pi[3])
    ways = [pair_loss(name, {}, problem.ebm.beta, x) for x in (margin, -margin)]
    found = []
    for _ in range(n):
        found.append(float(agent.update(batch)["losses/loss"]))
        agent.policy.table.data.copy_(table)
    assert all(min(abs(x - w) for w in ways) < 1e-5 for x in found)
    share = sum(abs(x - ways[0]) < 1e-5 for x in found) / n
    assert abs(ways[0] - ways[1]) > 1e-2
    assert abs(share - chosen) < 5 * math.sqrt(chosen * (1 - chosen) / n)


@in_tiny_kinds
@pytest.mark.parametrize("source", ["reference", "policy"])
@in_every_case
def test_at_the_limit_the_gradient_over_all_pairs_vanishes(name, options, source, kind):
    problem = case(kind)
    entry, state = AGENTS[name], problem_of(problem.ebm)
    config = entry.config(source=source, labels="exact", max_grad_norm=1e12, **options)
    point = entry.limit(config, state)
    assert not point.degenerate
    close(float(point.log_law.exp().sum()), 1.0, 1e-12)
    at_limit, at_other = (
        all_pairs(problem, state, config, name, law) for law in (point.log_law, state.start_law)
    )
    assert at_limit < 1e-6
    assert at_other > 1e-3
    # The gradient is that of float32 rewards: the law itself is told apart in float64.
    exact = name == "dpo" and not options
    assert (float(tv(point.log_law, state.log_target)) < 1e-9) == exact


def all_pairs(problem, state, config, name, log_law):
    """The largest entry of the gradient, over all pairs of the source, at a law."""
    q = rl_ebm.q_from_r(state.at_ends(log_law), problem.space)
    policy = Tabular.from_tables(q, problem.space)
    agent = AGENTS[name].agent(problem.ebm, policy, config, seeded(), None)
    mu = (log_law if config.source == "policy" else state.start_law).exp().tolist()
    total = torch.zeros_like(policy.table)
    for i, j in product(range(len(mu)), repeat=2):
        if i != j:
            total += mu[i] * mu[j] * gradient(agent, problem.batch([(0, i), (0, j)]))
    return float(total.abs().max())


@in_every_case
def test_the_limit_of_pairs_of_the_reference_minimises_their_expected_loss(name, options):
    ebm = small_ebm((3, 2, None), beta=0.6, seed=2)
    state, entry = problem_of(ebm), AGENTS[name]
    reward, mu = state.g_responses * ebm.beta, state.start_law.exp()
    chosen = torch.sigmoid(reward[:, None] - reward)
    h = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([h], 1.0, 500, 1000, 1e-13, 0.0, 20, "strong_wolfe")

    def closure():
        search.zero_grad()
        terms = chosen * pair_loss(name, options, ebm.beta, h[:, None] - h)
        loss = 2 * (mu[:, None] * mu * terms).sum()
        loss.backward()
        return loss

    search.step(closure)
    want = torch.log_softmax(state.log_ref_responses + h.detach(), 0)
    close(entry.limit(entry.config(**options), state).log_law, want, 1e-6)


def test_a_limit_needs_to_know_who_draws():
    ebm = small_ebm((3, 2, None), forbid=True)
    state = problem_of(ebm)
    dpo, ipo = AGENTS["dpo"], AGENTS["ipo"]
    close(dpo.limit(dpo.config(source="teacher"), state).log_law, state.log_target, 0.0)
    assert dpo.limit(dpo.config(source="policy"), state).sampler is False
    assert ipo.limit(ipo.config(), state).sampler is True
    for entry, options in (
        (ipo, {"source": "teacher"}),
        (dpo, {"source": "teacher", "label_smoothing": 0.1}),
        (dpo, {"pairs": "some.jsonl"}),
        (dpo, {"forbidden_log_weight": -5.0}),  # p_ref never draws what it stands for
    ):
        point = entry.limit(entry.config(**options), state)
        assert (point.log_law, point.how) == (None, "not known")
    online = dpo.limit(dpo.config(source="policy", forbidden_log_weight=-5.0), state)
    assert float(tv(online.log_law, state.log_target)) > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"batch_size": 1}, "batch_size must be >= 2, two a pair, got 1"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ("ipo", {"tau": 0.0}, "tau must be a finite number > 0, or None for beta, got 0.0"),
        ("ipo", {"pairs": 3}, "pairs must be the path of a file, as text, or None, got 3"),
        ("ipo", {"pairs": "x", "labels": "exact"}, "leave out source and labels"),
        ("dpo", {"pairs": "x", "source": "policy"}, "leave out source and labels"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        AGENTS[name].config(**options)


def test_a_teacher_may_draw_the_pairs():
    problem = case(KINDS[1])
    entry = AGENTS["dpo"]
    config = entry.config(batch_size=8, source="teacher")
    agent = entry.agent(problem.ebm, problem.table(), config, seeded(), problem.star())
    assert agent.source is not agent.policy
    assert agent.behaviour() == (0.0, 0.0, 1.0, 1.0, 0.0)
    assert agent.own_rows is None
    assert len(agent.sample()) == 8
    with pytest.raises(ValueError, match="source='teacher' needs a teacher"):
        entry.agent(problem.ebm, problem.table(), config, seeded(), None)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["reference", "policy"])
@in_every_case
def test_the_agent_with_a_table_ends_at_its_limit(name, options, source):
    entry, space = AGENTS[name], rl_ebm.TokenSpace(3, 2)
    reference = Tabular(space, scale=0.7, generator=seeded(0))
    ebm = rl_ebm.EBM(space, 1.5 * torch.randn(9, generator=seeded(1)), 0.8, reference)
    state = problem_of(ebm)
    config = entry.config(batch_size=2048, source=source, lr=0.05, **options)
    policy = Tabular.from_tables([t[0].detach() for t in reference.tables()], space)
    agent = entry.agent(ebm, policy, config, seeded(2), None)
    for k in range(500):
        agent.update(ebm.score(agent.sample()), k / 500)
    with torch.no_grad():
        log_law = sequence_log_probs([log_policy(t[0].double()) for t in policy.tables()], space)
    assert float(tv(log_law, entry.limit(config, state).log_law)) < 0.02
    assert float(tv(log_law, state.start_law)) > 0.04


# Files --------------------------------------------------------------------------------------------


def some_pairs(space, prompts=1, n=6):
    def batch(seed):
        ids = torch.arange(n) % prompts
        return rl_ebm.policies.sample(Uniform(space), space, n, seeded(seed), None).clean(), ids

    (a, ids), (b, _) = batch(0), batch(1)
    return [Batch(x.tokens, x.lengths, ids) for x in (a, b)]


@pytest.mark.parametrize("ending", ["pairs.jsonl", "pairs.safetensors"])
@pytest.mark.parametrize("eos", [None, 0])
def test_pairs_are_read_as_they_were_written(tmp_path, ending, eos):
    space = rl_ebm.TokenSpace(3, 3, eos)
    pairs, path = some_pairs(space, prompts=2), tmp_path / ending
    write_pairs(path, *pairs)
    for got, want in zip(read_pairs(path, space, 2), pairs, strict=True):
        close(got.tokens, want.tokens, 0.0)
        close(got.lengths, want.lengths, 0.0)
        close(got.prompt_ids, want.prompt_ids, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == [ending]
    with pytest.raises(ValueError, match=r"pair 2: prompt 1 is none of the 1"):
        read_pairs(path, space, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pairs"),
        ("\n[1]\n", "line 2: it is no object with chosen and rejected"),
        ("{", "line 1: Expecting"),
        ('{"chosen": [1, 0]}', "line 1: it has no rejected"),
        (
            '{"chosen": [1, 3], "rejected": [0]}',
            r"line 1: chosen must be a list of ids in \[0, 3\)",
        ),
        ('{"chosen": [1.5], "rejected": [0]}', "line 1: chosen must be a list of ids"),
        ('{"chosen": "10", "rejected": [0]}', "line 1: chosen must be a list of ids"),
        ('{"chosen": [1, 0], "rejected": [1]}', r"rejected must end with its only EOS \(id 0\)"),
        ('{"chosen": [0, 0], "rejected": [0]}', "chosen must end with its only EOS"),
        ('{"chosen": [1, 1, 1, 0], "rejected": [0]}', "after at most 3 tokens"),
        ('{"chosen": [], "rejected": [0]}', "chosen must end with its only EOS"),
        ('{"chosen": [0], "rejected": [0], "prompt": true}', "prompt must be the place of one"),
        ('{"chosen": [0], "rejected": [0], "prompt": -1}', "prompt -1 is none of the 1"),
    ],
)
def test_a_line_that_is_no_preference_is_told_in_a_sentence(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(path, rl_ebm.TokenSpace(3, 3, 0))
    assert str(path) in str(caught.value)


def test_files_that_are_none_are_told_in_a_sentence(tmp_path):
    space, path = rl_ebm.TokenSpace(3, 2), tmp_path / "x.safetensors"
    for name in ("x.safetensors", "x.jsonl"):
        with pytest.raises(ValueError, match=r"there is no file|is missing"):
            read_pairs(tmp_path / name, space)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        read_pairs(path, space)
    from rl_ebm.files.tensors import save_tensors

    rows = torch.zeros(2, 2, dtype=torch.int64)
    for tensors, message in (
        ({"chosen": rows}, "must hold the tensors chosen and rejected"),
        ({"chosen": rows, "rejected": rows[:1].clone()}, "one chosen, one rejected"),
        ({"chosen": rows, "rejected": rows + 3}, "rejected: token ids"),
        ({"chosen": rows.double(), "rejected": rows}, "chosen: "),
        ({"chosen": rows[0].clone(), "rejected": rows}, "chosen: tokens has shape"),
    ):
        save_tensors(path, tensors)
        with pytest.raises(ValueError, match=message):
            read_pairs(path, space)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_pairs(tmp_path / "b.jsonl", space)
    with pytest.raises(ValueError, match="is a folder"):
        read_pairs(tmp_path, space)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").write_text('{"chosen": [0, 1], "rejected": [2, 1]}')
    assert read_pairs(tmp_path / "link", space)[1].tokens.tolist() == [[2, 1]]
    one, two = (Batch(rows[:n], torch.full((n,), 2), torch.zeros(n).long()) for n in (1, 2))
    with pytest.raises(ValueError, match="a pair is a row of both"):
        write_pairs(path, one, two)
    for wrong in (3, None):
        with pytest.raises(TypeError, match=r"path must be the path|parameter 'path'"):
            read_pairs(wrong, space)
        with pytest.raises(TypeError, match=r"chosen must be an .*Batch|parameter 'chosen'"):
            write_pairs(path, wrong, two)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_run_learns_from_a_file_and_asks_for_no_reward(tmp_path, name):
    space, path = rl_ebm.TokenSpace(3, 2), tmp_path / "pairs.jsonl"
    lines = [json.dumps({"chosen": [2, 1], "rejected": [0, i % 3]}) for i in range(9)]
    path.write_text("\n".join(lines))
    ebm = rl_ebm.EBM(space, torch.zeros(9), 1.0, Uniform(space))
    entry = AGENTS[name]
    options = entry.config(batch_size=8, pairs=str(path), lr=0.1)
    policy, _ = rl_ebm.train(
        ebm, name, tmp_path / "run", options=options, network="tabular", steps=40
    )
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    calls = rows[0].split(",").index("reward_calls")
    assert rows[-1].split(",")[calls] == "0"
    tokens, lengths = torch.tensor([[2, 1], [0, 1]]), torch.tensor([2, 2])
    log_pi = log_prob(policy, space, tokens, lengths).detach()
    assert float(log_pi[0] - log_pi[1]) > 0.3
    again, _ = rl_ebm.load(tmp_path / "run")
    close(log_prob(again, space, tokens, lengths).detach(), log_pi, 1e-6)
