"""GFlowNets of gfnx, compiled by JAX: trajectory, sub-trajectory and detailed balance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.peers.contender import TARGET, Contender
from benchmarks.peers.policies import CHUNK, PrefixPolicy
from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.agents.shared.learner import learning_rate
from rl_ebm.networks.backbone import TransformerConfig

STEPS = 50
"""updates in one compiled call"""


@dataclass(frozen=True)
class Settings:
    """Of a baseline."""

    loss: Literal["TB", "DB", "SubTB"]
    network: Literal["its MLP", "its Transformer"]
    source: str
    lr: float
    lr_log_z: float = 0.0
    weight_decay: float = 0.0
    explore: tuple[float, float] = (0.0, 0.0)
    """chance of a uniform action at the first step, and from ``explore_steps`` on"""
    explore_steps: int = 50_000
    batch: int = 16
    tuned: bool = False
    """a rate that falls by our schedule within the time, in the place of the recommended one"""

    @property
    def text(self) -> str:
        first, last = self.explore
        falls = f"{first:g} falling to {last:g} in {self.explore_steps:,} steps"
        explore = f"{first:g}" if first == last else falls
        return (
            f"{self.batch} responses a step, Adam {self.lr:g}"
            + (f", {self.lr_log_z:g} for log Z" if self.lr_log_z else "")
            + (f", weight decay {self.weight_decay:g}" if self.weight_decay else "")
            + (", by a cosine that ends with its time" if self.tuned else "")
            + f", chance of a uniform action {explore}; {STEPS} updates in each compiled call, in "
            "a loop of ours around its environment and its `forward_rollout`"
        )


def make_optimizer(settings: Settings) -> Any:
    """AdamW of the network, and Adam of log Z."""
    import optax

    network = optax.adamw(settings.lr, weight_decay=settings.weight_decay)
    return optax.multi_transform(
        {"weights": network, "log_z": optax.adam(settings.lr_log_z)},
        {"weights": "weights", "log_z": "log_z"},
    )


def make_steps(
    settings: Settings, env: Any, env_params: Any, static: Any, optimizer: Any
) -> Callable[[Any, Any], Any]:
    """STEPS updates of (weights and log Z, the optimizer's state, key), compiled.

    Args:
        static: the network without its weights.
    """
    import equinox as eqx
    import gfnx
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.peers.gfnx_parts import LOSSES

    exploring = optax.linear_schedule(*settings.explore, settings.explore_steps)

    def step(rate: Any, carry: Any, i: Any) -> tuple[Any, None]:
        learned, state, key = carry
        key, rollout_key = jax.random.split(key)
        chance = exploring(i)

        def draw(draw_key: Any, obs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
            logits, _ = jax.vmap(eqx.combine(weights, static))(obs)
            uniform = jax.random.bernoulli(draw_key, chance, (settings.batch, 1))
            return jnp.where(uniform, 0.0, logits), {}

        batch, _ = gfnx.utils.forward_rollout(
            rollout_key, settings.batch, draw, learned["weights"], env, env_params
        )

        def loss(learned: Any) -> Any:
            model = eqx.combine(learned["weights"], static)
            return LOSSES[settings.loss](model, learned["log_z"], batch)

        updates, state = optimizer.update(jax.grad(loss)(learned), state, learned)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return (optax.apply_updates(learned, updates), state, key), None

    @jax.jit
    def steps(carry: Any, first: Any, rate: Any) -> Any:
        return jax.lax.scan(partial(step, rate), carry, first + jnp.arange(STEPS))[0]

    return steps


def make_rows(static: Any, vocab_size: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Logits of prefixes padded with -1, of the weights of a network."""
    import equinox as eqx
    import jax
    import numpy as np

    from benchmarks.peers.gfnx_parts import observations

    @jax.jit
    def evaluate(weights: Any, obs: Any) -> Any:
        return jax.vmap(eqx.combine(weights, static))(obs)[0]

    def rows(weights: Any, prefixes: torch.Tensor) -> torch.Tensor:
        obs = observations(prefixes, vocab_size)
        # Three shapes in all, so that few are compiled.
        room = next(size for size in (256, 1024, CHUNK) if len(obs) <= size) - len(obs)
        padded = np.pad(obs, ((0, room), (0, 0)), mode="edge")
        return torch.from_numpy(np.array(evaluate(weights, padded)[: len(obs)]))

    return rows


def trainer(settings: Settings) -> Callable[[EBM, int, Watch], None]:
    """What trains a GFlowNet by one of its baselines' settings."""

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        import equinox as eqx
        import jax
        import jax.numpy as jnp

        from benchmarks.peers import gfnx_parts as parts

        space = ebm.space
        env = parts.environment(ebm)
        key, model_key, env_key = jax.random.split(jax.random.PRNGKey(seed), 3)
        env_params = env.init(env_key)
        if settings.network == "its MLP":
            model = parts.Mlp(space, model_key)
        else:
            model = parts.Attention(space, TransformerConfig(), model_key)
        weights, static = eqx.partition(model, eqx.is_inexact_array)
        # A typed zero: of a bare one, the first calls would each be compiled anew.
        learned = {"weights": weights, "log_z": jnp.zeros((), jnp.float32)}
        optimizer = make_optimizer(settings)
        steps = make_steps(settings, env, env_params, static, optimizer)
        rows = make_rows(static, space.vocab_size)
        carry = (learned, optimizer.init(learned), key)
        policy = PrefixPolicy(space, lambda prefixes: rows(carry[0]["weights"], prefixes))
        updates = 0
        watch.start(sum(leaf.size for leaf in jax.tree.leaves(weights)))
        while True:
            rate = learning_rate(1.0, watch.progress) if settings.tuned else 1.0
            carry = jax.block_until_ready(steps(carry, updates, rate))
            updates += STEPS
            watch(policy, updates, updates * settings.batch)

    return train


def contender(settings: Settings, limit: float | None = None) -> Contender:
    """A baseline.

    Args:
        limit: seconds after which a tuned rate is zero; None for those of the others.
    """
    return Contender(
        name=f"gfnx {settings.loss} ({settings.network})"
        + (", tuned" if settings.tuned else "")
        + ("" if limit is None else f", {limit:.0f} s"),
        package="gfnx",
        module="gfnx",
        extra="peers-gfnx",
        network=settings.network,
        settings=settings.text,
        source=f"its repository's `baselines/configs/{settings.source}`"
        + (", with a rate and schedule of ours" if settings.tuned else ""),
        fixed_point=TARGET,
        train=trainer(settings),
        limit=limit,
        spreads=True,
        one_length=True,
    )


CONTENDERS = tuple(
    contender(settings)
    for settings in (
        Settings("TB", "its MLP", "tb_tfbind.yaml", 5e-4, 0.05, explore=(1.0, 0.0)),
        Settings("SubTB", "its MLP", "subtb_tfbind.yaml", 1e-3, explore=(1.0, 0.0)),
        Settings("DB", "its MLP", "db_tfbind.yaml", 5e-4),
        Settings(
            "TB",
            "its Transformer",
            "tb_amp.yaml",
            1e-3,
            0.64,
            weight_decay=1e-4,
            explore=(0.01, 0.01),
        ),
    )
)
CONTENDERS += tuple(
    contender(Settings(loss, "its MLP", "tb_tfbind.yaml", 1e-3, rate, tuned=True), limit)
    for loss, rate in (("TB", 0.05), ("SubTB", 0.0))
    for limit in (None, 20.0)
)
"""rate, schedule and exploration as ours have them: our schedule, no exploration"""
