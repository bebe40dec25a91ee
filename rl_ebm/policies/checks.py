"""Policies at the door: what comes out of ``logits`` has to be a policy, or no number is exact.

A policy that others wrote is tried on a few sequences before any work: row t of its logits may
depend on ``tokens[:, :t]`` alone, not on the rows beside it, and not on chance. Where row t has
read token t its "probabilities" sum to something else than one, and every figure of it, exact or
sampled, is one of nothing. It is a trial, not a proof: three passes over a few rows,
and one over fewer for each thing more that it has (:mod:`rl_ebm.policies.agreement`).
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NoReturn

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.messages.arguments import shown, whole
from rl_ebm.policies.agreement import Seen, check_members
from rl_ebm.policies.base import device_of, evaluating, num_prompts, space_of
from rl_ebm.policies.outputs import check_kind, check_output
from rl_ebm.policies.scoring import mask_logits
from rl_ebm.policies.tabular import Uniform
from rl_ebm.soft_bellman import gather_tokens, log_policy
from rl_ebm.tokens import TokenSpace, check_space

ROWS = 64
"""sequences that are tried, at most; fewer where vocabulary and length make logits large"""
_FEW, _LITTLE = 16, 2**12
"""so many are enough, unless more make no more logits than this: a slip may show at one token of
one position alone"""
_LOGITS, _LARGE = 2**23, 2**27
_ROUNDING = (1e-5, 4)
"""relative difference of two passes over as many rows that is rounding still: a number, or so
many steps of the precision"""
_RESHAPED = (1e-3, 20)
"""the same where the rows stand elsewhere in another batch: other kernels sum in other orders"""


def check(
    policy: Any, space: TokenSpace | None = None, name: str = "the policy", rows: int = ROWS
) -> None:
    """Try whether something is a policy, and whether all that it has agrees with its logits.

    What a policy is, and what each of its members must equal, stands in
    :class:`rl_ebm.policies.base.FullPolicy`. The library does the same wherever it is handed a
    policy of others (verify, certify, train, EBM), and leaves out its own. A module is tried in
    the mode it is in.

    Args:
        space: the responses; None for the policy's own.
        name: what a sentence calls it.
        rows: sequences on which it is tried, at most; 64 are the most.

    Raises:
        TypeError: no policy, or logits that are no tensor.
        ValueError: no space, another one than the policy's; logits of another shape, that are NaN
            or +inf where the policy gets, or that depend on later tokens, on other rows of the
            batch, or on chance; or a member that does not agree with them, by its name.
    """
    check_kind(policy, name)
    if not isinstance(name, str):
        raise TypeError(f"name must be text, got {shown(name)}")
    own = space_of(policy)
    space = own if space is None else space
    if space is None:
        raise ValueError(f"{name} has no space of its own: give space, a TokenSpace")
    check_space(space)
    if own not in (None, space):
        raise ValueError(f"{name} is for {own}, and {space} is asked for")
    _try(policy, space, num_prompts(policy), name, whole("rows", rows, 1), steps=False)


def check_rows(
    policy: Any,
    space: TokenSpace,
    prompts: int,
    name: str = "the policy",
    rows: int = ROWS,
    steps: bool = False,
) -> None:
    """Try a policy that others wrote, in the mode it is in; those of the library are known.

    Args:
        prompts: how many prompts it is asked about.
        name: what a sentence calls it.
        rows: sequences in a batch, at most.
        steps: try its ``step`` in the place of its ``logits``.

    Raises:
        TypeError: logits that are no tensor, or that take no prompt ids.
        ValueError: logits of another shape, that are NaN or +inf where the policy gets, or that
            depend on later tokens, on other rows of the batch, or on chance; or another member
            that does not agree with them.
    """
    if not _known(policy):
        _try(policy, space, prompts, name, rows, steps)


def _try(policy: Any, space: TokenSpace, prompts: int, name: str, rows: int, steps: bool) -> None:
    device = device_of(policy)
    if device.type == "meta":
        return
    _check_signature(policy, name)
    size = space.max_length * space.vocab_size
    most = max(1 if size > _LARGE else 2, _LOGITS // size)
    n = max(1, min(rows, ROWS, most, max(_FEW, _LITTLE // size)))
    first, other, kept = _sequences(space, n)
    trial = _Trial(policy, space, name, first, torch.arange(n) % prompts, device)
    trial.steps = steps
    # The caller's random numbers stay his: a policy that draws some gets others.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            trial.run(other, kept)
        except ValueError as error:
            trial.refuse_mode(other, kept, error)
            raise


def _check_signature(policy: Any, name: str) -> None:
    """Raise TypeError where ``logits`` takes no prompt ids."""
    try:
        signature(policy.logits).bind(None, None)
    except ValueError:  # written in C: it has none to read
        return
    except TypeError as error:
        raise TypeError(
            f"{name}'s logits must take (tokens, prompt_ids=None), whether it reads prompts or "
            f"not: {error}"
        ) from None


def _known(policy: object) -> bool:
    """Whether it is one of the library's own; a model of others in its wrapper is not.

    Of derived classes those of the uniform policy alone: whoever counts its calls derives from it.
    """
    if isinstance(policy, Uniform):
        return True
    module = type(policy).__module__
    own = module.startswith("rl_ebm.") and not module.startswith("rl_ebm.policies.hf")
    return own and "logits" not in vars(policy)


def _sequences(space: TokenSpace, n: int) -> tuple[Tensor, Tensor, Int64[Tensor, "n"]]:
    """Sequences, others that continue the same prefixes otherwise, and the prefixes' lengths."""
    t_max, a = space.max_length, space.vocab_size
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(a, (n, t_max), generator=generator)
    step = torch.randint(1, a, (n, t_max), generator=generator)
    # The ends, the middle, and what lies between.
    kept = torch.linspace(0, t_max - 1, n).round().long() if n > 1 else torch.tensor([t_max // 2])
    inside = torch.arange(t_max) < kept[:, None]
    prefix = space.unrank(torch.randint(space.branching, (n, t_max), generator=generator))
    first = torch.where(inside, prefix, first)
    other = torch.where(inside, prefix, (first + step) % a)
    # Masks that come one token early show at the tokens that are masked alone: EOS, and padding.
    special = torch.tensor([0 if space.eos_id is None else space.eos_id, 0, a - 1])
    rows = torch.arange(n)[torch.arange(n) % 4 < 3]
    token = special[rows % 4]
    other[rows, kept[rows]] = torch.where(
        token == first[rows, kept[rows]], other[rows, kept[rows]], token
    )
    return first, other, kept


class _Trial:
    """One policy's logits of some sequences, and what is wrong with them."""

    def __init__(
        self,
        policy: Any,
        space: TokenSpace,
        name: str,
        tokens: Tensor,
        prompt_ids: Tensor,
        device: torch.device,
    ) -> None:
        self.policy, self.space, self.name = policy, space, name
        self.tokens, self.prompt_ids, self.device = tokens, prompt_ids, device
        self.steps, self.eps = False, torch.finfo(torch.float32).eps
        # What stands past an EOS is unspecified.
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        if space.eos_id is not None:
            ended = (tokens == space.eos_id).cumsum(1) > 0
        self.alive = ~F.pad(ended, (1, -1), value=False)

    def run(self, other: Tensor, kept: Tensor) -> None:
        """Raise ValueError where it is no policy.

        Args:
            other: sequences that agree with those of the trial on as many tokens as ``kept`` says.
        """
        first, n, t = self.tokens, len(self.tokens), torch.arange(self.space.max_length)
        want, got = self.rows(first), self.rows(other)
        leak = self.differ(want, got, _ROUNDING) & (t <= kept[:, None])
        if bool(leak.any()):
            self.refuse_noise(want)
            alone = leak.any(1).nonzero()[0]
            want, got = (self.rows(tokens[alone], alone) for tokens in (first, other))
            if bool((self.differ(want, got, _ROUNDING) & (t <= kept[alone])).any()):
                _refuse_leak(self.name, leak, kept)
            _refuse_batch(self.name)
        if n > 1:
            others = torch.arange(n - 1, 0, -1)
            moved = self.rows(first[others], others)
            if bool((self.differ(want[others], moved, _RESHAPED) & self.alive[others]).any()):
                self.refuse_noise(want)
                _refuse_batch(self.name)
        reached = self.refuse_no_numbers(want)
        if not self.steps:  # where these are tried, logits may be too large
            seen = Seen(
                self.policy, self.space, self.name, first, self.prompt_ids, want, reached,
                self.eps, self.device,
            )  # fmt: skip
            check_members(seen)

    def rows(self, tokens: Tensor, which: Tensor | None = None) -> Tensor:
        """Masked logits (n, T, A), on the CPU."""
        ids = self.prompt_ids if which is None else self.prompt_ids[which]
        try:
            logits = self._logits(tokens.to(self.device), ids.to(self.device))
        except (RuntimeError, IndexError) as error:
            said = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"{self.name} fails on token ids in [0, {self.space.vocab_size}) of shape "
                f"{tuple(tokens.shape)}: {said}"
            ) from error
        check_output(logits, len(tokens), self.space, self.name)
        if logits.device.type != self.device.type:
            raise ValueError(
                f"{self.name}'s device is {self.device}, and its logits come out on "
                f"{logits.device}: it must say where it computes"
            )
        self.eps = max(self.eps, _step(self.policy, logits))
        return mask_logits(logits, self.space).cpu()

    def _logits(self, tokens: Tensor, ids: Tensor) -> Any:
        if not self.steps:
            return self.policy.logits(tokens, ids)
        state = self.policy.start(ids)
        read = (None, *tokens.unbind(1)[:-1])
        return torch.stack([self.policy.step(state, token) for token in read], 1)

    def differ(self, a: Tensor, b: Tensor, tolerance: tuple[float, int]) -> Tensor:
        """Where two passes say other things, (n, T)."""
        top = a.masked_fill(~torch.isfinite(a), -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(torch.isinf(top), 0.0)
        # Each logit by its own size: a -1e9 beside it, in the place of -inf, must hide nothing.
        scale = 1 + top.abs() + a.abs()
        near = (a - b).abs() <= max(tolerance[0], tolerance[1] * self.eps) * scale
        near = near & torch.isfinite(a) & torch.isfinite(b)
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        return ~(same | near).all(-1)

    def refuse_mode(self, other: Tensor, kept: Tensor, error: ValueError) -> None:
        """Raise where the fault is that of a mode alone: of a module that is not in eval()."""
        module = self.policy
        if not (isinstance(module, nn.Module) and any(m.training for m in module.modules())):
            return
        with evaluating(module):
            try:
                self.run(other, kept)
            except ValueError:
                return
        raise ValueError(
            f"{error}; it is in training mode, with dropout, batch normalisation or the like: call "
            "its eval() first"
        ) from None

    def refuse_noise(self, want: Tensor) -> None:
        """Raise where a second pass over the same tokens says something else."""
        if self._noisy(want):
            raise ValueError(
                f"two calls of {self.name} give other logits for the same tokens: it draws random "
                "numbers or keeps a state, and its probabilities cannot be known"
            )

    def _noisy(self, want: Tensor) -> bool:
        again = self.rows(self.tokens)
        return bool((self.differ(want, again, _ROUNDING) & self.alive).any())

    def refuse_no_numbers(self, rows: Tensor) -> Tensor:
        """Where the policy gets, (n, T); raise where its logits there are NaN or +inf."""
        known = rows.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)
        steps = gather_tokens(log_policy(known), self.tokens)
        possible = F.pad(steps.cumsum(1), (1, -1)) > -torch.inf
        reached = possible & self.alive
        wrong = (torch.isnan(rows) | torch.isposinf(rows)).any(-1) & reached
        if bool(wrong.any()):
            depth = int(wrong.any(0).nonzero()[0, 0])
            raise ValueError(
                f"{self.name}'s logits are NaN or +inf at depth {depth}: it has no probabilities"
            )
        return reached


def _refuse_leak(name: str, leak: Tensor, kept: Tensor) -> NoReturn:
    """Raise about rows that have read what follows them."""
    early = leak & (torch.arange(leak.shape[1]) < kept[:, None])
    if not bool(early.any()):
        raise ValueError(
            f"row t of {name}'s logits depends on token t, which it is to predict (seen at t = "
            f"{int(kept[leak.any(1)][0])}): it may depend on tokens[:, :t] alone; shift by one, so "
            "that row t holds what is known after t tokens"
        )
    row, column = (int(x) for x in early.nonzero()[0])
    raise ValueError(
        f"{name} is not causal: row {column} of its logits depends on the tokens from {kept[row]} "
        "on, and row t may depend on tokens[:, :t] alone"
    )


def _refuse_batch(name: str) -> NoReturn:
    raise ValueError(
        f"a row of {name}'s logits depends on the other rows of the batch (batch normalisation, "
        "say): it may depend on its own tokens and prompt alone"
    )


def _step(policy: object, logits: Tensor) -> float:
    """The relative step of the coarsest numbers that a policy computes with."""
    parts = [policy, *(vars(policy).values() if hasattr(policy, "__dict__") else ())]
    kinds = {p.dtype for m in parts if isinstance(m, nn.Module) for p in m.parameters()}
    return max(torch.finfo(k).eps for k in {*kinds, logits.dtype, torch.float64} if _floats(k))


def _floats(kind: torch.dtype) -> bool:
    """Whether numbers of a kind are computed with: those of 8 bits are weights in storage."""
    return kind.is_floating_point and kind.itemsize >= 2
