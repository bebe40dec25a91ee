"""On a card that is not there: the CPU's numbers, no mixed devices, and no step that waits.

``pytest tests/networks/checks_on_card.py``: its process has the card, which others would find, so
that ``test_card.py`` runs it in one of its own.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import torch
from card import AVAILABLE, NAME, Card, DeviceError, Generator, register
from toy_policies import seeded
from verify_cases import assert_same

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.envs import make_task
from rl_ebm.policies import (
    Tabular,
    Transformer,
    TransformerConfig,
    Uniform,
    fit_hmm,
    fit_ngram,
)
from rl_ebm.rewards import parse_reward

pytestmark = pytest.mark.skipif(
    not AVAILABLE, reason="this PyTorch knows no devices that are written in Python"
)
SMALL = TransformerConfig(layers=1, heads=2, dim=16, hidden=16)
FIXED, ENDS = rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(3, 4, eos_id=0)
LARGE = rl_ebm.TokenSpace(5, 30, eos_id=0)
PAID = "2*contains:1 2 + -1*counts:2"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register()
    monkeypatch.setattr(torch, "Generator", Generator)


def tabular(space):
    return Tabular(space, scale=0.7, generator=seeded(1), dtype=torch.float64)


def texts(space):
    """Responses to fit to."""
    return rl_ebm.policies.sample(Uniform(space), space, 50, seeded(6))


def paid(space, reference=None, beta=0.7):
    return rl_ebm.EBM(space, parse_reward(PAID, space), beta, reference)


def table(space, reference=None, prompts=None, forbids=True):
    count = len(prompts or [[]])
    scores = torch.randn(count, space.num_sequences, generator=seeded(2), dtype=torch.float64)
    if forbids:
        scores[:, 3] = -torch.inf
    return rl_ebm.EBM(space, scores, 0.8, reference, prompts)


# By kind: the space, and what makes one for it.
REFERENCES = {
    "none": (FIXED, lambda space: None),
    "uniform": (ENDS, Uniform),
    "tabular": (ENDS, tabular),
    "n-gram": (ENDS, lambda space: fit_ngram(space, texts(space), order=2)),
    "HMM": (ENDS, lambda space: fit_hmm(space, texts(space), 2, 5, generator=seeded(3))[0]),
    "network": (FIXED, lambda space: Transformer(space, SMALL)),
}
EBMS = {
    **{
        f"{kind}, {name}": lambda make=make, of=of, space=space: make(space, of(space))
        for kind, make in (("table", table), ("automaton", paid))
        for name, (space, of) in REFERENCES.items()
    },
    "table, prompts": lambda: table(FIXED, Uniform(FIXED), [[1], [2, 0]]),
    "all allowed": lambda: table(ENDS, Uniform(ENDS), forbids=False),
    **{
        f"automaton, large, {name}": lambda name=name: paid(LARGE, REFERENCES[name][1](LARGE))
        for name in ("uniform", "n-gram", "HMM")
    },
    **{
        f"task {name}": lambda name=name: make_task(name)
        for name in rl_ebm.envs.TASKS
        if name not in ("potts", "phrases")  # large automata, as those above
    },
}  # fmt: skip


@cache
def ebm_of(name):
    torch.manual_seed(0)
    return EBMS[name]()


def network(ebm, seed=5, **options):
    torch.manual_seed(seed)
    return Transformer(ebm.space, SMALL, ebm.prompts, **options)


def figures(ebm, device):
    """What solving, sampling, verifying and certifying say."""
    ebm, policy = ebm.to(device), network(ebm).to(device)
    solution = rl_ebm.solve(ebm)
    ids = torch.arange(ebm.num_prompts, device=device).repeat_interleave(16)
    batch = solution.sample(len(ids), Generator(device).manual_seed(1), ids)
    drawn = rl_ebm.policies.sample(
        policy, ebm.space, len(ids), Generator(device).manual_seed(2), ids
    )
    report = rl_ebm.verify(policy, solution, samples=30, generator=Generator(device).manual_seed(3))
    certified = rl_ebm.certify(policy, ebm, 16, 0.9, batch, 100.0, Generator(device).manual_seed(4))
    found = {
        "log_z": solution.log_z, "tokens": batch.tokens, "lengths": batch.lengths,
        "log_prob": solution.log_prob(batch.tokens, batch.lengths, batch.prompt_ids),
        "logits": solution.logits(batch.tokens, batch.prompt_ids),
        "score": ebm.log_weight(drawn.tokens, drawn.lengths, drawn.prompt_ids),
    }  # fmt: skip
    assert {x.device.type for x in found.values()} == {torch.device(device).type}
    numbers = {name: x.cpu().tolist() for name, x in found.items()}
    return numbers | report.to_dict() | {"certified": certified.to_dict()}


def cases(names, fast):
    """Of which all but a few are slow."""
    return [pytest.param(x, marks=() if x in fast else pytest.mark.slow) for x in names]


@pytest.mark.parametrize("name", cases(EBMS, ("all allowed", "automaton, HMM")))
def test_what_is_solved_and_verified_there_is_what_is_here(name):
    ebm = ebm_of(name)
    want = figures(ebm, "cpu")
    with Card():
        assert_same(figures(ebm, NAME), want, 1e-5)  # the network is in float32


def steps(agent, ebm, device, count=3):
    """The losses of an agent's first steps, one after the other."""
    entry = AGENTS[agent]
    known = {field.name for field in fields(entry.config)}
    config = entry.config(**{"batch_size": 64} if "batch_size" in known else {})
    ebm, policy = ebm.to(device), network(ebm).to(device)
    made = entry.agent(ebm, policy, config, Generator(device).manual_seed(0), rl_ebm.solve(ebm))
    for _ in range(count):
        batch = made.sample()
        yield made.update(None if batch is None else ebm.score(batch), 0.5)["losses/loss"]


