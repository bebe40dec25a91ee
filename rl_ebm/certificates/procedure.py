"""The entry point: draw, weigh, bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rl_ebm.certificates.certificate import Certificate, combine
from rl_ebm.certificates.limits import (
    log_z_interval,
    log_z_limits,
    self_normalised_kl,
)
from rl_ebm.certificates.weights import Elsewhere, Sampler, UniformResponses, check_reward_max
from rl_ebm.ebm import EBM
from rl_ebm.messages.arguments import is_number, is_whole, shown, whole
from rl_ebm.policies.base import Policy, evaluating, forbids_of
from rl_ebm.policies.outputs import check_kind
from rl_ebm.rewards.base import limits_of
from rl_ebm.statistics.expectations import Known, entropy_expectation, expectation
from rl_ebm.statistics.interval import Interval, check_confidence, check_samples, difference
from rl_ebm.statistics.mean_bounds import effective_sample_size, log_mean
from rl_ebm.tokens import Batch

DEFAULT_MEMORY = 2**28
LOW_ESS = 10
"""below it the relative error of the mean weight, about ESS**-0.5, is a third or more, and the
ESS itself, made of the same few weights, says little"""
WIDE = 1.0
"""nats: an uncertainty of 1 nat in log Z is one of 1 nat in the KL, and with KL = 1 the total
variation can be anything up to 0.7 (Pinsker): good and bad policies look the same"""


@torch.no_grad()
def certify(
    policy: Policy,
    ebm: EBM,
    samples: int = 10_000,
    confidence: float = 0.95,
    target_samples: Batch | None = None,
    reward_max: float | int | None = None,
    generator: torch.Generator | None = None,
    *,
    particles: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Certificate:
    """Bound log Z and the divergences between a policy and its target from samples.

    Args:
        policy: anything with ``logits``, on the EBM's device.
        samples: how many responses of the policy, for each prompt; some hundreds more are looked at
            to see what these may have missed, or all responses where they are no more than
            samples, or than 1,024.
        confidence: of every interval by itself, in (0, 1).
        target_samples: independent **exact** samples of p*, not those of a Markov chain; only
            they give an upper end close to log Z.
        reward_max: a number that no reward exceeds, in reward units. log Z is then bounded by
            it, and a little better by as many samples of the reference (without a reference: of
            the uniform law over all responses).
        generator: on the policy's device; None for the global one.
        particles: bound log Z from below by ``samples // particles`` runs of
            :func:`rl_ebm.certificates.smc.smc` with so many particles, instead of by single
            weights: better where the policy's logits are good values, and far worse where they are
            declared to be values and are none. To be decided before looking at the result of
            either.
        memory: about how many bytes one evaluation of the policy may take.

    Raises:
        TypeError: samples, particles, a confidence or a ``reward_max`` that is no number.
        ValueError: fewer samples than one, a confidence out of (0, 1), a reward above
            ``reward_max``, a target sample that is impossible, a policy for other prompts, or
            fewer samples than particles.
    """
    _check(policy, ebm, samples, confidence, target_samples, reward_max, particles, memory)
    samples, memory = whole("samples", samples), min(whole("memory", memory, 1), 2**62)
    reward_max = None if reward_max is None else float(reward_max)
    each = 1 - (1 - confidence) / ebm.num_prompts
    with evaluating(policy):
        ebm.check_policy(policy, rows=Sampler(policy, ebm, 0, generator, memory).rows)
        parts = [
            _certify_prompt(
                Sampler(policy, ebm, prompt, generator, memory),
                samples,
                each,
                target_samples,
                reward_max,
                particles,
            )
            for prompt in range(ebm.num_prompts)
        ]
    return parts[0] if len(parts) == 1 else combine(parts)


def _check(
    policy: object,
    ebm: object,
    samples: Any,
    confidence: Any,
    target_samples: object,
    reward_max: object,
    particles: object,
    memory: object,
) -> None:
    """Raise what :func:`certify` says of its arguments, each by itself."""
    check_kind(policy)
    if not isinstance(ebm, EBM):
        raise TypeError(
            f"ebm must be an rl_ebm.EBM, got {type(ebm).__name__}: of an exact solution "
            "certify(policy, solution.ebm), or better verify(policy, solution)"
        )
    check_confidence(confidence)
    check_samples(samples)
    samples = whole("samples", samples)
    whole("memory", memory, 1)
    if not (target_samples is None or isinstance(target_samples, Batch)):
        raise TypeError(
            "target_samples must be a Batch, as solution.sample(n) gives it, got "
            f"{type(target_samples).__name__}"
        )
    if particles is not None and not (is_whole(particles) and 1 <= particles <= samples):
        raise ValueError(f"particles must be in [1, samples = {samples}], got {shown(particles)}")
    if reward_max is not None and not (is_number(reward_max) and math.isfinite(reward_max)):
        raise ValueError(f"reward_max must be finite, got {shown(reward_max)}")


def _certify_prompt(
    sampler: Sampler,
    samples: int,
    confidence: float,
    target_samples: Batch | None,
    reward_max: float | None,
    particles: int | None,
) -> Certificate:
    log_w, log_pi, reward = sampler.draw(sampler.policy, samples)
    if reward_max is not None:
        check_reward_max(reward, reward_max)
    others: dict[str, Any] = {"target_log_w": sampler.score_targets(target_samples)}
    if reward_max is not None:
        others["log_w_max"], others["base_log_w"] = sampler.base(samples, reward_max)
    estimates = log_w if particles is None else sampler.smc_runs(samples, particles)
    targets = others["target_log_w"]

    log_z = log_z_interval(estimates, confidence, **others)
    low, high = log_z_limits(estimates, 1 - confidence, **others)
    crossed = bool(low > high)
    # log Z and the expectation of (4) may each fail half as often.
    half = 1 - (1 - confidence) / 2
    log_z_half = log_z_interval(estimates, half, **others)
    known = _known(sampler, sampler.elsewhere(samples, target_samples), log_w, targets, reward_max)
    elbo, why_elbo = expectation(log_w, confidence, known["elbo"])
    kl_policy = difference(log_z_half, expectation(log_w, half, known["elbo"]).interval, least=0.0)
    eubo, why_eubo = None, ""
    kl_target = self_normalised_kl(log_w, confidence)
    if targets is not None:
        eubo, why_eubo = expectation(targets, confidence, known["eubo"])
        eubo_half = expectation(targets, half, known["eubo"]).interval
        kl_target = difference(eubo_half, log_z_half, least=0.0)
    expected_reward, why_reward = expectation(reward, confidence, known["reward"])
    ess = float(effective_sample_size(log_w))
    open_ends = {
        "ELBO and KL(policy, target)": why_elbo,
        "EUBO and KL(target, policy)": why_eubo,
        "expected reward": why_reward,
    }
    return Certificate(
        mode="sampled",
        num_samples=samples,
        num_target_samples=0 if targets is None else len(targets),
        log_z=log_z,
        kl_policy_target=kl_policy,
        kl_target_policy=kl_target,
        elbo=elbo,
        eubo=eubo,
        expected_reward_policy=expected_reward,
        entropy_policy=entropy_expectation(
            log_pi, UniformResponses(sampler.ebm.space).log_count, confidence, known["entropy"]
        ),
        ess=ess,
        warnings=[
            *_warnings(log_w, log_z, crossed, ess, particles),
            *(f"{name}: an end is open: {why}" for name, why in open_ends.items() if why),
        ],
    )


def _known(
    sampler: Sampler,
    elsewhere: Elsewhere,
    log_w: Tensor,
    targets: Tensor | None,
    reward_max: float | None,
) -> dict[str, Known]:
    """What is known of log W under either law, of R and of -log pi, besides the samples."""
    ebm, listed = sampler.ebm, elsewhere.turn is None
    least, most = limits_of(ebm.reward_model, ebm.space, sampler.prompt)
    most = most if reward_max is None else min(most, reward_max)
    impossible = missing = ""
    if not listed:
        if ebm.forbids:
            impossible = "the EBM forbids some responses, and the policy may give mass to them"
        if forbids_of(sampler.policy):
            missing = "the policy forbids some responses, and the target may give mass to them"
    below, mass_below = elsewhere.of_policy(elsewhere.log_w)
    log_z = float(log_mean(log_w))  # an estimate
    above, mass_above = elsewhere.of_target(log_z)
    rewards, masses = elsewhere.of_policy(elsewhere.reward)
    surprise, mass_surprise = elsewhere.of_policy(-elsewhere.log_pi)
    ends = [(-math.inf, math.inf)] * 2
    if listed:
        ends = [_ends(below), _ends(above)]
        first, last = _ends(rewards)
        least, most = max(least, first), min(most, last)
    # Markov's inequality: pi(W >= Z e^d) <= e^-d, and p*(W <= Z e^-d) <= e^-d. Of an estimate that
    # is too small, as one from few weights is, only the second holds.
    light = max(log_z, elsewhere.log_z_least)
    every: dict[str, Any] = {"listed": listed, "unit": 1.0}
    return {
        "elbo": Known(*ends[0], below, mass_below, below=impossible, light_above=light, **every),
        "eubo": Known(*ends[1], above, mass_above, above=missing, light_below=log_z, **every),
        "reward": Known(
            least,
            most,
            elsewhere=rewards,
            masses=masses,
            listed=listed,
            below=impossible if ebm.reward_model.forbids else "",
        ),
        "entropy": Known(elsewhere=surprise, masses=mass_surprise, listed=listed),
    }


def _ends(x: Tensor) -> tuple[float, float]:
    """The least and the largest value that X takes, by a list; unbounded where it is empty."""
    return (float(x.min()), float(x.max())) if len(x) else (-math.inf, math.inf)


def _warnings(
    log_w: Tensor, log_z: Interval, crossed: bool, ess: float, particles: int | None
) -> list[str]:
    """Sentences on what the intervals are not good for."""
    out = []
    impossible = int(torch.isneginf(log_w).sum())
    if impossible:
        out.append(
            f"{impossible} of {len(log_w)} samples of the policy are impossible under the target: "
            "KL(policy, target) is infinite"
        )
    if ess < LOW_ESS and particles is None:
        out.append(
            f"the effective sample size is {ess:.3g}: a few samples carry all the weight, so the "
            "estimates are unreliable, log Z is probably too small, and the asymptotic intervals "
            "are not to be trusted"
        )
    if crossed:
        out.append(
            "the lower bound on log Z is above the upper one: by bad luck, or because the target "
            "samples are no exact samples of p*"
        )
    if log_z.high == math.inf:
        out.append(
            "nothing bounds log Z from above: give exact samples of the target "
            "(target_samples) or the largest reward (reward_max)"
        )
    elif log_z.width > WIDE:
        out.append(
            f"the bounds on log Z are {log_z.width:.3g} nats apart: too far to tell a good policy "
            "from a bad one"
        )
    return out
