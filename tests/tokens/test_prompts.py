"""Prompts at the door: real tokens by their mask, whatever stands at the padding."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from toy_policies import seeded, transformer

import rl_ebm
from rl_ebm.policies import Tabular
from rl_ebm.tokens.prompts import MAX_ID, check_prompts

LISTS = [[5, 1], [1], [], [1, 1, 2]]
PAD = 1  # an id that prompts hold as well, as the EOS of many tokenizers


def padded(side):
    width = max(map(len, LISTS))
    ids = torch.full((len(LISTS), width), PAD)
    mask = torch.zeros(len(LISTS), width, dtype=torch.int64)
    for i, row in enumerate(LISTS):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("as_lists", [False, True])
def test_the_mask_says_what_is_real(side, kind, as_lists):
    encoded = padded(side)
    if as_lists:
        encoded = {name: x.tolist() for name, x in encoded.items()}
    assert check_prompts(kind(encoded)) == LISTS


def test_masked_prompts_are_those_of_lists_everywhere():
    space = rl_ebm.TokenSpace(3, 3)
    scores = torch.randn(4, 27, generator=seeded(), dtype=torch.float64)
    policy = transformer(space, LISTS)
    masked = transformer(space, padded("left"))
    masked.load_state_dict(policy.state_dict())
    ebm = rl_ebm.EBM(space, scores, 1.0, None, padded("right"))
    assert ebm.prompts == policy.prompts == masked.prompts == LISTS
    tokens, ids = space.sequences()[0].repeat(4, 1), torch.arange(4).repeat_interleave(27)
    assert torch.equal(policy.logits(tokens, ids), masked.logits(tokens, ids))
    ebm.check_policy(masked)
    assert Tabular(space, padded("left")).prompts == LISTS


def test_one_prompt_is_not_padded_and_unpadded_lists_of_a_tokenizer_need_no_mask():
    assert check_prompts(torch.tensor([[4, 2]])) == [[4, 2]]
    assert check_prompts({"input_ids": LISTS}) == LISTS
    assert check_prompts([torch.tensor([4, 2]), (3,)]) == [[4, 2], [3]]
    assert check_prompts({"input_ids": [4, 2], "attention_mask": [0, 1]}) == [[2]]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (padded("left")["input_ids"], "nothing in it tells padding"),
        (padded("left")["input_ids"].numpy(), "nothing in it tells padding"),
        ({"input_ids": padded("left")["input_ids"]}, "nothing in it tells padding"),
        ({"attention_mask": [[1]]}, "a mapping with input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "another shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "0 and 1 alone"),
        ("a text", "tokenize it first"),
        (["a text"], "tokenize it first"),
        ([b"bytes"], "tokenize it first"),
        ([["a"]], "list of int sequences"),
        ([[True]], "list of int sequences"),
        ([[1.0]], "list of int sequences"),
        ([torch.tensor([1.0])], "list of int sequences"),
        ([{"input_ids": [1]}], "a list of mappings"),
        ([[MAX_ID + 1]], "ids must be in"),
        ([[-1]], "negative token id"),
        ([], "prompts is empty"),
        (7, "list of int sequences"),
    ],
)
def test_what_is_no_list_of_prompts_is_told(prompts, words):
    with pytest.raises(ValueError, match=words) as told:
        check_prompts(prompts)
    assert "\n" not in str(told.value)


def test_the_largest_id_is_one():
    assert check_prompts([[0, MAX_ID]]) == [[0, MAX_ID]]
    with pytest.raises(ValueError, match=f"ids must be in \\[0, {MAX_ID}\\]"):
        check_prompts([[0, MAX_ID + 1]])
