"""The declared lower bounds, and the file that make test-lowest installs, are the same."""

from __future__ import annotations

import re
import tomllib

from checkout import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def declared() -> dict[str, str]:
    """The lower bound of everything that one needs, uses or develops with."""
    groups = PROJECT["optional-dependencies"]
    bounds = {}
    for line in [*PROJECT["dependencies"], *groups["dev"], *groups["hf"]]:
        if line.startswith("rl-ebm["):
            continue
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
        assert found, f"{line}: a bound is NAME>=VERSION"
        bounds[found[1]] = found[2]
    return bounds


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def release(version: str) -> list[int]:
    """Its numbers, without zeros at the end: 1.26 is 1.26.0."""
    return [int(n) for n in re.sub(r"(\.0)+$", "", version).split(".")]


def test_what_is_installed_as_lowest_is_what_is_declared():
    assert {name: release(version) for name, version in pinned().items()} == {
        name: release(version) for name, version in declared().items()
    }


def test_extras_that_name_one_package_agree_on_it():
    bounds: dict[str, set[str]] = {}
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for name, version in (line.split(">=") for line in lines if ">=" in line):
            bounds.setdefault(name, set()).add(version)
    assert {name for name, versions in bounds.items() if len(versions) > 1} == set()


def test_the_usual_releases_are_within_the_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    usual = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for name, version in declared().items():
        assert release(usual[name]) >= release(version), name


def test_the_suites_of_other_releases_exist():
    (names,) = re.findall(r"^RELEASES := (.*?)\n\n", MAKEFILE.replace("\\\n", " "), flags=re.M)
    assert len(names.split()) > 5
    for name in names.split():
        assert (ROOT / name).is_file(), name
