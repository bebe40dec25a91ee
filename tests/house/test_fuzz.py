"""Ten thousand wrong inputs end in success or one sentence; and the instrument that says so."""

from __future__ import annotations

import pytest

from tests.fuzz import KINDS, module_of
from tests.fuzz.deliberate import ENDS
from tests.fuzz.driver import run
from tests.fuzz.judge import call
from tests.fuzz.subjects import subjects

PART = 500
"""cases that one process tries, so that several share a kind out"""
PARTS = [(kind, at) for kind in KINDS for at in range(0, module_of(kind).COUNT, PART)]


def test_there_are_ten_thousand():
    assert sum(module_of(kind).COUNT for kind in KINDS) >= 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_one_input_and_seeds_differ(kind):
    case = module_of(kind).case
    cases = [case(seed) for seed in range(40)]
    assert cases == [case(seed) for seed in range(40)]
    assert len(set(map(str, cases))) > 30


@pytest.mark.slow
def test_some_of_every_kind():
    """The first of each, in one process."""
    found = run((kind, seed) for kind in KINDS for seed in range(5))
    assert not found.findings, found.text()
    assert {"success", "sentence"} == set(found.ends)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "start"), PARTS)
def test_success_or_one_sentence(kind, start):
    stop = min(start + PART, module_of(kind).COUNT)
    found = run((kind, seed) for seed in range(start, stop))
    assert not found.findings, found.text()
    # Neither are all inputs refused at the door, nor is most of what comes in right.
    total = sum(found.ends.values())
    assert total == stop - start
    assert found.ends["success"] > 0.05 * total, found.text()
    assert found.ends["sentence"] > 0.2 * total, found.text()


# The instrument ---------------------------------------------------------------------------------

RIGHT_ENDS = {"success": "success", "sentence": "sentence", "hang": "hang", "hang in C": "hang"}
DEATHS = ("segmentation fault", "abort", "exit")


@pytest.mark.slow
def test_every_sort_of_end_is_told_from_the_others():
    ends = list(ENDS)
    for seed, name in enumerate(ends):
        found = run([("deliberate", seed)], seconds=3)
        want = RIGHT_ENDS.get(name, "death" if name in DEATHS else "finding")
        assert dict(found.ends) == {want: 1}, f"{name}: {found.text()}"


@pytest.mark.parametrize("name", ["success", "sentence", "torch", "attribute"])
def test_the_judge_tells_our_sentences_from_the_errors_of_others(name):
    assert call(ENDS[name]).end == RIGHT_ENDS.get(name, "finding")


def raises(error: Exception):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "error", [ValueError("said outside of the library"), KeyError("a key"), RuntimeError("a b c d")]
)
def test_what_the_library_does_not_raise_is_a_finding(error):
    assert call(raises(error)).end == "finding"


@pytest.mark.slow
def test_the_right_calls_succeed():
    """What is spoilt is right before: else the sweep tries something else than it says."""
    count = len(subjects())
    found = run(("calls", -1 - i) for i in range(count))
    assert found.ends == {"success": count}, found.text()
