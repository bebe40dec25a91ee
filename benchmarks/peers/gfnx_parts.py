"""What gfnx needs to know of an EBM, the networks of its baselines, and their losses.

gfnx ships environments, rollouts and network blocks; its baselines are scripts, not a package. So
the networks and losses here are written after them. Imported only where gfnx is installed.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import gfnx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from gfnx.environment.sequence import FixedAutoregressiveSequenceEnvironment

from benchmarks.peers.machines import Table, log_weights, tables
from rl_ebm import EBM
from rl_ebm.tokens import TokenSpace
from rl_ebm.training.loop import looks_at_all


class LogWeights(gfnx.base.BaseRewardModule):
    """Log-weights of all responses, read by index, as its reward of TFBind8 does."""

    def __init__(self, log_weights: np.ndarray, vocab_size: int) -> None:
        self.log_weights, self.vocab_size = log_weights, vocab_size

    def init(self, rng_key: Any, dummy_state: Any) -> Any:
        return {"log_weights": jnp.asarray(self.log_weights, jnp.float32)}

    def log_reward(self, state: Any, env_params: Any) -> Any:
        length = state.tokens.shape[-1]
        powers = self.vocab_size ** jnp.arange(length - 1, -1, -1)
        index = (state.tokens * powers).sum(-1)
        return jnp.take(env_params.reward_params["log_weights"], index, mode="clip")

    def reward(self, state: Any, env_params: Any) -> Any:
        return jnp.exp(self.log_reward(state, env_params))


class AutomatonWeights(gfnx.base.BaseRewardModule):
    """Log-weights that automata add up along a response: where nobody can list them."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def init(self, rng_key: Any, dummy_state: Any) -> Any:
        return {}

    def log_reward(self, state: Any, env_params: Any) -> Any:
        # Of a prefix, whose pad is no token, nothing is read.
        tokens = jnp.minimum(state.tokens, self.tables[0].log_weight.shape[1] - 1)
        return log_weights(tokens, self.tables, jnp).astype(jnp.float32)

    def reward(self, state: Any, env_params: Any) -> Any:
        return jnp.exp(self.log_reward(state, env_params))


class Sequences(FixedAutoregressiveSequenceEnvironment):
    """Its environment of responses of fixed length; ids A, A + 1, A + 2 are pad, start and end."""

    def __init__(self, rewards: LogWeights | AutomatonWeights, space: TokenSpace) -> None:
        a = space.vocab_size
        super().__init__(
            rewards, space.max_length, a, a + 3, pad_token=a, bos_token=a + 1, eos_token=a + 2
        )

    @property
    def name(self) -> str:
        return "responses"


def environment(ebm: EBM) -> Sequences:
    """Its environment on an EBM: with all log-weights where they are listed, else by automata."""
    if not looks_at_all(ebm):
        return Sequences(AutomatonWeights(tables(ebm)), ebm.space)
    listed = ebm.log_weight(ebm.space.sequences()[0]).numpy()
    return Sequences(LogWeights(listed, ebm.space.vocab_size), ebm.space)


class Mlp(eqx.Module):
    """The network of its TFBind8 baselines: two hidden layers of 256, logits and a log-flow."""

    encoder: eqx.nn.MLP
    pooler: eqx.nn.Linear
    vocab_size: int

    def __init__(self, space: TokenSpace, key: Any) -> None:
        first, second = jax.random.split(key)
        a, width = space.vocab_size, 256
        self.vocab_size = a
        self.encoder = eqx.nn.MLP((a + 1) * space.max_length, width, width, depth=2, key=first)
        self.pooler = eqx.nn.Linear(width, a + 1, key=second)

    def __call__(self, obs: Any) -> tuple[Any, Any]:
        hot = jax.nn.one_hot(obs[1:], self.vocab_size + 1).reshape(-1)
        out = self.pooler(self.encoder(hot))
        return out[:-1], out[-1]


class Attention(eqx.Module):
    """The network of its AMP baselines: its encoder, the mean over positions, then logits."""

    encoder: gfnx.networks.Encoder
    pooler: eqx.nn.Linear

    def __init__(self, space: TokenSpace, size: Any, key: Any) -> None:
        first, second = jax.random.split(key)
        a = space.vocab_size
        self.encoder = gfnx.networks.Encoder(
            vocab_size=a + 3,
            max_length=space.max_length + 1,
            embedding_size=size.dim,
            hidden_size=size.dim,
            intermediate_size=size.hidden,
            num_layers=size.layers,
            num_heads=size.heads,
            dropout_rate=0.0,
            pad_id=a,
            key=first,
        )
        self.pooler = eqx.nn.Linear(size.dim, a + 1, key=second)

    def __call__(self, obs: Any) -> tuple[Any, Any]:
        places = jnp.arange(obs.shape[0])
        out = self.pooler(self.encoder(obs, places)["layers_out"][-1].mean(0))
        return out[:-1], out[-1]


def observations(prefixes: torch.Tensor, vocab_size: int) -> np.ndarray:
    """What the environment shows of prefixes padded with -1."""
    ids = prefixes.masked_fill(prefixes < 0, vocab_size)
    start = torch.full_like(ids[:, :1], vocab_size + 1)
    return torch.cat([start, ids], dim=1).numpy().astype(np.int32)


def along(model: Any, batch: Any) -> tuple[Any, Any, Any]:
    """log P_F (B, T) of the actions, log-flows (B, T) before them, log-rewards (B,).

    The backward policy has one action everywhere, of log-probability 0; every action is allowed.
    """
    logits, flow = jax.vmap(jax.vmap(model))(batch.obs[:, :-1])
    log_pi = jax.nn.log_softmax(logits, axis=-1)
    taken = jnp.take_along_axis(log_pi, batch.action[:, :-1, None], axis=-1)[..., 0]
    return taken, flow, batch.log_gfn_reward[:, :-1].sum(1)


def trajectory_balance(model: Any, log_z: Any, batch: Any) -> Any:
    log_pf, _, log_reward = along(model, batch)
    return jnp.square(log_z + log_pf.sum(1) - log_reward).mean()


def detailed_balance(model: Any, log_z: Any, batch: Any) -> Any:
    log_pf, flow, log_reward = along(model, batch)
    after = jnp.concatenate([flow[:, 1:], log_reward[:, None]], axis=1)
    return 0.5 * jnp.square(flow + log_pf - after).mean()


def sub_trajectory_balance(model: Any, log_z: Any, batch: Any) -> Any:
    """All sub-trajectories alike: lambda is 1."""
    log_pf, flow, log_reward = along(model, batch)
    done = jnp.pad(log_pf.cumsum(1), ((0, 0), (1, 0)))
    # F(s_i) P_F(i..j) = F(s_j): the same as equal "F(s_t) / P_F(..t)" at both ends.
    level = jnp.concatenate([flow, log_reward[:, None]], axis=1) - done
    i, j = jnp.triu_indices(level.shape[1], k=1)
    return jnp.square(level[:, i] - level[:, j]).mean()


LOSSES = {"TB": trajectory_balance, "DB": detailed_balance, "SubTB": sub_trajectory_balance}
