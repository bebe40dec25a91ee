"""``policies.check``: what the library has passes, and each member that lies is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_policies import randomised, seeded, tabular, transformer

import rl_ebm
from rl_ebm.policies import Tabular, Uniform, base, check, fit_hmm, fit_ngram, sample
from rl_ebm.rewards import Automaton
from rl_ebm.training.kinds import KINDS

SPACES = [
    rl_ebm.TokenSpace(3, 5),
    rl_ebm.TokenSpace(4, 6, eos_id=1),
    rl_ebm.TokenSpace(5, 1),
    rl_ebm.TokenSpace(3, 2, eos_id=2),
]
by_space = pytest.mark.parametrize("space", SPACES, ids=str)
PROMPTS = [[0], [1, 2], []]


def some_responses(space, prompts=None):
    ids = torch.arange(40) % len(prompts or [[]])
    return sample(Uniform(space), space, 40, seeded(1), ids)


def forbidding(space):
    rows = tabular(space).table.detach().clone()
    rows[:, 0, 0] = -torch.inf
    policy = Tabular(space)
    policy.table = nn.Parameter(rows)
    return policy


def solved(space, scale=1.0):
    scores = torch.randn(space.num_sequences, generator=seeded(3), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scale * scores))


def solved_automaton(space):
    reward = Automaton.counts(space, [0], 1.5)
    reference = fit_ngram(space, some_responses(space))
    return rl_ebm.solve(rl_ebm.EBM(space, reward, 0.5, reference))


def of_values(space):
    policy = transformer(space)
    policy.logits_are_values = True
    return policy


OWN = {
    "uniform": Uniform,
    "table": tabular,
    "table of prompts": lambda space: tabular(space, PROMPTS),
    "table that forbids": forbidding,
    "transformer": transformer,
    "transformer of prompts": lambda space: transformer(space, PROMPTS),
    "transformer of values": of_values,
    "transformer in float32": lambda space: transformer(space).float(),
    "n-gram": lambda space: fit_ngram(space, some_responses(space), 3),
    "n-gram that forbids": lambda space: fit_ngram(space, some_responses(space), 2, 0.0),
    "n-gram of prompts": lambda space: fit_ngram(
        space, some_responses(space, PROMPTS[:2]), 2, 1.0, PROMPTS[:2]
    ),
    "HMM": lambda space: fit_hmm(space, some_responses(space), 3, 3, generator=seeded())[0],
    "solution": solved,
    "solution at large R": lambda space: solved(space, 1e8),
    "solution of automata": solved_automaton,
}


@by_space
@pytest.mark.parametrize("kind", OWN)
def test_what_the_library_has_passes(space, kind):
    policy, before = OWN[kind](space), torch.get_rng_state()
    check(policy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])
@by_space
@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role in ("reference", "policy") for name in KINDS[role]]
)
def test_every_kind_that_a_run_makes_again_passes(role, name, space, prompts):
    check(KINDS[role][name].example(space, prompts), space)


# Lies ---------------------------------------------------------------------------------------------


class Full:
    """A policy with everything, all of it true; not one of the library's to the door."""

    prompts = None
    device = "cpu"
    forbids = False
    crops = True
    tree_bytes_per_node = 100

    def __init__(self, space):
        self.space = space
        self.of = fit_ngram(space, some_responses(space))
        self.machine = self.of.machine
        self.log_probs, self.start, self.step = self.of.log_probs, self.of.start, self.of.step
        self.table = Tabular.from_tables(self.tables(), space)

    logits_are_values = False

    def tables(self):
        """Logits of all prefixes by depth, by whole sequences."""
        tables = []
        for t in range(self.space.max_length):
            prefixes = self.space.prefixes(t)
            tokens = torch.zeros(len(prefixes), self.space.max_length, dtype=torch.int64)
            tokens[:, :t] = prefixes
            tables.append(self.of.logits(tokens)[:, t])
        return tables

    def logits(self, tokens, prompt_ids=None):
        return self.table.logits(torch.nn.functional.pad(tokens, (0, self.room(tokens))))[
            :, : tokens.shape[1]
        ].detach()

    def room(self, tokens):
        return self.space.max_length - tokens.shape[1]

    def tree_logits(self, tree, prompt_ids):
        return self.table.tree_logits(tree, prompt_ids).detach()


class Even(Full):
    """The same of a uniform law, which alone has constants."""

    log_ref_constants = None

    def __init__(self, space):
        super().__init__(space)
        self.of = Uniform(space)
        self.machine, self.log_probs = self.of.machine, self.of.log_probs
        self.log_ref_constants = self.of.log_ref_constants
        self.table = Tabular.from_tables(self.tables(), space)
        self.step = lambda state, tokens: torch.zeros(len(state), space.vocab_size)
        self.start = lambda prompt_ids: prompt_ids


