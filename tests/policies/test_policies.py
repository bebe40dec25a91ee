"""Policies: scores by the tree and by sequences, what is sampled, what padding and masks may do.

Tables and networks start random and large: near zero every wrong path looks right.
"""

from __future__ import annotations

import math
from collections import Counter

import brute_force
import jaxtyping
import pytest
import torch
from brute_force import INF
from toy_policies import (
    OTHER_INTEGERS,
    PROMPTS,
    SHAPES,
    Only,
    Plain,
    close,
    exact_log_probs,
    logits_by_prefix,
    randomised,
    responses,
    seeded,
    tabular,
    transformer,
)

from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies import (
    MLP,
    MLPConfig,
    Policy,
    Tabular,
    Uniform,
    fit_ngram,
    log_pi_rows,
    log_prob,
    mask_logits,
    q_values,
    sample,
    tree_logits,
    tree_q_values,
)
from rl_ebm.tokens import TokenSpace, length_mask

POLICIES = [transformer, tabular]
in_all_spaces = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_prompts = pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])


# Tables and the uniform policy ----------------------------------------------------------------


@in_all_spaces
def test_a_table_gives_every_prefix_its_own_row(shape):
    space = TokenSpace(*shape)
    q = brute_force.random_tables(*shape, leading=(3,))
    policy, plain = Tabular.from_tables(q, space, PROMPTS), Plain(space, q)
    assert logits_by_prefix(policy, space, 3) == logits_by_prefix(plain, space, 3)
    for got, want in zip(policy.tables(), q, strict=True):
        close(got.detach(), want, 0.0)
    ids = torch.tensor([2, 0])
    tree = PrefixTree.below(space, 0, 0, 1, space.max_length)[0]
    close(policy.tree_logits(tree, ids), torch.cat(q, dim=1)[ids], 0.0)


def test_a_table_starts_random_and_keeps_what_it_is_told():
    space = TokenSpace(5, 4)
    tables = [Tabular(space, scale=s, generator=seeded(3)).table for s in (1.0, 0.5)]
    close(tables[0] * 0.5, tables[1], 0.0)
    assert abs(float(tables[0].detach().std()) - 1) < 0.1
    assert not torch.equal(Tabular(space, generator=seeded(4)).table, tables[0] * 0.1)
    assert Tabular(space, logits_are_values=True).logits_are_values
    assert not Tabular(space).logits_are_values
    assert Tabular(space, dtype=torch.float64).table.dtype == torch.float64


def test_from_tables_copies_checks_and_knows_what_is_forbidden():
    space = TokenSpace(3, 2)
    q = brute_force.random_tables(3, 2)
    policy = Tabular.from_tables(q, space, logits_are_values=True)
    assert policy.logits_are_values
    assert not policy.forbids
    policy.table.data += 1
    assert not torch.equal(policy.tables()[0][0], q[0])
    q[1][2, 1] = -INF
    assert Tabular.from_tables(q, space).forbids
    with pytest.raises(ValueError, match="q is for 1 prompts, expected 3"):
        Tabular.from_tables(q, space, PROMPTS)
    with pytest.raises(ValueError, match=r"q\[1\] has shape"):
        Tabular.from_tables(brute_force.random_tables(2, 2), TokenSpace(2, 2, 0))


@in_all_spaces
def test_the_uniform_policy_divides_equally_among_allowed_tokens(shape):
    space = TokenSpace(*shape)
    tokens, lengths = brute_force.padded(responses(space), space.max_length)
    want = []
    for y in responses(space):
        last = space.eos_id is not None and len(y) == space.max_length
        want.append(-math.log(space.vocab_size) * (len(y) - last))
    close(
        log_prob(Uniform(space), space, tokens, lengths).double(), torch.tensor(want).double(), 1e-6
    )
    rows = log_pi_rows(Uniform(space), space, tokens)[0].max(-1).values
    close(rows.double(), torch.tensor(Uniform(space).log_ref_constants()).double(), 1e-6)


# Scores ---------------------------------------------------------------------------------------


