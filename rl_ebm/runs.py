"""Run directories: what a run was trained on, and how to rebuild it without running code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_ebm.automata import from_tensors, to_tensors
from rl_ebm.backbone import TransformerConfig
from rl_ebm.checkpoint import RunError, load_tensors, save_tensors, write_text
from rl_ebm.ebm import EBM
from rl_ebm.envs.tasks import make_task
from rl_ebm.policies import (
    AutomatonPolicy,
    Policy,
    Tabular,
    Trainable,
    Transformer,
    Uniform,
)
from rl_ebm.policies.scoring import device_of
from rl_ebm.rewards import Automaton, Reward, Table
from rl_ebm.tokens import TokenSpace

CONFIG = "config.json"
POLICY = "policy.safetensors"
STATE = "state.pt"
SCORES = "task.safetensors"
REPORT = "report.json"
CERTIFICATE = "certificate.json"
METRICS = "metrics.csv"
FILES = (CONFIG, POLICY, STATE, SCORES, REPORT, CERTIFICATE, METRICS)
OWN = {"kind": "custom"}
"""what stands in a configuration for a policy that was passed in"""


def forget_reports(run: Path) -> None:
    """Delete what verification said of a policy that goes on learning."""
    for name in (REPORT, CERTIFICATE):
        (run / name).unlink(missing_ok=True)


def describe_ebm(ebm: EBM, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """What rebuilds an EBM, as JSON; its table or automata, where it has them, go beside it.

    Args:
        ebm: the EBM.
        source: ``task`` and ``task_seed`` of the named task that it is; or ``alphabet`` and
            ``separator`` of its table file, for printing.
    """
    source = source or {}
    kinds = {Table: "table", Automaton: "automaton"}
    reward: Any = kinds.get(type(ebm.reward_model), "function")
    if "task" in source:
        reward = {"task": source["task"], "task_seed": source["task_seed"]}
    reference = None if ebm.reference is None else "custom"
    if isinstance(ebm.reference, Uniform):
        reference = "uniform"
    elif isinstance(ebm.reference, AutomatonPolicy):
        reference = "automaton"
    return {
        "space": asdict(ebm.space),
        "beta": ebm.beta,
        "prompts": ebm.prompts,
        "reward": reward,
        "reference": reference,
        "alphabet": source.get("alphabet"),
        "separator": source.get("separator", " "),
    }


def decode(config: dict[str, Any], tokens: Sequence[int]) -> str:
    """Tokens as the run's table file writes them; ids where there is none."""
    alphabet = config.get("alphabet")
    if alphabet is None:
        symbols = [str(token) for token in tokens]
    else:
        # The EOS of a table has no symbol.
        symbols = [alphabet[token] for token in tokens if alphabet[token]]
    return str(config.get("separator", " ")).join(symbols)


def rebuild_ebm(
    config: dict[str, Any],
    run: Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
) -> EBM:
    """The EBM that :func:`describe_ebm` described.

    Raises:
        RunError: it needs a reward or a reference that only Python can give.
    """
    space = TokenSpace(**config["space"])
    if config["reference"] == "custom" and reference is None:
        raise RunError(
            f"{run} was trained with a reference policy of your own: "
            "pass it again, load(run, reference=...)"
        )
    kind, prompts = config["reward"], config["prompts"]
    if config["reference"] == "uniform":
        reference = Uniform(space)
    elif config["reference"] == "automaton":
        machine = from_tensors(load_tensors(run / SCORES), "reference")
        reference = AutomatonPolicy(space, machine, prompts if machine.num_prompts > 1 else None)
    if isinstance(kind, dict):
        return make_task(
            kind["task"],
            vocab_size=space.vocab_size,
            max_length=space.max_length,
            eos_id=space.eos_id,
            beta=config["beta"],
            reference=reference,
            task_seed=kind["task_seed"],
        )
    if kind == "table":
        tensors = load_tensors(run / SCORES)
        if "scores" not in tensors or tensors["scores"].ndim != 2:
            raise RunError(f"{run / SCORES} holds no scores: it is damaged")
        scores = tensors["scores"]
        reward = scores if prompts is not None else scores[0]
    elif kind == "automaton":
        reward = Automaton(space, from_tensors(load_tensors(run / SCORES), "reward"))
    elif reward is None:
        raise RunError(
            f"{run} was trained on a Python reward: pass it again, load(run, reward=...)"
        )
    return EBM(space, reward, config["beta"], reference, prompts)


