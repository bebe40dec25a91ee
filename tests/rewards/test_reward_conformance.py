"""``rewards.check``: what the library has passes, and each member that lies is named."""

from __future__ import annotations

import math

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.automata import Machine
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.rewards import Automaton, Table, TransformerReward, base, check, from_trl
from rl_ebm.tasks.named import TASKS
from rl_ebm.training.kinds import KINDS

SPACE, EOS = rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(4, 4, eos_id=1)
LONG = rl_ebm.TokenSpace(4, 40, eos_id=1)
PROMPTS = [[1], [2, 0]]


def scores(space, prompts=1):
    return torch.randn(prompts, space.num_sequences, generator=seeded(), dtype=torch.float64)


def by_length(completions, **_):
    return [float(len(text)) for text in completions]


def called(tokens, lengths):
    return tokens.double().sum(1) - lengths


OWN = {
    "table": (scores(SPACE)[0], SPACE, None),
    "table in float32": (scores(EOS)[0].float(), EOS, None),
    "table of prompts": (scores(SPACE, 2), SPACE, PROMPTS),
    "table that forbids": (scores(EOS)[0].masked_fill(scores(EOS)[0] > 1, -torch.inf), EOS, None),
    "function": (called, LONG, None),
    "function of prompts": (lambda tokens, lengths, ids: ids.double() - lengths, LONG, PROMPTS),
    "TRL": (
        from_trl(lambda completions, **_: [float(len(c)) for c in completions], str),
        EOS,
        None,
    ),
    "automaton": (Automaton.contains(LONG, [2, 3]) + Automaton.avoids(LONG, [0, 0]), LONG, None),
    "hidden automaton": (
        Automaton.hmm(
            LONG, *(torch.randn(s, generator=seeded()).double() for s in ((2,), (2, 2), (2, 4)))
        ),
        LONG,
        None,
    ),
    "network": (TransformerReward(EOS, TransformerConfig(1, 2, 8, 8)), EOS, None),
    **{
        f"task {name}": (
            task.reward(rl_ebm.TokenSpace(task.vocab_size, task.max_length), 0),
            rl_ebm.TokenSpace(task.vocab_size, task.max_length),
            task.prompts,
        )
        for name, task in TASKS.items()
    },
}


@pytest.mark.parametrize("kind", OWN)
def test_what_the_library_has_passes(kind):
    check(*OWN[kind])


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])
@pytest.mark.parametrize("space", [SPACE, EOS], ids=str)
@pytest.mark.parametrize("name", [name for name, kind in KINDS["reward"].items() if kind.example])
def test_every_kind_that_a_run_makes_again_passes(name, space, prompts):
    check(KINDS["reward"][name].example(space, prompts), space, prompts)


class Full(Table):
    """A table that also says everything else, truly."""

    def __init__(self):
        super().__init__(scores(SPACE))
        self.space, self.called = SPACE, False
        fields = torch.zeros(4, 3).double()
        couplings = torch.randn(3, 3, 3, generator=seeded()).double()
        self.of = Automaton.chain(SPACE, fields, couplings)
        self.machine = self.of.machine
        tokens, lengths = SPACE.sequences()
        self.scores = self.of(tokens, lengths, torch.zeros_like(lengths))[None]
        self.least, self.largest = (float(x) for x in torch.aminmax(self.scores))

    def bind(self, space, prompts):
        return self

    def limits(self, space, prompt=0):
        return self.least, self.largest

    def __call__(self, tokens, lengths, prompt_ids):
        return self.of(tokens, lengths, prompt_ids)


def test_one_that_has_everything_and_lies_nowhere_passes():
    check(Full(), SPACE)


def set_to(name, value):
    return lambda r: setattr(r, name, value)


def other_machine(r):
    parts = vars(r.machine)
    r.machine = Machine(**(parts | {"log_weight": parts["log_weight"] + 0.1}))


def forbidding(r):
    own, r.machine, r.scores = r.of, None, None
    r.limits = lambda *_: (-math.inf, math.inf)
    r.of = lambda tokens, lengths, ids: own(tokens, lengths, ids).masked_fill(
        tokens[:, 0] == 2, -torch.inf
    )


def drifting(r):
    own, seen = r.of, []

    def of(*args):
        seen.append(1)
        return own(*args) + len(seen)

    r.of = of


LIES = [
    ("scores", lambda r: set_to("scores", r.scores.flip(1))(r), "in enumeration order"),
    ("scores", lambda r: set_to("scores", r.scores[:, 1:])(r), r"expected \(1, 81\)"),
    ("machine", other_machine, "must pay R"),
    ("limits", lambda r: set_to("least", r.least + 1)(r), "beyond them"),
    ("limits", lambda r: set_to("largest", r.largest - 1)(r), "beyond them"),
    ("forbids", forbidding, "say True"),
    ("second call", drifting, "other numbers"),
    ("value", lambda r: set_to("of", lambda *_: torch.full((64,), math.nan))(r), "is nan"),
    ("returned", set_to("of", lambda *_: torch.zeros(3)), "expected"),
    ("returned", set_to("of", lambda *_: None), "NoneType"),
    ("fails", set_to("of", lambda *args: args[5]), "out of range"),
]


@pytest.mark.parametrize(("name", "lie", "words"), LIES)
def test_each_member_that_lies_is_named(name, lie, words):
    reward = Full()
    lie(reward)
    with pytest.raises((ValueError, TypeError), match=words) as told:
        check(reward, SPACE)
    assert name in str(told.value)
    assert "\n" not in str(told.value)


def test_no_member_is_without_a_lie():
    members = {n for n in dir(base.FullReward) if not n.startswith("_")} | {"forbids"}
    untried = {"bind", "to", "device", "called"}  # of work and places, not of numbers
    assert (
        members
        == {name for name, _, _ in LIES} - {"second call", "value", "returned", "fails"} | untried
    )


@pytest.mark.parametrize(
    ("reward", "is_called"),
    [(OWN["table"], False), (OWN["automaton"], False), (OWN["task pairwise"], False),
     (OWN["function"], True), (OWN["TRL"], True), (OWN["network"], True)],
)  # fmt: skip
def test_whose_calls_count(reward, is_called):
    given, space, prompts = reward
    assert base.is_called(rl_ebm.EBM(space, given, prompts=prompts).reward_model) == is_called


def test_a_class_of_the_users_counts_unless_it_says_otherwise():
    class Theirs:
        pass

    assert base.is_called(Theirs())
    Theirs.called = False
    assert not base.is_called(Theirs())
