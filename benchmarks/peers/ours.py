"""The agents of this library, through our own loop: sample, score, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.peers.contender import TARGET, Contender
from benchmarks.peers.policies import count
from benchmarks.peers.watch import Watch
from rl_ebm import EBM, solve
from rl_ebm.agents import AGENTS
from rl_ebm.agents.shared.account import scored, values_apart
from rl_ebm.exact import lists
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies.mlp import MLPConfig
from rl_ebm.training.run_policy import make_policy, network_config

SHORT = {"soft-q": (30.0, 60.0), "policy-gradient": (60.0,), "vargrad": (20.0, 60.0)}
"""further runs whose learning rate falls to zero earlier"""
SMALL_BATCHES = (
    ("vargrad", 20.0),
    ("vargrad", None),
    ("policy-gradient", None),
    ("on-policy-distillation", None),
)
"""further runs with :data:`SMALL` responses a step: more steps, for rewards that generalise"""
SMALL = 256
BATCHES = {"policy-gradient": 4096}
"""responses of a step, of the others 2,048"""
Network = Literal["Transformer", "MLP"]
NETWORKS: dict[Network, TransformerConfig | MLPConfig] = {
    "Transformer": TransformerConfig(),
    "MLP": MLPConfig(),
}


def trainer(
    name: str, network: Network = "Transformer", **options: int
) -> Callable[[EBM, int, Watch], None]:
    """What trains the agent of a name, with options that are not its defaults."""

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        entry = AGENTS[name]
        config = entry.config(**options)
        said = network_config(NETWORKS[network], values_apart(config))
        policy = make_policy(said, ebm, seed, entry.agent.logits_are_values)
        generator = torch.Generator().manual_seed(seed)
        watch.start(count(policy))
        # Solving is part of the method, and asks for the reward of every response; not of an
        # automaton, which tells its rewards.
        teacher = solve(ebm) if entry.needs_teacher else None
        listed = teacher is not None and lists(teacher)
        reward_calls = ebm.num_prompts * ebm.space.num_sequences if listed else 0
        agent = entry.agent(ebm, policy, config, generator, teacher)
        updates = 0
        while True:
            batch = agent.sample()
            if batch is not None and not entry.needs_teacher:
                batch, asked = scored(agent, ebm, batch)
                reward_calls += asked
            agent.update(batch, watch.progress)
            updates += 1
            watch(policy, updates, reward_calls)

    return train


def contender(
    name: str,
    limit: float | None = None,
    batch: int | None = None,
    network: Network = "Transformer",
    grows: bool = False,
) -> Contender:
    """An agent with its default options, but for the size of its batch.

    Args:
        limit: seconds after which its learning rate is zero; None for those of the others.
        batch: responses of a step; None for the agent's default, or :data:`BATCHES` where that
            grows.
        network: of the policy, in its default size.
        grows: whether the batch grows by itself, as it does by default.
    """
    entry = AGENTS[name]
    usual = getattr(entry.config(), "batch_size", 0)
    size = batch or (BATCHES.get(name, 2048) if usual is None and not grows else usual)
    options = {"batch_size": size} if size else {}
    step = "all prefixes a step" if size == 0 else f"{size} responses a step"
    step = "a batch that grows by itself" if grows else step
    return Contender(
        name=f"rl-ebm {name}"
        + ("" if network == "Transformer" else f" ({network})")
        + ("" if batch is None else f", {batch} responses")
        + (", defaults" if grows else "")
        + ("" if limit is None else f", {limit:.0f} s"),
        package="rl-ebm",
        module="rl_ebm",
        extra=None,
        network=network,
        settings=f"{'the defaults: ' if grows or size == usual else ''}{step}, "
        f"learning rate {entry.config().lr:g}, by a cosine that ends at "
        f"{'the time limit' if limit is None else f'{limit:.0f} s'}",
        source=f"`rl_ebm.agents`, {entry.paper}",
        fixed_point=TARGET,
        train=trainer(name, network, **options),
        limit=limit,
    )


CONTENDERS = tuple(
    contender(name, limit)
    for name in (
        "soft-q",
        "policy-gradient",
        "trajectory-balance",
        "path-consistency",
        "vargrad",
        "exact",
    )
    for limit in (None, *SHORT.get(name, ()))
)
CONTENDERS += tuple(contender(name, limit, SMALL) for name, limit in SMALL_BATCHES)
CONTENDERS += tuple(
    contender(name, limit, batch, network)
    for name, batch in (("tree-backup", None), ("vargrad", 128))
    for network in NETWORKS
    for limit in (None, 20.0)
)
CONTENDERS += tuple(
    contender(name, limit, network=network, grows=True)
    for name in ("soft-q", "policy-gradient", "vargrad", "ppo")
    for network in NETWORKS
    for limit in (None, 20.0)
)
