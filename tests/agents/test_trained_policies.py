"""What may be trained: weights of its own that can move; and whose curves are shown."""

from __future__ import annotations

import copy
import csv
import math
from functools import partial
from statistics import fmean

import pytest
import torch
from run_cases import small_options
from torch import nn
from toy_policies import exact_log_probs, responses, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.agents.shared.trained import tensors_of
from rl_ebm.policies import Tabular, Transformer, TransformerConfig
from rl_ebm.rewards import Function
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.defaults import ADAPTER_RATE, BATCH_SIZE, RATE, default_options

SPACE = rl_ebm.TokenSpace(3, 3)
SCORES = torch.randn(27, generator=seeded())


def table(seed=4):
    return Tabular(SPACE, generator=seeded(seed))


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def logits(self, tokens, prompt_ids=None):
        return 2 * self.inner.logits(tokens)


class Plain:
    """A policy that is no module, with another in a place of its choice."""

    def __init__(self, place):
        self.place = place

    def logits(self, tokens, prompt_ids=None):
        return torch.zeros(len(tokens), 3, 3)


class Slotted(Plain):
    __slots__ = ("kept",)

    def __init__(self, kept):
        super().__init__(None)
        self.kept = kept


def view_of(policy):
    other = table(9)
    other.table = nn.Parameter(policy.table.detach(), requires_grad=False)
    return other


@pytest.mark.parametrize(
    "reference",
    [
        lambda p: p,
        Inside,
        lambda p: Plain(p),
        lambda p: Plain({"a": [p]}),
        lambda p: Plain(partial(p.logits)),
        lambda p: Plain(lambda tokens: p.logits(tokens)),
        lambda p: Plain(Plain(p.table)),
        lambda p: Slotted(p),
        view_of,
    ],
    ids=[
        "itself",
        "inside",
        "attribute",
        "containers",
        "partial",
        "closure",
        "tensor",
        "slot",
        "view",
    ],
)
@pytest.mark.parametrize("agent", ["soft-q", "policy-gradient", "sampled-teacher", "exact"])
def test_a_policy_is_not_its_own_reference(reference, agent, tmp_path):
    policy = table()
    ebm = rl_ebm.EBM(SPACE, SCORES, reference=reference(policy))
    with pytest.raises(ValueError, match=r"shares a weight that is trained .*with the reference"):
        rl_ebm.train(ebm, agent, tmp_path / "r", policy=policy, steps=1)
    assert not (tmp_path / "r").exists()
    rl_ebm.train(ebm, agent, policy=copy.deepcopy(policy), options=small_options(agent), steps=1)


def test_nor_its_own_teacher_or_reward():
    policy, ebm = table(), rl_ebm.EBM(SPACE, SCORES)
    g = torch.Generator()
    for name in ("teacher-forcing", "on-policy-distillation", "exact"):
        with pytest.raises(ValueError, match="with the teacher"):
            AGENTS[name].agent(ebm, policy, None, g, Inside(policy))

    class Reward(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = policy.table

        def forward(self, tokens, lengths):
            return self.weight.sum() + tokens.double().sum(1)

    reward = Reward()
    for given in (reward, Function(reward), lambda tokens, lengths: reward(tokens, lengths)):
        with pytest.raises(ValueError, match="with the reward"):
            rl_ebm.train(rl_ebm.EBM(SPACE, given), policy=policy, steps=1)


def test_who_only_knows_the_policy_is_no_part_of_the_target():
    """A reward that is a method of whoever holds policy and EBM, the usual script."""

    class Script:
        def __init__(self):
            self.policy = table()
            self.ebm = rl_ebm.EBM(SPACE, self.reward, reference=Tabular(SPACE))

        def reward(self, tokens, lengths):
            return tokens.double().sum(1)

    script = Script()
    options = small_options("soft-q")
    rl_ebm.train(script.ebm, policy=script.policy, options=options, steps=1)


def test_the_target_stays_where_it_is():
    """log Z and E[R] of the EBM before and after, with a copy of the policy as the reference."""
    policy = table()
    ebm = rl_ebm.EBM(SPACE, SCORES, reference=copy.deepcopy(policy))
    before = rl_ebm.solve(ebm).log_z
    rl_ebm.train(ebm, policy=policy, options=small_options("soft-q"), steps=20)
    assert torch.equal(rl_ebm.solve(ebm).log_z, before)


def test_frozen_weights_of_both_and_trained_ones_of_the_reference_are_fine():
    shared = table(1).requires_grad_(False)

    class Sum(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.base, self.own = shared, table(seed)

        def logits(self, tokens, prompt_ids=None):
            return self.base.logits(tokens) + self.own.logits(tokens)

    ebm = rl_ebm.EBM(SPACE, SCORES, reference=Sum(2))
    rl_ebm.train(ebm, policy=Sum(3), options=small_options("soft-q"), steps=1)


def test_tensors_are_found_once_and_cycles_end():
    one, two = torch.zeros(2), torch.ones(2)
    thing = {"a": [one, (two,)], "b": one}
    thing["c"] = thing
    assert len(list(tensors_of(thing))) == 2


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.requires_grad_(False), r"all 1 weight tensors .* are frozen"),
        (lambda p: p.bfloat16(), r"weights are bfloat16 \(table\).*float32"),
        (lambda p: p.half(), r"weights are float16 \(table\).*float32"),
    ],
)
@pytest.mark.parametrize("agent", ["soft-q", "ppo", "best-of-n", "exact"])
def test_weights_that_cannot_be_trained(change, words, agent):
    with pytest.raises(ValueError, match=words) as told:
        rl_ebm.train(rl_ebm.EBM(SPACE, SCORES), agent, policy=change(table()), steps=1)
    assert "\n" not in str(told.value)


