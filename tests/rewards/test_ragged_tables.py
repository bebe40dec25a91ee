"""Tables of words, and of sequences of different lengths: read, solved, trained, sampled."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.rewards import read_table

INF = math.inf
WORDS = ["the", "cat", "sat", "naïve", "a b"]


def every(symbols, longest):
    return [s for n in range(longest + 1) for s in itertools.product(symbols, repeat=n)]


def write(path, score, separator, header="sequence\tscore", end="\n", bom=False):
    rows = [
        f'"{separator.join(s)}"{"," if "," in header else chr(9)}{x!r}' for s, x in score.items()
    ]
    random.Random(0).shuffle(rows)
    text = "\n".join([header, *rows]) + "\n"
    path.write_bytes(text.replace("\n", end).encode("utf-8-sig" if bom else "utf-8"))
    return path


@pytest.mark.parametrize("separator", [" ", "|", ", ", ""])
@pytest.mark.parametrize("dialect", [("\n", "\t", False), ("\r\n", ",", True)])
def test_what_is_written_is_read_in_enumeration_order(tmp_path, separator, dialect):
    end, comma, bom = dialect
    symbols = WORDS[:3] if separator else ["b", " ", "c"]
    draw = random.Random(1)
    score = {s: draw.choice([draw.gauss(0, 1), -INF]) for s in every(symbols, 3)}
    path = write(tmp_path / "t", score, separator, comma.join(["sequence", "score"]), end, bom)
    table = read_table(path, separator=separator)
    order = sorted(symbols)
    assert table.alphabet == (*order, "")
    assert table.space == rl_ebm.TokenSpace(4, 4, eos_id=3)
    tokens, lengths = table.space.sequences()
    for y, n, got in zip(tokens.tolist(), lengths.tolist(), table.scores.tolist(), strict=True):
        names = tuple(order[a] for a in y[: n - 1])
        assert got == score[names]
        assert table.decode(y[:n]) == separator.join(names)
    # An order that is given.
    other = [symbols[2], symbols[0], symbols[1]]
    table = read_table(path, separator.join(other), separator=separator)
    assert table.alphabet == (*other, "")


def test_words_of_one_length_need_no_eos(tmp_path):
    score = {s: float(i) for i, s in enumerate(itertools.product(WORDS[:3], repeat=2))}
    path = write(tmp_path / "t", score, " ")
    table = read_table(path, "the cat sat", separator=" ")
    assert table.space == rl_ebm.TokenSpace(3, 2)
    assert table.scores.tolist() == [float(i) for i in range(9)]
    assert table.decode([0, 2]) == "the sat"
    assert read_table(path, separator=" ", ragged=True, missing="forbid").space.eos_id == 3


def test_characters_of_different_lengths_where_asked_for(tmp_path):
    score = {s: float(len(s)) for s in every("xy", 2)}
    path = write(tmp_path / "t", score, "")
    assert read_table(path, ragged=True).scores.tolist() == [0, 1, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="tokens, expected"):
        read_table(path)
    alone = write(tmp_path / "one", dict.fromkeys(every("x", 4), 1.0), "")
    table = read_table(alone, ragged=True)
    assert table.space == rl_ebm.TokenSpace(2, 5, eos_id=1)
    assert table.scores.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (["a b\t1", "a\t2"], {}, r"5 of 7 sequences are missing, the first of them ''"),
        (["a b\t1", "a\t2", '""\t0', "b\t0"], {}, r"3 of 7 .* first of them 'a a'"),
        (["a b\t1", "a\t2", "a  b \t3"], {}, "line 4: the sequence 'a b' stands already in line 2"),
        (['""\t1', '""\t2', "a b\t3"], {}, "line 3: the sequence '' stands already in line 2"),
        (["a|b\t1", "a||b\t2"], {"separator": "|"}, "line 3: two '|' with no symbol between them"),
        (["a b\t1", "a c\t2"], {"alphabet": "a b"}, "line 3: the token 'c' is not in the alphabet"),
        (['""\t1'], {}, "the empty sequence alone"),
        (["a b\t1", "a\t\u0661"], {}, "line 3: the score .* is no number"),
        (["a b\t1"], {"separator": 3}, "separator must be text"),
        (["a b\t1"], {"alphabet": "a a"}, "alphabet has 'a' twice"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, rows, kwargs, message, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    path = tmp_path / "t.tsv"
    path.write_text("\n".join(["sequence\tscore", *rows]) + "\n")
    with pytest.raises((ValueError, TypeError), match=message):
        read_table(path, **({"separator": " "} | kwargs))


def run(capsys, *args):
    code = main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_table_of_sentences_from_the_command_line_to_a_loaded_run(capsys, tmp_path):
    draw = random.Random(2)
    score = {s: draw.gauss(0, 1) for s in every(WORDS[:3], 2)}
    missing = score.pop(("cat", "cat"))
    assert missing
    path, folder = str(write(tmp_path / "t.tsv", score, " ")), str(tmp_path / "run")
    given = ["--table", path, "--separator", " ", "--missing", "forbid", "--beta", "0.5"]
    code, out, err = run(capsys, "solve", *given, "--json", "--top", "20")
    assert code == 0, err
    found = json.loads(out)
    z = math.fsum(math.exp(x / 0.5) for x in score.values())
    assert found["log_z"] == pytest.approx(math.log(z))
    assert {x["sequence"]: x["score"] for x in found["top"] if x["probability"]} == {
        " ".join(s): pytest.approx(x) for s, x in score.items()
    }
    train = ["--agent", "teacher-forcing", "--steps", "3", "--layers", "1", "--dim", "16"]
    code, _, err = run(capsys, "train", *given, *train, "--batch-size", "32", "--out", folder)
    assert code == 0, err
    (tmp_path / "t.tsv").unlink()
    assert run(capsys, "train", "--resume", folder, "--steps", "5")[0] == 0
    assert run(capsys, "verify", folder)[0] == 0
    policy, ebm = rl_ebm.load(folder)
    assert policy.space == ebm.space == rl_ebm.TokenSpace(4, 3, eos_id=3)
    assert float(rl_ebm.solve(ebm).log_z) == pytest.approx(math.log(z))
    code, out, err = run(capsys, "sample", folder, "-n", "40")
    assert code == 0, err
    for line in out.splitlines()[1:]:
        sequence, _, value = line.split("\t")
        assert float(value) == pytest.approx(score.get(tuple(sequence.split()), -INF), rel=1e-4)


def test_words_as_the_alphabet_of_an_automaton(capsys):
    code, out, err = run(
        capsys, "solve", "--reward", "2*contains:not good + avoids:bad", "--alphabet",
        "good,not,bad", "--separator", ",", "--max-length", "2", "--top", "1",
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-1].split()[-1] == "not,good"
    for args in (["--task", "random"], []):
        code, _, err = run(capsys, "solve", *args, "--separator", ",")
        assert code == 2
        assert "need a --table" in err
