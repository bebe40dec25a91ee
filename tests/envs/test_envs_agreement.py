"""The scalar environment, the batched one and the sampler follow one set of rules.

The judge is `play`, a Python loop over one row at a time, in float64.
"""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch

from rl_ebm.ebm import EBM
from rl_ebm.envs import ENV_ID, Transition
from rl_ebm.policies import Uniform, sample
from rl_ebm.tokens import TokenSpace

PROMPTS = [[3], [], [1, 2]]
FORBIDDEN = -7.5


class Bigram:
    """A reference that looks at the prompt and the token before; says nothing of `forbids`."""

    def __init__(self, table, prompts):
        self.table, self.prompts = table, prompts  # (P, A + 1, A); row A: no token before

    def logits(self, tokens, prompt_ids=None):
        start = torch.full_like(tokens[:, :1], self.table.shape[2])
        before = torch.cat([start, tokens[:, :-1]], dim=1)
        return self.table[prompt_ids[:, None], before]

    def log_prob(self, prompt_id, prefix, token):
        """log p_ref in Python; no action at all: -inf."""
        row = self.table[prompt_id, prefix[-1] if prefix else -1].tolist()
        total = sum(math.exp(x) for x in row)
        return -math.inf if row[token] == -math.inf else row[token] - math.log(total)


class Script:
    """A policy that writes given actions, as far as the space lets it."""

    def __init__(self, actions, vocab_size):
        self.script = torch.nn.functional.one_hot(torch.as_tensor(actions), vocab_size) * 1e4

    def logits(self, tokens, prompt_ids=None):
        return self.script.double()


def responses(space):
    """All responses in enumeration order."""
    if space.eos_id is None:
        return list(itertools.product(range(space.vocab_size), repeat=space.max_length))
    others = [a for a in range(space.vocab_size) if a != space.eos_id]
    return [
        (*prefix, space.eos_id)
        for t in range(space.max_length)
        for prefix in itertools.product(others, repeat=t)
    ]


def play(space, actions, log_ref, reward, beta):
    """One row: a list of (tokens, reward, ended, replaced) after each step; -inf as it is."""
    steps, written = [], []
    for action in actions:
        last = len(written) == space.max_length - 1
        replaced = space.eos_id is not None and last and action != space.eos_id
        executed = space.eos_id if replaced else action
        forced = space.eos_id is not None and last
        paid = 0.0 if log_ref is None or forced else beta * log_ref(tuple(written), executed)
        written.append(executed)
        ended = len(written) == space.max_length or executed == space.eos_id
        paid += reward(tuple(written)) if ended else 0.0
        steps.append((list(written), paid, ended, replaced))
        if ended:
            break
    return steps


def problem(eos_id, prompts, minus_inf, seed=0):
    """An EBM with a Bigram reference, and its reward as a dict."""
    rng = np.random.default_rng(seed)
    space = TokenSpace(vocab_size=4, max_length=4, eos_id=eos_id)
    listed = responses(space)
    p = 1 if prompts is None else len(prompts)
    scores = rng.standard_normal((p, len(listed)))
    table = rng.standard_normal((p, 5, 4))
    if minus_inf:
        scores[rng.random(scores.shape) < 0.3] = -np.inf
        table[rng.random(table.shape) < 0.2] = -np.inf
        table[:, 2] = -np.inf  # after token 2 p_ref has no action left
    reference = Bigram(torch.from_numpy(table), prompts)
    rows = torch.from_numpy(scores if prompts is not None else scores[0])
    ebm = EBM(space, rows, beta=0.7, reference=reference, prompts=prompts)
    rewards = {(k, y): scores[k, i] for k in range(p) for i, y in enumerate(listed)}
    return ebm, rewards


CASES = list(itertools.product([None, 0, 2], [None, PROMPTS], [False, True], ["terminal", "soft"]))


