"""What solving refuses: trees too large, EBMs without responses, rewards that are no numbers."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from brute_force import INF
from toy_policies import PROMPTS

import rl_ebm
from rl_ebm.exact import TooLargeError, check_memory
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tokens import TokenSpace

solve_module = importlib.import_module(
    "rl_ebm.exact.dispatch"
)  # its package shows a function there


def never(*_):
    raise AssertionError("nothing was to be evaluated")


class NeverAsked:
    logits = never


@pytest.mark.parametrize("reference", [None, NeverAsked()])
def test_what_cannot_fit_is_refused_before_any_work(reference):
    ebm = rl_ebm.EBM(TokenSpace(50257, 128), never, 1.0, reference)
    digits = round(128 * math.log10(50257))
    with pytest.raises(
        TooLargeError, match=rf"about 10\^{digits} sequences need about 10\^6\d\d b"
    ):
        rl_ebm.solve(ebm)
    assert issubclass(TooLargeError, ValueError)
    assert issubclass(TooLargeError, MemoryError)


def test_memory_refuses_a_table_with_the_count_and_the_bytes():
    ebm = rl_ebm.EBM(TokenSpace(4, 5), torch.zeros(1024))
    with pytest.raises(TooLargeError, match=r"1,024 sequences need 67\.1 MB .* 2 KB may be used"):
        rl_ebm.solve(ebm, memory=2000)
    with pytest.raises(MemoryError, match="make vocab_size or max_length smaller"):
        check_memory(ebm, 0)
    rl_ebm.solve(ebm, memory=2**27)


@pytest.mark.parametrize("eos_id", [None, 3])
@pytest.mark.parametrize("reference", [None, "uniform", NeverAsked()])
@pytest.mark.parametrize("prompts", [None, [[0], [1]]])
def test_the_bytes_are_those_that_a_solution_keeps(eos_id, reference, prompts):
    space = TokenSpace(4, 14 if eos_id is None else 18, eos_id)
    reference = Uniform(space) if reference == "uniform" else reference
    states = sum(len(range(space.branching**t)) for t in range(space.max_length))
    count = states if eos_id is not None else 4**14
    keeps = 8 * states + 8 * count  # V and the scores
    keeps += 32 * states if isinstance(reference, NeverAsked) else 0
    keeps *= len(prompts or [0])
    ebm = rl_ebm.EBM(space, never, 1.0, reference, prompts)
    check_memory(ebm, keeps + 2**27)
    with pytest.raises(TooLargeError, match=f"{count:,} sequences"):
        check_memory(ebm, keeps)


def test_the_bytes_of_a_table_are_those_of_its_values():
    space = TokenSpace(4, 13)
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        ebm = rl_ebm.EBM(space, torch.zeros(1, dtype=dtype).expand(4**13))
        keeps = size * (4**13 // 3)
        check_memory(ebm, keeps + 2**26 + 2**10)
        with pytest.raises(TooLargeError, match="67,108,864 sequences"):
            check_memory(ebm, keeps)


@pytest.mark.parametrize("shape", [(3, 2, None), (3, 3, 1)], ids=str)
def test_an_ebm_without_a_possible_response_is_refused(shape):
    space = TokenSpace(*shape)
    n = space.num_sequences
    with pytest.raises(ValueError, match="every response of a prompt has reward -inf"):
        rl_ebm.EBM(space, torch.full((n,), -INF))
    for prompts in (None, PROMPTS):

        def function(tokens, lengths, prompt_ids=None):
            last = torch.ones(len(tokens)) if prompt_ids is None else prompt_ids == 2
            return torch.zeros(len(tokens)).masked_fill(last > 0, -INF)

        with pytest.raises(ValueError, match="every response of a prompt is impossible"):
            rl_ebm.solve(rl_ebm.EBM(space, function, prompts=prompts))
    # Neither the reward nor the reference alone forbids everything.
    scores = torch.zeros(n).masked_fill(space.sequences()[0][:, 0] == 0, -INF)
    root = torch.tensor([[0.3, -INF, -INF]])
    tables = [root, *[torch.randn(space.num_prefixes(t), 3) for t in range(1, shape[1])]]
    with pytest.raises(ValueError, match="every response of a prompt is impossible"):
        rl_ebm.solve(rl_ebm.EBM(space, scores, 1.0, Tabular.from_tables(tables, space)))


@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_reward_that_is_no_number_is_refused_while_solving(monkeypatch, value):
    monkeypatch.setattr(solve_module, "_REWARD_BATCH", 4)
    space = TokenSpace(3, 2)
    scores = torch.zeros(9)
    scores[6] = value

    class Unchecked:
        forbids = False

        def __call__(self, tokens, lengths, prompt_ids):
            return scores[tokens @ torch.tensor([3, 1])]

        def bind(self, space, prompts):
            return self

        def to(self, device):
            return self

    with pytest.raises(ValueError, match=f"is {value} at index 2: a reward must be a number"):
        rl_ebm.solve(rl_ebm.EBM(space, Unchecked()))
    with pytest.raises(ValueError, match=f"is {value} at index 2: a reward must be a number"):
        rl_ebm.solve(rl_ebm.EBM(space, lambda tokens, lengths: Unchecked()(tokens, lengths, None)))