STEPPED = (
    "all allowed",
    "automaton, HMM",
    "automaton, n-gram",
    "automaton, network",
    "task prompts",
)
WAITING = ("tree-backup",)
"""what keeps a tree by what was drawn: how much that is must be known"""


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("name", cases(STEPPED, ("all allowed",)))
def test_a_step_of_an_agent_waits_for_nothing_there_and_learns_the_same(name, agent):
    ebm = ebm_of(name)
    want = [float(loss) for loss in steps(agent, ebm, "cpu")]
    with Card() as card:
        begun = steps(agent, ebm, NAME)
        got = [next(begun)]  # constants are cached in the first
        before = len(card.waits)
        got += list(begun)
        waited = card.waits[before:]
        assert [float(x) for x in got] == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert bool(waited) == (agent in WAITING), waited


MOST = {
    "soft-q": 600, "path-consistency": 620, "subtb": 620, "detailed-balance": 620,
    "trajectory-balance": 560, "vargrad": 570, "tree-backup": 1250, "monte-carlo": 500,
    "policy-gradient": 530, "ppo": 1650, "grpo": 1790, "dpg": 550, "best-of-n": 515,
    "sampled-teacher": 455, "on-policy-distillation": 590, "dpo": 475, "ipo": 455,
    "teacher-forcing": 430, "exact": 430,
}  # fmt: skip
"""operations of a step, A = 4, T = 3, one layer, about 6 % above what there are; of an agent that
is not here at most 2,000. Each is a launch on a GPU: so many kept one busy for 5 % of the time"""


@pytest.mark.parametrize("agent", AGENTS)
def test_a_step_has_no_more_operations_than_it_had(agent):
    ebm = make_task("random", vocab_size=4, max_length=3)
    with Card() as card:
        begun = steps(agent, ebm, NAME)
        next(begun)
        before = card.operations
        next(begun)
        assert card.operations - before <= MOST.get(agent, 2000)


def test_the_card_sees_what_mixes_devices_and_what_waits():
    x = torch.randn(4, generator=seeded(0))
    with Card() as card:
        there = x.to(NAME)
        assert there.device.type == NAME
        for mixed in (lambda: there + x, lambda: there[torch.tensor([0, 1])], lambda: there @ x):
            with pytest.raises(DeviceError, match="on the card and cpu"):
                mixed()
        free = [
            lambda: there + torch.tensor(2.0), lambda: there[there.argsort()], lambda: 3 * there,
            lambda: torch.zeros(3, device=NAME), lambda: there.masked_fill(there > 0, 1.0),
            lambda: there[1:].sum(), lambda: torch.where(there > 0, there, 0.0),
        ]  # fmt: skip
        for work in free:
            with card.no_waits():
                assert work().device.type == NAME
        waiting = [
            lambda: float(there.sum()), lambda: bool(there.any()), lambda: there.tolist(),
            lambda: there.nonzero(), lambda: there[there > 0], lambda: there.cpu(),
            lambda: x.to(NAME), lambda: torch.tensor([1.0], device=NAME), lambda: there.unique(),
            lambda: torch.equal(there, there), lambda: there.masked_select(there > 0),
        ]  # fmt: skip
        for work in waiting:
            before = len(card.waits)
            work()
            assert len(card.waits) > before, work