@in_all_spaces
@with_and_without_prompts
@pytest.mark.parametrize("make", POLICIES)
def test_log_prob_is_the_sum_of_log_softmaxes_whatever_stands_past_the_end(shape, prompts, make):
    space = TokenSpace(*shape)
    policy, num_prompts = make(space, prompts), len(prompts or [[]])
    want = torch.tensor(exact_log_probs(policy, space, num_prompts), dtype=torch.float64)
    for pad in range(space.vocab_size):
        tokens, lengths = brute_force.padded(responses(space), space.max_length, pad)
        for i in range(num_prompts):
            ids = torch.full((len(tokens),), i) if prompts else None
            close(log_prob(policy, space, tokens, lengths, ids), want[i])
            # One row at a time never takes the tree.
            one = log_prob(policy, space, tokens[:1], lengths[:1], None if ids is None else ids[:1])
            close(one, want[i, :1])
    close(want.exp().sum(1), torch.ones(num_prompts).double())


@in_all_spaces
@with_and_without_prompts
@pytest.mark.parametrize("make", POLICIES)
def test_q_values_and_gradients_by_the_tree_are_those_by_sequences(shape, prompts, make):
    space = TokenSpace(*shape)
    policy, num_prompts = make(space, prompts), len(prompts or [[]])
    tokens, lengths = brute_force.padded(responses(space) * 4 * num_prompts, space.max_length)
    ids = torch.randint(num_prompts, (len(tokens),), generator=seeded())
    mask = length_mask(lengths, space.max_length)

    tree_only = Only(policy, "tree_logits")  # has no logits: the tree must do
    by_tree = q_values(tree_only, space, tokens, ids)
    by_rows = mask_logits(policy.logits(tokens, ids), space)
    close(by_tree[mask], by_rows[mask])

    weight = torch.randn(by_rows.shape, generator=seeded(1), dtype=torch.float64)
    allowed = mask[..., None] & torch.isfinite(by_rows)
    gradients = []
    for q in (by_tree, by_rows):
        policy.zero_grad()
        (q.masked_fill(~allowed, 0) * weight).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    assert max(float(g.abs().max()) for g in gradients[0]) > 0.1
    for got, want in zip(*gradients, strict=True):
        close(got, want, 1e-9)


def test_a_small_batch_is_not_worth_the_tree():
    space = TokenSpace(3, 4)
    rows_only = Only(transformer(space), "logits")
    rows_only.tree_logits = rows_only.never
    tokens = torch.randint(3, (9, 4), generator=seeded())  # 36 tokens, 40 states
    close(q_values(rows_only, space, tokens), rows_only.logits(tokens), 0.0)
    with pytest.raises(AssertionError, match="was to be left alone"):
        q_values(rows_only, space, tokens[[*range(9), 0]])


@in_all_spaces
def test_an_object_with_logits_alone_is_a_policy(shape):
    space = TokenSpace(*shape)
    q = brute_force.random_tables(*shape, leading=(2,), forbid=0.2)
    plain, table = Plain(space, q), Tabular.from_tables(q, space, [[], [1]])
    assert isinstance(plain, Policy)
    assert not isinstance(object(), Policy)
    close(tree_q_values(plain, space, 2), torch.cat(q, dim=1), 0.0)
    part = PrefixTree.below(space, space.max_length - 1, 0, 1, space.max_length)[0]
    ids = torch.tensor([1, 0])
    close(tree_logits(plain, part, ids, space), table.tree_logits(part, ids), 0.0)


@pytest.mark.parametrize("make", POLICIES)
def test_a_policy_without_prompts_answers_every_prompt_alike(make):
    space = TokenSpace(3, 3)
    policy, (tokens, _) = make(space), space.sequences()
    ids = torch.arange(len(tokens)) % 2
    rows = tree_q_values(policy, space)
    close(tree_q_values(policy, space, 2), rows.expand(2, -1, -1))
    close(q_values(policy, space, tokens, ids), policy.logits(tokens))
    batch, alone = (sample(policy, space, 27, seeded(), p) for p in (ids, None))
    assert torch.equal(batch.tokens, alone.tokens)


def test_half_precision_is_scored_in_float32():
    space = TokenSpace(3, 2, eos_id=0)
    policy = tabular(space).bfloat16()
    tokens, _ = space.sequences()
    assert mask_logits(policy.logits(tokens), space).dtype == torch.float32
    assert tree_q_values(policy, space).dtype == torch.float32
    assert mask_logits(policy.double().logits(tokens), space).dtype == torch.float64


