"""V with weights of its own: what it is made of, what moves log pi, where the level goes."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, PROMPTS, WIDE, case, states, train
from brute_force import log_softmax, log_sum_exp
from toy_policies import close, logits_by_prefix, seeded

import rl_ebm
from rl_ebm.agents import AGENTS, SoftQAgent, SoftQConfig
from rl_ebm.agents.shared.learner import Learner
from rl_ebm.envs import make_task
from rl_ebm.networks.values import ValueHead
from rl_ebm.policies import MLP, MLPConfig, Tabular, Transformer, TransformerConfig, check
from rl_ebm.training.directory import load
from rl_ebm.training.run import resume

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
AGENT_NAMES = ("soft-q", "path-consistency", "subtb", "detailed-balance")


class Headed(torch.nn.Module):
    """A table of logits with a V beside it, which knows every state by itself."""

    logits_are_values = True

    def __init__(self, problem, seed=0):
        super().__init__()
        self.space, self.prompts = problem.space, problem.ebm.prompts
        inner = Tabular(self.space, self.prompts, 1.0, seeded(seed + 50))
        self.table = inner.table
        self.inner = [inner]  # not registered: its table is
        count = len(self.prompts or [[]])
        self.value_head = ValueHead(self.space, count * self.space.num_states, count)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.value_head.parameters():
                parameter.normal_(0, 0.3)
            self.value_head.level.normal_()

    def logits(self, tokens, prompt_ids=None):
        rows = torch.zeros(len(tokens), dtype=torch.long) if prompt_ids is None else prompt_ids
        if self.prompts is None:
            rows = torch.zeros_like(rows)
        ids = self.space.state_ids(tokens) + rows[:, None] * self.space.num_states
        features = torch.nn.functional.one_hot(ids, self.value_head.hidden.in_features).float()
        out = torch.nn.functional.embedding(ids, self.table.flatten(0, 1))
        return self.value_head.of_sequences(out, features, tokens, rows)


def update(agent, batch):
    """The gradients of one step by the table and by V's own weights, and what it told."""
    agent.learner.optimizer.step = lambda: None
    metrics = agent.update(batch)
    return agent.policy.table.grad, metrics


def by_loops(problem, policy):
    """log pi of every state of every prompt, by Python."""
    rows = logits_by_prefix(policy, problem.space, len(problem.truth))
    return {key: log_softmax(row) for key, row in rows.items()}


def score_gradient(problem, log_pi, prompt, y, t):
    """The gradient of log pi of a response's t-th token, by the table."""
    rows = {s: i for i, s in enumerate(states(problem.space))}
    table = torch.zeros(
        len(problem.truth), len(rows), problem.space.vocab_size, dtype=torch.float64
    )
    row = log_pi[prompt, y[:t]]
    for a, value in enumerate(row):
        table[prompt, rows[y[:t]], a] = float(a == y[t]) - math.exp(value)
    return table


def wanted_gradient(problem, policy, name):
    """That of the loss on all responses: each residual that reaches the end is the whole one."""
    log_pi = by_loops(problem, policy)
    total, count = 0.0, 0
    for p, truth in enumerate(problem.truth):
        found = []
        for y in truth.sequences:
            r = math.fsum(truth.r[y[:t]][a] for t, a in enumerate(y))
            found.append(r - math.fsum(log_pi[p, y[:t]][a] for t, a in enumerate(y)))
        level = math.fsum(found) / len(found)
        for y, f in zip(truth.sequences, found, strict=True):
            n, delta = len(y), level - f
            parts = [score_gradient(problem, log_pi, p, y, t) for t in range(n)]
            if name == "soft-q":
                weight = 1.0
            elif name == "detailed-balance":
                weight = 1 / n
            else:
                lam = 0.9 if name == "subtb" else 1.0
                pairs = [lam ** (j - i) for i in range(n) for j in range(i + 1, n + 1)]
                weight = sum(lam ** (n - i) for i in range(n)) / sum(pairs)
            total = total + weight * delta * sum(parts)
            count += 1
    return total / count


@in_all_kinds
@pytest.mark.parametrize("name", AGENT_NAMES)
def test_the_whole_residual_alone_moves_log_pi(name, kind):
    problem = case(kind)
    policy = Headed(problem)
    want = wanted_gradient(problem, policy, name)
    entry = AGENTS[name]
    agent = entry.agent(problem.ebm, policy, entry.config(**WIDE))
    close(update(agent, problem.batch())[0].double(), want, 2e-6)


