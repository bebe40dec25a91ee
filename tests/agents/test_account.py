"""Agents say what they learned and who draws; the diagnosis reads nothing that is not told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from agent_cases import KINDS, case
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents import AGENTS, Behaviour, VarGradAgent, behaviour, learned_log_z
from rl_ebm.agents.shared.learner import log_ref_and_gain
from rl_ebm.agents.trajectory_balance import TrajectoryBalanceAgent
from rl_ebm.cli import commands as cli
from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty, penalised
from rl_ebm.fixed_points.flow import by_depth, follow
from rl_ebm.policies import Tabular, TransformerConfig, Uniform, sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import sequence_log_probs
from rl_ebm.studies.diagnose import _starved, diagnose, laws
from rl_ebm.studies.problems import problems
from rl_ebm.training.checkpoint import RunError
from rl_ebm.training.run import resume


@pytest.fixture(autouse=True)
def registry():
    before = dict(AGENTS)
    yield
    AGENTS.clear()
    AGENTS.update(before)


def ebm_of(count=None, size=3, length=2):
    space = rl_ebm.TokenSpace(size, length)
    rows = 1 if count is None else count
    scores = 2 * torch.randn(rows, space.num_sequences, generator=seeded(1), dtype=torch.float64)
    prompts = None if count is None else [[i] for i in range(count)]
    scores = scores if prompts else scores[0]
    return rl_ebm.EBM(space, scores, 1.0, Uniform(space), prompts)


def run_of(folder, agent, ebm=None, steps=3, network="tabular", **options):
    config = AGENTS[agent].config(**({"batch_size": 16} | options))
    ebm = ebm_of() if ebm is None else ebm
    run = folder / "run"
    rl_ebm.train(ebm, agent, run, options=config, network=network, steps=steps, progress=False)
    return run


class Extra:
    """One more parameter, ahead of the agent's own."""

    def extra_parameters(self):
        self.other = torch.nn.Parameter(torch.full((1,), 1234.5))
        return (self.other, *super().extra_parameters())


class ExtraVarGrad(Extra, VarGradAgent):
    pass


class ExtraBalance(Extra, TrajectoryBalanceAgent):
    pass


def test_a_parameter_that_is_no_log_z_is_not_read_as_one(tmp_path):
    AGENTS["vg"] = AGENTS["vargrad"]._replace(agent=ExtraVarGrad)
    AGENTS["tb"] = AGENTS["trajectory-balance"]._replace(agent=ExtraBalance)
    assert diagnose(run_of(tmp_path / "a", "vg"), 0.1).log_z_error is None
    ebm = ebm_of()
    found = diagnose(run_of(tmp_path / "b", "tb", ebm, log_z_start=1.5, lr=1e-9), 0.1)
    assert found.log_z_error == pytest.approx(abs(float(rl_ebm.solve(ebm).log_z) - 1.5), abs=1e-4)


def test_each_agent_tells_the_log_z_that_it_learned():
    problem = case(KINDS[3])
    told = set()
    for name, entry in AGENTS.items():
        policy = problem.star()
        agent = entry.agent(problem.ebm, policy, entry.config(), seeded(), problem.star())
        found = learned_log_z(agent)
        if found is None:
            continue
        told.add(name)
        assert found.shape == (3,)
        if entry.agent.logits_are_values:  # its policy's logits are q*: V at the root is log Z
            want = torch.tensor([t.log_z for t in problem.truth], dtype=torch.float64)
            close(found.double(), want, 1e-5)
    values = {n for n, e in AGENTS.items() if e.agent.logits_are_values}
    assert told == values | {"trajectory-balance", "tree-backup", "dpg"}
    assert learned_log_z(object()) is None
    assert behaviour(object()) is None


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("soft-q", {"explore": 0.25, "temperature": 2, "epsilon": 0.1}, (0.75, 0.25, 0, 2, 0.1)),
        ("monte-carlo", {}, (0, 1, 0)),
        ("policy-gradient", {}, (1, 0, 0)),
        ("dpg", {}, (1, 0, 0)),
        ("best-of-n", {"source": "reference"}, (0, 1, 0)),
        ("best-of-n", {"source": "policy"}, (1, 0, 0)),
        ("sampled-teacher", {"source": "reference"}, (0, 1, 0)),
        ("teacher-forcing", {}, (0, 0, 1)),
        ("on-policy-distillation", {"on_policy": 0.25}, (0.25, 0, 0.75)),
        ("exact", {}, None),
    ],
)
def test_each_agent_tells_who_draws(name, options, want):
    problem, entry = case(KINDS[0]), AGENTS[name]
    agent = entry.agent(
        problem.ebm, problem.table(), entry.config(**options), seeded(), problem.star()
    )
    assert behaviour(agent) == (None if want is None else Behaviour(*want))


