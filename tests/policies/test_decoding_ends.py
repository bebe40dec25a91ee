"""Decoding ends with the longest response, and scoring reads no further."""

from __future__ import annotations

import pytest
import torch
from toy_policies import seeded, transformer

import rl_ebm
from rl_ebm.certificates.smc import smc
from rl_ebm.policies import Transformer, log_prob, q_values, sample
from rl_ebm.policies.scoring import mask_logits
from rl_ebm.tokens import length_mask

LONG = rl_ebm.TokenSpace(5, 128, eos_id=2)


class Ending:
    """Ends every response at one position; counts what it is asked for."""

    def __init__(self, end, face):
        self.end, self.calls = end, 0
        if face == "step":
            self.start, self.step = self._start, self._step

    def row(self, t):
        row = torch.zeros(5)
        row[2] = -torch.inf
        if t == self.end:
            row = row.fill_(-torch.inf).index_fill(0, torch.tensor(2), 0.0)
        return row

    def logits(self, tokens, prompt_ids=None):
        self.calls += 1
        rows = torch.stack([self.row(t) for t in range(128)])
        return rows.expand(len(tokens), -1, -1)

    def _start(self, prompt_ids):
        return {"t": -1, "n": len(prompt_ids)}

    def _step(self, state, tokens):
        self.calls += 1
        state["t"] += 1
        return self.row(state["t"]).expand(state["n"], -1)


@pytest.mark.parametrize("face", ["logits", "step"])
@pytest.mark.parametrize("end", [0, 3, 126])
def test_as_many_forwards_as_the_longest_response_has_tokens(face, end):
    policy = Ending(end, face)
    batch = sample(policy, LONG, 7, seeded())
    assert policy.calls == end + 1
    assert batch.tokens.shape == (7, 128)
    assert batch.lengths.tolist() == [end + 1] * 7
    assert torch.equal(LONG.check(batch.tokens, batch.lengths), batch.lengths)
    assert (batch.tokens[~batch.mask] == 0).all()


def test_no_response_no_forward_more_than_one():
    policy = Ending(3, "step")
    assert len(sample(policy, LONG, 0, seeded())) == 0
    assert policy.calls <= 1


@pytest.mark.parametrize("face", ["logits", "step"])
def test_particles_end_as_well_and_estimate_the_same(face):
    policy = Ending(3, face)
    ebm = rl_ebm.EBM(LONG, lambda tokens, lengths: tokens[:, 0].double())
    found = smc(ebm, policy, 20_000, generator=seeded())
    tried = 3 if face == "logits" else 3 + 4  # at the door: logits, and whether step agrees
    assert policy.calls == tried + 4  # and a pass for each token
    assert found.ess.shape == found.resampled.shape == (1, 128)
    # 4 choices at each of three places, then EOS: Z of these is sum over the first token.
    want = torch.tensor([0.0, 1.0, 3.0, 4.0]).exp().sum() * 16
    assert float(found.log_z) == pytest.approx(float(want.log()), abs=0.05)


def test_samples_are_those_of_a_decoding_to_the_end():
    """Stopping early changes no token: the first draws of a generator are the same."""
    space = rl_ebm.TokenSpace(4, 6, eos_id=1)
    policy = transformer(space)
    batch = sample(policy, space, 40, seeded(3))
    generator = seeded(3)
    tokens = torch.zeros(40, 6, dtype=torch.int64)
    mask = space.action_mask()
    for t in range(6):
        logits = policy.logits(tokens)[:, t].masked_fill(~mask[t], -torch.inf).detach()
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        tokens[:, t] = (logits - noise).argmax(-1)
    lengths = space.find_lengths(tokens)
    assert torch.equal(batch.lengths, lengths)
    assert torch.equal(batch.tokens, tokens.masked_fill(~length_mask(lengths, 6), 0))


@pytest.mark.parametrize("prompts", [None, [[1], [2, 0]]])
def test_scoring_reads_no_further_than_the_longest_response(prompts):
    space = rl_ebm.TokenSpace(4, 9, eos_id=0)
    policy = transformer(space, prompts)
    widths = []
    real = Transformer._sequence_pass

    def watched(self, tokens, rows):
        widths.append(tokens.shape[1])
        return real(self, tokens, rows)

    tokens = torch.tensor([[1, 2, 0, 3, 3, 3, 3, 3, 3], [3, 0, 0, 0, 0, 0, 0, 0, 0]])
    lengths, ids = torch.tensor([3, 2]), torch.zeros(2, dtype=torch.int64)
    want = mask_logits(policy.logits(tokens, ids), space)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "_sequence_pass", watched)
        got = q_values(policy, space, tokens, ids)
        log_prob(policy, space, tokens, lengths, ids)
        ebm = rl_ebm.EBM(space, lambda *x: x[1].double(), 1.0, policy, prompts)
        ebm.log_weight(tokens, lengths, ids)
    assert widths == [3, 3, 3]
    assert got.shape == (2, 9, 4)
    mask = length_mask(lengths, 9)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-12, atol=1e-12)
    gradients = []
    for q in (q_values(policy, space, tokens, ids), mask_logits(policy.logits(tokens, ids), space)):
        policy.zero_grad()
        q[mask].logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_row_without_an_end_is_read_whole():
    space = rl_ebm.TokenSpace(4, 5, eos_id=0)
    policy = transformer(space)
    tokens = torch.tensor([[1, 2, 3, 3, 3], [0, 1, 1, 1, 1]])
    want = mask_logits(policy.logits(tokens), space)
    torch.testing.assert_close(q_values(policy, space, tokens), want, rtol=0, atol=0)


@pytest.mark.parametrize("n", [-1, 2.5, True, "3", None, 2**40])
def test_a_number_of_samples_is_one(n):
    space = rl_ebm.TokenSpace(3, 3)
    with pytest.raises(ValueError, match="n must be an integer in"):
        sample(transformer(space), space, n)
