"""Names of agents from elsewhere, and the types of every option of every agent."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from inspect import signature
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import rl_ebm
from rl_ebm.agents import AGENTS, entry_of
from rl_ebm.agents.names import ELSEWHERE, PREFERENCES, key, meant
from rl_ebm.agents.path_consistency import path_consistency_loss
from rl_ebm.agents.soft_q import n_step_returns
from rl_ebm.cli import commands as cli
from rl_ebm.policies import Transformer, TransformerConfig
from rl_ebm.studies.bench import Plan, Problem

# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "agent"),
    [
        ("rloo", "policy-gradient"),
        ("RLOO", "policy-gradient"),
        ("reinforce", "policy-gradient"),
        ("pcl", "path-consistency"),
        ("tb", "trajectory-balance"),
        ("db", "detailed-balance"),
        ("sub-tb", "subtb"),
        ("gkd", "on-policy-distillation"),
        ("sql", "soft-q"),
        ("soft_q", "soft-q"),
        ("soft-q-learning", "soft-q"),
        ("q#", "monte-carlo"),
        ("gdc", "dpg"),
        ("sft", "teacher-forcing"),
        ("raft", "best-of-n"),
        ("expert-iteration", "best-of-n"),
        ("star", "best-of-n"),
        ("mcmc", "sampled-teacher"),
        ("sir", "sampled-teacher"),
        ("log-variance", "vargrad"),
        ("log_variance", "vargrad"),
        ("DPO", "dpo"),
        ("online-dpo", "dpo"),
        ("cdpo", "dpo"),
    ],
)
def test_a_name_from_elsewhere_is_told_what_it_is_here(name, agent, capsys):
    wanted = f"there is no agent {name!r}: did you mean {agent!r}?"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        entry_of(name)
    assert str(caught.value).startswith(wanted)
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(2, 1), torch.zeros(2))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rl_ebm.train(ebm, name, steps=1)
    assert str(caught.value).startswith(wanted)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Plan((name,), (Problem("random"),))
    assert str(caught.value).startswith(wanted)
    assert cli.main(["train", "--agent", name, "--out", "nowhere"]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())
    assert cli.main(["bench", "--agents", f"soft-q,{name}", "--out", "nowhere"]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())


def test_rloo_is_the_policy_gradient_with_its_default_baseline():
    assert "leave-one-out" in meant("rloo", AGENTS)
    assert AGENTS["policy-gradient"].config().baseline == "leave-one-out"


def test_preference_learning_is_told_apart():
    for name in ("kto", "KTO", "orpo", "nash-md"):
        text = meant(name, AGENTS)
        assert "'dpo' and 'ipo' are agents here" in text
        assert "'vargrad'" in text
        assert "sigmoid(R1 - R2)" in text


def test_the_table_names_agents_once_and_in_its_own_spelling():
    assert set(ELSEWHERE) <= set(AGENTS)
    names = [*(n for found in ELSEWHERE.values() for n in found), *PREFERENCES]
    assert len(names) == len(set(names))
    assert all(name == key(name) for name in names)
    assert not {key(name) for name in AGENTS} & set(names)


def test_other_names_get_the_nearest_or_all():
    assert meant("softq", AGENTS) == ": did you mean 'soft-q'?"
    assert meant("xyz", AGENTS).startswith("; there are: soft-q, ")
    for name in (3, None, ["soft-q"], AGENTS["soft-q"].agent):
        with pytest.raises(ValueError, match="an agent is named by one of soft-q"):
            entry_of(name)


# Options -----------------------------------------------------------------------------------------

EVERY = [
    (name, field.name, get_type_hints(entry.config)[field.name])
    for name, entry in AGENTS.items()
    for field in fields(entry.config)
]
PATHS = [(n, f) for n, f, h in EVERY if h == str | None]
NUMBERS = [
    (n, f, set(get_args(h) or (h,)))
    for n, f, h in EVERY
    if get_origin(h) is not Literal and (n, f) not in PATHS
]
CHOICES = [(n, f) for n, f, h in EVERY if get_origin(h) is Literal]


def build(name, **options):
    """A config; log_z="batch" where a group_size would else not be read."""
    if name == "trajectory-balance" and "group_size" in options:
        options["log_z"] = "batch"
    return AGENTS[name].config(**options)


@pytest.mark.parametrize(("name", "option", "kinds"), NUMBERS)
def test_what_is_no_number_is_one_sentence_for_every_option(name, option, kinds):
    wrong = [True, False, "3", [1], {}, 1j, torch.tensor(3), b"1", np.array([1, 2])]
    if float not in kinds:
        wrong += [2.5, 2.0, math.nan, math.inf, np.float64(4.0)]
    if type(None) not in kinds:
        wrong.append(None)
    word = "a number" if float in kinds else "an integer"
    for value in wrong:
        with pytest.raises(TypeError, match=f"^{option} must be {word}"):
            build(name, **{option: value})
        with pytest.raises(ValueError, match=f"^{option} must be {word}"):  # both
            build(name, **{option: value})


@pytest.mark.parametrize(("name", "option", "kinds"), NUMBERS)
def test_what_is_not_finite_is_refused_by_name(name, option, kinds):
    if float not in kinds or option == "forbidden_log_weight":
        return  # that one is checked with the EBM
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**400)):
        with pytest.raises(ValueError, match=option):
            build(name, **{option: value})


@pytest.mark.parametrize("name", AGENTS)
def test_a_number_of_nats_that_float32_does_not_hold_is_refused_by_name(name):
    space = rl_ebm.TokenSpace(3, 2)
    ebm = rl_ebm.EBM(space, torch.randn(9, generator=torch.Generator().manual_seed(0)))
    policy = Transformer(space, TransformerConfig(1, 1, 8, 8))
    for option in ("forbidden_log_weight", "log_z_start"):
        if option in {field.name for field in fields(AGENTS[name].config)}:
            for value in (1e39, -1e39):
                with pytest.raises(ValueError, match=f"{option} must be within"):
                    AGENTS[name].agent(ebm, policy, build(name, **{option: value}))


@pytest.mark.parametrize(("name", "option", "kinds"), NUMBERS)
def test_numbers_of_numpy_are_numbers(name, option, kinds):
    plain = getattr(AGENTS[name].config(), option)
    value = (
        8 if plain is None and option != "forbidden_log_weight" else -3 if plain is None else plain
    )
    for kind in (np.int64, np.int32) if isinstance(value, int) else (np.float64, np.float32):
        config = build(name, **{option: kind(value)})
        got = getattr(config, option)
        assert type(got) in (int, float)
        assert got == pytest.approx(value, rel=1e-6)
        assert json.loads(json.dumps(asdict(config)))[option] == got


@pytest.mark.parametrize(("name", "option"), PATHS)
def test_a_path_is_text(name, option):
    for value in (3, True, ["x"], b"x", torch.zeros(2)):
        with pytest.raises(TypeError, match=f"^{option} must be the path of a file, as text"):
            build(name, **{option: value})
    assert json.loads(json.dumps(asdict(build(name, **{option: "x"}))))[option] == "x"


@pytest.mark.parametrize(("name", "option"), CHOICES)
def test_a_choice_is_one_of_its_words(name, option):
    for value in ("x", 3, None, True, ["k1"], torch.zeros(2)):
        with pytest.raises(ValueError, match=f"^{option} must be"):
            build(name, **{option: value})


def test_an_epoch_count_and_lengths_beyond_reason_neither_hang_nor_take_memory():
    with pytest.raises(ValueError, match="epochs must be >= 1 and at most 1000"):
        AGENTS["ppo"].config(epochs=10**12)
    for option in ("replay_size", "replay_batch", "batch_size"):
        with pytest.raises(ValueError, match=f"{option} must be at most"):
            AGENTS["soft-q"].config(**({"replay_size": 1} | {option: 10**15}))
    g = torch.Generator().manual_seed(0)
    r, v, log_pi = (torch.randn(4, 3, generator=g) for _ in range(3))
    lengths = torch.tensor([3, 2, 1, 3])
    whole = n_step_returns(r, v, log_pi, lengths, 3)
    assert torch.equal(n_step_returns(r, v, log_pi, lengths, 10**12), whole)
    loss = path_consistency_loss(v, log_pi, r, lengths, 1.0, None)
    assert torch.equal(path_consistency_loss(v, log_pi, r, lengths, 1.0, 10**30), loss)


def test_a_config_still_reads_like_a_dataclass():
    config = AGENTS["ppo"].config
    assert next(iter(signature(config).parameters)) == "batch_size"
    assert replace(config(), epochs=2).epochs == 2
    with pytest.raises(TypeError, match="wrong"):
        config(wrong=1)