def test_the_law_of_draws_at_a_temperature_with_slips_is_that_of_the_sampler():
    ebm = ebm_of()
    policy = Tabular(ebm.space, scale=1.5, generator=seeded(2), dtype=torch.float64)
    law = laws(policy, ebm, temperature=0.6, epsilon=0.3)[0].exp()
    close(float(law.sum()), 1.0, 1e-12)
    batch = sample(policy, ebm.space, 40_000, seeded(3), None, 0.6, 0.3)
    seen = torch.bincount(ebm.space.sequence_indices(batch.tokens, batch.lengths), minlength=9)
    close(seen.double() / 40_000, law, 0.012)
    assert float((law - laws(policy, ebm)[0].exp()).abs().max()) > 0.03


# What was hardly drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("who", [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.0, 0.0, 1.0)])
def test_the_calls_of_a_run_are_shared_out_over_its_prompts(count, who):
    ebm = ebm_of(count)
    solution = rl_ebm.solve(ebm)
    cases = problems(solution)
    star = torch.stack([c.log_target for c in cases])
    policy = Tabular(ebm.space, ebm.prompts, scale=1.5, generator=seeded(2), dtype=torch.float64)
    log_pi = laws(policy, ebm)
    found = set()
    for calls in (3, 9, 15, 30, 60, 100):
        got = _starved(Behaviour(*who), policy, ebm, star, cases, calls)
        want = 0.0
        for p in range(count):
            for y in range(9):
                share = (math.exp(log_pi[p, y]), 1 / 9, math.exp(star[p, y]))
                drawn = math.fsum(a * b for a, b in zip(who, share, strict=True))
                want += math.exp(star[p, y]) * (calls / count * drawn < 1) / count
        assert got == pytest.approx(want, abs=1e-9)
        found.add(round(got, 9))
    assert len(found) > 2  # not all or nothing


def test_whose_draws_are_not_told_has_no_starved_mass(tmp_path):
    class Silent(VarGradAgent):
        def behaviour(self):
            return None

    AGENTS["silent"] = AGENTS["vargrad"]._replace(agent=Silent)
    found = diagnose(run_of(tmp_path, "silent"), 0.1)
    assert found.starved_mass is None
    assert "p* of what was hardly drawn   not known" in str(found)


def test_samples_of_the_teacher_are_not_starved_by_a_policy_that_has_not_learned(tmp_path):
    ebm = ebm_of(size=3, length=3)
    run = run_of(tmp_path, "teacher-forcing", ebm, steps=1, batch_size=4096, lr=1e-9)
    star = rl_ebm.solve(ebm)
    tokens, lengths = ebm.space.sequences()
    p = star.log_prob(tokens, lengths).exp()
    assert diagnose(run, 0.1).starved_mass == pytest.approx(float(p[4096 * p < 1].sum()), abs=1e-9)


def test_values_are_read_before_the_fit_goes_on_with_the_weights(tmp_path):
    network = TransformerConfig(layers=1, heads=1, dim=8, hidden=8)
    ebm = ebm_of()
    run = run_of(tmp_path, "soft-q", ebm, steps=60, network=network, lr=0.03, batch_size=256)
    policy, _ = rl_ebm.load(run)
    tokens = torch.zeros(1, 2).long()
    with torch.no_grad():
        root = float(torch.logsumexp(q_values(policy, ebm.space, tokens, None)[0, 0], 0))
    want = abs(root - float(rl_ebm.solve(ebm).log_z))
    assert diagnose(run, 0.5).log_z_error == pytest.approx(want, abs=1e-5)


# Names and options of a run that this process does not know ---------------------------------------


def test_an_unknown_agent_of_a_run_is_the_same_sentence_everywhere(tmp_path, capsys):
    AGENTS["mine"] = AGENTS["vargrad"]
    run = run_of(tmp_path, "mine")
    del AGENTS["mine"]
    sentence = r"the run's agent 'mine' is unknown.*rl_ebm\.agents\.register"
    for call in (diagnose, resume):
        with pytest.raises(RunError, match=sentence):
            call(run)
    for command in (["diagnose", str(run)], ["train", "--resume", str(run), "--steps", "9"]):
        assert cli.main(command) == 2
        assert "the run's agent 'mine' is unknown" in capsys.readouterr().err
    for command in (["verify", str(run)], ["sample", str(run), "-n", "2"]):  # need no agent
        assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rloo"}, "agent 'rloo' is unknown: did you mean 'policy-gradient'"),
        ({"name": 3}, "is damaged: agent.name is 3"),
        ({"name": None}, "is damaged: agent.name is null"),
        ({"options": {"lrr": 1.0}}, "vargrad has no such option: lrr: did you mean 'lr'"),
        ({"options": {"lr": "x"}}, 'is damaged: agent.options.lr is "x"'),
        ({"options": {"lr": -1.0}}, "lr must be a finite number > 0"),
        ({"options": [1]}, "is damaged: agent.options is"),
        ({"options": None}, "is damaged: agent.options is"),
    ],
)
def test_an_agent_that_no_run_has_is_one_sentence(tmp_path, change, message, capsys):
    run = run_of(tmp_path, "vargrad")
    config = json.loads((run / "config.json").read_text())
    config["agent"] |= change
    (run / "config.json").write_text(json.dumps(config))
    for call in (diagnose, resume):
        with pytest.raises(RunError, match=message):
            call(run)
    assert cli.main(["diagnose", str(run)]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_agent_is_one_sentence(tmp_path):
    run = run_of(tmp_path, "trajectory-balance")
    config = json.loads((run / "config.json").read_text())
    config["agent"] = {"name": "dpg", "options": {}, "logits_are_values": False}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"state\.pt does not fit the run's configuration"):
        diagnose(run)


