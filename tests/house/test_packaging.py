"""Copies of the repository as users get them: each imports, installs, and has one of everything."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
from email import message_from_string
from pathlib import Path
from shutil import make_archive, which
from zipfile import ZipFile

import pytest
from checkout import ENTRIES, ROOT, copy_tree, pip, run, start

import rl_ebm
from rl_ebm.packages.version import UNKNOWN, find_version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
README = (ROOT / "README.md").read_text()
TRAIN = """
import rl_ebm
ebm = rl_ebm.envs.make_task("random", vocab_size=3, max_length=2)
_, report = rl_ebm.train(ebm, "exact", steps=1, network="tabular")
assert report.kl_target_policy >= 0
print(rl_ebm.__file__, rl_ebm.agents.__file__, rl_ebm.envs.__file__, rl_ebm.__version__, sep="\\n")
"""
WITHOUT_LINKS = ("files", "nothing")


# A source tree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", ["files", pytest.param("nothing", marks=pytest.mark.slow)])
def test_a_tree_without_links_trains_where_it_stands_and_warns_of_nothing(tmp_path, in_place):
    tree = copy_tree(tmp_path / "tree", in_place)
    said = run("-W", "error", "-c", TRAIN, at=tmp_path, path=tree)
    package, agents, envs, version = said.splitlines()
    assert Path(package) == tree / "rl_ebm/__init__.py"
    assert (Path(agents), Path(envs)) == (tree / "agents/__init__.py", tree / "envs/__init__.py")
    assert version == PROJECT["version"]


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("line", ["import {0}", "from {0} import *", "import {0}.learner"])
def test_bare_names_say_what_to_import(name, line):
    done = subprocess.run(
        [sys.executable, "-c", line.format(name)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"ImportError: import rl_ebm.{name}" in done.stderr


def test_a_package_without_its_parts_says_so(tmp_path):
    here = tmp_path / "rl_ebm"
    here.mkdir()
    (here / "__init__.py").write_text((ROOT / "rl_ebm/__init__.py").read_text())
    with pytest.raises(AssertionError, match="has no folder agents, and none stands beside it"):
        run("-c", "import rl_ebm", at=tmp_path, path=tmp_path)


# The version --------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_checkout():
    assert rl_ebm.__version__ == find_version() == PROJECT["version"]


@pytest.mark.parametrize(
    "text",
    ["", "[project]\n", "project = 1\n", "][", '[project]\nname = "other"\nversion = "7"\n'],
)
def test_the_file_of_another_project_is_not_read(tmp_path, monkeypatch, text):
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr("rl_ebm.packages.version.version", {"rl-ebm": "5.0"}.__getitem__)
    assert find_version(tmp_path / "rl_ebm") == "5.0"


def test_a_tree_that_is_neither_checkout_nor_installed_has_no_version(tmp_path, monkeypatch):
    def missing(name):
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    monkeypatch.setattr("rl_ebm.packages.version.version", missing)
    assert find_version(tmp_path / "rl_ebm") == UNKNOWN


def test_only_one_module_asks_for_the_version():
    files = [p for room in ("rl_ebm", "agents", "envs") for p in (ROOT / room).rglob("*.py")]
    asking = {p.name for p in files if re.search(r"\bversion\([\"']rl-ebm", p.read_text("utf-8"))}
    assert asking == {"version.py"}


# The index page -----------------------------------------------------------------------------------


def targets(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^)]*)\)", markdown)


@pytest.mark.parametrize("repository", [None, "https://host.example/team/rl-ebm"])
def test_the_index_page_has_no_relative_link(repository):
    assert any(not target.startswith("https:") for target in targets(README))
    page = SETUP["index_page"](README, repository, "v1")
    assert all(target.startswith("https:") for target in targets(page))
    assert page.count("\n") == README.count("\n")


def test_links_lead_to_the_release_and_pictures_to_their_bytes():
    page = SETUP["index_page"]
    at = "https://host.example/x"
    assert page("![a b](c/d.png)", at, "v1") == f"![a b]({at}/raw/v1/c/d.png)"
    assert page("see [`e`](f.md).", at, "v1") == f"see [`e`]({at}/blob/v1/f.md)."
    assert page("[E[R] here](f.md)", at, "v1") == f"[E[R] here]({at}/blob/v1/f.md)"
    assert page("[top](#speed)", at, "v1") == f"[top]({at}/blob/v1/README.md#speed)"
    assert page("[p](https://q.example)", at, "v1") == "[p](https://q.example)"


def test_without_a_repository_paths_stand_as_text():
    page = SETUP["index_page"]
    assert page("![a](c.png)", None, "v1") == "Picture: a (`c.png`)"
    assert page("[all](f.md), [`f.md`](f.md), [up](#top)", None, "v1") == "all (`f.md`), `f.md`, up"


def test_every_link_of_the_readme_leads_to_a_file():
    for target in targets(README):
        if not re.match(r"https:|#", target):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("folder", ["README.md", "rl_ebm", "benchmarks"])
def test_what_is_told_to_install_can_be(folder):
    """It is on no index: a checkout, or an address."""
    at = ROOT / folder
    files = [at] if at.is_file() else [p for p in at.rglob("*") if p.suffix in (".py", ".md")]
    told = [t for p in files for t in re.findall(r"pip install [^`\n]*", p.read_text("utf-8"))]
    for line in told:
        assert "rl-ebm" not in line.split(" in a checkout")[0] or "@ git+" in line, line
        for extra in re.findall(r"\[([a-z0-9-]+)\]'", line):
            assert extra in PROJECT["optional-dependencies"], line
    assert told


def test_the_classifiers_name_the_pythons_that_are_tested():
    said = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    tested = re.findall(r"\d\.\d\d", (ROOT / ".github/workflows/ci.yml").read_text())
    assert said == set(tested)
    assert f">={min(said, key=lambda v: int(v[2:]))}" == PROJECT["requires-python"]


# What is built ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("in_place", WITHOUT_LINKS)
def test_an_archive_without_links_installs(tmp_path, in_place):
    tree = copy_tree(tmp_path / "tree", in_place)
    archive = make_archive(str(tmp_path / "main"), "zip", tree)
    pip("install", "--target", tmp_path / "site", archive, at=tmp_path)
    package, *rest, version = run("-c", TRAIN, at=tmp_path, path=tmp_path / "site").splitlines()
    assert Path(package) == tmp_path / "site/rl_ebm/__init__.py"
    assert [Path(file).parent.parent for file in rest] == 2 * [tmp_path / "site/rl_ebm"]
    assert version == PROJECT["version"]
    assert not (tmp_path / "site/agents").exists()


@pytest.mark.slow
def test_a_wheel_has_the_same_files_with_links_and_without(tmp_path):
    names = {}
    for in_place in ("links", *WITHOUT_LINKS):
        tree = copy_tree(tmp_path / in_place, in_place)
        pip("wheel", "-w", tmp_path / f"{in_place}.out", ".", at=tree)
        (wheel,) = (tmp_path / f"{in_place}.out").iterdir()
        with ZipFile(wheel) as content:
            names[in_place] = set(content.namelist())
            (of_metadata,) = [n for n in content.namelist() if n.endswith("/METADATA")]
            page = message_from_string(content.read(of_metadata).decode())
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "rl_ebm").rglob("*.py")}
    for name in ENTRIES:
        wanted |= {f"rl_ebm/{p.relative_to(ROOT)}" for p in (ROOT / name).rglob("*.py")}
    for found in names.values():
        assert {n for n in found if ".dist-info/" not in n} == wanted | {"rl_ebm/py.typed"}
    assert page["Author"]
    assert page.get_all("Project-URL")
    assert all(target.startswith("https:") for target in targets(page.get_payload()))


@pytest.mark.slow
def test_the_tests_of_a_source_distribution_run(tmp_path):
    tree = copy_tree(tmp_path / "tree", "links")
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    name = run("-c", build, at=tree).splitlines()[-1]
    with tarfile.open(tree / "dist" / name) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / name.removesuffix(".tar.gz")
    files = {p.relative_to(tree) for p in tree.rglob("*") if p.is_file()}
    made = ("dist/", "rl_ebm.egg-info/", "rl_ebm/agents/", "rl_ebm/envs/")
    missing = {p for p in files if not (unpacked / p).is_file() and not str(p).startswith(made)}
    assert missing == set()
    quick = [
        "tests/house/test_layers.py",
        "tests/house/test_lowest.py",
        "tests/tokens/test_tokens.py",
    ]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *quick, at=unpacked)
    assert re.search(r"\d+ passed", said)


@pytest.mark.skipif(which("make") is None, reason="needs make")
def test_make_lays_the_links_again_where_a_file_has_come_or_gone(tmp_path):
    tree = copy_tree(tmp_path / "tree", "links")

    def commands() -> str:
        make = ["make", "-n", "install", f"VENV={tmp_path}/env"]
        return subprocess.run(make, cwd=tree, capture_output=True, text=True, check=True).stdout

    assert "editable_mode=strict" in commands()
    (stamp,) = re.findall(r"touch (.*)", commands())
    Path(stamp).parent.mkdir()
    Path(stamp).touch()
    assert "pip" not in commands()
    (tree / "agents/soft_q.py").write_text("# an edit is seen through its link\n")
    assert "pip" not in commands()
    (tree / "agents/new.py").write_text("")
    assert "pip install" in commands()
    (tree / "agents/new.py").unlink()
    (tree / "rl_ebm/exact/dispatch.py").unlink()
    assert "pip install" in commands()


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """A checkout that is installed as the README says, in an environment of its own."""
    folder = tmp_path_factory.mktemp("editable")
    tree = copy_tree(folder / "tree", "links")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    libraries = {str(Path(m.__file__).parents[1]) for m in (pytest, sys.modules["torch"])}
    (site / "libraries.pth").write_text("\n".join(libraries))
    python = folder / "env/bin/python"
    pip("install", "-e", tree, at=folder, python=python)
    return python, tree


@pytest.mark.slow
def test_type_checkers_find_an_editable_install(editable, tmp_path):
    python, _ = editable
    (tmp_path / "mine.py").write_text(
        "import rl_ebm\n"
        "space = rl_ebm.TokenSpace(vocab_size=3, max_length=2)\n"
        "ebm: rl_ebm.EBM = rl_ebm.envs.make_task('random')\n"
        "wrong: int = space\n"
        "rl_ebm.agents.SoftQConfig(lr='fast')\n"
    )
    found = start("-m", "mypy", "--no-incremental", "mine.py", at=tmp_path, python=python).stdout
    assert "import-not-found" not in found
    assert "import-untyped" not in found
    lines = re.findall(r"^mine\.py:(\d+): error", found, flags=re.M)
    assert lines == ["4", "5"], found


@pytest.mark.slow
def test_an_editable_install_is_the_checkout(editable, tmp_path):
    python, tree = editable
    where = "import os, rl_ebm.agents.soft_q as m; print(os.path.realpath(m.__file__))"
    found = run("-c", where, at=tmp_path, python=python).strip()
    assert Path(found) == (tree / "agents/soft_q.py").resolve()
    for bare in ENTRIES:
        assert (
            "ModuleNotFoundError"
            in start("-c", f"import {bare}", at=tmp_path, python=python).stderr
        )
