"""Small policies for the tests, and their probabilities by the chain rule in Python."""

from __future__ import annotations

import math

import brute_force
import torch
from brute_force import INF, log_softmax

from rl_ebm.policies import Tabular, Transformer, TransformerConfig

SHAPES = [(3, 3, None), (2, 4, None), (4, 1, None), (4, 3, 1), (3, 4, 2), (3, 1, 1)]
PROMPTS = [[], [2, 0, 6], [1]]  # ragged, with an id that no response has
OTHER_INTEGERS = [torch.int8, torch.int16, torch.int32]
OTHER_INTEGERS += [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
SMALL = TransformerConfig(layers=2, heads=2, dim=8, hidden=12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(module, seed=0):
    for parameter in module.double().parameters():
        parameter.data.normal_(0, 0.6, generator=seeded(seed + parameter.numel()))
    return module


def transformer(space, prompts=None, seed=0):
    return randomised(Transformer(space, SMALL, prompts), seed)


def tabular(space, prompts=None, seed=0):
    return Tabular(space, prompts, scale=1.5, generator=seeded(seed), dtype=torch.float64)


class Plain:
    """A policy that has nothing but logits, by look-up; after an EOS they are NaN."""

    def __init__(self, space, tables):
        self.space = space
        self.rows = {
            (i, s): row.tolist()
            for t, table in enumerate(tables)
            for i, prompt_rows in enumerate(table)
            for s, row in zip(
                brute_force.prefixes(space.vocab_size, t, space.eos_id), prompt_rows, strict=True
            )
        }

    def logits(self, tokens, prompt_ids=None):
        dead = [math.nan] * self.space.vocab_size
        ids = [0] * len(tokens) if prompt_ids is None else prompt_ids.tolist()
        steps = range(tokens.shape[1])
        rows = [
            [self.rows.get((i, tuple(y[:t])), dead) for t in steps]
            for i, y in zip(ids, tokens.tolist(), strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)


class Only:
    """A policy with some of its faces alone; where ``logits`` is not among them it fails."""

    def __init__(self, policy, *names):
        self.prompts = getattr(policy, "prompts", None)
        for name in names:
            setattr(self, name, getattr(policy, name))

    def never(self, *_):
        raise AssertionError("this face was to be left alone")

    logits = never


def logits_by_prefix(policy, space, num_prompts=1):
    """Masked raw logits of every prefix, from whole sequences, as lists."""
    tokens, lengths = brute_force.padded(responses(space), space.max_length)
    out = {}
    for i in range(num_prompts):
        with torch.no_grad():
            rows = policy.logits(tokens, torch.full((len(tokens),), i)).tolist()
        for y, n, row in zip(tokens.tolist(), lengths.tolist(), rows, strict=True):
            for t in range(n):
                last = space.eos_id is not None and t == space.max_length - 1
                row[t] = [-INF if last and a != space.eos_id else x for a, x in enumerate(row[t])]
                out[i, tuple(y[:t])] = row[t]
    return out


def exact_log_probs(policy, space, num_prompts=1):
    """log pi of every response of every prompt, by the chain rule over log-softmaxes."""
    rows = {s: log_softmax(row) for s, row in logits_by_prefix(policy, space, num_prompts).items()}
    return [
        [math.fsum(rows[i, y[:t]][a] for t, a in enumerate(y)) for y in responses(space)]
        for i in range(num_prompts)
    ]


def responses(space):
    return brute_force.sequences(space.vocab_size, space.max_length, space.eos_id)


def close(got, want, tolerance=1e-11, **others):
    torch.testing.assert_close(got, want, **{"rtol": tolerance, "atol": tolerance, **others})


# Rewards ---------------------------------------------------------------------------------------

GARBAGE = 10**6  # what unread places hold: no legal id


def scores_of(space, num_prompts=None, dtype=torch.float64, seed=0):
    shape = (
        (len(responses(space)),) if num_prompts is None else (num_prompts, len(responses(space)))
    )
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def everything(space, num_prompts=1, pad=GARBAGE):
    """Every response to every prompt, shuffled: tokens, lengths, prompt ids, (prompt, place)."""
    all_pairs = [(i, k) for i in range(num_prompts) for k in range(len(responses(space)))]
    order = torch.randperm(len(all_pairs), generator=seeded(9)).tolist()
    pairs = [all_pairs[j] for j in order]
    tokens, lengths = brute_force.padded(
        [responses(space)[k] for _, k in pairs], space.max_length, pad
    )
    return tokens, lengths, torch.tensor([i for i, _ in pairs]), pairs
