"""The agents of this library, through the loop of :mod:`rl_ebm.training`: sample, score, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.peers.contender import TARGET, Contender
from benchmarks.peers.policies import count
from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.agents import AGENTS
from rl_ebm.backbone import TransformerConfig
from rl_ebm.runs import make_policy

NETWORK = {"kind": "transformer"} | asdict(TransformerConfig())
SHORT = {"soft-q": (30.0, 60.0), "policy-gradient": (60.0,), "vargrad": (60.0,)}
"""further runs whose learning rate falls to zero earlier"""


def trainer(name: str) -> Callable[[EBM, int, Watch], None]:
    """What trains the agent of a name, with its default options."""

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        entry = AGENTS[name]
        policy = make_policy(NETWORK, ebm, seed, entry.agent.logits_are_values)
        generator = torch.Generator().manual_seed(seed)
        agent = entry.agent(ebm, policy, entry.config(), generator, None)
        updates = reward_calls = 0
        watch.start(count(policy))
        while True:
            batch = ebm.score(agent.sample())
            agent.update(batch, watch.progress)
            updates, reward_calls = updates + 1, reward_calls + len(batch)
            watch(policy, updates, reward_calls)

    return train


def contender(name: str, limit: float | None = None) -> Contender:
    """An agent with its default options.

    Args:
        limit: seconds after which its learning rate is zero; None for those of the others.
    """
    size = AGENTS[name].config().batch_size
    return Contender(
        name=f"rl-ebm {name}" + ("" if limit is None else f", {limit:.0f} s"),
        package="rl-ebm",
        module="rl_ebm",
        extra=None,
        network="Transformer",
        settings=f"the agent's defaults: {size} responses a step, learning rate by a cosine that "
        f"ends at {'the time limit' if limit is None else f'{limit:.0f} s'}",
        source=f"`rl_ebm.agents`, {AGENTS[name].paper}",
        fixed_point=TARGET,
        train=trainer(name),
        limit=limit,
    )


CONTENDERS = tuple(
    contender(name, limit)
    for name in ("soft-q", "policy-gradient", "trajectory-balance", "path-consistency", "vargrad")
    for limit in (None, *SHORT.get(name, ()))
)
