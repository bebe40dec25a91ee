"""Table files: what was written is read, in the order of itertools; what is wrong is said where."""

from __future__ import annotations

import csv
import itertools
import math
import random
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_ebm
from rl_ebm.rewards import read_table, table_file

DATA = Path(__file__).parents[3] / "shared" / "data"
INF = math.inf
CHARACTERS = "TCGA-é*"
INTEGERS = ["10", "9", "-3", "0", "101"]


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """One file, written again and again: hypothesis wants no fixture of each test's own."""
    return tmp_path_factory.mktemp("tables") / "table.tsv"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def table(rows, header="sequence\tscore"):
    return "\n".join([header, *rows]) + "\n"


def all_sequences(symbols, length, separator=""):
    return [separator.join(s) for s in itertools.product(symbols, repeat=length)]


COMPLETE = table(["AA\t1", "AB\t2", "BA\t3", "BB\t4"])


# What is written is read ------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    integers=st.booleans(),
    length=st.integers(1, 3),
    size=st.integers(2, 5),
    given_alphabet=st.booleans(),
    comma=st.booleans(),
    quoted=st.booleans(),
    extra=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    tail=st.sampled_from(["", "\n", "\r\n\r\n", "  \n"]),
    bom=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_table_in_any_dialect_and_row_order_is_read_in_enumeration_order(
    path, integers, length, size, given_alphabet, comma, quoted, extra, end, tail, bom, seed
):
    draw, separator = random.Random(seed), " " if integers else ""
    symbols = draw.sample(INTEGERS if integers else CHARACTERS, size)
    if integers and length == 1 and not given_alphabet:
        length = 2  # a single integer without an alphabet is read as characters
    order = symbols if given_alphabet else sorted(symbols, key=int if integers else ord)
    score = {
        s: draw.choice([draw.gauss(0, 3), -INF]) for s in all_sequences(symbols, length, separator)
    }
    body = draw.sample([(repr(x), s) for s, x in score.items()], len(score))
    rows = [("score", "sequence"), *body]
    columns = [(*row, "more \t, junk") if extra else row for row in rows]
    quote = quoted or extra
    lines = [
        ("," if comma else "\t").join(f'"{cell}"' if quote else cell for cell in row)
        for row in columns
    ]
    write(path, end.join(lines) + end + tail, "utf-8-sig" if bom else "utf-8")

    got = read_table(path, separator.join(symbols) if given_alphabet else None)
    want = all_sequences(order, length, separator)
    assert got.scores.dtype == torch.float64
    assert got.scores.tolist() == [score[s] for s in want]
    assert got.space == rl_ebm.TokenSpace(size, length)
    assert got.alphabet == tuple(order)
    assert [got.decode(y) for y in got.space.sequences()[0].tolist()] == want


def test_rows_of_several_chunks_are_one_table(path, monkeypatch):
    names = all_sequences("ACGT", 3)
    shuffled = random.Random(0).sample(names, 64)
    write(path, table([f"{s}\t{i}" for i, s in enumerate(shuffled)]))
    want = read_table(path).scores
    assert want.tolist() == [shuffled.index(s) for s in names]
    for chunk in (1, 7, 64):
        monkeypatch.setattr(table_file, "_CHUNK", chunk)
        assert torch.equal(read_table(path).scores, want)
    monkeypatch.setattr(table_file, "_CHUNK", 10)
    write(path, table([*(f"{s}\t0" for s in names[:30]), f"{names[3]}\t1"]))
    with pytest.raises(ValueError, match="line 32: the sequence 'AAT' stands already in line 5"):
        read_table(path)


def test_integers_are_numbers_however_they_are_written(path):
    write(path, table(["007 10\t1", "+7 7\t2", "10 7\t3", "10 010\t4"]))
    got = read_table(path)
    assert got.alphabet == ("7", "10")  # as numbers: "10" < "7" as text
    assert got.scores.tolist() == [2, 1, 3, 4]
    assert got.decode([1, 0]) == "10 7"


