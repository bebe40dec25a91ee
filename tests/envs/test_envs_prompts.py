"""Which prompts the rows of a batched environment answer, draw by draw."""

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding

from rl_ebm.ebm import EBM
from rl_ebm.envs import ENV_ID
from rl_ebm.tokens import TokenSpace


def test_rows_that_go_on_keep_their_prompt_and_draw_none():
    space, prompts, rows = TokenSpace(3, 4, eos_id=1), [[7], [], [1, 2], [5]], 5
    scores = torch.randn(4, space.num_sequences, generator=torch.Generator().manual_seed(0))
    envs = gymnasium.make_vec(ENV_ID, num_envs=rows, ebm=EBM(space, scores, prompts=prompts))
    rng = seeding.np_random(8)[0]
    _, info = envs.reset(seed=8)
    want = [int(rng.integers(4)) for _ in range(rows)]
    assert info["prompt_id"].tolist() == want
    ended, actions, some = np.zeros(rows, dtype=bool), np.random.default_rng(0), 0
    for _ in range(60):
        _, _, terminated, _, info = envs.step(actions.integers(3, size=rows))
        for row in np.flatnonzero(ended):
            want[row] = int(rng.integers(4))
        some += 0 < ended.sum() < rows
        assert info["prompt_id"].tolist() == want
        ended = terminated
    assert some > 30
