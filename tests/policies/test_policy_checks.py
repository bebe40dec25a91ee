"""Policies of others at every door: causal, deterministic, row by row; or a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_policies import seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.certificates.smc import smc
from rl_ebm.policies import Tabular
from rl_ebm.policies.checks import check_rows

SPACES = [
    rl_ebm.TokenSpace(3, 4),
    rl_ebm.TokenSpace(4, 3, eos_id=1),
    rl_ebm.TokenSpace(2, 1),
    rl_ebm.TokenSpace(2, 5, eos_id=0),
    rl_ebm.TokenSpace(40, 30, eos_id=7),
]
by_space = pytest.mark.parametrize("space", SPACES, ids=str)


class Net(nn.Module):
    """A causal policy: an embedding of position and last token, summed along the sequence."""

    def __init__(self, space, dtype=torch.float64, dropout=0.0):
        super().__init__()
        self.space, self.dropout = space, nn.Dropout(dropout)
        shape = (space.max_length, space.vocab_size, space.vocab_size)
        self.weight = nn.Parameter(torch.randn(shape, generator=seeded(1), dtype=dtype))
        self.first = nn.Parameter(torch.randn(space.vocab_size, generator=seeded(2), dtype=dtype))

    def shifted(self, tokens):
        """Row t is what is known after tokens[:, :t + 1]: the commonest slip."""
        place = torch.arange(tokens.shape[1])
        return self.dropout(self.weight[place, tokens].cumsum(1))

    def logits(self, tokens, prompt_ids=None):
        rest = self.shifted(tokens)[:, :-1]
        return torch.cat([self.first.expand(len(tokens), 1, -1), self.first + rest], 1)


class Wrapper(nn.Module):
    """Another module with a slip in it."""

    def __init__(self, net, slip):
        super().__init__()
        self.net, self.slip = net, slip

    def logits(self, tokens, prompt_ids=None):
        return self.slip(self.net, tokens)


def by_hand(net, tokens):
    """Bit by bit the causal policy, one row at a time: right, whatever kernels do."""
    return torch.cat([net.logits(row[None]) for row in tokens])


def shifted(net, tokens):
    return net.shifted(tokens)


def shifted_by_two(net, tokens):
    ahead = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    return net.logits(tokens) + net.shifted(ahead)


def last_token_everywhere(net, tokens):
    return net.logits(tokens) + 0.01 * tokens[:, -1:, None]


def length_of_the_response(net, tokens):
    return net.logits(tokens) + 0.1 * (tokens == 0).sum(1)[:, None, None]


def sum_over_the_batch(net, tokens):
    return net.logits(tokens) + net.logits(tokens).mean(0, keepdim=True)


def noise(net, tokens):
    return net.logits(tokens) + 0.01 * torch.randn(len(tokens), 1, 1)


def masked_by_a_large_number(net, tokens):
    """A leak beside logits that stand for -inf."""
    rows = net.logits(tokens).clone()
    rows[..., 0] = -1e9
    return rows + 0.05 * torch.nn.functional.one_hot(tokens, rows.shape[-1])


@by_space
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_causal_policies_pass_in_every_precision(space, dtype):
    for policy in (Net(space, dtype), Wrapper(Net(space, dtype), by_hand)):
        check_rows(policy, space, 1)


@by_space
@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (shifted, r"depends on token t.*shift by one"),
        (shifted_by_two, r"not causal: row \d+ .* depends on the tokens from \d+ on"),
        (last_token_everywhere, r"not causal|shift by one"),
        (length_of_the_response, r"not causal|shift by one"),
        (masked_by_a_large_number, r"shift by one"),
        (sum_over_the_batch, r"depends on the other rows"),
        (noise, r"two calls .* draws random numbers"),
    ],
)
def test_every_slip_is_named(space, slip, words):
    if space.max_length == 1 and slip in (shifted_by_two,):
        words = "shift by one"  # there is no row before
    if slip is sum_over_the_batch and space.max_length == 1:
        slip = lambda net, tokens: net.logits(tokens) + net.first.std() * len(tokens)  # noqa: E731
    with pytest.raises(ValueError, match=words) as told:
        check_rows(Wrapper(Net(space), slip), space, 1)
    assert "\n" not in str(told.value)
    assert not str(told.value).endswith(".")


def distribution_sum(policy, space):
    """What the 'probabilities' of all responses sum to: 1 exactly where the policy is causal."""
    tokens, lengths = space.sequences()
    with torch.no_grad():
        return float(rl_ebm.policies.log_prob(policy, space, tokens, lengths).exp().sum())


def test_what_is_refused_is_no_distribution():
    space = rl_ebm.TokenSpace(3, 4)
    assert distribution_sum(Net(space), space) == pytest.approx(1.0)
    assert abs(distribution_sum(Wrapper(Net(space), shifted), space) - 1) > 0.1


def doors():
    space = rl_ebm.TokenSpace(3, 3)
    scores = torch.randn(27, generator=seeded(), dtype=torch.float64)
    ebm = rl_ebm.EBM(space, scores)
    solution = rl_ebm.solve(ebm)
    options = {name: entry.config() for name, entry in AGENTS.items()}
    g = torch.Generator().manual_seed(0)
    table = Tabular(space, generator=seeded(4))
    return space, {
        "verify": lambda p: rl_ebm.verify(p, solution),
        "verify along samples": lambda p: rl_ebm.verify(p, solution, samples=20),
        "certify": lambda p: rl_ebm.certify(p, ebm, 20),
        "smc": lambda p: smc(ebm, p, 5),
        "train": lambda p: rl_ebm.train(ebm, "soft-q", policy=p, steps=1),
        "train exact": lambda p: rl_ebm.train(ebm, "exact", policy=p, steps=1),
        "reference": lambda p: rl_ebm.EBM(space, scores, reference=p),
        "teacher": lambda p: AGENTS["teacher-forcing"].agent(
            ebm, table, options["teacher-forcing"], g, p
        ),
        "teacher of exact": lambda p: AGENTS["exact"].agent(ebm, table, None, g, p),
        "teacher on policy": lambda p: AGENTS["on-policy-distillation"].agent(
            ebm, table, None, g, p
        ),
    }


@pytest.mark.parametrize("door", doors()[1])
def test_every_door_is_watched(door):
    space, all_doors = doors()
    for slip, words in ((shifted, "shift by one"), (noise, "two calls"), (None, None)):
        policy = Net(space, torch.float32) if slip is None else Wrapper(Net(space), slip)
        before = torch.get_rng_state()
        if slip is None:
            all_doors[door](policy)
            continue
        with pytest.raises(ValueError, match=words):
            all_doors[door](policy)
        assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_random_numbers_are_left_alone():
    space = rl_ebm.TokenSpace(3, 3)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random"):
        check_rows(Wrapper(Net(space), noise), space, 1)
    check_rows(Net(space), space, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_named_and_is_none_where_the_library_turns_it_off():
    space = rl_ebm.TokenSpace(3, 3)
    scores = torch.randn(27, generator=seeded())
    ebm = rl_ebm.EBM(space, scores)
    policy = Net(space, torch.float32, dropout=0.5).train()
    for wrong in (
        lambda: rl_ebm.EBM(space, scores, reference=policy),
        lambda: rl_ebm.train(ebm, policy=policy, steps=1),
    ):
        with pytest.raises(ValueError, match=r"training mode, with dropout.*eval\(\)"):
            wrong()
    # Verification turns it off, and on again.
    got = rl_ebm.verify(policy, rl_ebm.solve(ebm))
    assert policy.training
    want = rl_ebm.verify(policy.eval(), rl_ebm.solve(ebm))
    assert got.kl_target_policy == want.kl_target_policy
    rl_ebm.EBM(space, scores, reference=policy)


def test_a_state_that_grows_from_call_to_call_is_no_policy():
    space = rl_ebm.TokenSpace(3, 3)

    class Counting(Net):
        calls = 0

        def logits(self, tokens, prompt_ids=None):
            Counting.calls += 1
            return super().logits(tokens) * Counting.calls

    with pytest.raises(ValueError, match=r"two calls .* keeps a state"):
        check_rows(Counting(space), space, 1)


def test_forbidden_actions_and_what_stands_past_the_end_are_no_fault():
    space = rl_ebm.TokenSpace(4, 4, eos_id=1)

    class Wild(Net):
        def logits(self, tokens, prompt_ids=None):
            rows = super().logits(tokens).clone()
            rows[..., 2] = -torch.inf
            ended = ((tokens == 1).cumsum(1) - (tokens == 1).long()) > 0
            ended = torch.cat(
                [torch.zeros_like(ended[:, :1]), (tokens == 1).cumsum(1)[:, :-1] > 0], 1
            )
            return rows.masked_fill(ended[..., None], torch.nan)

    check_rows(Wild(space), space, 1)


def test_what_is_never_reached_may_be_no_number():
    class Forbids(Net):
        def logits(self, tokens, prompt_ids=None):
            rows = super().logits(tokens).clone()
            rows[:, 0, 2] = -torch.inf
            rows[:, 1:][tokens[:, 0] == 2] = torch.nan
            return rows

    check_rows(Forbids(rl_ebm.TokenSpace(3, 3)), rl_ebm.TokenSpace(3, 3), 1)


def test_what_stands_past_the_end_may_depend_on_other_rows():
    space = rl_ebm.TokenSpace(4, 4, eos_id=1)

    class Numbered(Net):
        def logits(self, tokens, prompt_ids=None):
            ended = ((tokens == 1).cumsum(1) > 0)[:, :-1]
            ended = torch.cat([torch.zeros_like(ended[:, :1]), ended], 1)
            place = torch.arange(len(tokens))[:, None, None].double()
            return torch.where(ended[..., None], place, super().logits(tokens))

    check_rows(Numbered(space), space, 1)


def test_prompts_are_passed_on():
    space, prompts = rl_ebm.TokenSpace(3, 3), [[1], [2, 2], []]

    class Prompted(Net):
        seen = set()  # noqa: RUF012

        def logits(self, tokens, prompt_ids=None):
            Prompted.seen |= set(prompt_ids.tolist())
            return super().logits(tokens) * (1 + prompt_ids[:, None, None])

    policy = Prompted(space)
    policy.prompts = prompts
    rl_ebm.EBM(space, lambda tokens, lengths, ids: tokens.double().sum(1), 1.0, policy, prompts)
    assert Prompted.seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("logits", "error", "words"),
    [
        (lambda n: (torch.zeros(n, 3, 3), None), TypeError, "no tensor but tuple"),
        (lambda n: torch.zeros(n, 3, 3).numpy(), TypeError, "no tensor but ndarray"),
        (lambda n: None, TypeError, "no tensor but NoneType"),
        (lambda n: torch.zeros(n, 3, 4), ValueError, r"shape \(\d+, 3, 4\), expected \(B, 3, 3\)"),
        (lambda n: torch.zeros(n, 3), ValueError, r"shape \(\d+, 3\), expected"),
        (lambda n: torch.zeros(1, 3, 3), ValueError, "one entry for each row"),
        (lambda n: torch.zeros(n, 3, 3, dtype=torch.complex64), ValueError, "complex64"),
        (lambda n: torch.full((n, 3, 3), torch.nan), ValueError, r"NaN or \+inf at depth 0"),
        (lambda n: torch.full((n, 3, 3), torch.inf), ValueError, r"NaN or \+inf at depth 0"),
    ],
)
@pytest.mark.parametrize("door", ["verify", "certify", "reference", "verify along samples"])
def test_logits_that_are_none_get_a_sentence(logits, error, words, door):
    class Wrong:
        def logits(self, tokens, prompt_ids=None):
            return logits(len(tokens))

    with pytest.raises(error, match=words) as told:
        doors()[1][door](Wrong())
    assert "\n" not in str(told.value)


def test_a_few_passes_are_all_that_it_takes():
    space = rl_ebm.TokenSpace(5, 9)

    class Counted(Net):
        rows = []  # noqa: RUF012

        def logits(self, tokens, prompt_ids=None):
            Counted.rows.append(len(tokens))
            return super().logits(tokens)

    check_rows(Counted(space), space, 1)
    assert len(Counted.rows) == 3
    assert max(Counted.rows) <= 2**12 // (5 * 9)


@pytest.mark.parametrize("a", [5, 300])
@pytest.mark.parametrize("special", ["eos", "padding", "last"])
def test_a_mask_that_comes_one_token_early_is_seen(a, special):
    """It shows at EOS, or at the token that pads, alone: one of 300."""
    space = rl_ebm.TokenSpace(a, 5, eos_id=3)
    token = {"eos": 3, "padding": 0, "last": a - 1}[special]

    def early(net, tokens):
        return net.logits(tokens) + (tokens == token)[..., None] * torch.arange(a)

    def rightly(net, tokens):
        before = torch.nn.functional.pad(tokens == token, (1, -1))
        return net.logits(tokens) + before[..., None] * torch.arange(a)

    check_rows(Wrapper(Net(space), rightly), space, 1)
    with pytest.raises(ValueError, match="depends on token t, which it is to predict"):
        check_rows(Wrapper(Net(space), early), space, 1)


def test_one_token_of_the_last_position_is_seen():
    space = rl_ebm.TokenSpace(4, 5)
    for token in range(4):

        def last(net, tokens, token=token):
            logits = net.logits(tokens)
            logits[:, -1] += (tokens[:, -1:] == token) * torch.arange(4)
            return logits

        with pytest.raises(ValueError, match="depends on token t, which it is to predict"):
            check_rows(Wrapper(Net(space), last), space, 1)


def test_batch_normalisation_in_training_mode_is_named():
    space = rl_ebm.TokenSpace(4, 5)

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = Net(space, torch.float32), nn.BatchNorm1d(4)

        def logits(self, tokens, prompt_ids=None):
            return self.norm(self.net.logits(tokens).transpose(1, 2)).transpose(1, 2)

    policy = Normalised()
    with pytest.raises(ValueError, match=r"training mode, with .*batch norm.*eval\(\)"):
        check_rows(policy, space, 1)
    check_rows(policy.eval(), space, 1)


def test_logits_that_take_no_prompts_are_told():
    space = rl_ebm.TokenSpace(3, 2)

    class Forgetful:
        def logits(self, tokens):
            return torch.zeros(len(tokens), 2, 3)

    with pytest.raises(TypeError, match=r"must take \(tokens, prompt_ids=None\)"):
        rl_ebm.verify(Forgetful(), rl_ebm.solve(rl_ebm.EBM(space, torch.zeros(9))))
