"""``rl-ebm audit --framework``: what it prints, and the sentence where one is not as known."""

from __future__ import annotations

import json

import pytest
from framework_cases import SMALL, broken, install, k1_in_the_reward

from rl_ebm.cli import main
from rl_ebm.studies.audit import MEASURES
from rl_ebm.studies.frameworks import FRAMEWORKS, FrameworkError, audit_framework, audit_named
from rl_ebm.studies.frameworks import audit as audits
from rl_ebm.studies.frameworks.rows import has, part

ARGS = [
    "audit", "--task", "random", "--vocab-size", "3", "--max-length", "2", "--beta", "0.5",
    "--reference", "uniform", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A framework of three rows, and no other."""
    install(monkeypatch, tmp_path, "made", "1.2", {"made/__init__.py": ""})
    monkeypatch.setattr(audits, "FRAMEWORKS", {"made": (k1_in_the_reward,), "absent": ()})


def test_rows_have_the_keys_of_the_audit_and_say_what_to_set_instead(made):
    first, second, third = audit_framework("made", SMALL)
    for line in (first, second, third):
        assert (line["framework"], line["version"]) == ("made", "1.2")
        assert set(MEASURES) < set(line)
        assert line["objective"] == line["name"] == "made.losses.loss"
    assert first["is_target"]
    assert first["default"]
    assert first["tv"] < 1e-8
    assert "instead" not in first
    assert second["tv"] > 0.01
    assert not second["is_target"]
    assert second["instead"]["options"] == first["options"]
    assert third["tv"] is None
    assert third["how"] == "it draws lots"


@pytest.mark.slow
def test_the_command_prints_json_and_a_table(made, capsys):
    assert main([*ARGS, "--framework", "made", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [x["options"] for x in lines] == [{"penalty": True}, {"penalty": False}, {"noise": True}]
    assert main([*ARGS, "--framework", "made"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("made 1.2\n")
    assert "penalty=True" in text
    assert "the EBM" in text
    assert "to end at the EBM: set penalty=True" in text


@pytest.mark.slow
def test_only_those_that_are_asked_for(made, capsys):
    for words in (["PENALTY=true"], ["made.losses", "penalty=True"]):
        assert main([*ARGS, "--framework", "made", "--json", "--only", *words]) == 0
        assert [x["options"] for x in json.loads(capsys.readouterr().out)] == [{"penalty": True}]
    assert main([*ARGS, "--framework", "all", "--only", "noise"]) == 0
    assert "noise=True" in capsys.readouterr().out


def test_only_of_nothing(made, capsys):
    for name in ("made", "all"):
        assert main([*ARGS, "--framework", name, "--only", "noise", "penalty"]) == 2
        want = f"only finds none of {name}'s losses that has 'noise' and 'penalty' in its name and"
        told = " ".join(capsys.readouterr().err.split())
        assert f"{want} options; their names are losses.loss" in told
    assert main([*ARGS, "--only", "noise"]) == 2
    assert "only picks losses of a framework: name it, made, absent" in capsys.readouterr().err


@pytest.mark.slow
def test_all_are_those_that_are_installed(made, capsys):
    assert main([*ARGS, "--framework", "all", "--json"]) == 0
    said = capsys.readouterr()
    assert {x["framework"] for x in json.loads(said.out)} == {"made"}
    assert said.err.count("\n") == 1
    assert "left out: absent is not installed: pip install absent" in said.err


def test_none_of_all_is_an_error(monkeypatch):
    monkeypatch.setattr(audits, "FRAMEWORKS", {"absent": ()})
    with pytest.raises(FrameworkError, match="absent is not installed"):
        audit_named("all", SMALL)


def test_a_name_that_is_none(capsys):
    assert main([*ARGS, "--framework", "tlr"]) == 2
    known = "framework must be one of trl, verl, torchrl, openrlhf, all, got 'tlr'"
    assert known in capsys.readouterr().err
    with pytest.raises(ValueError, match="framework must be one of"):
        audit_framework("all", SMALL)


def test_a_loss_that_wants_what_it_is_not_given(made, monkeypatch):
    monkeypatch.setattr(audits, "FRAMEWORKS", {"made": (broken,)})
    with pytest.raises(FrameworkError, match=r"made 1.2 is not the release .*no_such_function"):
        audit_framework("made", SMALL)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_release_without_what_is_expected(monkeypatch, tmp_path, name):
    """Too old, or changed inside: the version, and what was expected where."""
    install(monkeypatch, tmp_path, name, "0.1", {f"{name}/__init__.py": ""})
    with pytest.raises(FrameworkError) as said:
        audit_framework(name, SMALL)
    text = str(said.value)
    assert text.startswith(f"{name} 0.1 ")
    assert "was expected" in text
    assert text.count(". ") == 0


def test_a_module_that_lost_a_member(monkeypatch, tmp_path):
    files = {"made/__init__.py": "", "made/losses.py": "class Loss: ..."}
    install(monkeypatch, tmp_path, "made", "0.1", files)
    with pytest.raises(
        FrameworkError, match=r"made 0.1 .*Loss.compute was expected in made.losses"
    ):
        part("made.losses", "Loss.compute")
    assert has("made.losses")
    assert not has("made.others")
    assert not has("absent.losses")