def test_a_single_integer_is_characters_unless_the_alphabet_is_of_integers(path):
    write(path, table(["12\t1", "21\t2", "11\t3", "22\t4"]))
    assert read_table(path).alphabet == ("1", "2")
    assert read_table(path).space.max_length == 2
    got = read_table(path, "22 12 21 11")
    assert got.space == rl_ebm.TokenSpace(4, 1)
    assert got.scores.tolist() == [4, 1, 2, 3]


def test_the_delimiter_is_that_of_the_extension_first_then_that_of_the_header(tmp_path):
    for name, delimiter in itertools.product(("t.csv", "T.CSV", "t.tsv", "t.txt", "t"), ",\t"):
        text = COMPLETE.replace("\t", delimiter)
        assert read_table(str(write(tmp_path / name, text))).scores.tolist() == [1, 2, 3, 4]
    both = "a\tb,sequence,score,c\tsequence\tscore\td\n"
    both += "".join(f"a\tb,{x},1,c\t{x}\t2\td\n" for x in all_sequences("AB", 2))
    for name, score in (("t.csv", 1), ("T.CSV", 1), ("t.tsv", 2), ("t.txt", 2)):
        assert read_table(write(tmp_path / name, both)).scores.tolist() == [score] * 4


def test_a_token_may_be_the_other_delimiter_or_a_quote(path):
    names = all_sequences('",;', 2)
    cells = ['"' + s.replace('"', '""') + '"' for s in names]
    write(path, table([f"{s}\t{i}" for i, s in enumerate(cells)]))
    assert read_table(path, '",;').scores.tolist() == list(range(9))


def test_white_space_around_a_cell_is_not_read(path):
    write(path, table([" A\t1", "B  \t -2 "], " sequence\tscore "))
    assert read_table(path).alphabet == ("A", "B")
    assert read_table(path).scores.tolist() == [1, -2]


def test_decode_takes_prefixes_and_refuses_other_tokens(path):
    got = read_table(write(path, COMPLETE))
    assert got.decode([]) == ""
    assert got.decode((1,)) == "B"
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=rf"must be in \[0, 2\), got {wrong}"):
            got.decode([0, wrong])


# Missing sequences and normalising ---------------------------------------------------------------


@pytest.mark.parametrize("normalise", [None, "minmax"])
def test_a_missing_sequence_is_an_error_or_impossible_also_when_normalised(path, normalise):
    write(path, table(["BA\t3", "AB\t-inf", "BB\t-1"]))
    with pytest.raises(
        ValueError, match=r'1 of 4 sequences are missing, .* \'AA\': give .*"forbid"'
    ):
        read_table(path, normalise=normalise)
    got = read_table(path, normalise=normalise, missing="forbid").scores.tolist()
    assert got == [-INF, -INF, *((1, 0) if normalise else (3, -1))]


def test_the_first_missing_sequence_is_the_first_in_the_order_of_the_alphabet(path):
    write(path, table([f"{s}\t0" for s in all_sequences("ACG", 3) if s not in ("CAG", "GAA")]))
    with pytest.raises(ValueError, match=r"2 of 27 .* first of them 'CAG'"):
        read_table(path)
    with pytest.raises(ValueError, match=r"2 of 27 .* first of them 'GAA'"):
        read_table(path, "GCA")
    with pytest.raises(ValueError, match=r"39 of 64 .* first of them 'AAT'"):
        read_table(path, "ACGT")
    write(path, table(["5 4\t0", "4 5\t0"]))
    with pytest.raises(ValueError, match=r"2 of 4 .* first of them '4 4'"):
        read_table(path)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4, unique=True), st.booleans())
def test_minmax_is_the_affine_map_to_the_unit_interval(path, values, forbid):
    values[0] = -INF if forbid else values[0]
    rows = [f"{s}\t{x!r}" for s, x in zip(all_sequences("AB", 2), values, strict=True)]
    got = read_table(write(path, table(rows)), normalise="minmax").scores
    finite = [x for x in values if x > -INF]
    low, high = min(finite), max(finite)
    want = [(x - low) / (high - low) if x > -INF else -INF for x in values]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert float(got[torch.isfinite(got)].min()) == 0
    assert float(got.max()) == 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((2, 2), "finite scores that differ, and less than .*, got 2.0 to 2.0"),
        ((2, -INF), "finite scores that differ"),
        ((-INF, -INF), "all of them are -inf"),
        ((-1.7e308, 1.7e308), "less than the largest float"),
    ],
)
def test_minmax_of_scores_that_do_not_differ_is_refused(path, scores, message):
    write(path, table([f"{s}\t{x}" for s, x in zip("AB", scores, strict=True)]))
    with pytest.raises(ValueError, match=message):
        read_table(path, normalise="minmax")
    assert read_table(path).scores.tolist() == list(scores)


