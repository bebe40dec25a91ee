"""The command line: what it prints, and one sentence with exit code 2 for every wrong input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from run_cases import (
    HANGS,
    NETWORK_FLAGS,
    load_state,
    refused,
    start,
    train_args,
)
from verify_cases import KEYS

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.cli import commands as cli
from rl_ebm.cli import main
from rl_ebm.cli import parsing as flags

TABLE = "sequence\tscore\n" + "".join(f"{a}{b}\t{i}\n" for i, (a, b) in enumerate(
    product("AC", repeat=2)))  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A short run on a table file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "t.tsv").write_text(TABLE)
    args = ["train", "--table", folder / "t.tsv", "--agent", "exact", *NETWORK_FLAGS]
    assert main([*map(str, args), "--steps", "2", "--out", str(folder / "run")]) == 0
    return folder / "run"


WRONG_FLAGS = [
    (["--beta", "0"], "beta must be a finite number > 0, got 0"),
    (["--beta", "-1"], "beta must be a finite number > 0, got -1"),
    (["--beta", "nan"], "beta must be a finite number > 0, got nan"),
    (["--beta", "1e-320"], "beta"),
    (["--beta", "x"], "--beta"),
    (["--vocab-size", "1"], "vocab_size must be an integer >= 2, got 1"),
    (["--max-length", "0"], "max_length must be an integer >= 1, got 0"),
    (["--max-length", "-2"], "max_length must be an integer >= 1, got -2"),
    (["--max-length", "100000"], "smaller"),
    (["--eos-id", "3"], "eos_id must be a token id in [0, 3)"),
    (["--task", "randon"], "no task 'randon': did you mean 'random'?"),
    (["--agent", "softq"], "no agent 'softq': did you mean 'soft-q'?"),
    (["--agent", "xyz"], "no agent 'xyz'; there are: soft-q"),
    (["--bta", "1"], "has no flag --bta: did you mean '--beta'?"),
    (["--bta=1"], "has no flag --bta: did you mean '--beta'?"),
    (["--directoin", "reverse"], "has no flag --directoin"),
    (["-x"], "-x"),
    (["extra"], "extra"),
    (["--beta"], "--beta"),
    (["--reference", "me"], "uniform"),
    (["--policy", "lstm"], "transformer"),
    (["--policy", "mlp", "--dim", "32"], "--dim is no size of --policy mlp, which has --layers"),
    (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    (["--steps", "-1"], "steps must be >= 0, got -1"),
    (["--steps", "1.5"], "--steps"),
    (["--seconds", "nan"], "seconds must be a finite number >= 0, got nan"),
    (["--seconds", "-1"], "seconds must be a finite number >= 0, got -1"),
    (["--log-every", "0"], "log_every must be >= 1, got 0"),
    (["--checkpoint-every", "0"], "checkpoint_every must be > 0"),
    (["--samples", "1"], "samples must be at least 2, got 1"),
    (["--task-seed", "-1"], "task_seed must be an integer >= 0, got -1"),
    (["--seed", "9" * 30], "seed"),
    (["--heads", "3"], "heads must divide dim, got dim=8, heads=3"),
    (["--layers", "0"], "layers must be an integer >= 1, got 0"),
    (["--dim", "80000000"], "memory"),
    (["--batch-size", "0"], "batch_size must be >= 1, got 0"),
    (["--batch-size", "100000000000000"], "memory"),
    (["--explore", "2"], "explore must be in [0, 1], got 2"),
    (["--tau", "0"], "tau must be in (0, 1], got 0"),
    (["--lr", "-1"], "lr must be"),
    (["--lr", "nan"], "lr must be"),
    (["--max-grad-norm", "-1"], "max_grad_norm must be"),
    (["--max-grad-norm", "nan"], "max_grad_norm must be"),
    (["--replay-size", "0"], "replay_batch needs replay_size > 0"),
    (["--n-step", "0"], "n_step must be >= 1"),
    (["--agent", "policy-gradient"], "--agent"),
    (["--table", "t.tsv"], "leave out --task"),
    (["--alphabet", "AC"], "need a --table"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG_FLAGS, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else ""
)
def test_wrong_flags_of_train(wrong, message, tmp_path, capsys):
    args = [*train_args(steps=1), "--out", tmp_path / "run", *wrong]
    assert message in refused(capsys, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path, capsys, made):
    for args in (
        [*train_args(steps=1), "--out", tmp_path / "run"],
        ["train", "--resume", made],
        ["verify", made],
        ["sample", made],
        ["solve"],
    ):
        assert "--device cpu" in refused(capsys, *args, "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


HEAD = "sequence\tscore\n"
WRONG_TABLES = {
    "missing": (HEAD + "AA\t1\nAC\t2\nCC\t3\n", "CA"),
    "duplicate": (HEAD + "AA\t1\nAC\t2\nAA\t3\nCA\t1\nCC\t1\n", "line 4"),
    "ragged": (HEAD + "AA\t1\nACC\t2\n", "line 3"),
    "NaN": (HEAD + "AA\t1\nAC\tnan\nCA\t1\nCC\t1\n", "line 3"),
    "+inf": (HEAD + "AA\t1\nAC\tinf\nCA\t1\nCC\t1\n", "line 3"),
    "no number": (HEAD + "AA\t1\nAC\tx\n", "line 3"),
    "one symbol": (HEAD + "AA\t1\n", "only symbol"),
    "all -inf": (HEAD + "A\t-inf\nC\t-inf\n", "-inf"),
    "no header": ("AA\t1\n", "sequence"),
    "empty": ("", "t.tsv"),
    "no text": ("\ud800", "t.tsv"),
}


@pytest.mark.parametrize("command", ["train", "solve"])
@pytest.mark.parametrize("name", WRONG_TABLES)
def test_wrong_tables(command, name, tmp_path, capsys):
    text, message = WRONG_TABLES[name]
    path = tmp_path / "t.tsv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    args = ["--steps", "1", "--out", tmp_path / "run"] if command == "train" else []
    assert message in refused(capsys, command, "--table", path, *args)
    assert os.listdir(tmp_path) == ["t.tsv"]


def test_a_table_that_is_not_there(tmp_path, capsys):
    assert "nope.tsv" in refused(capsys, "solve", "--table", tmp_path / "nope.tsv")
    assert "directory" in refused(capsys, "solve", "--table", tmp_path)


def test_forbidden_responses_ask_for_a_stand_in(tmp_path, capsys):
    path = tmp_path / "t.tsv"
    path.write_text(HEAD + "AA\t1\nAC\t2\nCC\t3\n")
    args = ["train", "--table", path, "--missing", "forbid", "--steps", "1"]
    err = refused(capsys, *args, "--out", tmp_path / "run")
    assert "forbidden_log_weight" in err
    assert os.listdir(tmp_path) == ["t.tsv"]


def test_outputs_that_cannot_be(tmp_path, capsys, made):
    (tmp_path / "file").write_text("mine")
    args = train_args(steps=1)
    assert "is a file" in refused(capsys, *args, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in refused(capsys, *args, "--out", tmp_path / "file" / "run")
    refused(capsys, *args, "--out", tmp_path / ("x" * 300))
    assert "--out FOLDER" in refused(capsys, *args)
    err = refused(capsys, *args, "--out", made)
    assert f"--resume {made}" in err
    assert "--overwrite" in err
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command 'trian': did you mean 'train'?"),
        (["train", "--resume"], "--resume"),
        (["train", "--resume", "nope"], "nope holds no run"),
        (["train", "--resume", "RUN", "--seed", "1"], "--seed cannot be given with --resume"),
        (["train", "--resume", "RUN", "--out=x"], "--out cannot be given with --resume"),
        (["train", "--resume", "RUN", "--lr", "1"], "--lr cannot be given with --resume"),
        (["train", "--resume", "RUN", "--stps", "1"], "did you mean '--steps'?"),
        (["train", "--resume", "RUN", "--steps", "-3"], "steps must be >= 0, got -3"),
        (["verify"], "run"),
        (["verify", "nope"], "nope holds no run"),
        (["verify", "RUN", "more"], "more"),
        (["verify", "RUN", "--max-kll", "1"], "did you mean '--max-kl'?"),
        (["verify", "RUN", "--max-kl", "nan"], "max-kl"),
        (["verify", "RUN", "--memory", "-1"], "memory"),
        (["sample", "nope"], "nope holds no run"),
        (["sample", "RUN", "-n", "0"], "-n must be >= 1, got 0"),
        (["sample", "RUN", "-n", "x"], "-n"),
        (["solve", "--top", "-1"], "--top must be >= 0, got -1"),
        (["solve", "--vocab-size", "90", "--max-length", "9"], "at most"),
        (["solve", "--task", "pairwise", "--max-length", "40"], "bytes"),
        (["agents", "--all"], "no flag --all"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_input_of_every_command(args, message, made, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *[made if arg == "RUN" else arg for arg in args])
    assert list(tmp_path.iterdir()) == []


def test_a_table_goes_to_no_task_flag(capsys, made):
    table = made.parent / "t.tsv"
    for flag in (["--vocab-size", "2"], ["--max-length", "2"], ["--eos-id", "0"], ["--task", "x"]):
        assert flag[0] in refused(capsys, "solve", "--table", table, *flag)


# What the commands do ---------------------------------------------------------------------------


def test_solve_json_against_brute_force(tmp_path, capsys):
    path = tmp_path / "t.csv"
    scores = {f"{a} {b}": float(a * 3 - b) for a, b in product((2, 10), repeat=2)}
    path.write_text("score,sequence\n" + "".join(f"{s},{y}\n" for y, s in scores.items()))
    args = ["solve", "--table", str(path), "--beta", "2.5", "--json", "--top", "3"]
    assert main(args) == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got) == {"log_z", "entropy", "num_sequences", "expected_reward", "top"}
    z = sum(math.exp(s / 2.5) for s in scores.values())
    p = {y: math.exp(s / 2.5) / z for y, s in scores.items()}
    assert got["num_sequences"] == 4
    assert got["log_z"] == pytest.approx(math.log(z))
    assert got["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p.values()))
    assert got["expected_reward"] == pytest.approx(sum(p[y] * scores[y] for y in p))
    best = sorted(p, key=p.__getitem__, reverse=True)[:3]
    ids = {"2": 0, "10": 1}
    assert got["top"] == [
        {"sequence": y, "tokens": [ids[x] for x in y.split()],
         "probability": pytest.approx(p[y]), "score": scores[y]}
        for y in best
    ]  # fmt: skip
    assert main([*args, "--reference", "uniform"]) == 0
    shifted = json.loads(capsys.readouterr().out)
    assert shifted["log_z"] == pytest.approx(math.log(z / 4))


def test_solve_of_prompts_has_each(capsys):
    args = ["solve", "--task", "prompts", "--vocab-size", "2", "--max-length", "2"]
    assert main([*args, "--json", "--top", "1"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert len(got["per_prompt"]) == 3
    for key in ("log_z", "entropy", "expected_reward"):
        assert got[key] == pytest.approx(sum(p[key] for p in got["per_prompt"]) / 3)
    assert main(args) == 0
    assert capsys.readouterr().out.count("log Z") == 3


def test_solve_prints_the_likeliest(made, capsys):
    assert main(["solve", "--table", str(made.parent / "t.tsv"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-3:]] == ["sequence", "CC", "CA"]


def test_verify_writes_the_report_and_judges(made, capsys):
    assert main(["verify", str(made)]) == 0
    assert "KL(target, policy)" in capsys.readouterr().out
    report = json.loads((made / "report.json").read_text())
    assert set(report) >= KEYS
    kl = report["kl_target_policy"]
    assert kl > 0
    assert report["num_sequences"] == 4
    assert main(["verify", str(made), "--max-kl", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["verify", str(made), f"--max-kl={kl * 1.01}"]) == 0


def test_sample_prints_lines_that_score_themselves(made, capsys):
    scores = dict(line.split("\t") for line in TABLE.splitlines())
    policy, ebm = rl_ebm.load(made)
    log_pi = rl_ebm.policies.log_prob
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(made), "-n", "7", "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    header, *lines = outputs[0].splitlines()
    assert header.split("\t") == ["sequence", "log_pi", "score"]
    assert len(lines) == 7
    for line in lines:
        sequence, printed, score = line.split("\t")
        tokens = torch.tensor([["AC".index(x) for x in sequence]])
        want = log_pi(policy, ebm.space, tokens, torch.tensor([2]), torch.tensor([0])).detach()
        assert float(printed) == pytest.approx(float(want), abs=1e-5)
        assert float(score) == float(scores[sequence])


def test_agents_lists_all(capsys):
    assert main(["agents"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(AGENTS)
    assert all("arXiv" in line for line in lines)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_mentions_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for flag in flags.flag_names(cli.COMMANDS[command].flags):
        assert flag in text or flag == "--run", flag


@pytest.mark.parametrize("agent", AGENTS)
def test_help_of_an_agent_mentions_its_options(agent, capsys):
    assert main(["train", "--agent", agent, "--help"]) == 0
    text = capsys.readouterr().out
    for flag in flags.flag_names(AGENTS[agent].config):
        assert flag in text, flag


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_of_all(args, capsys):
    assert main(args) == 0
    text = capsys.readouterr().out
    kinds = [*(command.flags for command in cli.COMMANDS.values())]
    kinds += [entry.config for entry in AGENTS.values()]
    for flag in set().union(*map(flags.flag_names, kinds)) - {"--run"}:
        assert flag in text, flag


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{rl_ebm.__version__}\n"


def test_steps_and_seconds(tmp_path, monkeypatch):
    """Giving only one lifts the other; neither: 60 seconds."""
    seen = []
    monkeypatch.setattr(
        cli, "train", lambda *a, config, **k: (seen.append(config), (None, None))[1]
    )
    for limits in ([], ["--steps", "5"], ["--seconds", "2"], ["--steps", "5", "--seconds", "2"]):
        assert main([*train_args(), "--out", str(tmp_path / "r"), *limits]) == 0
    assert [(c.steps, c.seconds) for c in seen] == [(None, 60), (5, None), (None, 2), (5, 2)]


# Processes --------------------------------------------------------------------------------------


def test_a_process_is_the_same_command_line(tmp_path):
    process = start([*train_args(steps=1), "--beta", "0", "--out", str(tmp_path / "r")])
    out, err = process.communicate(timeout=HANGS)
    assert (process.returncode, out) == (2, "")
    assert err == "rl-ebm: beta must be a finite number > 0, got 0.0\n"


@pytest.mark.parametrize("top", ["1", pytest.param("4000", marks=pytest.mark.slow)])
def test_a_broken_pipe_is_silent(top):
    """As with ``| head``: whether the output fits a buffer or not."""
    command = [sys.executable, "-m", "rl_ebm", "solve", "--top", top]
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert process.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("kilobytes", [8, 60])
def test_a_full_disk(kilobytes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={kilobytes}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        args = train_args(steps=3000, checkpoint_every=0.05)
        process = start([*args, "--out", str(disk / "run")])
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == 2
        assert err.count("\n") == 1
        assert "No space left on device" in err
        assert str(disk) in err
        if kilobytes == 60:  # room for one checkpoint, not for two
            assert load_state(disk / "run")["step"] == 0
            assert rl_ebm.load(disk / "run")
        assert not list(disk.glob("run/*.part"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_main_takes_the_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rl-ebm", "--version"])
    assert main() == 0
