r"""Twisted sequential Monte Carlo: unbiased estimates of Z(x) with a policy as the proposal.

Particles grow token by token. With log psi(s) a guess (the *twist*) of the log-weight of all that
may follow a prefix, a particle carries the weight of

    gamma(s) = p_ref(s) exp(log psi(s)),    gamma(y) = p_ref(y) exp(R(y) / beta) at its end

over what the policy proposed, and is resampled by it. The best twist is V, the exact value:
with it and the exact policy all weights are Z. Any twist that is positive wherever something
possible follows leaves the estimate of Z (not of log Z) unbiased; one that is 0 too early, or a
policy that forbids something possible, makes its mean smaller than Z, never larger. A poor twist
costs precision only, but of that as much as there is: it keeps the wrong particles.

Resampling is adaptive and systematic: where the effective sample size falls below a share of
the particles, by one random shift of a regular comb. References: Doucet and Johansen (2011), "A
tutorial on particle filtering and smoothing"; for language models with learned twists Zhao et
al. (2024), https://arxiv.org/abs/2404.17546.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.ebm import EBM, check_ebm
from rl_ebm.messages.arguments import check_generator, is_number, shown, whole
from rl_ebm.policies.base import (
    Policy,
    device_of,
    evaluating,
    logits_are_values,
    resolve_prompt_ids,
)
from rl_ebm.policies.decoding import Positions
from rl_ebm.policies.outputs import check_kind
from rl_ebm.soft_bellman import log_policy, soft_value
from rl_ebm.statistics.mean_bounds import effective_sample_size, log_mean
from rl_ebm.tokens import Batch

Twists = Callable[[Tensor, int, Tensor], Tensor]
"""log psi of prefixes: ``(tokens (B, T), depth, prompt_ids (B,)) -> (B,)``, nats. It reads
``tokens[:, :depth]``. R is paid at the end, so psi of a prefix is to include what the prefix has
earned of it already. What it says of a response that has ended is not used."""


@dataclass(frozen=True)
class SMCResult:
    """R independent runs of N particles each."""

    log_z: Float[Tensor, "R"]
    """log of each run's estimate of Z, nats, float64: the estimates are unbiased, not their logs"""
    particles: Batch
    """all R * N responses, run by run"""
    log_weights: Float[Tensor, "R N"]
    """normalised within each run; all ``-inf`` where a run met nothing possible"""
    ess: Float[Tensor, "R T"]
    """effective sample size after each token, before resampling"""
    resampled: Bool[Tensor, "R T"]
    """whether the run was resampled after that token; never after the last"""


@torch.no_grad()
def smc(
    ebm: EBM,
    policy: Policy,
    num_particles: int,
    twists: Twists | None = None,
    generator: torch.Generator | None = None,
    *,
    runs: int = 1,
    prompt_ids: Int64[Tensor, "R"] | None = None,
    ess_threshold: float | int = 0.5,
) -> SMCResult:
    """Estimate Z by runs of particles that the policy proposes.

    Args:
        policy: the proposal, on the EBM's device.
        num_particles: N, of each run.
        twists: see :data:`Twists`. None: the policy's values V where its logits are declared to
            be values; else particles are weighed at the end only, which is importance sampling
            (with psi = 1 they would be resampled towards the reference: what the policy has
            learned would be thrown away).
        generator: on the policy's device; None for the global one.
        runs: R, how many independent runs, all in one batch.
        prompt_ids: which prompt each run answers, (R,); needed with several prompts.
        ess_threshold: a run is resampled when its effective sample size is below this share of
            the particles; 0 for never.

    Raises:
        ValueError: no particles or runs, a threshold out of [0, 1], a policy for other prompts,
            prompt ids that do not fit, or a twist that is NaN, +inf or of another shape.
    """
    check_ebm(ebm)
    num_particles, runs = whole("num_particles", num_particles), whole("runs", runs)
    if num_particles < 1 or runs < 1:
        raise ValueError(f"num_particles and runs must be >= 1, got {num_particles} and {runs}")
    whole("num_particles * runs", num_particles * runs, 1, 2**31)
    if not (is_number(ess_threshold) and 0 <= ess_threshold <= 1):
        raise ValueError(f"ess_threshold must be in [0, 1], got {shown(ess_threshold)}")
    check_kind(policy)
    device = device_of(policy)
    check_generator(generator, device)
    per_run = resolve_prompt_ids(runs, prompt_ids, ebm.num_prompts, device).to(device)
    values = twists is None and logits_are_values(policy)
    if twists is None and not values:
        ess_threshold = 0.0
    with evaluating(policy):
        ebm.check_policy(policy, rows=runs * num_particles)
        cloud = _Cloud(ebm, policy, num_particles, per_run, generator)
        for t in range(ebm.space.max_length):
            if cloud.over(t):
                break
            cloud.look(t)
            if t > 0:
                if values:
                    cloud.twist(soft_value(cloud.q))
                elif twists is not None:
                    cloud.twist(_checked(twists(cloud.tokens, t, cloud.prompt_ids), cloud))
                cloud.resample(float(ess_threshold))
            cloud.extend(t)
    return cloud.result()


