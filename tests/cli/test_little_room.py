"""Folders that may not be written, and memory that is short: what is told, and what is kept."""

from __future__ import annotations

import pytest
from run_cases import train_args

from rl_ebm.automata import check_size
from rl_ebm.cli import commands, main
from rl_ebm.cli.exits import out_of_memory
from rl_ebm.messages import memory


def test_a_report_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main([*train_args(steps=2), "--out", str(run)]) == 0
    capsys.readouterr()

    def refused(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(commands, "write_text", refused)
    assert main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    assert "KL(target, policy)" in out
    assert "written:" not in out
    assert err.strip() == f"rl-ebm: Permission denied: {run / 'report.json'}"


def test_the_memory_of_an_automaton_is_told_before_it_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**8)
    check_size(2000, 1000, "the phrase", "give a shorter one")  # 96 MB
    with pytest.raises(ValueError, match=r"the phrase needs 144 MB and 100 MB are free; give"):
        check_size(3000, 1000, "the phrase", "give a shorter one")
    args = ["solve", "--vocab-size", "50257", "--max-length", "100", "--reward"]
    assert main([*args, "regex:(0|1){100}"]) == 2
    assert "the pattern '(0|1){100}' needs" in capsys.readouterr().err


def test_what_numpy_says_of_memory_is_our_sentence():
    told = "Unable to allocate 384. MiB for an array with shape (1002, 50257) and data type int64"
    want = "not enough memory for these sizes: 384 MiB at once; make them smaller"
    assert out_of_memory(told) == want


def test_a_number_of_steps_that_is_none_is_told_before_a_folder_is_made(tmp_path, capsys):
    args = [*train_args(steps=2), "--out", str(tmp_path / "run"), "--log-every", "1" + 400 * "0"]
    assert main(args) == 2
    assert "log_every must be below 2**63" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