# Epochs and roots ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize("k", ["k1", "k2"])
def test_the_penalty_in_the_reward_is_that_of_the_policy_that_drew(name, k):
    problem = case(KINDS[1])
    batch, space, beta = problem.batch(), problem.space, problem.ebm.beta
    config = AGENTS[name].config(kl_in="reward", kl_estimator=k, clip=0.9, batch_size=8)
    policy = problem.table()
    agent = AGENTS[name].agent(problem.ebm, policy, config, seeded(), None)
    drawn, now = agent.log_pi(batch).detach(), problem.table(seed=1)
    log_ref, gain = log_ref_and_gain(problem.ebm, batch, None)
    policy.table.data.copy_(now.table)  # the policy has moved since
    log_pi = agent.log_pi(batch).detach()
    got = float(agent.loss(batch, log_pi, drawn, log_ref, gain))

    def loss_of(penalised):
        """The loss, response by response, with the penalty of given log-probabilities."""
        u = (penalised - log_ref).double().masked_fill(~batch.mask, 0.0)
        returns = (gain - (u if k == "k1" else u.square() / 2).sum(1)).tolist()
        n, mean = len(returns), math.fsum(returns) / len(returns)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in returns) / (n - 1))
        total = 0.0
        for b, length in enumerate(batch.lengths.tolist()):
            rest = returns[b] - mean
            advantage = rest * n / (n - 1) if name == "ppo" else rest / (spread + 1e-6) / beta
            ratios = [math.exp(log_pi[b, t] - drawn[b, t]) for t in range(length)]
            terms = [min(x * advantage, min(max(x, 0.1), 1.9) * advantage) for x in ratios]
            total -= math.fsum(terms) / (1 if name == "ppo" else length) / n
        return total

    assert got == pytest.approx(loss_of(drawn), rel=1e-4)
    assert abs(loss_of(log_pi) - loss_of(drawn)) > 0.02
    assert space.eos_id is not None  # lengths differ


def test_every_epoch_is_told_what_the_policy_was_when_it_drew(monkeypatch):
    problem = case(KINDS[1])
    config = AGENTS["ppo"].config(batch_size=8, epochs=3, lr=0.3)
    agent = AGENTS["ppo"].agent(problem.ebm, problem.table(), config, seeded(), None)
    batch, seen, real = problem.batch(), [], agent.loss
    drawn = agent.log_pi(batch).detach()

    def loss(batch, log_pi, log_pi_old, log_ref, gain):
        seen.append((log_pi.detach(), log_pi_old))
        return real(batch, log_pi, log_pi_old, log_ref, gain)

    monkeypatch.setattr(agent, "loss", loss)
    agent.update(batch)
    assert len(seen) == 3
    assert all(torch.equal(old, drawn) for _, old in seen)
    assert all(float((now - drawn).abs().max()) > 0.01 for now, _ in seen[1:])


def test_of_several_roots_the_one_is_taken_that_the_flow_from_the_reference_reaches():
    ref, reward = [0.13, 0.225, 0.645], [1.117, 1.071, -2.416]
    space = rl_ebm.TokenSpace(3, 1)
    reference = Tabular.from_tables([torch.tensor([ref], dtype=torch.float64).log()], space)
    ebm = rl_ebm.EBM(space, torch.tensor(reward, dtype=torch.float64), 1.486, reference)
    (problem,) = problems(rl_ebm.solve(ebm))
    penalty = Penalty("k2", "loss", group_std=True)
    point = penalised(problem, penalty)
    assert len(point.other_roots) == 3
    for _, theta, rate in follow(problem, penalty, tolerance=1e-7):  # noqa: B007
        if float(rate.abs().max()) < 1e-7:
            break
    law = sequence_log_probs(by_depth(problem, theta), space)
    assert float(tv(law, point.log_law)) < 1e-4
    assert all(float(tv(law, root)) > 0.05 for root in point.other_roots)
