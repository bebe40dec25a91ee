"""EBMs and policies whose figures are hard to estimate, with the truth by enumeration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular, Uniform

INF = math.inf


class Case(NamedTuple):
    ebm: rl_ebm.EBM
    policy: Tabular


def truth_of(case: Case) -> dict[str, float]:
    """By listing all responses."""
    ebm, policy = case
    tokens, lengths = ebm.space.sequences()
    ids = torch.zeros(len(tokens), dtype=torch.int64)
    log_pi = rl_ebm.policies.log_prob(policy, ebm.space, tokens, lengths).detach().double()
    log_w = ebm.log_weight(tokens, lengths)
    reward = ebm.reward(tokens, lengths, ids).double()
    log_z = torch.logsumexp(log_w, 0)
    pi, star = log_pi.exp(), (log_w - log_z).exp()

    def mean(p, x):
        return float((p * x).masked_fill(p == 0, 0.0).sum())

    return {
        "log_z": float(log_z),
        "elbo": mean(pi, log_w - log_pi),
        "eubo": mean(star, log_w - log_pi),
        "kl_policy_target": mean(pi, log_pi - log_w + log_z),
        "kl_target_policy": mean(star, log_w - log_z - log_pi),
        "expected_reward_policy": mean(pi, reward),
        "entropy_policy": -mean(pi, log_pi.masked_fill(torch.isneginf(log_pi), 0.0)),
        "mass_impossible": float(pi[torch.isneginf(log_w)].sum()),
    }


def near(ebm: rl_ebm.EBM, change, noise: float = 0.1) -> Case:
    """A policy with the exact logits, some noise, and what ``change`` does to its tables."""
    g = seeded(11)
    q = [
        x.reshape(-1, x.shape[-1]).clone() + noise * torch.randn(x.shape[-2:], generator=g).double()
        for x in rl_ebm.solve(ebm).tables()
    ]
    change(q)
    return Case(ebm, Tabular.from_tables(q, ebm.space))


def even_ebm(seed: int = 3, scale: float = 0.5) -> torch.Tensor:
    """Scores of all 256 responses of 4 tokens of 4."""
    return scale * torch.randn(256, generator=seeded(seed), dtype=torch.float64)


SPACE = rl_ebm.TokenSpace(4, 4)
LISTED = SPACE.sequences()[0].tolist()


def light() -> Case:
    """A policy that is a little off everywhere."""
    return near(rl_ebm.EBM(SPACE, even_ebm(), reference=Uniform(SPACE)), lambda q: None, 0.4)


def missed_branch(share: float = 0.005) -> Case:
    """The target begins with token 0 now and then, the policy never does."""
    scores = even_ebm().view(4, 64)
    scores[0] += (
        math.log(share / (1 - share)) + scores[1:].logsumexp((0, 1)) - scores[0].logsumexp(0)
    )

    def change(q):
        q[0][0, 0] -= 40.0

    return near(rl_ebm.EBM(SPACE, scores.flatten()), change)


def missed_response(share: float = 0.005) -> Case:
    """One response has some mass of the target, which the policy does not give it."""
    scores = even_ebm()
    scores[7] = math.log(share) + torch.cat([scores[:7], scores[8:]]).logsumexp(0)

    def change(q):
        q[3][1, 3] -= 40.0

    return near(rl_ebm.EBM(SPACE, scores), change)


def heavy() -> Case:
    """Each further first token half as probable, and twice as badly underrated."""
    space = rl_ebm.TokenSpace(12, 2)
    token = torch.arange(12, dtype=torch.float64)
    scores = (-math.log(2) * token)[:, None] + 0.1 * torch.randn(
        12, 12, generator=seeded(5), dtype=torch.float64
    )

    def change(q):
        q[0][0] -= 2.0**token / 8

    return near(rl_ebm.EBM(space, scores.flatten()), change)


def impossible(share: float = 0.003, function: bool = False) -> Case:
    """The policy now and then gives a response of reward -inf."""
    scores = even_ebm()
    scores[:64] = -INF

    def change(q):
        q[0][0, 0] = q[0][0, 1:].logsumexp(0) + math.log(share)
        for x in q[1:]:
            x[: len(x) // 4] = 0.0

    reward = scores
    if function:

        def reward(tokens, lengths):
            return scores[SPACE.sequence_indices(tokens, lengths)]

    ebm = rl_ebm.EBM(SPACE, scores)
    case = near(ebm, change)
    return Case(rl_ebm.EBM(SPACE, reward), case.policy)


def rare_pay(share: float = 0.01) -> Case:
    """A reward of 1 for what the policy hardly gives, else 0."""
    scores = [1.0 if y[1:] == [0, 0, 0] or y[:3] == [0, 0, 0] else 0.0 for y in LISTED]
    ebm = rl_ebm.EBM(SPACE, torch.tensor(scores, dtype=torch.float64))

    def change(q):
        for x in q:
            x[:, 0] += math.log(share ** (1 / 3) * 1.5)

    return near(ebm, change)


def long_tail(share: float = 0.02, max_length: int = 9) -> Case:
    """Responses are short, but for some that go on; there the policy is off at every state."""
    space = rl_ebm.TokenSpace(3, max_length, eos_id=0)
    q = [torch.zeros(space.num_prefixes(t), 3, dtype=torch.float64) for t in range(max_length)]
    g = seeded(2)
    for t, x in enumerate(q):
        x[:, 1:] = torch.randn(len(x), 2, generator=g, dtype=torch.float64)
        x[:, 0] = -1.5
        if t == 0:
            x[:, 0] = x[:, 1:].logsumexp(1) - math.log(share)
    tokens, lengths = space.sequences()
    target = Tabular.from_tables(q, space)
    log_p = rl_ebm.policies.log_prob(target, space, tokens, lengths).detach()
    ebm = rl_ebm.EBM(space, _lookup(space, log_p))

    def change(q):
        for x in q[1:]:
            x[:, 1] += 3.0
        q[0] += 0.1 * torch.randn(q[0].shape, generator=seeded(4)).double()

    return near(ebm, change, 0.0)


def _lookup(space, scores):
    place = {}
    tokens, lengths = space.sequences()
    for i, (y, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        place[tuple(y[:n])] = i

    def reward(tokens, lengths):
        ids = [place[tuple(y[:n])] for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return scores[ids]

    return reward


def rare_branch(share: float = 0.02) -> Case:
    """After one first token, which the target gives now and then, the policy is far off."""
    space = rl_ebm.TokenSpace(4, 6)
    scores = 0.5 * torch.randn(4, 1024, generator=seeded(6), dtype=torch.float64)
    rest = scores[1:].logsumexp((0, 1)) - scores[0].logsumexp(0)
    scores[0] += math.log(share / (1 - share)) + rest

    def change(q):
        for x in q[1:]:
            x[: len(x) // 4, 1] += 6.0

    return near(rl_ebm.EBM(space, scores.flatten()), change)


def far_tail() -> Case:
    """The long tail of a space whose responses are not listed."""
    return long_tail(max_length=12)


CASES = {
    f.__name__: f
    for f in (light, heavy, missed_branch, missed_response, impossible, rare_pay, long_tail)
} | {f.__name__: f for f in (rare_branch, far_tail)}
