"""Frameworks of a few lines, as they would be installed, and EBMs that all are asked about."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

import rl_ebm
from rl_ebm.envs import make_task
from rl_ebm.studies.frameworks.rows import Case, Instead, Row

SMALL = rl_ebm.solve(make_task("random", vocab_size=3, max_length=2, beta=0.5, reference="uniform"))


def needs(*packages):
    """Skips where one is not installed: pip install rl-ebm[frameworks]."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{' and '.join(missing)} not installed (rl-ebm[frameworks])"
    )


def install(monkeypatch, folder, name, version, files):
    """A package with these modules, in the place of any other of its name."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    for path in files:  # what is imported of it goes with it
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
    monkeypatch.syspath_prepend(folder)


def k1_in_the_reward(case: Case) -> list[Row]:
    """A row that ends at the EBM, one with half its penalty, which does not, and one unknown."""

    def loss_of(beta):
        def loss(log_pi, log_pi_old, log_ref, advantages, mask):
            paid = advantages - beta * ((log_pi_old - log_ref) * mask).sum(1, keepdim=True)
            return -(paid * log_pi * mask).sum(1).mean()

        return loss

    name = "made.losses.loss"
    advice = Instead(name, {"penalty": True}, "set penalty=True")
    return [
        Row(name, {"penalty": True}, "policy-gradient", loss_of(case.beta), default=True),
        Row(name, {"penalty": False}, "policy-gradient", loss_of(case.beta / 2), instead=advice),
        Row(name, {"noise": True}, "policy-gradient", loss_of(0.0), unknown="it draws lots"),
    ]


def broken(case: Case) -> list[Row]:
    """A loss that asks for what its release has no more."""

    def loss(log_pi, log_pi_old, log_ref, advantages, mask):
        return torch.no_such_function(log_pi)

    return [Row("made.losses.loss", {}, "policy-gradient", loss)]
