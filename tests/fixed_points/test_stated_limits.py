"""A limit that nobody stated is not known: to the audit, the diagnosis, the benchmark."""

from __future__ import annotations

import math

import pytest
import torch
from fixed_point_cases import problem_of, small_ebm
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents import AGENTS, AgentEntry, PolicyGradientAgent, PolicyGradientConfig, register
from rl_ebm.cli import commands as cli
from rl_ebm.fixed_points import FixedPoint, boundary, target
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.studies.audit import MEASURES, audit, is_target, to_json, to_text
from rl_ebm.studies.bench import Plan, Problem
from rl_ebm.studies.bench_report import targets
from rl_ebm.studies.diagnose import diagnose
from rl_ebm.studies.problems import problems
from rl_ebm.tokens import Batch


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(boundary, "STEPS", 40)
    before = dict(AGENTS)
    yield
    AGENTS.clear()
    AGENTS.update(before)


class Plain(PolicyGradientAgent):
    """REINFORCE without any KL."""

    def loss(self, batch, log_pi, log_pi_old, log_ref, gain):
        return -((gain - gain.mean())[:, None] * log_pi).sum(1).mean()


def keep(*names):
    """Leave these agents alone registered, without the penalties whose flows take their time."""
    for name in set(AGENTS) - set(names):
        del AGENTS[name]
    for name, entry in AGENTS.items():
        quick = [v for v in entry.variants if v.get("kl_estimator") == "k1" or name == "grpo"]
        quick += [v for v in entry.variants if "kl_estimator" not in v]
        AGENTS[name] = entry._replace(variants=tuple(quick) or entry.variants)


def plain_ebm():
    space = rl_ebm.TokenSpace(3, 2)
    scores = 2 * torch.randn(9, generator=seeded(1), dtype=torch.float64)
    return rl_ebm.EBM(space, scores, 1.0, Uniform(space))


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_agent_without_a_stated_limit_is_not_known_anywhere(tmp_path, by_hand):
    if by_hand:
        AGENTS["plain"] = AgentEntry(Plain, PolicyGradientConfig, "no KL", "Williams 1992")
    else:
        register("plain", Plain, PolicyGradientConfig, "no KL", "Williams 1992")
    assert AGENTS["plain"].fixed_point is None
    keep("plain", "policy-gradient", "soft-q")
    ebm = plain_ebm()
    lines = audit(rl_ebm.solve(ebm))
    (row,) = [x for x in lines if x["objective"] == "plain"]
    none = ("degenerate", "is_target", "depends_on_sampler", *MEASURES)
    assert {row[k] for k in none} == {None}
    assert (row["how"], row["other_roots"]) == ("not known", [])
    assert to_json([row])[0]["is_target"] is None
    (_, text) = to_text([row]).splitlines()
    assert text.split() == ["plain", *"?????", "not", "known"]

    options = PolicyGradientConfig(batch_size=64, lr=0.1)
    rl_ebm.train(ebm, "plain", tmp_path / "run", options=options, network="tabular", steps=30)
    found = diagnose(tmp_path / "run", 0.5)
    assert (found.objective, found.capacity, found.optimisation) == (None, None, None)
    assert found.total > 0.05
    assert "is not known" in found.advice
    assert "train longer" not in found.advice

    plan = Plan(("plain", "policy-gradient"), (Problem("lookahead"),), calls=8192)
    assert targets(plan, Problem("lookahead")) == {"plain": None, "policy-gradient": True}


@pytest.mark.slow
def test_what_is_stated_is_called_so_and_what_is_computed_says_how():
    keep(*AGENTS)
    how = {
        (x["objective"], *x["options"].values()): x["how"] for x in audit(rl_ebm.solve(plain_ebm()))
    }
    computed = {"policy-gradient", "ppo", "grpo", "best-of-n", "dpo", "ipo"}
    part = {k for k in how if k[0] == "on-policy-distillation" and len(k) > 2}
    assert len(part) >= 10
    assert "stated" not in {how.pop(k) for k in part}
    assert {n for (n, *_), h in how.items() if h != "stated"} == computed
    assert all(h == "stated" for (n, *_), h in how.items() if n not in computed)
    assert how["policy-gradient", "k1", "reward", "token", "none"] == "closed form"
    assert how["grpo", "k3", "loss", "token", "group-std"] == "root"
    text = to_text(audit(rl_ebm.solve(plain_ebm())))
    assert "the EBM, as stated" in text


