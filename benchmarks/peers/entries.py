"""Everybody who takes part, by name."""

from __future__ import annotations

from benchmarks.peers import ours, with_gfnx, with_sb3, with_torchgfn, with_trl
from benchmarks.peers.contender import Contender
from rl_ebm.messages.words import nearest

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for module in (ours, with_torchgfn, with_gfnx, with_trl, with_sb3)
    for contender in module.CONTENDERS
}


def find(names: tuple[str, ...]) -> list[Contender]:
    """Contenders by name, or by the beginning of their names; all where no name is given.

    Raises:
        ValueError: a name of nobody.
    """
    found: dict[str, Contender] = {}
    for name in names or ("",):
        chosen = {k: c for k, c in CONTENDERS.items() if k.startswith(name)}
        if name in CONTENDERS:
            chosen = {name: CONTENDERS[name]}
        if not chosen:
            raise ValueError(f"there is no contender {name!r}{nearest(name, CONTENDERS)}")
        found |= chosen
    return list(found.values())
