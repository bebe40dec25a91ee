"""What Gymnasium asks of an environment: checks, spaces, seeding, prompts, autoreset, errors."""

import copy
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from rl_ebm.ebm import EBM
from rl_ebm.envs import ENV_ID, FlatObservation, TokenMDP, TokenVectorEnv, make_task, register
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tokens import TokenSpace

PROMPTS = [[7], [], [1, 2]]
FIXED, EOS = TokenSpace(3, 3), TokenSpace(3, 3, eos_id=1)


def an_ebm(space=FIXED, prompts=None, reference=None):
    shape = (space.num_sequences,) if prompts is None else (len(prompts), space.num_sequences)
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    return EBM(space, scores, beta=0.5, reference=reference, prompts=prompts)


# Gymnasium's own checks ---------------------------------------------------------------------


@pytest.mark.parametrize("space", [FIXED, EOS], ids=["fixed", "eos"])
@pytest.mark.parametrize("mode", ["terminal", "soft"])
@pytest.mark.parametrize("prompts", [None, PROMPTS, [[]]], ids=["none", "three", "empty"])
@pytest.mark.parametrize("flat", [False, True])
def test_check_env_is_silent(space, mode, prompts, flat):
    ebm = an_ebm(space, prompts, Uniform(space))
    env = gymnasium.make(ENV_ID, ebm=ebm, reward_mode=mode)
    if flat:
        env = FlatObservation(env)
        # Gymnasium warns of any wrapper; the wrapped spaces and data are what is checked here.
        with pytest.warns(UserWarning, match="different from the unwrapped version"):
            check_env(env)
    else:
        check_env(env.unwrapped)


@pytest.mark.parametrize("task", ["random", "pairwise", "prompts"])
def test_check_env_is_silent_on_every_task(task):
    check_env(gymnasium.make(ENV_ID, task=task).unwrapped)


def test_make_gives_the_env_and_make_vec_the_batched_one():
    assert type(gymnasium.make(ENV_ID, task="random").unwrapped) is TokenMDP
    envs = gymnasium.make_vec(ENV_ID, num_envs=3, task="random")
    assert type(envs) is TokenVectorEnv
    assert envs.num_envs == 3
    assert envs.spec.id == ENV_ID


def test_registering_twice_is_registering_once():
    spec = gymnasium.spec(ENV_ID)
    register()  # Gymnasium would warn of an id that is overridden
    assert gymnasium.spec(ENV_ID) is spec


def test_spec_makes_the_same_env_again_and_shares_the_scores():
    ebm = an_ebm()
    again = gymnasium.make(ENV_ID, ebm=ebm).spec.make().unwrapped
    assert again.ebm.reward_model.scores is ebm.reward_model.scores
    twin = copy.deepcopy(gymnasium.make(ENV_ID, ebm=ebm).unwrapped)
    assert twin.ebm.reward_model.scores is ebm.reward_model.scores


def test_spaces_are_the_promised_ones():
    env = gymnasium.make(ENV_ID, ebm=an_ebm(EOS, PROMPTS))
    box = gymnasium.spaces.Box
    assert env.observation_space == gymnasium.spaces.Dict(
        tokens=box(0, 2, (3,), np.int64),
        length=gymnasium.spaces.Discrete(4),
        prompt=box(0, 7, (2,), np.int64),  # 7 is the largest id of any prompt
        prompt_length=gymnasium.spaces.Discrete(3),
    )
    assert env.action_space == gymnasium.spaces.Discrete(3)
    plain = gymnasium.make(ENV_ID, ebm=an_ebm())
    assert set(plain.observation_space) == {"tokens", "length"}
    narrow = gymnasium.make(ENV_ID, ebm=an_ebm(prompts=[[], [1]])).observation_space["prompt"]
    assert narrow == box(0, 2, (1,), np.int64)  # A - 1 where the prompts' ids are smaller


def test_rewards_are_floats_and_the_batchs_are_float64():
    env = gymnasium.make(ENV_ID, ebm=an_ebm())
    env.reset()
    assert type(env.step(0)[1]) is float
    envs = gymnasium.make_vec(ENV_ID, num_envs=2, ebm=an_ebm())
    envs.reset()
    _, reward, terminated, truncated, _ = envs.step([0, 1])
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)