def test_every_built_in_agent_states_its_limit():
    assert all(callable(entry.fixed_point) for entry in AGENTS.values())


def test_a_function_that_states_no_fixed_point_is_told():
    register("odd", Plain, PolicyGradientConfig, "", "", lambda config, problem: problem.log_target)
    keep("odd")
    with pytest.raises(TypeError, match=r"fixed_point of Plain must return a .*FixedPoint, got"):
        audit(rl_ebm.solve(plain_ebm()))


def test_one_prompt_that_is_not_known_leaves_all_unknown_unless_another_is_no_ebm():
    (case,) = problems(rl_ebm.solve(plain_ebm()))
    yes = FixedPoint(case.log_target)
    no = FixedPoint(case.start_law)
    unknown = FixedPoint(None, degenerate=None)
    boundary_ = FixedPoint(None, degenerate=True)
    for points, want in (
        ([yes, yes], True),
        ([yes, unknown], None),
        ([unknown, unknown], None),
        ([yes, no], False),
        ([unknown, no], False),
        ([unknown, boundary_], False),
    ):
        assert is_target(points, [case, case]) is want


# Stand-ins for -inf -------------------------------------------------------------------------------


def log_weights(ebm, stand_in, once):
    """Sum of r of every response, -inf replaced: by token, the last one's R / beta with it."""
    tokens, lengths = ebm.space.sequences()
    ids = torch.zeros_like(lengths)
    log_ref, gain = ebm.log_ref(tokens, lengths, ids), ebm.reward(tokens, lengths, ids) / ebm.beta
    found = []
    for row, n, g in zip(log_ref.tolist(), lengths.tolist(), gain.tolist(), strict=True):
        r = row[:n]
        if once:  # the last token's r is -inf as a whole
            r[-1] += g
            found.append(math.fsum(stand_in if x == -math.inf else x for x in r))
        else:
            found.append(math.fsum(stand_in if x == -math.inf else x for x in r) + g)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["soft-q", "vargrad", "trajectory-balance", "path-consistency"])
@pytest.mark.parametrize("shape", [(3, 2, None), (3, 3, 0)])
def test_what_regresses_on_a_stand_in_ends_at_the_ebm_of_the_stand_in(name, shape):
    ebm = small_ebm(shape, forbid=True)
    problem, entry = problem_of(ebm), AGENTS[name]
    config = entry.config(forbidden_log_weight=-2.0)
    point = entry.fixed_point(config, problem)
    want = torch.log_softmax(log_weights(ebm, -2.0, once=True), 0)
    close(point.log_law, want, 1e-10)
    assert is_target([point], [problem]) is False
    assert is_target([entry.fixed_point(entry.config(), problem)], [problem]) is True
    # Where the reference alone draws, nobody learns what the forbidden gets.
    blind = entry.config(forbidden_log_weight=-2.0, explore=1.0)
    assert is_target([entry.fixed_point(blind, problem)], [problem]) is None


@pytest.mark.parametrize("name", ["policy-gradient", "ppo", "dpg", "vargrad"])
def test_at_the_ebm_of_the_stand_in_an_agent_has_no_gradient(name):
    ebm = small_ebm((3, 2, None), forbid=True)
    problem, entry, space = problem_of(ebm), AGENTS[name], ebm.space
    config = entry.config(forbidden_log_weight=-2.0, max_grad_norm=1e12)
    tokens, lengths = space.sequences()
    batch = ebm.score(Batch(tokens, lengths, torch.zeros_like(lengths)))
    norms = []
    for law in (entry.fixed_point(config, problem).log_law, problem.log_target):
        q = rl_ebm.q_from_r(problem.at_ends(law.clamp(min=-30.0)), space)
        policy = Tabular.from_tables(q, space)
        agent = entry.agent(ebm, policy, config, seeded(), None)
        norms.append(float(agent.update(batch)["losses/grad_norm"]))
    assert norms[0] < 1e-5 < 1e-3 < norms[1]