# Samples --------------------------------------------------------------------------------------


def assert_drawn_from(drawn, log_probs, space):
    """Pearson's statistic of responses against exact log-probabilities, to six deviations."""
    counts, n = Counter(drawn), len(drawn)
    rare, chi2, cells = [0, 0.0], 0.0, 0
    for y, log_p in zip(responses(space), log_probs, strict=True):
        count, expected = counts.pop(y, 0), n * math.exp(log_p)
        assert expected > 0 or count == 0, f"{y} is impossible"
        if expected < 5:
            rare = [rare[0] + count, rare[1] + expected]
            continue
        chi2, cells = chi2 + (count - expected) ** 2 / expected, cells + 1
    assert not counts, f"{counts} are no responses"
    chi2 += (rare[0] - rare[1]) ** 2 / max(rare[1], 1.0)
    assert chi2 < cells + 6 * math.sqrt(2 * cells) + 6


FACES = {
    "tree": ("tree_logits",),
    "cache": ("start", "step"),
    "logits": ("logits",),
}


def drawn(batch):
    rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
    return [tuple(y[:n]) for y, n in rows]


@pytest.mark.slow
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shape", [(3, 3, None), (3, 4, 1)], ids=str)
@with_and_without_prompts
def test_samples_have_the_frequencies_of_the_exact_probabilities(face, shape, prompts):
    space = TokenSpace(*shape)
    policy, num_prompts = transformer(space, prompts), len(prompts or [[]])
    ids = torch.arange(9_000 * num_prompts) % num_prompts
    batch = sample(Only(policy, *FACES[face]), space, len(ids), seeded(), ids)
    assert torch.equal(batch.prompt_ids, ids)
    assert torch.equal(space.check(batch.tokens, batch.lengths), batch.lengths)
    assert (batch.tokens[~batch.mask] == 0).all()
    want = exact_log_probs(policy, space, num_prompts)
    for i in range(num_prompts):
        assert_drawn_from(drawn(batch)[i::num_prompts], want[i], space)


@pytest.mark.parametrize("make", [Tabular.from_tables, None], ids=["table", "plain"])
@pytest.mark.parametrize("shape", [(4, 3, None), (4, 3, 1)], ids=str)
def test_forbidden_tokens_are_never_drawn(make, shape):
    space = TokenSpace(*shape)
    q = brute_force.random_tables(*shape, seed=5, forbid=0.4, leading=(1,))
    q[0][..., 0] = 0.0  # the root has a way on
    for t, table in enumerate(q):
        dead = torch.isneginf(table).all(-1)
        table[dead] = 50.0 if t < space.max_length - 1 else 0.0  # and so has every state
    q[0][..., 3], q[-1][..., 0] = -INF, torch.clamp(q[-1][..., 0], min=-40.0)
    policy = Plain(space, q) if make is None else make(q, space)
    batch = sample(policy, space, 3_000, seeded())
    assert_drawn_from(drawn(batch), exact_log_probs(policy, space)[0], space)


def test_the_temperature_divides_the_logits():
    space = TokenSpace(3, 3, eos_id=0)
    policy = tabular(space)
    warm = Tabular.from_tables([t.detach() / 2.5 for t in policy.tables()], space)
    batch = sample(policy, space, 9_000, seeded(), temperature=2.5)
    assert_drawn_from(drawn(batch), exact_log_probs(warm, space)[0], space)


def test_with_epsilon_some_tokens_are_uniform_ones():
    space, epsilon = TokenSpace(3, 3, eos_id=0), 0.4
    policy = tabular(space)
    mask = space.action_mask()
    mixed = []
    for t, table in enumerate(policy.tables()):
        pi = table.detach().masked_fill(~mask[t], -INF).softmax(-1)
        mixed.append(((1 - epsilon) * pi + epsilon * mask[t] / mask[t].sum()).log())
    batch = sample(policy, space, 9_000, seeded(), epsilon=epsilon)
    mixture = Tabular.from_tables(mixed, space)
    assert_drawn_from(drawn(batch), exact_log_probs(mixture, space)[0], space)


