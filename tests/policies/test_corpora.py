"""References fitted to files: where a response begins, where a line ends, what a symbol is."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

import rl_ebm
from rl_ebm.policies.expression import parse_reference, read_responses
from rl_ebm.rewards import read_table

AB = rl_ebm.TokenSpace(3, 4, eos_id=2)


def law(policy, space):
    """p of every response, by its tokens without EOS."""
    tokens, lengths = space.sequences()
    log_p = rl_ebm.policies.log_prob(policy, space, tokens, lengths)
    stop = int(space.eos_id is not None)
    rows = zip(tokens.tolist(), lengths.tolist(), log_p.exp().tolist(), strict=True)
    return {tuple(y[: n - stop]): p for y, n, p in rows}


def written(tmp_path, text):
    path = tmp_path / "corpus.txt"
    path.write_bytes(text.encode())
    return path


def test_a_bigram_of_one_sentence_is_that_sentence(tmp_path):
    path = written(tmp_path, "ab\nab\nab\n")
    found = law(parse_reference(f"ngram:{path}?order=2&smoothing=0", AB, "ab"), AB)
    assert found[0, 1] == 1
    assert sum(found.values()) == 1


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("lines", [["ab", "ba", "ab", "b"], ["aab", "", "bba"]])
def test_the_first_token_has_the_law_of_first_tokens(tmp_path, order, lines):
    path = written(tmp_path, "\n".join([*lines, "a"]) + "\n")
    found = law(parse_reference(f"ngram:{path}?order={order}&smoothing=0", AB, "ab"), AB)
    firsts = Counter(line[:1] for line in [*lines, "a"])
    for symbol in ("a", "b", ""):
        share = sum(p for y, p in found.items() if "".join("ab"[a] for a in y)[:1] == symbol)
        assert share == pytest.approx(firsts[symbol] / (len(lines) + 1), abs=1e-12)


def test_with_a_history_longer_than_every_response_frequencies_are_those_of_the_file(tmp_path):
    lines = ["ab", "ab", "ba", "a", "", "abb"]
    path = written(tmp_path, "\n".join(lines) + "\n")
    found = law(parse_reference(f"ngram:{path}?order=6&smoothing=0", AB, "ab"), AB)
    for y, p in found.items():
        share = lines.count("".join("ab"[a] for a in y)) / len(lines)
        assert p == pytest.approx(share, abs=1e-12)


def test_unigrams_have_one_law_at_every_position(tmp_path):
    path = written(tmp_path, "ab\nab\n\nb\n")
    policy = parse_reference(f"ngram:{path}?order=1&smoothing=0", AB, "ab")
    tokens, _ = AB.sequences()
    rows = policy.logits(tokens).exp()
    want = torch.tensor([2 / 9, 3 / 9, 4 / 9], dtype=torch.float64)
    torch.testing.assert_close(rows, want.expand_as(rows))


def test_smoothing_backs_off_from_the_start_to_what_follows_anywhere(tmp_path):
    path = written(tmp_path, "ab\nab\nb\n")
    policy = parse_reference(f"ngram:{path}?order=2&smoothing=0.5", AB, "ab")
    tokens, _ = AB.sequences()
    first = policy.logits(tokens)[0, 0].exp().tolist()
    # 8 tokens: two a, three b, three ends; three beginnings: two a, one b.
    below = [(n + 0.5) / (8 + 1.5) for n in (2, 3, 3)]
    want = [(n + 1.5 * p) / (3 + 1.5) for n, p in zip((2, 1, 0), below, strict=True)]
    assert first == pytest.approx(want)


def test_a_hidden_markov_reference_knows_the_start(tmp_path):
    path = written(tmp_path, "ab\n" * 5)
    text = f"hmm:{path}?states=3&iterations=300&smoothing=0&seed=0"
    assert law(parse_reference(text, AB, "ab"), AB)[0, 1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "END", "ENDEND", "ENDENDEND"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_blank_lines_at_the_end_are_no_responses_and_those_before_are(tmp_path, end, tail, bom):
    path = written(tmp_path, bom + end.join(["ab", "", "b"]) + tail.replace("END", end))
    batch = read_responses(path, AB, "ab")
    assert [y[:n] for y, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)] == [
        [0, 1, 2], [2], [1, 2]
    ]  # fmt: skip


def test_white_space_is_a_symbol_where_the_alphabet_has_it(tmp_path):
    space = rl_ebm.TokenSpace(4, 3)
    path = written(tmp_path, " ab\r\nb \t\n   \n\u2028ab"[:-3])
    assert read_responses(path, space, "ab \t").tokens.tolist() == [[2, 0, 1], [1, 2, 3], [2, 2, 2]]
    # Only a line feed ends a line.
    odd = rl_ebm.TokenSpace(3, 3)
    path = written(tmp_path, "a\u2028\x0b\n")
    assert read_responses(path, odd, "a\u2028\x0b").tokens.tolist() == [[0, 1, 2]]
    path = written(tmp_path, "ab \n")
    with pytest.raises(ValueError, match="line 1: ' ' is not in the alphabet"):
        read_responses(path, rl_ebm.TokenSpace(2, 3), "ab")


def test_words_and_pieces(tmp_path):
    space = rl_ebm.TokenSpace(4, 3, eos_id=3)
    path = written(tmp_path, " not  good\t\nbad\n")
    assert read_responses(path, space, ["good", "bad", "not"]).tokens.tolist() == [
        [2, 0, 3], [1, 3, 0]
    ]  # fmt: skip
    pieces = [" a", "b", " "]
    path = written(tmp_path, " ab\n b\n")
    assert read_responses(path, space, pieces).tokens.tolist() == [[0, 1, 3], [2, 1, 3]]
    with pytest.raises(ValueError, match="more than one sequence of symbols"):
        read_responses(path, rl_ebm.TokenSpace(4, 4), [" a", "b", " ", "a"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ngram:{}?order=2&order=3", "order is given twice"),
        ("ngram:{}?order=1_0", "'1_0' is no whole number"),
        ("ngram:{}?order=\u0663", "is no whole number"),
        ("ngram:{}?order=-1", "order must be an integer >= 1"),
        ("ngram:{}?order=" + "9" * 5000, "is no whole number"),
        ("ngram:{}?order=99999999999", "too many"),
        ("ngram:{}?smoothing=nan", "'nan' is no number"),
        ("ngram:{}?smoothing=1e999", "no number that is finite"),
        ("ngram:{}?smoothing=1e200", "smoothing must be"),
        ("ngram:{}?smoothing=-inf", "smoothing must be"),
        ("hmm:{}?states=99999999999", "use fewer states"),
        ("hmm:{}?iterations=9223372036854775808", "iterations must be an integer in"),
        ("hmm:{}?states=0", "num_states must be an integer >= 1"),
        ("hmm:{}?smoothing=1_0", "is no number"),
    ],
)
def test_options_out_of_range_are_one_sentence(tmp_path, text, words):
    path = written(tmp_path, "ab\n")
    with pytest.raises(ValueError, match=words) as error:
        parse_reference(text.format(path), AB, "ab")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_the_smallest_smoothing_leaves_laws(tmp_path):
    path = written(tmp_path, "ab\nb\n")
    for smoothing in ("5e-324", "1e-310", "1e100"):
        policy = parse_reference(f"ngram:{path}?order=3&smoothing={smoothing}", AB, "ab")
        assert math.fsum(law(policy, AB).values()) <= 1 + 1e-9
        assert not policy.machine.log_weight.isnan().any()


@pytest.mark.parametrize("device", ["/dev/zero", "link"])
def test_what_has_no_end_is_not_read(tmp_path, device):
    """As a corpus and as a table: both are read whole."""
    if device == "link":
        device = tmp_path / "link"
        device.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is a device, which may have no end"):
        parse_reference(f"ngram:{device}", AB, "ab")
    with pytest.raises(ValueError, match="is a device, which may have no end"):
        read_table(device)
