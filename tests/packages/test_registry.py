"""Names from three sides: one's own, registered ones, and those of installed packages."""

from __future__ import annotations

import sys

import pytest
from distributions import install

from rl_ebm.packages.plugins import PluginWarning, Registry

GROUP = "tests.numbers"


def read(name, found):
    value = found() if callable(found) else found
    if not isinstance(value, int):
        raise TypeError(f"no number:\n{value!r}")
    return value


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put a distribution on the path; its modules are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = set(sys.modules)
    yield lambda name, module, points: install(tmp_path / "site", name, module, {GROUP: points})
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def numbers():
    found = Registry("number", GROUP, read)
    found.update(one=1, two=2)
    return found


def test_a_package_is_imported_when_its_name_is_asked_for(installed, numbers):
    installed("alpha", "THREE = 3", {"three": "alpha:THREE"})
    installed("beta", "def four():\n    return 4", {"four": "beta:four"})
    assert numbers["one"] == 1
    assert "two" in numbers
    assert numbers.names() == ["one", "two", "three", "four"]
    assert not {"alpha", "beta"} & set(sys.modules)
    assert "three" in numbers
    assert numbers["three"] == 3
    assert "alpha" in sys.modules
    assert "beta" not in sys.modules
    assert dict(numbers) == {"one": 1, "two": 2, "three": 3, "four": 4}
    assert len(numbers) == 4


def test_what_is_not_there_is_not_there(installed, numbers):
    installed("alpha", "THREE = 3", {"three": "alpha:THREE"})
    for name in ("five", 5, None):
        assert name not in numbers
        assert numbers.fault(name) is None
    with pytest.raises(KeyError):
        numbers["five"]


BROKEN = {
    "raises": ("1 / 0", "broken:X", "ZeroDivisionError: division by zero"),
    "lacks it": ("", "broken:X", "has no attribute 'X'"),
    "needs another": ("import no_such_module", "broken:X", "No module named 'no_such_module'"),
    "another kind": ("X = 'text'", "broken:X", "TypeError: no number: 'text'"),
    "a function that fails": ("def X():\n    return [][1]", "broken:X", "IndexError"),
    "no module": ("", "nowhere:X", "No module named 'nowhere'"),
    "no reference": ("", "a b c", "cannot be loaded"),
}


@pytest.mark.parametrize(("module", "refers", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_one_sentence_and_the_others_work(
    installed, numbers, module, refers, why
):
    installed("broken", module, {"bad": refers})
    installed("good", "THREE = 3", {"three": "good:THREE"})
    with pytest.warns(PluginWarning) as told:
        assert list(numbers) == ["one", "two", "three"]
    assert "bad" not in numbers
    sentence = numbers.fault("bad")
    assert [str(w.message) for w in told] == [sentence]
    assert "the number 'bad' of the distribution broken 1.2" in sentence
    assert why in sentence
    assert "\n" not in sentence
    assert list(numbers) == ["one", "two", "three"]  # told once


def test_a_name_that_is_taken_stays_with_who_has_it(installed, numbers):
    installed("alpha", "TWO = 22", {"two": "alpha:TWO"})
    installed("beta", "THREE = 3", {"three": "beta:THREE"})
    with pytest.raises(ValueError, match="a number 'two' already"):
        numbers.add("two", 22)
    with pytest.raises(ValueError, match="'three' already, of the distribution beta"):
        numbers.add("three", 33)
    assert numbers["two"] == 2
    with pytest.warns(PluginWarning, match=r"'two' of the distribution alpha 1\.2 is left out"):
        assert dict(numbers) == {"one": 1, "two": 2, "three": 3}


def test_two_packages_with_one_name_are_told_of_and_neither_is_taken(installed, numbers):
    installed("alpha", "THREE = 3", {"three": "alpha:THREE"})
    installed("beta", "THREE = 33", {"three": "beta:THREE"})
    assert "three" not in numbers
    assert "alpha 1.2" in numbers.fault("three")
    assert "beta 1.2" in numbers.fault("three")


def test_a_package_may_register_its_own_as_well(installed, numbers, monkeypatch):
    """On import from Python, and when it is loaded by its entry point."""
    monkeypatch.setattr(sys.modules[__name__], "numbers", numbers, raising=False)
    source = f"import {__name__} as t\nSEVEN = 700 + 77\nt.numbers.add('seven', SEVEN)"
    installed("alpha", source, {"seven": "alpha:SEVEN"})
    assert numbers["seven"] == 777
    again = Registry("number", GROUP, read)
    del sys.modules["alpha"]
    monkeypatch.setattr(sys.modules[__name__], "numbers", again, raising=False)
    import alpha

    assert dict(again) == {"seven": 777}
    assert again["seven"] is alpha.SEVEN