@pytest.mark.parametrize(("eos_id", "prompts", "minus_inf", "mode"), CASES)
def test_scalar_batched_and_sampler_agree_step_by_step(eos_id, prompts, minus_inf, mode):
    ebm, rewards = problem(eos_id, prompts, minus_inf)
    space, n = ebm.space, 20
    rng = np.random.default_rng(1)
    actions = rng.integers(space.vocab_size, size=(n, space.max_length))
    ids = rng.integers(ebm.num_prompts, size=n)
    judged = [
        play(
            space,
            actions[b].tolist(),
            (lambda s, a, k=ids[b]: ebm.reference.log_prob(k, s, a)) if mode == "soft" else None,
            lambda y, k=ids[b]: rewards[k, y],
            ebm.beta,
        )
        for b in range(n)
    ]
    kwargs = {"ebm": ebm, "reward_mode": mode, "forbidden_reward": FORBIDDEN}
    given = (lambda k: {"prompt_id": k}) if prompts is not None else (lambda k: None)

    env = gymnasium.make(ENV_ID, **kwargs)
    for b in range(n):
        env.reset(options=given(int(ids[b])))
        for action, (written, paid, ended, replaced) in zip(actions[b], judged[b], strict=False):
            obs, reward, terminated, truncated, info = env.step(action)
            assert obs["length"] == len(written)
            assert obs["tokens"].tolist() == written + [0] * (space.max_length - len(written))
            assert reward == pytest.approx(FORBIDDEN if paid == -math.inf else paid, abs=1e-12)
            assert (terminated, truncated) == (ended, False)
            assert info["action_replaced"] is replaced

    envs = gymnasium.make_vec(ENV_ID, num_envs=n, **kwargs)
    envs.reset(options=given(ids))
    for t in range(space.max_length):
        obs, reward, terminated, truncated, info = envs.step(actions[:, t])
        for b in range(n):
            if t >= len(judged[b]):
                continue
            written, paid, ended, replaced = judged[b][t]
            assert obs["length"][b] == len(written)
            assert obs["tokens"][b].tolist() == written + [0] * (space.max_length - len(written))
            want = FORBIDDEN if paid == -math.inf else paid
            assert reward[b] == pytest.approx(want, abs=1e-12)
            assert (terminated[b], truncated[b]) == (ended, False)
            assert info["action_replaced"][b] == replaced

    batch = sample(
        Script(actions, space.vocab_size), space, n, torch.Generator().manual_seed(0),
        torch.from_numpy(ids),
    )  # fmt: skip
    assert batch.lengths.tolist() == [len(steps) for steps in judged]
    for b in range(n):
        assert batch.tokens[b, : len(judged[b])].tolist() == judged[b][-1][0]
    # The same numbers from the tensor face: R where only R is paid, beta * log_weight where soft.
    if mode == "terminal":
        total = ebm.reward(batch.tokens, batch.lengths, batch.prompt_ids)
    else:
        total = ebm.beta * ebm.log_weight(batch.tokens, batch.lengths, batch.prompt_ids)
    want = torch.tensor([sum(paid for _, paid, _, _ in steps) for steps in judged])
    torch.testing.assert_close(total, want.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("eos_id", [None, 0, 2])
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_mask_is_what_the_space_and_the_reference_allow(eos_id, prompts):
    ebm, _ = problem(eos_id, prompts, minus_inf=True)
    space = ebm.space
    env = gymnasium.make(ENV_ID, ebm=ebm, forbidden_reward=FORBIDDEN)
    rng = np.random.default_rng(2)
    seen_dead = False
    for _ in range(60):
        k = int(rng.integers(ebm.num_prompts))
        _, info = env.reset(options=None if prompts is None else {"prompt_id": k})
        written, ended = [], False
        while not ended:
            forced = eos_id is not None and len(written) == space.max_length - 1
            allowed = [
                a == eos_id if forced else ebm.reference.log_prob(k, written, a) > -math.inf
                for a in range(space.vocab_size)
            ]
            seen_dead |= not any(allowed)
            assert info["action_mask"].dtype == np.int8
            assert info["action_mask"].tolist() == allowed
            masks = env.unwrapped.action_masks()
            assert masks.dtype == np.bool_
            assert masks.tolist() == allowed
            action = int(rng.integers(space.vocab_size))
            obs, _, ended, _, info = env.step(action)
            written = obs["tokens"][: obs["length"]].tolist()
        assert info["action_mask"].tolist() == [1] * space.vocab_size
    assert seen_dead == (eos_id != 2)  # after token 2, which in one case is EOS


@pytest.mark.parametrize("eos_id", [None, 1])
@pytest.mark.parametrize("prompts", [None, [[2, 1]]])
@pytest.mark.parametrize("mode", ["terminal", "soft"])
def test_batched_env_is_gymnasiums_own_batch_of_scalar_ones(eos_id, prompts, mode):
    ebm, _ = problem(eos_id, prompts, minus_inf=True)
    kwargs = {"ebm": ebm, "reward_mode": mode, "forbidden_reward": FORBIDDEN}
    ours = gymnasium.make_vec(ENV_ID, num_envs=5, **kwargs)
    theirs = gymnasium.make_vec(ENV_ID, num_envs=5, vectorization_mode="sync", **kwargs)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    results = [(envs.reset(seed=0)[0], envs.reset(seed=0)[1]) for envs in (ours, theirs)]
    rng = np.random.default_rng(3)
    restarts = 0
    for _ in range(60):
        mine, other = results
        assert mine[0] in ours.observation_space
        for one, two in zip(mine[:-1], other[:-1], strict=True):
            _assert_same(one, two)
        # Gymnasium leaves an entry out where no row has it; we say False for every row.
        for key in mine[-1]:
            if key in other[-1]:
                _assert_same(mine[-1][key], other[-1][key])
            else:
                assert key.endswith("action_replaced")
                assert not mine[-1]["_action_replaced"].any()
        assert set(other[-1]) <= set(mine[-1])
        restarts += len(mine) > 2 and bool(mine[2].any())
        actions = rng.integers(4, size=5)
        results = [ours.step(actions), theirs.step(actions)]
    assert restarts > 5


def _assert_same(one, two, tolerance=1e-12):
    if isinstance(one, dict):
        assert set(one) == set(two)
        for key in one:
            _assert_same(one[key], two[key], tolerance)
        return
    assert one.dtype == two.dtype
    np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)