def test_what_an_agent_does_to_its_observation_changes_nothing():
    for make in (gymnasium.make, gymnasium.make_vec):
        env = make(ENV_ID, ebm=an_ebm(prompts=PROMPTS))
        obs, info = env.reset(options={"prompt_id": 2})
        obs["tokens"][:] = 2
        obs["prompt"][:] = 2
        info["action_mask"][:] = 0
        obs, *_, info = env.step(1 if make is gymnasium.make else [1])
        assert obs["tokens"].ravel().tolist() == [1, 0, 0]
        assert obs["prompt"].ravel().tolist() == [1, 2]
        assert info["action_mask"].ravel().tolist() == [1, 1, 1]


# Prompts and seeds --------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "shown"), [(0, [7, 0]), (1, [0, 0]), (2, [1, 2])])
def test_reset_option_sets_the_prompt(k, shown):
    env = gymnasium.make(ENV_ID, ebm=an_ebm(prompts=PROMPTS))
    obs, info = env.reset(options={"prompt_id": k})
    for _ in range(3):
        assert obs["prompt"].tolist() == shown
        assert obs["prompt_length"] == len(PROMPTS[k])
        assert info["prompt_id"] == k
        obs, *_, info = env.step(0)


def test_reset_option_of_the_batch_is_one_prompt_or_one_for_each_row():
    envs = gymnasium.make_vec(ENV_ID, num_envs=4, ebm=an_ebm(prompts=PROMPTS))
    obs, info = envs.reset(options={"prompt_id": [2, 0, 1, 2]})
    assert info["prompt_id"].tolist() == [2, 0, 1, 2]
    assert obs["prompt"].tolist() == [[1, 2], [7, 0], [0, 0], [1, 2]]
    assert obs["prompt_length"].tolist() == [2, 1, 0, 2]
    assert info["_prompt_id"].all()
    assert envs.reset(options={"prompt_id": np.int64(1)})[1]["prompt_id"].tolist() == [1] * 4
    assert envs.step([0, 1, 2, 0])[4]["prompt_id"].tolist() == [1] * 4


def test_prompts_are_uniform_draws_of_np_random():
    env = gymnasium.make(ENV_ID, ebm=an_ebm(prompts=PROMPTS))
    ids = [env.reset(seed=11)[1]["prompt_id"]] + [env.reset()[1]["prompt_id"] for _ in range(299)]
    rng = seeding.np_random(11)[0]
    assert ids == [int(rng.integers(3)) for _ in range(300)]
    # Three standard deviations of a binomial(300, 1/3).
    assert all(abs(ids.count(k) - 100) < 25 for k in range(3))


def test_the_same_seed_gives_the_batch_the_same_prompts():
    def run(seed):
        envs = gymnasium.make_vec(ENV_ID, num_envs=5, ebm=an_ebm(EOS, PROMPTS))
        seen = [envs.reset(seed=seed)[1]["prompt_id"]]
        actions = np.random.default_rng(0)
        for _ in range(20):
            seen.append(envs.step(actions.integers(3, size=5))[4]["prompt_id"])
        return np.stack(seen).tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_one_row_draws_the_prompts_of_the_scalar_env():
    env = gymnasium.make(ENV_ID, ebm=an_ebm(prompts=PROMPTS))
    envs = gymnasium.make_vec(ENV_ID, num_envs=1, ebm=an_ebm(prompts=PROMPTS))
    want = [env.reset(seed=3)[1]["prompt_id"]] + [env.reset()[1]["prompt_id"] for _ in range(9)]
    got = [int(envs.reset(seed=3)[1]["prompt_id"][0])]
    for _ in range(9):
        for _ in range(4):  # three tokens, and the step that begins anew
            info = envs.step([0])[4]
        got.append(int(info["prompt_id"][0]))
    assert got == want


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": 1}, "unknown reset option 'prompt': the only one is 'prompt_id'"),
        ({"prompt_id": 3}, r"must be an index in \[0, 3\).*got 3"),
        ({"prompt_id": -1}, r"must be an index in \[0, 3\)"),
        ({"prompt_id": 0.5}, r"must be an index in \[0, 3\)"),
        ({"prompt_id": True}, r"must be an index in \[0, 3\)"),
        ({"prompt_id": [0, 1, 2]}, r"array of shape \([12],\)"),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_bad_reset_options(options, match, batched):
    ebm = an_ebm(prompts=PROMPTS)
    env = TokenVectorEnv(2, ebm) if batched else TokenMDP(ebm)
    with pytest.raises(ValueError, match=match):
        env.reset(options=options)


