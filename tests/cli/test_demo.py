"""make demo prints the same on a machine that does other things as well."""

from __future__ import annotations

import shlex

from checkout import ROOT

from rl_ebm.cli import main


def demo_args() -> list[str]:
    """The arguments of its ``rl-ebm train``."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = makefile.split("\ndemo:")[1].split("\n\n")[0]
    (line,) = (line for line in recipe.splitlines() if "rl-ebm train" in line)
    assert line.strip().startswith("OMP_NUM_THREADS=1 ")
    return shlex.split(line.replace("$(STEPS)", "2000"))[2:]


def test_it_ends_by_steps_alone():
    args = demo_args()
    assert args[args.index("--steps") + 1] == "2000"
    assert "--seconds" not in args


def test_how_often_a_clock_rings_changes_no_bit(tmp_path):
    # On a slow machine more steps have a verification and a checkpoint behind them.
    clock = {"never": "1e9", "always": "1e-9"}
    for when, seconds in clock.items():
        args = [arg for arg in demo_args() if arg != "--overwrite"]
        args[args.index("--steps") + 1] = "3"
        args[args.index("--out") + 1] = str(tmp_path / when)
        assert main([*args, "--eval-every", seconds, "--checkpoint-every", seconds]) == 0
    for name in ("policy.safetensors", "report.json"):
        never, always = ((tmp_path / when / name).read_bytes() for when in clock)
        assert never == always, name
