"""What a policy, reward or solution may have is asked for in its base module alone.

``FullPolicy``, ``FullReward`` and ``Solution`` declare every member; whoever asks for one goes by
the reader there. So there is no ``getattr`` or ``hasattr`` of a member elsewhere, and each other
one stands below, with the reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rl_ebm
from rl_ebm.exact.base import Solution
from rl_ebm.policies import base as policies
from rl_ebm.policies.base import FullPolicy, Trainable
from rl_ebm.rewards import base as rewards
from rl_ebm.rewards.base import FullReward

ROOTS = [Path(room.__file__).parent for room in (rl_ebm, rl_ebm.agents, rl_ebm.envs)]
BASE = {"policies/base.py", "rewards/base.py", "exact/base.py"}

FIELDS = "fields of a dataclass, by their names"
ALLOWED = {
    "agents/shared/off_policy.py": FIELDS,
    "automata/store.py": FIELDS,
    "certificates/certificate.py": FIELDS,
    "networks/backbone.py": FIELDS,
    "studies/bench.py": "options of an agent: not each has a batch size",
    "tokens/batches.py": FIELDS,
    "tokens/space.py": FIELDS,
    "training/config.py": FIELDS,
    "training/defaults.py": FIELDS,
    "verification/forms.py": "laws and figures of the table, by their names",
    "verification/parts.py": "parts of a report, as JSON has them",
    "verification/reading.py": "laws and figures of the table, by their names",
    "verification/sampled_report.py": FIELDS,
    "verification/visits.py": FIELDS,
    "certificates/smc.py": "parts of a cloud of particles, by their names",
    "agents/registry.py": "members of an agent's class, listed there",
    "agents/shared/base.py": "an agent's options, and the tensors that it keeps, by their names",
    "agents/shared/account.py": "what an agent may tell of itself, declared there",
    "studies/losses/audit.py": "fields of a dataclass, and the name of any function",
    "studies/frameworks/rows.py": "members of other packages, which releases may not have",
    "training/charts.py": "which rows an agent drew itself",
    "training/saved_state.py": "the optimiser of an agent's learner",
    "agents/shared/trained.py": "options of an agent; parts of any object, to find tensors",
    "automata/regex/pieces.py": "tokenizers of others",
    "files/opening.py": "flags that not every system has",
    "policies/checks.py": "parts of any object, to find its precision",
    "policies/outputs.py": "a model of transformers, to name its wrapper",
    "policies/hf/policy.py": "models and configurations of transformers and peft",
    "rewards/trl.py": "numbers and columns of any library",
    "tokens/prompts.py": "what tokenizers return",
    "training/checkpoint.py": "metadata of torch's state dicts",
}


def members(*protocols):
    found = {n for p in protocols for n in dir(p) if not n.startswith("_")}
    return found | {n for p in protocols for kind in p.__mro__ for n in vars(kind).get(
        "__annotations__", {}
    ) if not n.startswith("_")}  # fmt: skip


DECLARED = members(FullPolicy, Trainable, FullReward, Solution)


def asked():
    """(file, line, member or None) of every getattr and hasattr of the library."""
    for root in ROOTS:
        above = "" if root == ROOTS[0] else f"{root.name}/"
        for path in root.rglob("*.py"):
            name = above + path.relative_to(root).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    if node.func.id not in ("getattr", "hasattr"):
                        continue
                    what = node.args[1]
                    yield name, node.lineno, getattr(what, "value", None)


ASKED = sorted(set(asked()), key=str)


def test_members_are_read_in_their_base_modules_alone():
    wrong = [
        f"{name}:{line} asks for {member}"
        for name, line, member in ASKED
        if name not in BASE and member in DECLARED
    ]
    assert not wrong, wrong


def test_every_other_question_has_a_reason():
    files = {name for name, _, _ in ASKED} - BASE
    assert files == set(ALLOWED), files ^ set(ALLOWED)


def test_only_declared_members_are_read():
    for name, line, member in ASKED:
        if name in BASE:
            assert member in DECLARED, f"{name}:{line} asks for {member}"


@pytest.mark.parametrize(
    ("module", "protocol"),
    [(policies, FullPolicy), (rewards, FullReward)],
    ids=["policies", "rewards"],
)
def test_a_policy_without_anything_has_the_defaults(module, protocol):
    """No reader needs more of a policy than that it is an object."""
    readers = [
        f
        for name, f in vars(module).items()
        if callable(f) and getattr(f, "__module__", "") == module.__name__
        and (name.endswith("_of") or name in ("crops", "logits_are_values", "is_called"))
    ]  # fmt: skip
    space = rl_ebm.TokenSpace(2, 2)
    for reader in readers:
        reader(object(), space) if reader.__name__ == "limits_of" else reader(object())
    assert readers


def test_no_mode_is_compared():
    """What a solution can do is a member of it, not the text of its mode."""
    for root in ROOTS:
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    for side in (node.left, *node.comparators):
                        assert not (isinstance(side, ast.Attribute) and side.attr == "mode"), path