def test_prompt_option_without_prompts():
    with pytest.raises(ValueError, match="has no prompts"):
        TokenMDP(an_ebm()).reset(options={"prompt_id": 0})


# Autoreset ----------------------------------------------------------------------------------


def test_next_step_autoreset_ignores_the_action_and_pays_nothing():
    ebm = an_ebm(EOS, PROMPTS, Uniform(EOS))
    envs = gymnasium.make_vec(ENV_ID, num_envs=2, ebm=ebm, reward_mode="soft")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.reset(options={"prompt_id": 2}, seed=0)
    _, _, terminated, _, info = envs.step([1, 0])  # EOS ends row 0
    assert terminated.tolist() == [True, False]
    assert info["_action_replaced"].tolist() == [True, True]
    obs, reward, terminated, truncated, info = envs.step([2, 2])
    assert obs["tokens"].tolist() == [[0, 0, 0], [0, 2, 0]]
    assert obs["length"].tolist() == [0, 2]
    assert reward[0] == 0.0
    assert reward[1] == pytest.approx(-0.5 * math.log(3))
    assert not terminated.any()
    assert not truncated.any()
    assert info["_action_replaced"].tolist() == [False, True]
    assert info["prompt_id"].tolist() == [int(seeding.np_random(0)[0].integers(3)), 2]


def test_prompts_drawn_at_autoreset_are_those_the_reward_reads():
    space = TokenSpace(2, 1)
    scores = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    envs = gymnasium.make_vec(ENV_ID, num_envs=4, ebm=EBM(space, scores, prompts=PROMPTS))
    _, info = envs.reset(seed=5)
    seen = set()
    for i in range(40):
        before = info["prompt_id"]
        _, reward, terminated, _, info = envs.step([0, 1, 0, 1])
        assert terminated.all() == (i % 2 == 0)
        want = 2 * before + [0, 1, 0, 1] if i % 2 == 0 else np.zeros(4)
        assert reward.tolist() == want.tolist()
        seen |= set(before.tolist())
    assert seen == {0, 1, 2}


def test_episode_statistics_of_gymnasium_read_the_batch():
    ebm = an_ebm(EOS)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        gymnasium.make_vec(ENV_ID, num_envs=2, ebm=ebm)
    )
    envs.reset()
    envs.step([0, 1])
    envs.step([1, 2])
    # Responses "0 EOS" of row 0 and "EOS" of row 1: places 1 and 0 of the enumeration.
    returns = list(envs.return_queue)
    assert returns == pytest.approx(ebm.reward_model.scores[0, [0, 1]].tolist(), abs=1e-6)
    assert list(envs.length_queue) == [1, 2]


# Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [3, -1, 1.0, "a", None, np.array([0, 1])])
def test_an_action_that_is_no_token_id(action):
    env = TokenMDP(an_ebm())
    env.reset()
    with pytest.raises(ValueError, match=r"integer token id in \[0, 3\)"):
        env.step(action)
    assert env.step(np.int32(2))[0]["tokens"].tolist() == [2, 0, 0]


@pytest.mark.parametrize("actions", [[0, 3], [0, -1], [0.0, 1.0], [0], [[0, 1]], 0])
def test_actions_that_are_no_token_ids(actions):
    envs = TokenVectorEnv(2, an_ebm())
    envs.reset()
    with pytest.raises(ValueError, match=r"integer token ids in \[0, 3\) of shape \(2,\)"):
        envs.step(actions)
    assert envs.step(np.array([1, 2], dtype=np.int32))[0]["length"].tolist() == [1, 1]


def test_nothing_before_the_first_reset_and_no_step_after_the_end():
    env, envs = TokenMDP(an_ebm()), TokenVectorEnv(1, an_ebm())
    for call in (lambda: env.step(0), env.action_masks, lambda: envs.step([0]), envs.action_masks):
        with pytest.raises(ResetNeeded, match=r"call reset\(\) before anything else"):
            call()
    env.reset()
    for _ in range(3):
        env.step(0)
    with pytest.raises(ResetNeeded, match=r"the response is complete: call reset\(\)"):
        env.step(0)
    env.reset()
    env.step(0)