@pytest.mark.parametrize("missing", ["error", "forbid"])
def test_a_space_that_dwarfs_the_file_is_refused_before_memory_is_taken(path, missing):
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    write(path, table(["A" * 20 + "\t1", "B" * 20 + "\t2"]))
    with pytest.raises(
        ValueError,
        match=r"26 symbols and length 20 make about 10\^28 sequences \(about 10\^29 bytes",
    ):
        read_table(path, alphabet, missing=missing)
    write(path, table(["A" * 9 + "\t1"]))
    with pytest.raises(ValueError, match=rf"make {7**9} sequences \({8 * 7**9} bytes .* 1 rows"):
        read_table(path, "ABCDEFG", missing=missing)
    write(path, table(["AB" * 20_000 + "\t1"]))  # more digits than str() writes
    with pytest.raises(ValueError, match=r"about 10\^12041 sequences"):
        read_table(path, missing=missing)


def test_a_sparse_table_of_moderate_size_is_read(path):
    write(path, table(["A" * 20 + "\t1", "B" * 20 + "\t2"]))
    got = read_table(path, missing="forbid").scores
    assert got.shape == (2**20,)
    assert torch.isfinite(got).nonzero()[:, 0].tolist() == [0, 2**20 - 1]


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["AA\t1", "AB\t2", "AA\t1"], "line 4: the sequence 'AA' stands already in line 2"),
        (["AA\t1", "", "", "ABA\t2"], "line 5: the sequence 'ABA' has 3 tokens, expected the 2 of"),
        (["AA\t1", "A\t2"], "line 3: the sequence 'A' has 1 tokens, expected the 2"),
        (["\t1", "A\t2"], "line 2: the sequence '' has 0 tokens, expected at least one"),
        (["AA\t1", "\t2"], "line 3: the sequence '' has 0 tokens, expected the 2"),
        (["AA\tnan"], "line 2: the score 'nan' is no number below"),
        (["AA\t1", "AB\tinf"], "line 3: the score 'inf' is no number below"),
        (["AA\t1", "AB\t1e999"], "line 3: the score '1e999' is no number below"),
        (["AA\t1", "AB\t1_5"], "line 3: the score '1_5' is no number below"),
        (["AA\t1", "AB\t"], "line 3: the score '' is no number"),
        (["AA\t1", "AB\t0,5"], "line 3: the score '0,5' is no number"),
        (["AA\t1", "AB"], "line 3: 1 cells, but the header has 2"),
        (["AA\t1", "AB\t1\t2"], "line 3: 3 cells, but the header has 2"),
        (["AA\t1", "A B\t1"], "line 3: the sequence 'A B' has 3 tokens"),
        (["AAA\t1", "A B\t1"], "line 3: white space in a sequence of characters"),
        (["0 1\t1", "0 x\t2"], "line 3: the token 'x' is no integer"),
        (["0 1\t1", "0 1.5\t2"], "line 3: the token '1.5' is no integer"),
        (["0 1\t1", "0 1_0\t2"], "line 3: the token '1_0' is no integer"),
        (["0 1\t1", "00\t2"], "line 3: the sequence '00' has 1 tokens, expected the 2"),
        (["AA\t1", '"A\nA"x\t1'], "line 4: "),
        (["AA\t1", '"AB\t2', "BA\t3"], "line 4: unexpected end of data"),
        (["A" * 90 + "\t1", "B" * 89 + "\t1"], r"line 3: the sequence 'B{55} \.\.\. has 89 tokens"),
        (["AA\t1"], "'A' is the only symbol, and a token space needs 2: give the alphabet"),
        ([], "has no rows below its header"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(path, rows, message):
    write(path, table(rows))
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert error.value.__cause__ is None


def test_of_several_wrong_rows_the_first_is_named(path):
    write(path, table(["AA\t1", "AB\tx", "BA\t1", "BB\ty"]))
    with pytest.raises(ValueError, match="line 3: the score 'x'"):
        read_table(path)


def test_a_symbol_out_of_the_alphabet_is_named_with_its_line(path):
    write(path, COMPLETE)
    with pytest.raises(ValueError, match="line 3: the token 'B' is not in the alphabet"):
        read_table(path, "AC")
    write(path, table(["0 1\t1", "0 2\t1"]))
    with pytest.raises(ValueError, match="line 3: the token '2' is not in the alphabet"):
        read_table(path, "0 1")


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("sequence\tvalue", "['sequence', 'value']"),
        ("Sequence\tscore", "['Sequence', 'score']"),
        ("sequence;score", "['sequence;score']"),
        ("sequence\tscore\tscore", "['sequence', 'score', 'score']"),
        ("AA\t1", "['AA', '1']"),
        ("\x00\x01\x02", "['\\x00\\x01\\x02']"),
    ],
)
def test_a_header_without_the_two_columns_is_shown(path, header, shown):
    write(path, table(["AA\t1"], header))
    message = f"one column 'sequence' and one column 'score', separated .* {re.escape(shown)}"
    with pytest.raises(ValueError, match=message):
        read_table(path)


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.tsv is empty"):
        read_table(path)


