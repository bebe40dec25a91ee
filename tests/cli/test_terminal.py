"""What a terminal is shown, and a terminal that is gone."""

from __future__ import annotations

import errno
import io
import json
import signal
import sys

import pytest
import torch
from run_cases import NETWORK, small_options

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.cli.exits import exit_code
from rl_ebm.messages.words import printable
from rl_ebm.training.directory import decode
from rl_ebm.training.stopping import Terminated


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\x1b[2J\t\u202eb\u2028\ud800\x9b\x07") == (
        "a\\x1b[2J\\t\\u202eb\\u2028\\ud800\\x9b\\x07"
    )
    plain = "ä 日 \u200d\u00a0\u3000 x  y"  # joiners and spaces are text
    assert printable(plain) == plain


def test_a_path_is_told_with_its_spaces_and_without_escapes(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "a  b\x1b[2J\u202e")]) == 2
    err = capsys.readouterr().err
    assert "a  b\\x1b[2J\\u202e" in err
    assert not set("\x1b\u202e") & set(err)


TINY = (
    "--vocab-size", "2", "--max-length", "2", "--layers", "1", "--heads", "1", "--dim", "8",
)  # fmt: skip


@pytest.mark.slow
def test_folders_are_told_without_escapes(tmp_path, capsys):
    run = tmp_path / "a  b\x1b[2J\u202e"
    train = ["train", "--agent", "vargrad", "--task", "random", *TINY, "--batch-size", "4"]
    assert main([*train, "--steps", "2", "--out", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    assert main(["train", "--resume", str(run)]) == 0
    (tmp_path / "c.csv").write_text("sequence,score\naa,1\nab,2\nba,3\nbb,4\n")
    bench = [
        "bench",
        "--agents",
        "vargrad",
        "--tasks",
        str(tmp_path / "c.csv"),
        "--seeds",
        "1",
    ]
    assert main([*bench, "--calls", "64", "--out", str(run / "bench"), "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("a  b\\x1b[2J\\u202e") >= 6
    assert not set("\x1b\u202e") & set(out + err)


def test_symbols_of_somebody_elses_run_do_nothing(tmp_path, capsys):
    """In what people read; what programs read is as it was."""
    space, symbols = rl_ebm.TokenSpace(2, 2), ["\x1b[2J", "b"]
    ebm = rl_ebm.EBM(space, torch.tensor([9.0, 0.0, 0.0, 0.0]), beta=1.0)
    run = tmp_path / "run"
    rl_ebm.train(
        ebm, "soft-q", run, options=small_options("soft-q"), network=NETWORK, steps=1,
        source={"alphabet": symbols, "separator": ""},
    )  # fmt: skip
    assert main(["sample", str(run), "-n", "40", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert "\x1b" not in out
    assert main(["diagnose", str(run), "--seconds", "0.1"]) in (0, 1)
    assert "\x1b" not in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())["ebm"]
    assert decode(config, [0, 1]) == "\x1b[2Jb"


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (Terminated(signal.SIGHUP), 129),
        (Terminated(), 143),
        (KeyboardInterrupt(), 130),
        (OSError(errno.EIO, "Input/output error"), 2),
    ],
)
def test_a_terminal_that_is_gone_changes_no_exit_code(stop, code, monkeypatch):
    def command():
        raise stop

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone())
    assert exit_code(command) == code


@pytest.mark.parametrize(
    ("flag", "takes"), [("--steps", "a whole number or None"), ("--seconds", "a number or None")]
)
def test_what_a_flag_takes_is_said_in_words(flag, takes, tmp_path, capsys):
    assert main(["train", "--task", "random", flag, "many", "--out", str(tmp_path / "run")]) == 2
    assert f"{flag}: it takes {takes}, got 'many'; rl-ebm train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