def test_quantised_weights_and_no_gradient_are_told():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.ones(3, 3, dtype=torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def logits(self, tokens, prompt_ids=None):
            return self.weight.float().expand(len(tokens), 3, 3)

    class Silent(Inside):
        @torch.no_grad()
        def logits(self, tokens, prompt_ids=None):
            return super().logits(tokens)

    class Empty(nn.Module):
        def logits(self, tokens, prompt_ids=None):
            return torch.zeros(len(tokens), 3, 3)

    ebm = rl_ebm.EBM(SPACE, SCORES)
    for policy, words in (
        (Quantised(), "frozen"),
        (Silent(table()), "no gradient"),
        (Empty(), "no weights"),
    ):
        with pytest.raises(ValueError, match=words):
            rl_ebm.train(ebm, policy=policy, steps=1)
    policy = table().double()
    rl_ebm.train(ebm, policy=policy, options=small_options("soft-q"), steps=1)
    assert policy.table.dtype == torch.float64


@pytest.mark.parametrize("policy", [None, "own"])
def test_compile_is_never_ignored(policy):
    ebm = rl_ebm.EBM(SPACE, SCORES)
    given = {"network": "tabular"} if policy is None else {"policy": Inside(table())}
    with pytest.raises(ValueError, match=r"compile=True compiles the library's own Transformer"):
        rl_ebm.train(ebm, steps=1, compile=True, **given)


# Default options --------------------------------------------------------------------------------


class Large(nn.Module):
    """A policy of others with more than a million weights, nearly all of them frozen or not."""

    def __init__(self, frozen=False):
        super().__init__()
        self.body = nn.Embedding(1100, 1000).requires_grad_(not frozen)
        self.head = nn.Linear(1000, 3)

    def logits(self, tokens, prompt_ids=None):
        x = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1] + 1], 1)
        return self.head(self.body(x))


@pytest.mark.parametrize("agent", AGENTS)
def test_default_options_are_by_kind_of_policy(agent):
    kind = AGENTS[agent].config
    tiny = TransformerConfig(1, 1, 4, 4)
    for policy in (None, table(), Transformer(SPACE, tiny), Inside(table())):
        assert default_options(kind, policy) == (kind(), [])
    for policy, rate in ((Large(), RATE), (Large(frozen=True), ADAPTER_RATE)):
        options, chosen = default_options(kind, policy)
        assert options.lr == rate
        assert "lr" in chosen
        assert getattr(options, "batch_size", BATCH_SIZE) == BATCH_SIZE


def test_they_are_printed_and_written_down_and_given_ones_win(tmp_path, capsys):
    import json

    ebm = rl_ebm.EBM(SPACE, SCORES)
    rl_ebm.train(ebm, "vargrad", tmp_path / "r", policy=Large(), steps=1)
    assert "vargrad for a pretrained policy: lr=1e-05, batch_size=64" in capsys.readouterr().err
    written = json.loads((tmp_path / "r" / "config.json").read_text())["agent"]["options"]
    assert (written["lr"], written["batch_size"]) == (1e-5, 64)
    given = AGENTS["vargrad"].config(lr=0.5, batch_size=8)
    rl_ebm.train(ebm, "vargrad", tmp_path / "s", policy=Large(), options=given, steps=1)
    written = json.loads((tmp_path / "s" / "config.json").read_text())["agent"]["options"]
    assert (written["lr"], written["batch_size"]) == (0.5, 8)
    assert "pretrained" not in capsys.readouterr().err


# Whose curves -----------------------------------------------------------------------------------


def rows_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["losses/loss"]]


def moments(policy, scores, space, prompts=1):
    """E[R], Var[R] and E[length] of the policy by enumeration, means over the prompts."""
    found = []
    lengths = torch.tensor([len(y) for y in responses(space)]).double()
    for i, log_probs in enumerate(exact_log_probs(policy, space, prompts)):
        p, r = torch.tensor(log_probs).double().exp(), scores.view(prompts, -1)[i].double()
        mean = float(p @ r)
        found.append((mean, float(p @ (r - mean).square()), float(p @ lengths)))
    return [sum(x) / prompts for x in zip(*found, strict=True)]