def test_an_end_that_is_forced_gets_no_stand_in():
    ebm, entry = small_ebm((3, 2, 0), forbid=True), AGENTS["policy-gradient"]
    config = entry.config(forbidden_log_weight=-2.0, kl_estimator="k2", kl_in="loss")
    point = entry.fixed_point(config, problem_of(ebm))
    # Nothing but the first token is a choice: k2 in the loss then ends at the EBM.
    close(point.log_law, torch.log_softmax(log_weights(ebm, -2.0, once=False), 0), 1e-10)


def test_a_stand_in_that_nothing_needs_changes_nothing():
    problem = problem_of(small_ebm((3, 3, 0)))  # ends that are forced are forbidden nowhere
    for name, options in (("vargrad", {"explore": 1.0}), ("soft-q", {}), ("ppo", {})):
        entry = AGENTS[name]
        point = entry.fixed_point(entry.config(forbidden_log_weight=-2.0, **options), problem)
        close(point.log_law, problem.log_target, 0.0)


@pytest.mark.parametrize("name", [n for n, e in AGENTS.items() if e.fixed_point is not None])
@pytest.mark.parametrize("floor", [{}, {"forbidden_log_weight": -2.0}])
def test_every_agent_states_a_limit_where_the_reference_forbids(name, floor):
    entry, problem = AGENTS[name], problem_of(small_ebm((3, 2, None), forbid=True))
    if floor and "forbidden_log_weight" not in entry.config.__dataclass_fields__:
        pytest.skip("it has no option forbidden_log_weight")
    point = entry.fixed_point(entry.config(**floor), problem)
    if point.log_law is not None:
        assert float(point.log_law.logsumexp(0).abs()) < 1e-9


def test_rollouts_of_a_reference_that_forbids_say_nothing_of_what_it_forbids():
    problem = problem_of(small_ebm((3, 2, None), forbid=True))
    entry = AGENTS["monte-carlo"]
    point = entry.fixed_point(entry.config(forbidden_log_weight=-2.0), problem)
    assert (point.log_law, point.degenerate) == (None, None)


def test_with_impossible_responses_the_benchmark_knows_what_is_stated_for_them(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("sequence\tscore\n0 0\t1\n0 1\t2\n1 0\t-inf\n1 1\t0\n")
    AGENTS["plain"] = AgentEntry(Plain, PolicyGradientConfig, "", "")
    options = {"soft-q": {"forbidden_log_weight": -5.0}}
    names = ("soft-q", "vargrad", "teacher-forcing", "plain", "grpo")
    plan = Plan(names, (Problem(str(table)),), calls=4096, options=options)
    assert targets(plan, Problem(str(table))) == {
        "soft-q": None,
        "vargrad": True,
        "teacher-forcing": True,
        "plain": None,
        "grpo": None,
    }


# Registering --------------------------------------------------------------------------------------


def test_a_registered_agent_is_known_everywhere(tmp_path, capsys):
    entry = register("mine", Plain, PolicyGradientConfig, "mine", "nobody", target)
    assert AGENTS["mine"] is entry
    assert cli.main(["agents"]) == 0
    assert "mine" in capsys.readouterr().out
    args = ["train", "--agent", "mine", "--task", "random", "--vocab-size", "3", "--steps", "2"]
    args += ["--batch-size", "8", "--policy", "tabular", "--out", str(tmp_path / "run")]
    assert cli.main([*args, "--max-length", "2"]) == 0


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("soft-q", Plain, PolicyGradientConfig), ValueError, "there is an agent 'soft-q' already"),
        (("", Plain, PolicyGradientConfig), ValueError, "name is lower case"),
        (("My Agent", Plain, PolicyGradientConfig), ValueError, "name is lower case"),
        (("x", object, PolicyGradientConfig), TypeError, "object has no sample"),
        (("x", 3, PolicyGradientConfig), TypeError, "must be a class"),
        (("x", Plain, dict), TypeError, "config must be a dataclass"),
        (("x", Plain, PolicyGradientConfig()), TypeError, "config must be a dataclass"),
    ],
)
def test_what_cannot_be_registered_is_one_sentence(args, error, message):
    with pytest.raises(error, match=message):
        register(*args, "", "")
    assert "x" not in AGENTS


def test_a_variant_is_an_option_of_the_agent():
    with pytest.raises(ValueError, match="x has no such option: kl_inn"):
        register("x", Plain, PolicyGradientConfig, "", "", variants=[{"kl_inn": "loss"}])
    assert "x" not in AGENTS