@by_space
@pytest.mark.parametrize("kind", [Full, Even])
def test_one_that_has_everything_and_lies_nowhere_passes(space, kind):
    policy = kind(space)
    check(policy)
    rl_ebm.EBM(space, torch.zeros(space.num_sequences), reference=policy)


def warmer(p, name):
    """The member with logits of another temperature."""
    own = getattr(p, name)
    setattr(p, name, lambda *args: 1.5 * own(*args))


def forgets(p):
    first = p.start
    p.start = lambda ids: [first(ids), 0]
    own = p.step

    def step(state, tokens):
        state[1] += 1
        return own(state[0], tokens if state[1] <= 2 else torch.zeros_like(tokens))

    p.step = step


def moved_tree(p):
    own = p.tree_logits
    p.tree_logits = lambda tree, ids: own(tree, ids).roll(1, 1)


def raised_tree(p):
    p.logits_are_values = True
    own = p.tree_logits
    p.tree_logits = lambda tree, ids: own(tree, ids) + 1.0


def another_machine(p):
    p.machine = fit_ngram(p.space, some_responses(p.space), 1).machine


def a_machine_that_pays(p):
    p.machine = replace(p.machine, final=p.machine.final + 1.0)


def forbids_one(p):
    p.table.table.data[:, 0, 0] = -torch.inf
    p.of = None
    for name in ("machine", "log_probs", "start", "step"):
        delattr(p, name)


def late_crop(p):
    own = p.logits
    p.logits = lambda tokens, ids=None: own(tokens, ids) * (1 + 0.3 * (p.room(tokens) > 0))


def no_crop(p):
    own = p.logits

    def logits(tokens, ids=None):
        if p.room(tokens):
            raise IndexError("only T columns here")
        return own(tokens, ids)

    p.logits = logits


def elsewhere(p):
    own = p.logits
    p.logits = lambda tokens, ids=None: own(tokens, ids).to("meta")


def set_to(name, value):
    return lambda p: setattr(p, name, value)


LIES = {
    "logits": [(Full, lambda p: warmer(p, "logits"), None)],  # then every other one lies
    "space": [(Full, set_to("space", rl_ebm.TokenSpace(7, 7)), "is for TokenSpace")],
    "device": [(Full, elsewhere, "device is cpu, and its logits come out on meta")],
    "forbids": [(Full, forbids_one, "an allowed action has logit -inf")],
    "crops": [(Full, late_crop, "the first rows"), (Full, no_crop, "fails: only T columns")],
    "start": [(Full, set_to("start", lambda ids: None), "step fails")],
    "step": [
        (Full, lambda p: warmer(p, "step"), "row t"),
        (Full, forgets, "seen at depth 2"),
        (Full, set_to("step", lambda state, tokens: torch.zeros(1, 1)), "gave shape"),
    ],
    "tree_logits": [
        (Full, lambda p: warmer(p, "tree_logits"), "up to a constant"),
        (Full, moved_tree, "a node must have the logits of its prefix"),
        (Full, raised_tree, "which are values"),
        (Full, set_to("tree_logits", lambda tree, ids: None), "gave NoneType, expected a tensor"),
    ],
    "tree_bytes_per_node": [(Full, set_to("tree_bytes_per_node", 0), "at least 1")],
    "log_probs": [(Full, lambda p: warmer(p, "log_probs"), "log-softmax")],
    "machine": [
        (Full, another_machine, "log-softmax"),
        (Full, a_machine_that_pays, "pays at the end"),
        (Full, set_to("machine", Uniform(SPACES[2]).machine), "over 4 tokens"),
    ],
    "log_ref_constants": [
        (Even, lambda p: set_to("log_ref_constants", lambda: [0.0] * 6)(p), "every allowed action"),
        (Even, set_to("log_ref_constants", lambda: [0.0]), "expected 6"),
        (Full, set_to("log_ref_constants", Uniform(SPACES[1]).log_ref_constants), "every allowed"),
    ],
}
UNTRIED = {
    "prompts": "the EBM's door compares them",
    "logits_are_values": "any logits are those of some values",
    "value_head": "it is of gradients: q that it makes is compared as any is",
    "read_tensors": "it is of weights, not of logits",
    "to": "it is of devices",
}
CASES = [(name, *case) for name, cases in LIES.items() for case in cases]