FAST = [
    ("soft-q", {"explore": 0.9}, 1),
    ("sampled-teacher", {"source": "reference"}, 1),
    ("on-policy-distillation", {"on_policy": 0.3}, None),
    ("soft-q", {"temperature": 3.0}, None),
]
OTHERS = [
    ("soft-q", {}),
    ("soft-q", {"explore": 0.9}),
    ("soft-q", {"explore": 0.0}),
    ("vargrad", {"replay_size": 64, "replay_batch": 32}),
    ("path-consistency", {}),
    ("policy-gradient", {}),
    ("ppo", {}),
    ("dpg", {}),
    ("best-of-n", {"source": "policy"}),
    ("best-of-n", {"source": "reference"}),
    ("sampled-teacher", {"source": "reference"}),
    ("sampled-teacher", {"source": "policy"}),
    ("on-policy-distillation", {"on_policy": 0.3}),
    ("on-policy-distillation", {"on_policy": 0.0}),
    ("teacher-forcing", {}),
    ("monte-carlo", {}),
    ("soft-q", {"temperature": 3.0}),
    ("soft-q", {"epsilon": 0.5}),
    ("soft-q", {"explore": 1.0}),
]
CASES = [
    *FAST,
    *(pytest.param(*x, eos, marks=pytest.mark.slow) for x in OTHERS for eos in (None, 1)),
]


@pytest.mark.parametrize(("agent", "options", "eos_id"), CASES)
def test_the_episodic_return_is_the_policys(agent, options, eos_id, tmp_path):
    """At a rate of nothing the policy stays: E[R] by enumeration, five deviations of the mean."""
    space = rl_ebm.TokenSpace(3, 3, eos_id)
    scores = 3 * torch.randn(2, space.num_sequences, generator=seeded(3))
    prompts = [[0], [1]]
    ebm = rl_ebm.EBM(space, scores, 2.0, None, prompts)
    q = [table.masked_fill(torch.isneginf(table), 0.0) for table in rl_ebm.solve(ebm).tables()]
    start = Tabular.from_tables(q, space, prompts)
    config = AGENTS[agent].config(batch_size=101, lr=1e-12, **options)
    every = TrainConfig(steps=40, log_every=1, eval_every=1e9)
    rl_ebm.train(ebm, agent, tmp_path / "r", policy=start, options=config, config=every)
    rows = rows_of(tmp_path / "r")
    assert len(rows) == 40
    mean, variance, length = moments(start, scores, space, 2)
    # Rows of the policy's own in a step, at least a quarter of them for each of the prompts.
    own = {0.9: 10, 0.5: 50, 0.3: 30}.get(options.get("explore", options.get("on_policy")), 50)
    bar = 5 * math.sqrt(2 / own / len(rows))
    shown = fmean(float(row["charts/episodic_return"]) for row in rows)
    assert shown == pytest.approx(mean, abs=bar * math.sqrt(variance))
    lengths = fmean(float(row["charts/episodic_length"]) for row in rows)
    assert lengths == pytest.approx(length, abs=bar)  # their variance is 1 at most
    # And the mixture, where it is one, is another number.
    if options.get("explore") == 0.9 or options.get("source") == "reference":
        behaviour = fmean(float(row["charts/behaviour_return"]) for row in rows)
        assert mean - behaviour > 2 * bar * math.sqrt(variance)


def test_no_call_of_a_users_reward_is_made_for_a_curve(tmp_path):
    calls = []

    def reward(tokens, lengths):
        calls.append(len(tokens))
        return tokens.double().sum(1)

    ebm = rl_ebm.EBM(SPACE, reward)
    options = AGENTS["sampled-teacher"].config(batch_size=16)
    config = TrainConfig(steps=5, log_every=1)
    rl_ebm.train(
        ebm, "sampled-teacher", tmp_path / "r", options=options, config=config, solve=False
    )
    assert sum(calls) == 5 * 16
    assert "charts/episodic_return" not in rows_of(tmp_path / "r")[0]
    assert rows_of(tmp_path / "r")[-1]["charts/behaviour_return"]


GLOBAL = Tabular(SPACE)


def global_reward(tokens, lengths):
    return rl_ebm.policies.log_prob(GLOBAL, SPACE, tokens, lengths).detach()


class GlobalReference:
    def logits(self, tokens, prompt_ids=None):
        return GLOBAL.logits(tokens)


@pytest.mark.parametrize("what", ["reference", "reward"])
def test_a_policy_that_is_a_global_of_the_script_is_found_too(what):
    reference = GlobalReference() if what == "reference" else None
    ebm = rl_ebm.EBM(SPACE, global_reward if what == "reward" else SCORES, reference=reference)
    with pytest.raises(ValueError, match=f"with the {what}"):
        rl_ebm.train(ebm, policy=GLOBAL, options=small_options("soft-q"), steps=1)
    rl_ebm.train(ebm, policy=table(5), options=small_options("soft-q"), steps=1)
