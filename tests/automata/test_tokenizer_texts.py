"""Rewards over the text of tokenizers: of all sequences of tokens, against ``re`` on the text."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import rl_ebm
from rl_ebm.automata.regex.pieces import _byte_of_character, pieces_of
from rl_ebm.rewards import Automaton, alphabet_of

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402


def written(raw):
    """Bytes as GPT-2's vocabulary writes them."""
    names = {byte: c for c, byte in _byte_of_character().items()}
    return "".join(names[byte] for byte in raw)


def byte_level(*pieces):
    names = ["<eos>", *map(written, pieces)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def sentence_piece(decoder, *pieces):
    names = ["<unk>", "</s>", *pieces]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def llama(strip=True):
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)


BYTES = ["<0x0A>", "<0x20>", "<0xC3>", "<0xA9>", "<0xE2>"]
TOKENIZERS = {
    "gpt-2": byte_level(b" a", b"a", b"b ", b"\n", b"\xc3", b"\xa9", "é".encode(), b"\xe2\x82"),
    "cut": byte_level(b"\xf0\x9f", b"\x98", b"\x80a", b"\xe2", b"\x82\xac", b"a", b" "),
    "llama": sentence_piece(llama(), *BYTES, "▁", "a", "▁a"),
    "not stripped": sentence_piece(llama(False), *BYTES, "a", "▁a"),
    "t5": sentence_piece(decoders.Metaspace(prepend_scheme="always"), "▁", "a", "▁▁a", "b▁a"),
    "bert": sentence_piece(decoders.WordPiece("##", cleanup=False), "a", "##a", "b", "##b"),
}
PATTERNS = [
    r"[\s\S]*a a[\s\S]*",
    r"a.*",
    r" ?\w+",
    r"[^a]*é?[^a]*",
    r"(\s|a)*",
    r"[\s\S]*\ufffd",
    r"[\s\S]*\b\W[\s\S]*",
    r"[\s\S]*(\U0001f600|€)[\s\S]*",
    r"\B[\s\S]*a$",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_reward_of_tokens_is_that_of_their_text(name):
    tokenizer = TOKENIZERS[name]
    eos = tokenizer.token_to_id("</s>" if name not in ("gpt-2", "cut") else "<eos>")
    space = rl_ebm.TokenSpace(tokenizer.get_vocab_size(), 5 if name == "cut" else 4, eos)
    tokens, lengths = space.sequences()
    texts = [
        tokenizer.decode(y[: n - 1]) for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    tried = 0
    for pattern in PATTERNS:
        want = [float(re.fullmatch(pattern, text) is not None) for text in texts]
        if not any(want):
            with pytest.raises(ValueError, match="no response can match"):
                Automaton.regex(space, pattern, tokenizer=tokenizer)
            continue
        reward = Automaton.regex(space, pattern, tokenizer=tokenizer)
        assert reward(tokens, lengths, lengths * 0).tolist() == want, pattern
        tried += len(set(want)) == 2
    assert tried >= 4
    for text in ("a", " a", "é", "\ufffd"):
        held = [text in x for x in texts]
        if any(held):
            reward = Automaton.contains(space, text, 2.5, tokenizer=tokenizer)
            assert reward(tokens, lengths, lengths * 0).tolist() == [2.5 * h for h in held]
            if not all(held):
                reward = Automaton.avoids(space, text, tokenizer=tokenizer)
                want = [-torch.inf if h else 0.0 for h in held]
                assert reward(tokens, lengths, lengths * 0).tolist() == want


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_say_what_decode_says(name):
    tokenizer = TOKENIZERS[name]
    pieces = pieces_of(tokenizer)
    for n in range(4):
        for tokens in itertools.product(range(tokenizer.get_vocab_size()), repeat=n):
            assert pieces.text(tokens) == tokenizer.decode(list(tokens)), tokens


def test_the_alphabet_has_the_real_texts():
    assert alphabet_of(TOKENIZERS["gpt-2"]) == [
        "", " a", "a", "b ", "\n", "\udcc3", "\udca9", "é", "\udce2\udc82"
    ]  # fmt: skip
    names = alphabet_of(TOKENIZERS["llama"])
    assert names == ["", "", "\n", " ", "\udcc3", "\udca9", "\udce2", " ", "a", " a"]
    assert alphabet_of(TOKENIZERS["llama"], skip_special_tokens=False)[:2] == ["<unk>", "</s>"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["llama"])
    assert alphabet_of(fast) == names


def test_an_alphabet_of_bytes_is_read_as_utf_8():
    tokenizer = TOKENIZERS["cut"]
    space = rl_ebm.TokenSpace(tokenizer.get_vocab_size(), 4, 0)
    tokens, lengths = space.sequences()
    alphabet = alphabet_of(tokenizer)
    for pattern in (r"[\s\S]*€[\s\S]*", r"\W*", ".*a"):
        got = Automaton.regex(space, pattern, 1.0, alphabet)(tokens, lengths, lengths * 0)
        want = Automaton.regex(space, pattern, tokenizer=tokenizer)(tokens, lengths, lengths * 0)
        assert torch.equal(got, want)


@pytest.mark.slow
def test_a_trained_byte_level_tokenizer_with_blanks_and_accents():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["the cat sat on the mat", "le café de la forêt", "a cat, the cat"]
    tokenizer.train_from_iterator(lines, trainer)
    space = rl_ebm.TokenSpace(tokenizer.get_vocab_size() + 4, 12, 0)
    reward = Automaton.regex(space, r".*\bcaf(é|e)\b.*", 1.0, tokenizer=tokenizer)
    texts = ["le café noir", "le cafés", "café", "un cafe au lait", "the cat"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        tokens = torch.tensor([[*ids, *[0] * (12 - len(ids))]])
        got = float(reward(tokens, torch.tensor([len(ids) + 1]), torch.tensor([0])))
        assert got == float(re.fullmatch(r".*\bcaf(é|e)\b.*", text) is not None)
    # Exact samples of EBMs that want the word, or hardly, against re on their decoded text.
    for beta, share in ((0.03, 1.0), (10.0, 0.0)):
        ebm = rl_ebm.EBM(space, reward, beta)
        batch = rl_ebm.solve(ebm).sample(20, torch.Generator().manual_seed(0))
        rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        known = tokenizer.get_vocab_size()
        said = [tokenizer.decode([a for a in y[: n - 1] if a < known]) for y, n in rows]
        want = [float(re.fullmatch(r".*\bcaf(é|e)\b.*", text) is not None) for text in said]
        assert ebm.score(batch).rewards().tolist() == want == [share] * 20


def test_what_is_refused():
    space = rl_ebm.TokenSpace(9, 4, 0)
    tokenizer = TOKENIZERS["gpt-2"]
    for call, words in (
        (lambda: Automaton.regex(space, "a", 1.0, ["a"] * 9, tokenizer), "alphabet or tokenizer"),
        (lambda: Automaton.contains(space, "a"), "is text: give alphabet= or tokenizer="),
        (lambda: Automaton.contains(space, "", tokenizer=tokenizer), "empty"),
        (lambda: Automaton.contains(space, [1], tokenizer=tokenizer), "for text"),
        (lambda: Automaton.regex(rl_ebm.TokenSpace(4, 2), "a", tokenizer=tokenizer), "has 9 tok"),
        (lambda: Automaton.contains(space, "z", tokenizer=tokenizer), "no response can match"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="tokenizer must be one of transformers or tokenizers"):
        alphabet_of(3)
    ctc = sentence_piece(decoders.CTC(), "a", "b")
    with pytest.raises(ValueError, match="not that of its tokens one after the other"):
        alphabet_of(ctc)