@pytest.mark.parametrize("build", [TokenMDP, lambda **kwargs: TokenVectorEnv(2, **kwargs)])
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "exactly one of ebm=.*and task="),
        ({"ebm": an_ebm(), "task": "random"}, "exactly one of ebm=.*and task="),
        ({"ebm": an_ebm(), "task_kwargs": {"beta": 2.0}}, "leave them out with ebm="),
        ({"task": "randm"}, "unknown task 'randm': did you mean 'random'"),
        ({"ebm": an_ebm(), "reward_mode": "softt"}, "got 'softt'; did you mean 'soft'"),
        ({"ebm": an_ebm(), "forbidden_reward": -math.inf}, "must be a finite number, got -inf"),
        ({"ebm": an_ebm(), "forbidden_reward": math.nan}, "must be a finite number, got nan"),
    ],
)
def test_bad_arguments(build, kwargs, match):
    with pytest.raises(ValueError, match=match):
        build(**kwargs)


def test_no_rows():
    with pytest.raises(ValueError, match=r"num_envs must be an integer in .*, got 0"):
        TokenVectorEnv(0, an_ebm())


def test_task_takes_its_arguments():
    env = TokenMDP(task="random", task_kwargs={"vocab_size": 3, "max_length": 2, "task_seed": 4})
    want = make_task("random", vocab_size=3, max_length=2, task_seed=4)
    assert env.ebm.space == want.space
    assert torch.equal(env.ebm.reward_model.scores, want.reward_model.scores)


# -inf ---------------------------------------------------------------------------------------


def forbidding_reference():
    """p_ref that never writes 2 as the first token."""
    policy = Tabular(FIXED)
    with torch.no_grad():
        policy.table[0, 0, 2] = -torch.inf
    return policy


class Silent(Uniform):
    """A reference that does not say whether it forbids: never 2 as the first token."""

    forbids = None

    def logits(self, tokens, prompt_ids=None):
        logits = super().logits(tokens, prompt_ids).clone()
        logits[:, 0, 2] = -torch.inf
        return logits


def test_known_minus_infinity_is_refused_at_construction():
    scores = torch.arange(27.0)
    scores[5] = -torch.inf
    for mode in ("terminal", "soft"):
        with pytest.raises(ValueError, match="give forbidden_reward="):
            TokenMDP(EBM(FIXED, scores), reward_mode=mode)
    with pytest.raises(ValueError, match="give forbidden_reward="):
        TokenMDP(an_ebm(reference=forbidding_reference()), reward_mode="soft")
    # R alone is paid in terminal mode, and this R is finite.
    TokenMDP(an_ebm(reference=forbidding_reference()), reward_mode="terminal")


def test_minus_infinity_of_a_function_is_refused_at_the_step_that_meets_it():
    def reward(tokens, lengths):
        return torch.where(tokens[:, 0] == 2, -torch.inf, 1.0)

    env = TokenMDP(EBM(FIXED, reward))
    env.reset()
    env.step(2)
    env.step(0)
    with pytest.raises(ValueError, match="give forbidden_reward="):
        env.step(0)
    env.reset()
    assert [env.step(a)[1] for a in (0, 2, 2)] == [0.0, 0.0, 1.0]
    paid = TokenVectorEnv(2, EBM(FIXED, reward), forbidden_reward=-4.0)
    paid.reset()
    assert [paid.step(a)[1].tolist() for a in ([2, 0], [0, 0], [0, 2])][-1] == [-4.0, 1.0]


def test_minus_infinity_of_a_reference_is_refused_at_the_step_that_meets_it():
    ebm = an_ebm(reference=Silent(FIXED))
    env = TokenMDP(ebm, reward_mode="soft")
    env.reset()
    with pytest.raises(ValueError, match="give forbidden_reward="):
        env.step(2)
    # The step was not taken: another one may be.
    obs, reward, *_ = env.step(1)
    assert obs["length"] == 1
    assert reward == pytest.approx(-0.5 * math.log(2), abs=1e-6)
    paid = TokenMDP(ebm, reward_mode="soft", forbidden_reward=-4.0)
    _, info = paid.reset()
    assert info["action_mask"].tolist() == [1, 1, 0]
    assert paid.step(2)[1] == -4.0
    assert paid.step(2)[1] == pytest.approx(-0.5 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_no_ebm_has(value):
    class Broken:
        forbids = False

        def __call__(self, tokens, lengths, prompt_ids):
            return torch.full((len(tokens),), value)

        def bind(self, space, prompts):
            return self

        def to(self, device):
            return self

    env = TokenMDP(EBM(TokenSpace(2, 1), Broken()))
    env.reset()
    with pytest.raises(ValueError, match="a reward must be a number below"):
        env.step(0)