@in_all_kinds
def test_v_is_its_level_and_what_was_gained_on_the_way(kind):
    problem = case(kind)
    policy = Headed(problem)
    head, space = policy.value_head.requires_grad_(False), problem.space
    logits = logits_by_prefix(policy.inner[0], space, len(problem.truth))
    q = logits_by_prefix(policy, space, len(problem.truth))
    index = {s: i for i, s in enumerate(states(space))}
    for p in range(len(problem.truth)):
        for s in states(space):
            want = float(head.level[p]) + float(head.place[len(s)])
            for t, a in enumerate(s):
                one = torch.zeros(head.hidden.in_features)
                one[p * space.num_states + index[s[:t]]] = 1.0
                x = (one - one.mean()) / (one.var(unbiased=False) + 1e-5).sqrt()
                told = head.out(head.hidden(x).clamp(min=0))
                want += log_softmax(logits[p, s[:t]])[a] + float(told[a])
            assert log_sum_exp(q[p, s]) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize("make", [Transformer, MLP])
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["one", "prompts"])
@pytest.mark.parametrize("eos_id", [None, 1])
def test_networks_agree_with_themselves_and_v_moves_no_weight_of_log_pi(make, prompts, eos_id):
    space = rl_ebm.TokenSpace(8, 3, eos_id=eos_id)
    torch.manual_seed(0)
    config = TransformerConfig(1, 2, 8, 8) if make is Transformer else MLPConfig(2, 8)
    policy = make(space, config, prompts, logits_are_values=True)
    with torch.no_grad():
        for parameter in policy.value_head.parameters():
            parameter.normal_(0, 0.5)
        policy.value_head.level.normal_()
    check(policy, space)
    tokens = space.unrank(torch.randint(space.branching, (5, 3), generator=seeded()))
    ids = None if prompts is None else torch.tensor([0, 1, 2, 1, 0])
    q = rl_ebm.policies.scoring.q_values(policy, space, tokens, ids)
    q.logsumexp(-1).sum().backward()
    own = {id(p) for p in policy.value_head.parameters()}
    for parameter in policy.parameters():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        assert (size > 1e-3) if id(parameter) in own else (size < 1e-5)
    torch.manual_seed(0)
    plain = make(space, config, prompts)
    assert plain.value_head is None
    want = rl_ebm.policies.scoring.q_values(plain, space, tokens, ids)
    close(want.log_softmax(-1), q.log_softmax(-1), 1e-5)


@in_all_kinds
def test_the_first_batch_moves_v_and_each_the_level(kind):
    problem = case(kind)
    policy = Headed(problem)
    before = {k: x.clone() for k, x in policy.value_head.state_dict().items()}
    log_pi = by_loops(problem, policy)
    v = logits_by_prefix(policy, problem.space, len(problem.truth))
    agent = SoftQAgent(problem.ebm, policy, SoftQConfig(lr=1e-9))
    agent.update(problem.batch())
    head = policy.value_head
    n = len(problem.truth[0].sequences)
    off = [[] for _ in range(problem.space.max_length)]
    means = []
    for p, truth in enumerate(problem.truth):
        gain = {
            y: [truth.r[y[:t]][a] - log_pi[p, y[:t]][a] for t, a in enumerate(y)]
            for y in truth.sequences
        }
        means.append(math.fsum(map(math.fsum, gain.values())) / n)
        for y in truth.sequences:
            for t in range(len(y)):
                carried = means[p] - math.fsum(gain[y][:t])
                off[t].append(carried - log_sum_exp(v[p, y[:t]]))
    shift = [math.fsum(x) / len(x) for x in off]
    close((head.place - before["place"]).double(), torch.tensor(shift).double(), 1e-5)
    for p in range(len(problem.truth)):
        root = log_sum_exp(v[p, ()]) + shift[0]
        moved = float(head.level[p] - before["level"][p])
        assert moved == pytest.approx((means[p] - root) * n / (n + 4), abs=1e-5)
    again = head.place.clone()
    agent.update(problem.batch())
    close(head.place, again, 1e-6)


def test_the_level_is_the_log_of_the_mean_weight_of_the_policys_own_draws():
    problem = case(KINDS[1])
    policy = Headed(problem)
    agent = SoftQAgent(
        problem.ebm, policy, SoftQConfig(batch_size=64, explore=0.25, lr=1e-9), seeded(3)
    )
    batch = problem.ebm.score(agent.sample())
    agent.update(batch)
    (truth,), log_pi = problem.truth, by_loops(problem, policy)
    weights = []
    for tokens, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        y = tuple(tokens[:n])
        weights.append(
            math.fsum(truth.r[y[:t]][a] - log_pi[(0, y[:t])][a] for t, a in enumerate(y))
        )
    want = log_sum_exp(weights[16:]) - math.log(48)  # the explorer's come first
    root = float(agent.learned_log_z())
    mean = math.fsum(weights) / 64  # where the first batch has put it before
    assert root == pytest.approx(mean + (want - mean) * 64 / 68, abs=1e-4)


def test_a_response_that_is_alone_with_its_prompt_is_held_against_the_level():
    problem = case(KINDS[2])
    policy = Headed(problem)
    agent = SoftQAgent(problem.ebm, policy, SoftQConfig(lr=1e-9, **WIDE))
    agent.update(problem.batch())
    gradient, _ = update(agent, problem.batch([(0, 1), (1, 0), (1, 3)]))
    assert float(gradient[0].abs().max()) > 1e-3
    assert float(gradient[2].abs().max()) == 0.0