def test_no_member_is_without_a_lie():
    members = {n for n in dir(base.FullPolicy) if not n.startswith("_")}
    members |= set(base.FullPolicy.__annotations__)
    assert members == set(LIES) | set(UNTRIED)


@pytest.mark.parametrize(
    ("name", "kind", "lie", "words"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_each_member_that_lies_is_named(name, kind, lie, words):
    space = SPACES[1]
    policy = kind(space)
    check(policy)
    lie(policy)
    with pytest.raises(ValueError, match=words) as told:
        check(policy, space)
    if name not in ("logits", "start", "space"):
        assert f"the policy's {name}" in str(told.value).replace("logits of fewer columns (", "")
    assert "\n" not in str(told.value)
    assert not str(told.value).endswith(".")


def doors():
    space = rl_ebm.TokenSpace(3, 3)
    ebm = rl_ebm.EBM(space, torch.randn(27, generator=seeded(), dtype=torch.float64))
    solution = rl_ebm.solve(ebm)
    return space, {
        "verify": lambda p: rl_ebm.verify(p, solution),
        "certify": lambda p: rl_ebm.certify(p, ebm, 20),
        "train": lambda p: rl_ebm.train(ebm, "soft-q", policy=p, steps=1),
        "EBM": lambda p: rl_ebm.EBM(space, torch.zeros(27), reference=p),
    }


class Lying(nn.Module):
    """A table whose tree says something else."""

    def __init__(self, space):
        super().__init__()
        self.table = tabular(space)

    def logits(self, tokens, prompt_ids=None):
        return self.table.logits(tokens, prompt_ids)

    def tree_logits(self, tree, prompt_ids):
        return 2 * self.table.tree_logits(tree, prompt_ids)


@pytest.mark.parametrize("door", doors()[1])
def test_every_door_asks(door):
    space, all_doors = doors()
    with pytest.raises(ValueError, match=r"tree_logits does not agree with its logits"):
        all_doors[door](Lying(space))


def test_what_the_doors_take_is_a_few_rows_more():
    """Three passes over the rows of the trial, and one over four for each member."""
    space, seen = rl_ebm.TokenSpace(4, 6), []

    class Counted(Full):
        def logits(self, tokens, prompt_ids=None):
            seen.append(("logits", len(tokens)))
            return super().logits(tokens)

        def tree_logits(self, tree, prompt_ids):
            seen.append(("tree", len(tree)))
            return super().tree_logits(tree, prompt_ids)

    policy = Counted(space)
    step, log_probs = policy.step, policy.log_probs
    policy.step = lambda state, tokens: (
        seen.append(("step", len(state.reading.k))) or step(state, tokens)
    )
    policy.log_probs = lambda *args: seen.append(("log_probs", len(args[0]))) or log_probs(*args)
    rl_ebm.EBM(space, torch.zeros(4**6), reference=policy)
    assert [name for name, _ in seen] == ["logits"] * 4 + ["step"] * 4 + ["tree", "log_probs"]
    assert all(n <= 4 for name, n in seen[3:] if name != "tree")
    assert dict(seen)["tree"] <= 1 + 3 * 4


def test_a_mode_is_told_where_it_is_the_fault():
    space = rl_ebm.TokenSpace(3, 3)

    class Moody(Lying):
        def tree_logits(self, tree, prompt_ids):
            return (2 if self.training else 1) * self.table.tree_logits(tree, prompt_ids)

    policy = Moody(space)
    with pytest.raises(ValueError, match=r"tree_logits .* training mode.*eval\(\)"):
        check(policy, space)
    check(policy.eval(), space)


def test_prompts_are_told_apart_by_every_member():
    space = rl_ebm.TokenSpace(3, 3)

    class Prompted:
        prompts = PROMPTS

        def __init__(self):
            self.net = randomised(transformer(space, PROMPTS))
            self.logits, self.start, self.step = self.net.logits, self.net.start, self.net.step

        def tree_logits(self, tree, prompt_ids):
            return self.net.tree_logits(tree, torch.zeros_like(prompt_ids))

    with pytest.raises(ValueError, match="tree_logits does not agree"):
        check(Prompted(), space)


def test_a_policy_needs_a_space_from_somewhere():
    class Bare:
        def logits(self, tokens, prompt_ids=None):
            return torch.zeros(*tokens.shape, 3)

    with pytest.raises(ValueError, match="has no space of its own: give space"):
        check(Bare())
    check(Bare(), rl_ebm.TokenSpace(3, 2))
    with pytest.raises(TypeError, match="must be a policy"):
        check(3)