class _Cloud:
    """The particles of all runs, flattened: (B,) = (R N,)."""

    def __init__(
        self,
        ebm: EBM,
        policy: Policy,
        n: int,
        per_run: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self.ebm, self.space, self.n, self.generator = ebm, ebm.space, n, generator
        self.prompt_ids = per_run.repeat_interleave(n)
        rows, device = len(self.prompt_ids), per_run.device
        self.policy = Positions(policy, self.space, self.prompt_ids)
        self.reference = None
        if ebm.reference is not None:
            self.reference = Positions(ebm.reference, self.space, self.prompt_ids)
        self.tokens = torch.zeros(rows, self.space.max_length, dtype=torch.int64, device=device)
        self.lengths = torch.full((rows,), self.space.max_length, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self.log_w = torch.zeros(rows, dtype=torch.float64, device=device)
        self.log_psi = torch.zeros_like(self.log_w)
        self.log_z = torch.zeros(len(per_run), dtype=torch.float64, device=device)
        self.q = self.log_ref = torch.empty(0)
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []

    def over(self, t: int) -> bool:
        """Whether all have ended: nothing is drawn or weighed any more, and ESS stays as it is."""
        if t == 0 or bool(self.running.any()):
            return False
        left = self.space.max_length - t
        log_w = self.log_w.view(-1, self.n)
        self.ess += [effective_sample_size(log_w)] * left
        self.resampled += [torch.zeros(len(log_w), dtype=torch.bool, device=log_w.device)] * left
        return True

    def look(self, t: int) -> None:
        """The policy's logits and log p_ref before the token at t, float64."""
        mask = self.space.action_mask(self.tokens.device)[t]
        self.q = self.policy.logits(t, self.tokens).double().masked_fill(~mask, -torch.inf)
        self.log_ref = torch.zeros_like(self.q)
        # In EOS mode the reference is made to stop at the last position: log p_ref(EOS) = 0.
        forced = self.space.eos_id is not None and t == self.space.max_length - 1
        if self.reference is not None and not forced:
            self.log_ref = log_policy(self.reference.logits(t, self.tokens).double())

    def twist(self, log_psi: Tensor) -> None:
        """Exchange the twist of each particle that has not ended for that of its prefix now."""
        self._gain(log_psi - self.log_psi, self.running)
        self.log_psi = torch.where(self.running, log_psi, self.log_psi)

    def resample(self, threshold: float) -> None:
        """Resample the runs whose effective sample size is low; ended particles take part."""
        log_w = self.log_w.view(-1, self.n)
        ess = effective_sample_size(log_w)
        self.ess.append(ess)
        # A run in which nothing is possible any more has ESS 0 and no weights to draw by.
        low = (ess < threshold * self.n) & (ess > 0)
        self.resampled.append(low)
        if not bool(low.any()):
            return
        self.log_z = torch.where(low, self.log_z + log_mean(log_w), self.log_z)
        start = torch.arange(len(log_w), device=log_w.device)[:, None] * self.n
        stay = torch.arange(self.n, device=log_w.device).expand_as(log_w)
        shift = torch.rand(
            len(log_w), 1, generator=self.generator, dtype=torch.float64, device=log_w.device
        )
        chosen = start + torch.where(low[:, None], systematic(log_w, shift), stay)
        self.log_w = log_w.masked_fill(low[:, None], 0.0).flatten()
        for name in ("tokens", "lengths", "running", "log_psi", "q", "log_ref"):
            setattr(self, name, getattr(self, name)[chosen.flatten()])
        self.policy.restart()
        if self.reference is not None:
            self.reference.restart()

    def extend(self, t: int) -> None:
        """Draw the token at t from the policy and weigh it; whoever ends gets its reward."""
        log_pi = log_policy(self.q)
        noise = torch.empty_like(log_pi).exponential_(generator=self.generator).log_()
        action = (log_pi - noise).argmax(-1, keepdim=True)
        drawn = log_pi.gather(-1, action)[:, 0]
        gain = self.log_ref.gather(-1, action)[:, 0] - drawn
        # Where the policy forbids every action it has lost the particle's share of Z.
        self._gain(gain.masked_fill(torch.isneginf(drawn), -torch.inf), self.running)
        action = action[:, 0]
        self.tokens[:, t] = torch.where(self.running, action, self.tokens[:, t])
        ends = self.running & self.space.ends(action, torch.full_like(action, t))
        self.lengths = torch.where(ends, t + 1, self.lengths)
        self.running = self.running & ~ends
        rows = ends.nonzero()[:, 0]
        if len(rows):
            reward = self.ebm.reward(self.tokens[rows], self.lengths[rows], self.prompt_ids[rows])
            log_psi = torch.zeros_like(self.log_w)
            log_psi[rows] = reward.double() / self.ebm.beta
            self._gain(log_psi - self.log_psi, ends)

    def result(self) -> SMCResult:
        log_w = self.log_w.view(-1, self.n)
        ess = [*self.ess, effective_sample_size(log_w)]
        never = torch.zeros(len(log_w), dtype=torch.bool, device=log_w.device)
        total = torch.logsumexp(log_w, dim=-1, keepdim=True)
        dead = torch.isneginf(total)
        return SMCResult(
            log_z=self.log_z + log_mean(log_w),
            particles=Batch(self.tokens, self.lengths, self.prompt_ids),
            log_weights=log_w - total.masked_fill(dead, 0.0),
            ess=torch.stack(ess, dim=1),
            resampled=torch.stack([*self.resampled, never], dim=1),
        )

    def _gain(self, gain: Tensor, rows: Tensor) -> None:
        """Add to the log-weights of some rows; a particle of weight 0 stays so (no inf - inf)."""
        gain = torch.where(rows & ~torch.isneginf(self.log_w), gain, 0.0)
        self.log_w = self.log_w + gain


def systematic(log_w: Float[Tensor, "R N"], shift: Float[Tensor, "R 1"]) -> Int64[Tensor, "R N"]:
    """Systematic resampling: particle i is drawn floor or ceil of N w_i times, N w_i on average.

    Args:
        log_w: unnormalised; a row of ``-inf`` only gives indices that mean nothing.
        shift: uniform in [0, 1), one for each row.
    """
    n = log_w.shape[-1]
    total = torch.softmax(log_w, dim=-1).cumsum(-1)
    total = total / total[:, -1:]
    comb = (torch.arange(n, device=log_w.device) + shift) / n
    # right=True passes over particles of weight 0; below 1 there is always one of positive weight.
    chosen = torch.searchsorted(total, comb.clamp(max=1 - 2.0**-53), right=True)
    return chosen.clamp(max=n - 1)


def _checked(log_psi: Tensor, cloud: _Cloud) -> Tensor:
    if log_psi.shape != cloud.log_w.shape:
        raise ValueError(
            f"twists returned shape {tuple(log_psi.shape)}, expected {tuple(cloud.log_w.shape)}: "
            "one number for each particle"
        )
    if bool(((torch.isnan(log_psi) | torch.isposinf(log_psi)) & cloud.running).any()):
        raise ValueError("twists returned NaN or +inf: log psi of a prefix is finite, or -inf")
    return log_psi.double()