def make_policy(config: dict[str, Any], ebm: EBM, seed: int, values: bool) -> Tabular | Transformer:
    """An untrained policy: ``config`` has the kind, and a Transformer's sizes.

    Args:
        seed: of the initial weights.
        values: whether its raw logits are to be q.
    """
    sizes = dict(config)
    kind = sizes.pop("kind")
    if kind not in ("transformer", "tabular"):
        raise ValueError(f"policy must be 'transformer' or 'tabular', got {kind!r}")
    # Explicit seeding that leaves the caller's global generator alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "tabular":
            return Tabular(ebm.space, ebm.prompts, logits_are_values=values).to(ebm.device)
        network = TransformerConfig(**sizes)
        return Transformer(ebm.space, network, ebm.prompts, values).to(ebm.device)


def own_policy(policy: torch.nn.Module, ebm: EBM, values: bool) -> Trainable:
    """A policy that was passed in, checked and told whether its logits are to be q.

    Raises:
        ValueError: no module with logits, or one on another device than the EBM's.
    """
    if not isinstance(policy, Trainable):
        raise ValueError(
            "policy must be a torch.nn.Module with logits(tokens, prompt_ids=None), got "
            f"{type(policy).__name__}"
        )
    if device_of(policy).type != ebm.device.type:
        raise ValueError(
            f"the policy is on {device_of(policy)} and the EBM on {ebm.device}: move one of them"
        )
    own: Any = policy
    own.logits_are_values = values
    return policy


def check_asked(config: dict[str, Any], policy: object, run: Path, call: str) -> None:
    """Check that a policy is passed again exactly where the run trained one that was passed in.

    Args:
        call: the function that takes it, for the message.

    Raises:
        RunError: it is missing, or not wanted.
    """
    own = config["policy"] == OWN
    if own and policy is None:
        raise RunError(
            f"{run} trained a policy of your own: pass one made alike, {call}(run, policy=...)"
        )
    if not own and policy is not None:
        raise RunError(f"{run} makes its policy from its {CONFIG}: leave policy out")


def write_config(run: Path, config: dict[str, Any], ebm: EBM) -> None:
    """Make a run directory: tables first, so that a directory with a config is a run."""
    run.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    if config["ebm"]["reward"] == "table" and isinstance(ebm.reward_model, Table):
        tensors["scores"] = ebm.reward_model.scores
    if isinstance(ebm.reward_model, Automaton):
        tensors |= to_tensors(ebm.reward_model.machine, "reward")
    if isinstance(ebm.reference, AutomatonPolicy):
        tensors |= to_tensors(ebm.reference.machine, "reference")
    if tensors:
        save_tensors(run / SCORES, tensors)
    write_text(run / CONFIG, json.dumps({"version": version("rl-ebm")} | config, indent=1) + "\n")


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        RunError: no run there, or a damaged one.
    """
    try:
        config: Any = json.loads((run / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run} holds no run: there is no {CONFIG} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{run / CONFIG} is damaged ({error})") from None
    parts = ("ebm", "policy", "agent", "train")
    if not isinstance(config, dict) or any(part not in config for part in parts):
        raise RunError(f"{run / CONFIG} is not the configuration of an rl-ebm run")
    return config


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Errors of a shape that no written configuration causes, as a sentence about the file."""
    try:
        yield
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{path} is damaged ({error!r})") from None


def load(
    run: str | Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    policy: torch.nn.Module | None = None,
) -> tuple[Any, EBM]:
    """The policy and the EBM that a run directory holds, rebuilt; runs no code from it.

    Args:
        run: the directory.
        reward: the reward, where the run was trained on a Python function.
        reference: the reference, where it was a policy of yours.
        device: where to put both.
        policy: one made like the policy that was passed to train, where one was; it gets the
            run's weights, on its own device.

    Raises:
        RunError: no run, a damaged one, or something that has to be given.
    """
    run = Path(run)
    config = read_config(run)
    with damage_told(run / CONFIG):
        ebm = rebuild_ebm(config["ebm"], run, reward, reference).to(device)
        values = bool(config["agent"]["logits_are_values"])
        check_asked(config, policy, run, "load")
        loaded: Trainable = (
            make_policy(config["policy"], ebm, seed=0, values=values)
            if policy is None
            else own_policy(policy, ebm, values)
        )
    load_weights(loaded, load_tensors(run / POLICY), run / POLICY)
    return loaded, ebm


def load_weights(policy: Trainable, weights: dict[str, Tensor], source: Path) -> None:
    """Put weights into a policy.

    Raises:
        RunError: they are those of another policy.
    """
    try:
        policy.load_state_dict(weights)
    except RuntimeError:
        raise RunError(f"{source} holds the weights of another policy than {CONFIG} says") from None