@pytest.mark.parametrize("n", [0, 1, 5, 400])
def test_the_same_seed_draws_the_same_bits(n):
    space = TokenSpace(3, 4, eos_id=2)
    policy = transformer(space, PROMPTS)
    ids = torch.arange(n) % 3
    first, second, other = (sample(policy, space, n, seeded(s), ids) for s in (0, 0, 1))
    assert len(first) == n
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.lengths, second.lengths)
    assert n < 5 or not torch.equal(first.tokens, other.tokens)


def test_prompt_ids_are_checked():
    space = TokenSpace(3, 2)
    policy = transformer(space, PROMPTS)
    with pytest.raises(ValueError, match=r"there are 3 prompts: give prompt_ids, one .* 4 rows"):
        sample(policy, space, 4)
    with pytest.raises(ValueError, match=r"prompt_ids has shape \(2,\), expected \(4,\)"):
        sample(policy, space, 4, prompt_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"prompt_ids must be in \[0, 3\)"):
        sample(policy, space, 2, prompt_ids=torch.tensor([0, 3]))
    for make in POLICIES:
        with pytest.raises(ValueError, match="there are 3 prompts: give prompt_ids"):
            make(space, PROMPTS).logits(torch.zeros(1, 2, dtype=torch.int64))


def mlp(space, prompts=None):
    return randomised(MLP(space, MLPConfig(layers=1, hidden=8), prompts))


def bigrams(space, prompts=None):
    ids = torch.arange(50) % len(prompts or [[]])
    drawn = sample(Uniform(space), space, 50, seeded(), ids)
    return fit_ngram(space, drawn, order=2, smoothing=0.1, prompts=prompts)


@pytest.mark.parametrize("dtype", OTHER_INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(8, 4, None), (8, 4, 5)], ids=str)
@pytest.mark.parametrize("make", [tabular, transformer, mlp, bigrams, Uniform])
def test_integers_of_any_size_are_read_as_int64(make, shape, dtype, monkeypatch):
    # Annotations, which say int64, are checked in the tests alone.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    space = TokenSpace(*shape)
    policy = make(space) if make is Uniform else make(space, [[1], [], [7, 2]])
    tokens, lengths = (x[::31] for x in space.sequences())
    ids = torch.arange(len(tokens)) % 3
    wide, small = ((tokens.to(d), lengths.to(d), ids.to(d)) for d in (torch.int64, dtype))
    pairs = [[log_prob(policy, space, *x) for x in (wide, small)]]
    calls = [policy.logits, *([policy.log_probs] if hasattr(policy, "log_probs") else [])]
    calls += [lambda *x, f=f: f(policy, space, *x) for f in (q_values, log_pi_rows)]
    pairs += [[call(x[0], x[2]) for x in (wide, small)] for call in calls]
    if hasattr(policy, "step"):
        pairs += [[all_steps(policy, x[0], x[2]) for x in (wide, small)]]
    for want, got in pairs:
        assert torch.equal(got, want)


def all_steps(policy, tokens, ids):
    state = policy.start(ids)
    return torch.stack([policy.step(state, t) for t in (None, *tokens[:, :-1].unbind(1))])


@pytest.mark.parametrize("token", [-1, 3, 2**40])
@pytest.mark.parametrize("make", [tabular, transformer, mlp, bigrams])
def test_a_token_that_is_no_id_is_told(make, token):
    space = TokenSpace(3, 3)
    policy, tokens = make(space, PROMPTS[::2]), torch.tensor([[0, token, 1]])
    ids = torch.tensor([0])
    for call in (policy.logits, lambda *x: q_values(policy, space, *x)):
        with pytest.raises(ValueError, match=r"token ids must be in \[0, 3\), got"):
            call(tokens, ids)
    # One that starts alike for all prompts reads no prompt ids.
    for wrong in (-1, 2) if make is not bigrams else ():
        with pytest.raises(ValueError, match=r"prompt_ids must be in \[0, 2\)"):
            policy.logits(tokens.clamp(0, 2), torch.tensor([wrong]))


def test_a_table_forbids_where_the_space_allows():
    space = TokenSpace(3, 2, eos_id=1)
    rows = [torch.zeros(1, 3), torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)]
    assert not Tabular.from_tables(rows, space).forbids
    rows[0][0, 2] = -torch.inf
    assert Tabular.from_tables(rows, space).forbids
