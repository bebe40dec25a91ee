"""Solve an EBM exactly: by its automata where it has them, on its prefix tree else."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rl_ebm.automata import Machine
from rl_ebm.automata.weights import check_values
from rl_ebm.ebm import EBM, end_reference
from rl_ebm.exact.automaton import AutomatonSolution
from rl_ebm.exact.automaton.memory import need
from rl_ebm.exact.base import Solution
from rl_ebm.exact.tree.values import bytes_of_value, fill_tree
from rl_ebm.messages.arguments import is_number, shown
from rl_ebm.messages.memory import free_bytes
from rl_ebm.messages.words import bytes_text, count_text
from rl_ebm.policies import base as policies
from rl_ebm.policies.walk import DEFAULT_MEMORY, prompts_at_once, walk_prompts
from rl_ebm.rewards import base as rewards
from rl_ebm.soft_bellman import log_policy

AnySolution = TypeVar("AnySolution", bound=Solution)

_REWARD_BATCH = 2**15
_BLOCK = 2**18


class TooLargeError(ValueError, MemoryError):
    """An EBM whose exact solution does not fit into memory."""


@torch.no_grad()
def solve(ebm: EBM, memory: int | None = None, progress: bool | None = None) -> Solution:
    """The exact soft Bellman fixed point q*, log Z, samples and log-probabilities of an EBM.

    Where reward and reference are both automata, backward vectors are all that is needed, whatever
    the number of sequences (mode "exact-automaton"). Else all prefixes are listed ("exact-tree").
    A table is read once, in chunks; a reward that is a function or a network is evaluated on
    all sequences first, in batches. Results have the precision of the scores: float64 in,
    1e-10 * max(1, |x|) out; float32 in, 1e-6.

    Args:
        ebm: reward, reference, beta and prompts.
        memory: bytes that may be used; None for what the device has free.
        progress: show a bar while a reward function or a reference network is evaluated; None:
            where standard error is a terminal.

    Raises:
        TypeError: no EBM.
        TooLargeError: it does not fit; with the number of sequences and the bytes.
        ValueError: every response of some prompt is impossible, or a reward is NaN or +inf.
    """
    if not isinstance(ebm, EBM):
        raise TypeError(
            f"solve needs an rl_ebm.EBM, got {type(ebm).__name__}: rl_ebm.EBM(space, reward) "
            "makes one"
        )
    if memory is not None and not (is_number(memory) and memory >= 0):
        raise ValueError(f"memory must be a number of bytes >= 0, or None, got {shown(memory)}")
    memory = None if memory is None else int(min(memory, 2**63))
    machines = find_machines(ebm)
    if machines is not None:
        found = _by_automaton(ebm, *machines, memory)
        if not bool((found.log_z < torch.inf).all()):
            raise ValueError(
                "R / beta is too large for float64, there is no finite log Z: scale the rewards "
                "down, or beta up"
            )
        return _possible(found)
    check_memory(ebm, memory)
    scores = rewards.scores_of(ebm.reward_model)
    if scores is None:
        scores = _all_rewards(ebm, progress)
    log_ref = _all_log_ref(ebm, progress)
    return _possible(fill_tree(ebm, scores, log_ref, _BLOCK))


def _possible(solution: AnySolution) -> AnySolution:
    """The solution, where every prompt has a response that is possible."""
    if bool(torch.isneginf(solution.log_z).any()):
        raise ValueError(
            "every response of a prompt is impossible (log-weight -inf), so there is no "
            "distribution: check the rewards and what the reference forbids"
        )
    return solution


def find_machines(ebm: EBM) -> tuple[Machine | None, Machine] | None:
    """The automata of reference and R / beta; None where one of them has none.

    A reward with a hidden part has one at beta = 1 alone.
    """
    reward, reference = rewards.machine_of(ebm.reward_model), policies.machine_of(ebm.reference)
    if reward is None or (ebm.reference is not None and reference is None):
        return None
    if ebm.beta == 1.0:
        return reference, reward
    return None if reward.num_hidden > 1 else (reference, reward.scaled(1.0 / ebm.beta))


def _by_automaton(
    ebm: EBM, reference: Machine | None, reward: Machine, memory: int | None
) -> AutomatonSolution:
    found = need(reference, reward, ebm.space.max_length)
    free = _free_bytes(ebm.device) if memory is None else memory
    if found.bytes > free:
        raise TooLargeError(
            f"the product of the automata has up to {found.states:,} states and needs up to "
            f"{bytes_text(found.bytes)}, and {bytes_text(free)} may be used: use fewer "
            "conditions or a smaller reference, or pass memory= where there is more"
        )
    return AutomatonSolution(ebm, reference, reward)


def _all_rewards(ebm: EBM, progress: bool | None) -> Float[Tensor, "P N"]:
    space = ebm.space
    scores: Tensor | None = None
    total = ebm.num_prompts * space.num_sequences
    with tqdm(
        total=total, desc="rewards", unit="seq", unit_scale=True, disable=_hide(progress)
    ) as bar:
        for prompt in range(ebm.num_prompts):
            for start in range(0, space.num_sequences, _REWARD_BATCH):
                stop = min(start + _REWARD_BATCH, space.num_sequences)
                tokens, lengths = space.sequences(start, stop, str(ebm.device))
                ids = torch.full_like(lengths, prompt)
                reward = ebm.reward(tokens, lengths, ids)
                check_values(reward, "the reward")
                if scores is None:
                    scores = torch.empty(
                        ebm.num_prompts,
                        space.num_sequences,
                        dtype=reward.dtype,
                        device=ebm.device,
                    )
                scores[prompt, start:stop] = reward
                bar.update(stop - start)
    assert scores is not None
    return scores


def _all_log_ref(ebm: EBM, progress: bool | None) -> list[float] | list[Tensor]:
    """log p_ref at every prefix; a number for each depth where that is all there is to it."""
    space = ebm.space
    if ebm.reference is None:
        return [0.0] * space.max_length
    constants = policies.constants_of(ebm.reference)
    if constants is not None:
        return constants()
    shape = (ebm.num_prompts, space.num_states, space.vocab_size)
    table = torch.empty(shape, dtype=torch.float64, device=ebm.device)
    with tqdm(
        total=shape[0] * shape[1],
        desc="reference",
        unit="prefix",
        unit_scale=True,
        disable=_hide(progress),
    ) as bar:
        at_once = prompts_at_once(ebm.reference, space, DEFAULT_MEMORY)
        for part in torch.arange(ebm.num_prompts).split(at_once):
            for depth, start, stop, logits in walk_prompts(ebm.reference, space, part):
                offset = space.state_offset(depth)
                rows = log_policy(logits).unflatten(0, (len(part), stop - start))
                table[int(part[0]) : int(part[-1]) + 1, offset + start : offset + stop] = rows
                bar.update(len(logits))
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    tables = list(table.split(sizes, dim=1))
    # Only the last depth has an entry that p_ref does not decide.
    tables[-1] = end_reference(tables[-1][..., None, :], space)[..., 0, :]
    return tables


def check_memory(ebm: EBM, memory: int | None = None) -> None:
    """Raise TooLargeError, with the count and the bytes, unless the tree fits.

    Args:
        memory: bytes that may be used; None for what the device has free.
    """
    space, p = ebm.space, ebm.num_prompts
    scores = rewards.scores_of(ebm.reward_model)
    listed = ebm.reference is not None and policies.constants_of(ebm.reference) is None
    size = 8 if scores is None else bytes_of_value(scores, ebm.beta, listed)
    need = 2**26 + p * space.num_states * size  # V, and room to work in
    if scores is None:
        need += p * space.num_sequences * 8
    if listed:
        need += p * space.num_states * space.vocab_size * 8
    free = _free_bytes(ebm.device) if memory is None else memory
    if need > free:
        raise TooLargeError(
            f"{count_text(space.num_sequences)} sequences need {bytes_text(need)} to be solved "
            f"exactly, and {bytes_text(free)} may be used: make vocab_size or max_length smaller, "
            "or pass memory= where there is more"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes()


def _hide(progress: bool | None) -> bool | None:
    """tqdm's ``disable``: None hides the bar where there is no terminal."""
    return None if progress is None else not progress
