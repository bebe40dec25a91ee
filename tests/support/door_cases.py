"""What is handed over at a door: of another kind it is one sentence, before anything is done."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import rl_ebm
from rl_ebm import agents, envs, policies, rewards
from rl_ebm.cli import parsing as flags
from rl_ebm.messages import memory
from rl_ebm.policies.expression import read_responses
from rl_ebm.training import kinds

SPACE = rl_ebm.TokenSpace(3, 3)
ROWS = torch.full((2, 3), 7.0)  # several lines, were it printed


@pytest.fixture(scope="module")
def ebm():
    scores = torch.randn(27, generator=torch.Generator().manual_seed(1))
    return rl_ebm.EBM(SPACE, scores)


def table_file():
    return rewards.TableFile(torch.zeros(4).double(), rl_ebm.TokenSpace(2, 2), ("a", "b"))


def batch():
    return rl_ebm.Batch(torch.zeros(2, 3).long(), torch.tensor([3, 3]), torch.zeros(2).long())


def trl(**given):
    return rewards.from_trl(lambda completions, **_: [0.0], str, **given)


def registered(**given):
    return agents.register("mine", agents.SoftQAgent, agents.SoftQConfig, "", "", **given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rewards.as_reward(torch.zeros(27), ROWS, None), "space must be a TokenSpace"),
        (lambda: rewards.as_reward(torch.zeros(27), SPACE, 2.5), "prompts must be a list"),
        (lambda: rewards.check_values(2.5, "here"), "here must be a tensor"),
        (lambda: rewards.check_values(torch.zeros(2), ROWS), "where must be text"),
        (lambda: rewards.read_table(ROWS), "path must be the path"),
        (lambda: rewards.read_table("t", alphabet=ROWS), "alphabet must be text"),
        (lambda: rewards.read_table("t", normalise=ROWS), "normalise must be"),
        (lambda: rewards.read_table("t", missing=ROWS), "missing must be"),
        (lambda: rewards.read_table("t", ragged=ROWS), "ragged must be"),
        (lambda: table_file().decode(2.5), "tokens must be a list"),
        (lambda: table_file().decode([ROWS]), "tokens must be a list"),
        (lambda: trl(prompts=torch.zeros(())), "prompts must be a list"),
        (lambda: rewards.Automaton.modular(SPACE, torch.zeros(2, device="meta")), "scores must be"),
        (lambda: policies.AutomatonPolicy(None, None), "space must be a TokenSpace"),
        (lambda: policies.AutomatonPolicy(SPACE, ROWS), "machine must be"),
        (lambda: policies.mask_logits(len, SPACE), "logits must be a tensor"),
        (lambda: policies.mask_logits(torch.zeros(1, 3, 3), ROWS), "space must be"),
        (lambda: policies.tree_q_values([], SPACE), "must be a policy"),
        (lambda: policies.tree_q_values(policies.Uniform(SPACE), SPACE, ROWS), "prompts must be"),
        (lambda: policies.check(ROWS), "the policy must be a policy"),
        (lambda: policies.check(policies.Uniform(SPACE), ROWS), "space must be"),
        (lambda: policies.check(policies.Uniform(SPACE), name=ROWS), "name must be text"),
        (lambda: policies.check(policies.Uniform(SPACE), rows=ROWS), "rows must be"),
        (lambda: kinds.register("reward", "x", 3, str, str), "of must be a class"),
        (lambda: kinds.register("reward", "x", ROWS, str, str), "of must be a class"),
        (lambda: kinds.register("reward", "x", int, ROWS, str), "describe and rebuild functions"),
        (lambda: kinds.register(ROWS, "x", int, str, str), "role must be one of"),
        (lambda: kinds.register("reward", ROWS, int, str, str), "name must be printable text"),
        (lambda: policies.fit_ngram(SPACE, ROWS), "responses must be an rl_ebm.Batch"),
        (lambda: policies.fit_ngram(SPACE, batch(), prompts=ROWS), "prompts are a tensor"),
        (lambda: policies.fit_hmm(SPACE, batch(), 2, progress=ROWS), "progress must be"),
        (lambda: policies.fit_ngram(SPACE, batch()).logits(2.5), "tokens must be a tensor"),
        (lambda: envs.Transition(ROWS), "ebm must be an rl_ebm.EBM"),
        (lambda: envs.make_task("x" * 5000), "unknown task"),
        (lambda: envs.make_task(ROWS), "name must be a task"),
        (lambda: envs.make_task("random", task_seed=ROWS), "task_seed must be"),
        (lambda: envs.TokenMDP(task="random", task_kwargs=ROWS), "task_kwargs must be a dict"),
        (lambda: agents.entry_of(ROWS), "there is no agent a tensor"),
        (lambda: agents.entry_of("x" * 5000), "there is no agent"),
        (lambda: agents.make_options("a", [], {}), "entry must be one of"),
        (lambda: registered(variants=3), "variants must be a list"),
        (lambda: registered(variants=[3]), "variants must be a list"),
    ],
)
def test_another_kind_is_one_short_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", sorted(agents.AGENTS))
def test_agents_say_what_they_are_made_of(ebm, name):
    entry = agents.AGENTS[name]
    config = entry.config(**({} if name == "exact" else {"batch_size": 8}))
    policy, solution = policies.Tabular(SPACE), rl_ebm.solve(ebm)
    for given, words in (
        ((2.5, policy, config, None, solution), "ebm must be"),
        ((ebm, policy, 2.5, None, solution), "config must be"),
        ((ebm, policy, entry.config, None, solution), "config must be"),
        ((ebm, policy, config, 2.5, solution), "generator must be"),
        ((ebm, policy, config, None, 2.5), "the teacher must be a policy"),
        ((ebm, 2.5, config, None, solution), "the policy must be a policy"),
        ((ebm, policies.Uniform(SPACE), config, None, solution), "nothing to train"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            entry.agent(*given)


def test_environments_say_what_they_take(ebm):
    for given in ({"reward_mode": ROWS}, {"forbidden_reward": ROWS}, {"forbidden_reward": "x"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(given))):
            envs.TokenMDP(ebm, **given)
    for count in (0, "a", ROWS, 2**40):
        with pytest.raises((TypeError, ValueError), match="num_envs must be an integer"):
            envs.TokenVectorEnv(count, ebm)
    env, vector = envs.TokenMDP(ebm), envs.TokenVectorEnv(2, ebm)
    for made in (env, vector):
        with pytest.raises(TypeError, match="options of reset must be a dict"):
            made.reset(options=len)
    env.reset()
    vector.reset()
    with pytest.raises(ValueError, match=r"an action is an integer token id .* got a tensor of"):
        env.step(ROWS)
    for actions in (ROWS, torch.zeros(2, device="meta"), [[1], [1, 2]]):
        with pytest.raises(ValueError, match="actions must be integer token ids"):
            vector.step(actions)
    for wrapper in (envs.FlatObservation(env).observation, envs.FlatVectorObservation(vector)):
        read = getattr(wrapper, "observations", wrapper)
        for observation in (2.5, {}, np.zeros(3)):
            with pytest.raises(TypeError, match="an observation is a dict of tokens, length"):
                read(observation)


def test_scores_are_of_batches(ebm):
    with pytest.raises(TypeError, match=r"batch must be an rl_ebm.Batch"):
        ebm.score(None)
    with pytest.raises(ValueError, match="lengths has shape"):
        ebm.score(rl_ebm.Batch(torch.zeros(2, 3).long(), torch.tensor([3]), torch.zeros(2).long()))


def test_more_draws_than_memory_are_refused(ebm, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**7)
    machine = rewards.Automaton.contains(SPACE, [1])
    solutions = (rl_ebm.solve(ebm), rl_ebm.solve(rl_ebm.EBM(SPACE, machine)))
    for solution in solutions:
        with pytest.raises(ValueError, match="drawing 2,000,000 responses at a time needs"):
            solution.sample(2_000_000)
        assert len(solution.sample(3)) == 3
    with pytest.raises(ValueError, match="draw fewer"):
        policies.sample(policies.Uniform(SPACE), SPACE, 2_000_000)


def test_a_limit_of_address_space_is_no_free_memory(monkeypatch):
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (mapped + 10**9, mapped + 10**9))
    assert 0 < memory.free_bytes() <= 1.5e9
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    assert memory.free_bytes() == 0


def test_long_words_lose_their_middle(capsys):
    assert flags.fail(f"no file /{'x' * 5000}/config.json at all") == 2
    said = capsys.readouterr().err
    assert len(said) < 300
    assert "config.json at all" in said


@pytest.mark.parametrize("read", [rewards.read_table, lambda path: corpus(path)])
def test_a_device_has_no_end(read):
    with pytest.raises(ValueError, match="is a device, which may have no end"):
        read(Path("/dev/zero"))


def corpus(path):
    return read_responses(path, SPACE, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"run": 3}, "run must be the path of a run's folder, got 3"),
        ({"seconds": "soon"}, "seconds must be"),
        ({"examples": 2.5}, "examples must be"),
    ],
)
def test_a_diagnosis_of_nothing(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        rl_ebm.diagnose(**{"run": "nowhere", **arguments})