def test_soft_rewards_sum_to_beta_log_weight_for_every_response():
    space = TokenSpace(3, 3, eos_id=1)
    listed = responses(space)
    scores = torch.from_numpy(np.random.default_rng(4).standard_normal(len(listed)))
    ebm = EBM(space, scores, beta=2.5, reference=Uniform(space))
    env = gymnasium.make(ENV_ID, ebm=ebm, reward_mode="soft")
    for y, score in zip(listed, scores.tolist(), strict=True):
        env.reset()
        total = sum(env.step(a)[1] for a in y)
        # Uniform over 3 tokens at every position but the last, where EOS is forced.
        free = min(len(y), space.max_length - 1)
        assert total == pytest.approx(score - 2.5 * free * math.log(3), abs=1e-5)
        padded = torch.tensor([[*y, *[0] * (3 - len(y))]])
        assert total == pytest.approx(2.5 * float(ebm.log_weight(padded)[0]), abs=1e-5)


def test_without_a_reference_both_modes_pay_the_same():
    space = TokenSpace(3, 2)
    ebm = EBM(space, torch.arange(9.0))
    for y in itertools.product(range(3), repeat=2):
        paid = []
        for mode in ("terminal", "soft"):
            env = gymnasium.make(ENV_ID, ebm=ebm, reward_mode=mode)
            env.reset()
            paid.append([env.step(a)[1] for a in y])
        assert paid[0] == paid[1] == [0.0, 3.0 * y[0] + y[1]]


def test_one_reward_call_for_complete_rows_only_and_one_reference_call_a_step():
    space = TokenSpace(3, 3, eos_id=0)
    rewarded, referred = [], []

    def reward(tokens, lengths):
        assert not torch.is_grad_enabled()
        rewarded.append([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)])
        return lengths.double()

    class Counting(Uniform):
        forbids = None  # not known: masks have to ask

        def logits(self, tokens, prompt_ids=None):
            referred.append(len(tokens))
            return super().logits(tokens, prompt_ids)

    envs = gymnasium.make_vec(ENV_ID, num_envs=3, ebm=EBM(space, reward, reference=Counting(space)))
    envs.reset()
    for actions in ([1, 0, 2], [2, 0, 1], [1, 2, 0]):
        envs.step(actions)
    # Row 1 ends at once and begins anew in step 2; in step 3 rows 0 and 2 end.
    assert rewarded == [[[0]], [[1, 2, 0], [2, 1, 0]]]
    assert referred == [3, 3, 3, 3]


@pytest.mark.parametrize(("mode", "calls"), [("terminal", 0), ("soft", 3)])
def test_a_reference_that_forbids_nothing_is_asked_only_where_it_is_paid(mode, calls):
    space = TokenSpace(3, 2)
    referred = []

    class Counting(Uniform):
        def logits(self, tokens, prompt_ids=None):
            referred.append(len(tokens))
            return super().logits(tokens, prompt_ids)

    ebm = EBM(space, torch.zeros(9), reference=Counting(space))
    env = gymnasium.make(ENV_ID, ebm=ebm, reward_mode=mode)
    env.reset()
    env.step(0)
    env.step(1)
    assert len(referred) == calls


def test_a_step_writes_into_no_state():
    ebm, _ = problem(None, None, minus_inf=False)
    transition = Transition(ebm)
    before = transition.start(torch.zeros(2, dtype=torch.int64))
    transition.step(before, torch.tensor([1, 2]))
    assert before.tokens.tolist() == [[0] * 4] * 2
    assert before.lengths.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("eos_id", [None, 0])
def test_batched_env_on_a_gpu_gives_the_numbers_of_the_cpu(eos_id):
    ebm, _ = problem(eos_id, PROMPTS, minus_inf=False)
    uniform = EBM(ebm.space, ebm.reward_model.scores, 0.7, Uniform(ebm.space), PROMPTS)
    kwargs = {"num_envs": 8, "reward_mode": "soft"}
    cpu = gymnasium.make_vec(ENV_ID, ebm=uniform, **kwargs)
    gpu = gymnasium.make_vec(ENV_ID, ebm=uniform.to("cuda"), **kwargs)
    results = [envs.reset(seed=0) for envs in (cpu, gpu)]
    rng = np.random.default_rng(5)
    for _ in range(20):
        for one, two in zip(*results, strict=True):
            _assert_same(one, two, tolerance=1e-6)  # the reference is in float32
        actions = rng.integers(4, size=8)
        results = [envs.step(actions) for envs in (cpu, gpu)]
