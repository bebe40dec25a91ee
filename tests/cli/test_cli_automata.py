"""Automaton rewards and fitted references on the command line, and in run directories."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.policies.expression import parse_reference, read_responses

SPACE = rl_ebm.TokenSpace(4, 4, eos_id=0)


def run(capsys, *args):
    code = main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_solve_agrees_with_enumeration(capsys):
    code, out, _ = run(
        capsys, "solve", "--reward", "3*contains:1 2 + avoids:3 3", "--vocab-size", "4",
        "--max-length", "4", "--beta", "0.5", "--json",
    )  # fmt: skip
    assert code == 0
    weights = []
    for y in itertools.product(range(4), repeat=4):
        pairs = list(itertools.pairwise(y))
        if (3, 3) not in pairs:
            weights.append(math.exp(3 * ((1, 2) in pairs) / 0.5))
    found = json.loads(out)
    assert found["log_z"] == pytest.approx(math.log(sum(weights)))
    assert found["num_sequences"] == 256
    assert found["top"][0]["score"] == 3


def test_solve_at_the_size_of_a_language_model(capsys):
    code, out, _ = run(
        capsys, "solve", "--reward", "20*contains:17 5", "--vocab-size", "50257",
        "--max-length", "128", "--eos-id", "50256", "--reference", "uniform", "--top", "1",
    )  # fmt: skip
    assert code == 0
    assert "about 10^597" in out
    assert "nan" not in out


def test_symbols(capsys):
    code, out, _ = run(
        capsys, "solve", "--reward", "2*regex:AC[GT]+", "--alphabet", "ACGT", "--max-length", "4",
        "--top", "1",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[-1].split()[-1] == "ACGG"


def test_a_run_holds_its_automata(capsys, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("1 2 1\n3\n\n2 2\n1 1 3\n")
    folder = str(tmp_path / "run")
    code, _, err = run(
        capsys, "train", "--agent", "vargrad", "--reward", "2*contains:1 2", "--vocab-size", "4",
        "--max-length", "4", "--eos-id", "0", "--reference", f"ngram:{corpus}?smoothing=0.5",
        "--steps", "3", "--out", folder, "--layers", "1", "--dim", "16", "--batch-size", "32",
    )  # fmt: skip
    assert code == 0, err
    corpus.unlink()
    _, ebm = rl_ebm.load(folder)
    reference = rl_ebm.policies.fit_ngram(SPACE, batch_of("1 2 1|3||2 2|1 1 3"), 2, 0.5)
    reward = rl_ebm.rewards.Automaton.contains(SPACE, [1, 2], 2.0)
    want = rl_ebm.EBM(SPACE, reward, 1.0, reference)
    tokens, lengths = SPACE.sequences()
    torch.testing.assert_close(ebm.log_weight(tokens, lengths), want.log_weight(tokens, lengths))
    assert rl_ebm.solve(ebm).mode == "exact-automaton"
    for args in (
        ("train", "--resume", folder, "--steps", "5"),
        ("verify", folder),
        ("sample", folder, "-n", "3"),
    ):
        code, _, err = run(capsys, *args)
        assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["mode"] == "exact-automaton"


def batch_of(text):
    rows = [[int(word) for word in line.split()] + [0] for line in text.split("|")]
    padded = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return rl_ebm.Batch(padded, lengths, torch.zeros_like(lengths))


@pytest.mark.slow
def test_what_cannot_be_listed_is_verified_from_samples(capsys, tmp_path):
    folder = str(tmp_path / "run")
    code, out, err = run(
        capsys, "train", "--agent", "on-policy-distillation", "--reward", "8*contains:1 2",
        "--vocab-size", "12", "--max-length", "10", "--steps", "4", "--out", folder,
        "--layers", "1", "--dim", "16", "--batch-size", "32", "--divergence", "forward",
    )  # fmt: skip
    assert code == 0, err
    assert "KL(target, policy)" in out
    code, out, err = run(capsys, "verify", folder, "--samples", "50", "--confidence", "0.9")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["mode"] == "sampled"
    assert report["num_samples"] == 50
    assert report["kl_target_policy"]["confidence"] == 0.9
    code, _, err = run(capsys, "verify", folder, "--samples", "50", "--max-kl", "0")
    assert code == 1
    assert "is above --max-kl 0" in err
    high = report["kl_target_policy"]["high"]
    assert run(capsys, "verify", folder, "--samples", "50", f"--max-kl={2 * high}")[0] == 0
    # An estimate below is not enough.
    middle = report["kl_target_policy"]["estimate"]
    _, _, err = run(capsys, "verify", folder, "--samples", "50", f"--max-kl={1.0001 * middle}")
    assert "may be above" in err
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    # The same seed draws the same, another something else.
    assert again["tv"]["estimate"] == report["tv"]["estimate"]
    assert run(capsys, "verify", folder, "--samples", "50", "--seed", "1")[0] == 0
    other = json.loads((tmp_path / "run" / "report.json").read_text())
    assert other["tv"]["estimate"] != report["tv"]["estimate"]


def trained(capsys, folder, *args):
    code, _, err = run(
        capsys, "train", "--agent", "vargrad", "--steps", "5", "--batch-size", "32", "--layers",
        "1", "--dim", "16", "--out", str(folder), *args,
    )  # fmt: skip
    assert code == 0, err
    return str(folder)


@pytest.mark.slow
def test_what_cannot_be_solved_is_bounded_from_samples(capsys, tmp_path):
    folder = trained(capsys, tmp_path / "run", "--task", "pairwise", "--max-length", "40")
    code, out, err = run(capsys, "verify", folder, "--samples", "40", "--max-kl", "3")
    assert code == 1
    assert "nothing is exact here: about 10^24 sequences" in err
    assert "nothing bounds KL(target, policy) from above" in err
    assert "nothing bounds log Z from above" in out
    assert not (tmp_path / "run" / "report.json").exists()
    report = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert report["num_samples"] == 40
    assert report["log_z"]["high"] == "Infinity"
    assert report["kl_target_policy"]["high"] == "Infinity"
    # log Z <= T log A + the largest reward, and the reference can only bring it down.
    code, _, _ = run(
        capsys, "verify", folder, "--samples", "40", "--reward-max", "80", "--confidence", "0.9"
    )
    report = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert code == 0
    assert report["log_z"]["low"] < report["log_z"]["high"] <= 80 + 40 * math.log(4) + 1e-9
    assert report["log_z"]["confidence"] == 0.9
    code, _, err = run(capsys, "verify", folder, "--samples", "40", "--reward-max=-80")
    assert code == 2
    assert "reward_max" in err
    assert run(capsys, "verify", folder, "--samples", "0")[0] == 2
    # It says nothing of a policy that goes on learning.
    assert run(capsys, "train", "--resume", folder, "--steps", "6")[0] == 0
    assert not (tmp_path / "run" / "certificate.json").exists()


def test_bounds_from_samples_hold_the_exact_values(capsys, tmp_path, monkeypatch):
    folder = trained(capsys, tmp_path / "run", "--task", "random")
    code, _, err = run(capsys, "verify", folder, "--max-kl", "100", "--reward-max", "9")
    assert code == 0
    assert "--reward-max is not read" in err
    assert run(capsys, "verify", folder, "--samples", "0")[0] == 2
    assert run(capsys, "verify", folder, "--reward-max", "nan")[0] == 2
    text = (tmp_path / "run" / "report.json").read_text()
    exact = json.loads(text)
    _, ebm = rl_ebm.load(tmp_path / "run")
    most = float(ebm.reward(*ebm.space.sequences(), torch.zeros(4096).long()).max())

    def too_large(ebm):
        raise rl_ebm.TooLargeError("too large")

    monkeypatch.setattr("rl_ebm.cli.commands.solve", too_large)
    code, _, err = run(
        capsys, "verify", folder, "--confidence", "0.999", "--seed", "3", f"--reward-max={most}"
    )
    assert code == 0
    assert "too large" in err
    found = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert found["num_samples"] == 10_000
    for name, truth in (
        ("log_z", exact["log_z"]),
        ("kl_policy_target", exact["kl_policy_target"]),
        ("expected_reward_policy", exact["expected_reward_policy"]),
    ):
        assert found[name]["low"] <= truth <= found[name]["high"] < math.inf, name
    assert found["elbo"]["low"] <= exact["log_z"] - exact["kl_policy_target"]
    # What was exact is still there.
    assert (tmp_path / "run" / "report.json").read_text() == text


def test_references_of_files(tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("1 2 1\n3\n\n2 2\n1 1 3\n")
    got = parse_reference(f"ngram:{corpus}?order=3&smoothing=0.25", SPACE)
    want = rl_ebm.policies.fit_ngram(SPACE, batch_of("1 2 1|3||2 2|1 1 3"), 3, 0.25)
    tokens, _ = SPACE.sequences()
    assert torch.equal(got.logits(tokens), want.logits(tokens))
    hidden = parse_reference(f"hmm:{corpus}?states=2&iterations=3&seed=5", SPACE)
    want, _ = rl_ebm.policies.fit_hmm(
        SPACE, read_responses(corpus, SPACE, None), 2, 3, 0.01, torch.Generator().manual_seed(5)
    )
    assert torch.equal(hidden.logits(tokens), want.logits(tokens))
    assert isinstance(parse_reference("uniform", SPACE), rl_ebm.policies.Uniform)
    fixed = rl_ebm.TokenSpace(3, 3)
    corpus.write_text("aba\n\ncab\n")
    batch = read_responses(corpus, fixed, "abc")
    assert batch.tokens.tolist() == [[0, 1, 0], [2, 0, 1]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--reward", "contain:1"], "did you mean 'contains'"),
        (["--reward", "contains:1", "--task", "random"], "leave out --task"),
        (["--reward", "contains:1", "--normalise", "minmax"], "leave out --task"),
        (["--reward", "contains:1", "--eos-id", "9"], "eos_id"),
        (["--reward", "contains:1", "--alphabet", "abc"], "expected one for each of the 4"),
        (["--reward", "contains:1", "--reference", "ngrams:x"], "did you mean 'ngram'"),
        (["--reward", "contains:1", "--reference", "ngram:missing.txt"], "cannot be read"),
        (["--reward", "contains:1", "--reference", "ngram:x?ordr=2"], "did you mean 'order'"),
        (["--reward", "contains:1", "--reference", "ngram:x?order=a"], "position 14"),
        (["--reference", "unifrm"], "did you mean 'uniform'"),
        (["--reward", "contains:1", "--reference", "hmm:x?states=2&seed=-1"], "position 20: seed"),
        (["--reward", "contains:1", "--reference", f"hmm:x?seed={2**63}"], "position 11: seed"),
        (["--reward", "contains:A", "--alphabet", "ABCA"], "symbol twice"),
    ],
)
def test_wrong_input_is_one_sentence(capsys, args, words):
    code, _, err = run(capsys, "solve", "--vocab-size", "4", "--max-length", "3", *args)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_reward_needs_a_space(capsys):
    code, _, err = run(capsys, "solve", "--reward", "contains:1")
    assert code == 2
    assert "--vocab-size" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [("1 x", "line 1: 'x'"), ("1\n0", "line 2: '0'"), ("1 1 1 1", "line 1: a response of 5")],
)
def test_a_line_that_is_no_response(tmp_path, text, words):
    path = tmp_path / "c.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_responses(path, SPACE, None)
