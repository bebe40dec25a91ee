"""What pyproject.toml cannot say: where two of the packages stand, and the index page's text."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
BESIDE = ("agents", "envs")
"""folders beside rl_ebm/ that are packages in it, whether or not it has links to them"""


def packages() -> list[str]:
    """All of them, links or not; nothing else that stands here."""
    names = {"rl_ebm", *(f"rl_ebm.{name}" for name in find_packages("rl_ebm"))}
    for folder in BESIDE:
        names |= {f"rl_ebm.{folder}", *(f"rl_ebm.{folder}.{x}" for x in find_packages(folder))}
    return sorted(names)


def index_page(text: str, repository: str | None, release: str) -> str:
    """The README for a page that has none of its files: no link is relative.

    Args:
        text: the README.
        repository: its public address; None while there is none: paths then stand as text.
        release: the tag of this version.
    """

    def absolute(match: re.Match[str]) -> str:
        bang, words, path = match.groups()
        if re.match(r"[a-z]+:", path):
            return match[0]
        if repository is None:
            named = path.startswith("#") or path in words
            return f"{'Picture: ' if bang else ''}{words}{'' if named else f' (`{path}`)'}"
        at = f"{repository}/{'raw' if bang else 'blob'}/{release}/"
        return f"{bang}[{words}]({at}{'README.md' if path.startswith('#') else ''}{path})"

    label = r"((?:[^]\[]|\[[^]\[]*\])*)"  # which may have brackets of its own
    return re.sub(rf"(!?)\[{label}\]\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]
    setup(
        packages=packages(),
        package_dir={f"rl_ebm.{folder}": folder for folder in BESIDE},
        long_description=index_page(
            (HERE / "README.md").read_text("utf-8"),
            project["urls"].get("Repository"),
            f"v{project['version']}",
        ),
        long_description_content_type="text/markdown",
        # mypy and pyright find an editable install of this mode alone.
        options={"editable_wheel": {"mode": "strict"}},
    )