def test_a_policy_that_is_passed_again_without_its_v_is_told_so(tmp_path):
    ebm = make_task("random", vocab_size=3, max_length=2)
    config, options = MLPConfig(1, 8), SoftQConfig(batch_size=8)

    class Mine(MLP):
        """Of no kind that a folder knows."""

    policy = Mine(ebm.space, config, logits_are_values=True)
    rl_ebm.train(ebm, "soft-q", tmp_path / "r", options=options, policy=policy, steps=2)
    for again in (load, resume):
        with pytest.raises(rl_ebm.RunError, match="value_head=True, or False"):
            again(tmp_path / "r", policy=Mine(ebm.space, config))
    load(tmp_path / "r", policy=Mine(ebm.space, config, value_head=True))


def test_a_policy_that_reads_no_prompts_has_one_level_for_them():
    problem = case(KINDS[2])
    policy = MLP(problem.space, MLPConfig(1, 8), logits_are_values=True)
    agent = SoftQAgent(problem.ebm, policy, SoftQConfig(lr=1e-9))
    agent.update(problem.batch())
    batch = problem.batch()
    q = rl_ebm.policies.scoring.q_values(policy, problem.space, batch.tokens, None).detach()
    mine = q.log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0].sum(1)
    found = []
    for truth in problem.truth:
        found += [math.fsum(truth.r[y[:t]][a] for t, a in enumerate(y)) for y in truth.sequences]
    want = float((torch.tensor(found) - mine).mean())
    assert float(q[0, 0].logsumexp(0)) == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENT_NAMES)
@pytest.mark.parametrize("kind", [KINDS[1]], ids=["eos"])
def test_they_end_at_the_solution_with_v_and_the_reference_in_it(name, kind):
    problem = case(kind)
    policy = Headed(problem)
    entry = AGENTS[name]
    config = entry.config(batch_size=512, lr=3e-2)
    agent = entry.agent(problem.ebm, policy, config, seeded())
    train(agent, problem.ebm, 600)
    assert problem.kl(policy) < 5e-4
    assert float(agent.learned_log_z().double().mean()) == pytest.approx(problem.log_z(), abs=0.01)
    q = logits_by_prefix(policy, problem.space, len(problem.truth))
    off = 0.0
    for p, truth in enumerate(problem.truth):
        for y, log_p in zip(truth.sequences, truth.log_probs, strict=True):
            gaps = [
                abs(log_sum_exp(q[p, y[:t]]) - log_sum_exp(truth.q(y[:t]))) for t in range(len(y))
            ]
            off += math.exp(log_p) * math.fsum(gaps) / len(gaps) / len(problem.truth)
    assert off < 0.1


@pytest.mark.parametrize("options", [{"lam": 0.5}, {"n_step": 2}])
def test_values_that_are_handed_back_stay_in_the_weights_of_log_pi(options, tmp_path):
    problem = case(KINDS[0])
    with pytest.raises(ValueError, match="value_head=False"):
        SoftQAgent(problem.ebm, Headed(problem), SoftQConfig(**options))
    config = SoftQConfig(batch_size=8, **options)
    policy, _ = rl_ebm.train(problem.ebm, "soft-q", options=config, steps=2)
    assert policy.value_head is None
    policy, _ = rl_ebm.train(problem.ebm, "vargrad", steps=1)
    assert policy.value_head is None


def test_vs_own_weights_are_clipped_by_themselves():
    problem = case(KINDS[0])
    policy = Headed(problem)
    learner = Learner(policy, 1e-3, 1.0)
    before = policy.table.detach().clone()
    loss = policy.table.sum() * 1e-3 + 1e6 * policy.value_head.place.sum()
    metrics = learner.descend(loss, 0.5)
    assert float(metrics["losses/grad_norm"]) == pytest.approx(
        1e-3 * math.sqrt(policy.table.numel()), rel=1e-4
    )
    close(policy.table.grad, torch.full_like(before, 1e-3), 1e-6)
    assert float(policy.value_head.place.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_run_of_before_has_v_in_its_logits_and_goes_on_so(tmp_path, monkeypatch):
    def run(name, steps):
        ebm = make_task("random", vocab_size=3, max_length=2)
        kept = {"network": TransformerConfig(1, 1, 8, 8), "out": tmp_path / name, "steps": steps}
        return rl_ebm.train(ebm, "soft-q", options=SoftQConfig(batch_size=16), **kept)

    with monkeypatch.context() as patch:
        patch.setattr(SoftQConfig, "values_apart", False)
        run("old", 5)
    policy, _ = load(tmp_path / "old")
    assert policy.value_head is None
    policy, _, _ = resume(tmp_path / "old", steps=8)
    assert policy.value_head is None
    run("new", 5)
    policy, _ = load(tmp_path / "new")
    assert float(policy.value_head.level) != 0.0  # as it was fitted, and stored
