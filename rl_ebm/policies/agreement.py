"""Whether what a policy has besides ``logits`` agrees with them: tried on a few prefixes.

The library takes the fastest member that a policy has, so one that says something else makes two
laws out of one policy, and figures of neither. What is tried, and what each member must equal,
stands in :class:`rl_ebm.policies.base.FullPolicy`. Not tried is ``logits_are_values``: any logits
are those of some values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.automata import Machine
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies import base
from rl_ebm.soft_bellman import gather_tokens, log_policy
from rl_ebm.tokens import TokenSpace

_ROWS, _DEPTHS = 4, 4
"""sequences, and their first positions, on which what takes a pass of its own is tried"""
_ROUNDING = (1e-3, 20)
"""relative difference of two ways that is rounding still: a number, or so many steps of the
precision"""


@dataclass(frozen=True)
class Seen:
    """A policy's logits of some sequences, to which its other members are held.

    Attributes:
        name: what sentences call the policy.
        logits: masked by the space, on the CPU.
        reached: positions that the policy reaches, none of them past an EOS.
        eps: relative step of the coarsest numbers that it computes with.
        device: where it computes.
    """

    policy: base.Policy
    space: TokenSpace
    name: str
    tokens: Int64[Tensor, "n T"]
    prompt_ids: Int64[Tensor, "n"]
    logits: Float[Tensor, "n T A"]
    reached: Bool[Tensor, "n T"]
    eps: float
    device: torch.device

    @property
    def decided(self) -> Bool[Tensor, "n T"]:
        """Where it is reached and chooses: not at the last position of EOS mode."""
        if self.space.eos_id is None:
            return self.reached
        t = torch.arange(self.space.max_length)
        return self.reached & (t < self.space.max_length - 1)

    def few(self) -> Seen:
        """Some of the sequences alone."""
        n = len(self.tokens)
        rows = torch.arange(n)
        if n > _ROWS:  # of several prompts, where there are several
            rows = torch.arange(_ROWS) * (n // _ROWS + 1) % n
        return replace(
            self,
            tokens=self.tokens[rows],
            prompt_ids=self.prompt_ids[rows],
            logits=self.logits[rows],
            reached=self.reached[rows],
        )

    def off(self, want: Tensor, got: Tensor) -> Bool[Tensor, "..."]:
        """Where logits, or what is made of them, differ by more than rounding, (...)."""
        top = want.masked_fill(~torch.isfinite(want), -torch.inf).amax(-1, keepdim=True)
        scale = 1 + top.masked_fill(torch.isinf(top), 0.0).abs() + want.abs()
        near = (want - got).abs() <= max(_ROUNDING[0], _ROUNDING[1] * self.eps) * scale
        near = near & torch.isfinite(want) & torch.isfinite(got)
        return ~((want == got) | near).all(-1)

    def refuse(self, member: str, wrong: Tensor, what: str) -> None:
        """Raise ValueError where something is wrong at some position, the first of which is told.

        Args:
            wrong: (n, depths).
            what: what must equal what.
        """
        if bool(wrong.any()):
            depth = int(wrong.any(0).nonzero()[0, 0])
            raise ValueError(
                f"{self.name}'s {member} does not agree with its logits (seen at depth {depth}): "
                f"{what}"
            )

    def result(self, member: str, of: Callable[[], Any], shape: tuple[int, ...]) -> Tensor:
        """What a member returns, on the CPU; ValueError where it fails, or has another shape."""
        try:
            out = of()
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            said = (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
            raise ValueError(f"{self.name}'s {member} fails: {said}") from error
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name}'s {member} gave {got}, expected a tensor of {shape}")
        return out.detach().cpu()


@torch.no_grad()
def check_members(seen: Seen) -> None:
    """Hold everything that a policy has besides ``logits`` to them.

    Raises:
        ValueError: the first that does not agree, by its name.
    """
    few = seen.few()
    _check_forbids(seen)
    _check_constants(seen)
    _check_machine(seen)
    _check_crops(few)
    _check_steps(few)
    _check_tree(few)
    _check_log_probs(few)


def _check_forbids(seen: Seen) -> None:
    if base.forbids_of(seen.policy) is False:
        allowed = seen.space.action_mask()
        seen.refuse(
            "forbids = False",
            (torch.isneginf(seen.logits) & allowed).any(-1) & seen.reached,
            "an allowed action has logit -inf; say True, or None where it is not known",
        )


def _check_constants(seen: Seen) -> None:
    own = base.constants_of(seen.policy)
    if own is None:
        return
    t_max = seen.space.max_length
    said = torch.tensor(own(), dtype=torch.float64)
    if said.shape != (t_max,):
        raise ValueError(
            f"{seen.name}'s log_ref_constants gave {tuple(said.shape)} numbers, expected {t_max}: "
            "one for each depth"
        )
    mask = seen.space.action_mask()
    want = said[:, None].expand(mask.shape).masked_fill(~mask, -torch.inf)
    seen.refuse(
        "log_ref_constants",
        seen.off(log_policy(seen.logits.double()), want) & seen.reached,
        "every allowed action of a depth must have that log-probability",
    )


def _check_machine(seen: Seen) -> None:
    machine = base.machine_of(seen.policy)
    if machine is None:
        return
    if not isinstance(machine, Machine) or machine.vocab_size != seen.space.vocab_size:
        raise ValueError(
            f"{seen.name}'s machine must be a Machine over {seen.space.vocab_size} tokens"
        )
    if bool((machine.final != 0).any() or (machine.log_end != 0).any()):
        raise ValueError(
            f"{seen.name}'s machine pays at the end of a response, and a policy's must not: its "
            "final and log_end must be 0"
        )
    # A machine that starts alike for all prompts reads none.
    ids = seen.prompt_ids if machine.num_prompts > 1 else torch.zeros_like(seen.prompt_ids)
    got = seen.result(
        "machine",
        lambda: machine.log_probs(seen.tokens.to(machine.device), ids.to(machine.device)),
        tuple(seen.tokens.shape),
    )
    _compare_tokens(seen, "machine", got)


def _check_log_probs(seen: Seen) -> None:
    own = base.token_pass(seen.policy)
    if own is not None:
        got = seen.result(
            "log_probs",
            lambda: own(seen.tokens.to(seen.device), seen.prompt_ids.to(seen.device)),
            tuple(seen.tokens.shape),
        )
        _compare_tokens(seen, "log_probs", got)


def _compare_tokens(seen: Seen, member: str, got: Float[Tensor, "n T"]) -> None:
    """Hold log-probabilities of the tokens alone to the logits."""
    log_pi = gather_tokens(log_policy(seen.logits.double()), seen.tokens)
    # Rounded as the logits are that they are made of.
    size = seen.logits.masked_fill(~torch.isfinite(seen.logits), 0.0).abs().amax(-1)
    tolerance = max(_ROUNDING[0], _ROUNDING[1] * seen.eps) * (1 + size + log_pi.abs())
    near = (log_pi - got).abs() <= tolerance
    near = near & torch.isfinite(log_pi) & torch.isfinite(got)
    seen.refuse(
        member,
        ~(near | (log_pi == got)) & seen.decided,
        "the log-probability of a token must be that of the log-softmax",
    )


def _check_crops(seen: Seen) -> None:
    width = (seen.space.max_length + 1) // 2
    if not base.crops(seen.policy) or width == seen.space.max_length:
        return
    tokens, n = seen.tokens[:, :width].to(seen.device), len(seen.tokens)
    got = seen.result(
        "logits of fewer columns (crops = True)",
        lambda: seen.policy.logits(tokens, seen.prompt_ids.to(seen.device)),
        (n, width, seen.space.vocab_size),
    )
    # The last column is not that of EOS mode.
    wrong = seen.off(seen.logits[:, :width], got) & seen.reached[:, :width]
    seen.refuse(
        "logits of fewer columns (crops = True)",
        wrong,
        "the first rows must be those of all columns",
    )


def _check_steps(seen: Seen) -> None:
    steps = base.steps_of(seen.policy)
    if steps is None:
        return
    n, depths = len(seen.tokens), min(seen.space.max_length, _DEPTHS)
    ids, tokens = seen.prompt_ids.to(seen.device), seen.tokens.to(seen.device)

    def all_steps() -> Tensor:
        state = steps.start(ids)
        read = [None, *tokens[:, : depths - 1].unbind(1)]
        return torch.stack([steps.step(state, token) for token in read], 1)

    got = seen.result("step", all_steps, (n, depths, seen.space.vocab_size))
    got = got.masked_fill(~seen.space.action_mask()[:depths], -torch.inf)
    want = seen.logits[:, :depths]
    seen.refuse(
        "step",
        seen.off(want, _level(want, got)) & seen.reached[:, :depths],
        "after t tokens it must give row t, up to a constant",
    )


def _check_tree(seen: Seen) -> None:
    if base.tree_bytes_per_node(seen.policy) < 1:
        raise ValueError(f"{seen.name}'s tree_bytes_per_node must be at least 1")
    own = base.tree_pass(seen.policy)
    if own is None:
        return
    tree, place = _tree_of(seen)
    prompts, which = seen.prompt_ids.unique(return_inverse=True)
    shape = (len(prompts), len(tree), seen.space.vocab_size)
    got = seen.result("tree_logits", lambda: own(tree, prompts.to(seen.device)), shape)
    got = got[which[:, None], place]
    depths = place.shape[1]
    got = got.masked_fill(~seen.space.action_mask()[:depths], -torch.inf)
    want = seen.logits[:, :depths]
    if not base.logits_are_values(seen.policy):
        got = _level(want, got)
    seen.refuse(
        "tree_logits",
        seen.off(want, got) & seen.reached[:, :depths],
        "a node must have the logits of its prefix"
        + (", which are values" if base.logits_are_values(seen.policy) else ", up to a constant"),
    )


def _tree_of(seen: Seen) -> tuple[PrefixTree, Int64[Tensor, "n D"]]:
    """The tree of the sequences' first prefixes, and the node of each; 0 past an EOS."""
    depths, rows = min(seen.space.max_length, _DEPTHS), seen.tokens.tolist()
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for t in range(1, depths):
        for row, reached in zip(rows, seen.reached[:, t].tolist(), strict=True):
            if reached:
                nodes.setdefault(tuple(row[:t]), len(nodes))
    deepest = max(map(len, nodes))
    paths = [[nodes[p[:i]] for i in range(deepest + 1)] for p in nodes]
    device = seen.device
    tree = PrefixTree(
        torch.tensor([p[-1] if p else 0 for p in nodes], device=device),
        torch.tensor(paths, device=device),
        torch.tensor([len(p) for p in nodes], device=device),
        seen.space.max_length,
    )
    place = [[nodes.get(tuple(row[:t]), 0) for t in range(depths)] for row in rows]
    return tree, torch.tensor(place)


def _level(want: Float[Tensor, "... A"], got: Float[Tensor, "... A"]) -> Float[Tensor, "... A"]:
    """``got``, with the constant that makes it equal where ``want`` is largest."""
    top = want.argmax(-1, keepdim=True)
    shift = want.gather(-1, top) - got.gather(-1, top)
    return got + shift.masked_fill(~torch.isfinite(shift), 0.0)
