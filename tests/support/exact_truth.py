"""EBMs at any temperature by enumeration: rewards as fractions, so that nothing is rounded before
their differences are taken and divided by beta."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from brute_force import INF, log_softmax, log_sum_exp, sequences


def log_weights(scores, beta, log_ref):
    """log p_ref + (R - R of the likeliest) / beta, each rounded once; and R of the likeliest.

    Args:
        scores: R of every response, as the floats that the library is given.
        log_ref: log p_ref of every response.
    """
    exact = [
        None if r == -INF or w == -INF else Fraction(r)
        for r, w in zip(scores, log_ref, strict=True)
    ]
    b = Fraction(beta)

    def below(top):
        return [
            -INF if x is None else ref + float((x - top) / b)
            for x, ref in zip(exact, log_ref, strict=True)
        ]

    top = max(x for x in exact if x is not None)
    # The best reward may be one that p_ref all but forbids.
    weights = below(top)
    top = exact[weights.index(max(weights))]
    return below(top), top


class Truth:
    """Everything about one prompt's EBM, in the library's order of responses."""

    def __init__(self, scores, beta, log_ref, space):
        self.space, self.scores = space, scores
        self.log_w, self.top = log_weights(scores, beta, log_ref)
        z = log_sum_exp(self.log_w)
        self.log_z = float(self.top / Fraction(beta) + Fraction(z))
        self.log_p = [w - z for w in self.log_w]
        self.p = [math.exp(x) for x in self.log_p]
        self.responses = sequences(space.vocab_size, space.max_length, space.eos_id)
        self.expected_reward = self.mean(scores)
        self.entropy = -math.fsum(
            p * x for p, x in zip(self.p, self.log_p, strict=True) if x > -INF
        )

    def pairs(self):
        return zip(self.p, self.log_p, strict=True)

    def mean(self, values):
        return math.fsum(p * x for p, x in zip(self.p, values, strict=True) if p > 0)

    def marginal(self, prefix):
        return math.fsum(
            p
            for p, y in zip(self.p, self.responses, strict=True)
            if y[: len(prefix)] == tuple(prefix)
        )


def reference_log_probs(reference, space, prompt=0):
    """log p_ref of every response from the policy's raw logits alone, token by token."""
    responses = sequences(space.vocab_size, space.max_length, space.eos_id)
    if reference is None:
        return [0.0] * len(responses)
    pad = 0
    tokens = torch.tensor([[*y, *[pad] * (space.max_length - len(y))] for y in responses])
    with torch.no_grad():
        rows = reference.logits(tokens, torch.full((len(tokens),), prompt)).double().tolist()
    out = []
    for y, logits in zip(responses, rows, strict=True):
        total = []
        for t, a in enumerate(y):
            forced = space.eos_id is not None and t == space.max_length - 1
            total.append(0.0 if forced else log_softmax(logits[t])[a])
        out.append(-INF if -INF in total else math.fsum(total))
    return out