def test_a_file_that_is_no_text_or_not_there_is_named(path, tmp_path):
    path.write_bytes(COMPLETE.encode() + b"\xff\xfe\x1f\x8b")
    with pytest.raises(ValueError, match=r"table\.tsv is no text in UTF-8"):
        read_table(path)
    write(path, COMPLETE, "utf-16")
    with pytest.raises(ValueError, match=r"table\.tsv is no text in UTF-8"):
        read_table(path)
    for wrong in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(
            ValueError, match=f"cannot read the table file {re.escape(str(wrong))}: "
        ):
            read_table(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphabet": "ABA"}, "alphabet has 'A' twice"),
        ({"alphabet": "A"}, "alphabet must have at least 2 symbols, got 'A'"),
        ({"alphabet": ""}, "alphabet must have at least 2 symbols, got ''"),
        ({"alphabet": "A B"}, "characters without spaces else, got 'A B'"),
        ({"normalise": "z"}, "normalise must be \"minmax\" or None, got 'z'"),
        ({"missing": "drop"}, 'missing must be "error" or "forbid", got \'drop\''),
    ],
)
def test_arguments_of_no_known_value_are_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(path, COMPLETE), **arguments)


@pytest.mark.parametrize(
    ("alphabet", "message"),
    [
        ("01", "alphabet must have at least 2 symbols, got '01'"),
        (
            "ACGT",
            "alphabet must be integers separated by spaces where the sequences are, .* 'ACGT'",
        ),
        ("1 01", "alphabet has '1' twice"),
    ],
)
def test_an_alphabet_for_integers_is_of_integers(path, alphabet, message):
    write(path, table(["0 1\t1", "0 0\t2"]))
    with pytest.raises(ValueError, match=message):
        read_table(path, alphabet)


# Real files ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["six6_ref_r1.tsv", "arx_ref_r1.tsv"])
def test_a_measured_table_is_read_quickly_and_as_the_csv_module_reads_it(name):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not there: the project ships no measured data")
    start = time.perf_counter()
    got = read_table(DATA / name, alphabet="TGCA")
    assert time.perf_counter() - start < 5  # a tenth of a second, on a machine that is idle
    with open(DATA / name, newline="") as file:
        score = {
            row["sequence"]: float(row["score"]) for row in csv.DictReader(file, delimiter="\t")
        }
    assert got.scores.tolist() == [score[s] for s in all_sequences("TGCA", 8)]
    ebm = rl_ebm.EBM(got.space, read_table(DATA / name, normalise="minmax").scores, beta=0.1)
    assert float(ebm.log_weight(*got.space.sequences()).max()) == 10
