"""The MLP: a sum of table rows is a linear layer over the one-hot prefix."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from toy_policies import close, seeded

import rl_ebm
from rl_ebm import cli
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies import MLP, MLPConfig

PROMPTS = [[0], [1, 2], []]


def by_one_hot(policy: MLP, prefix: list[int], prompt: int) -> torch.Tensor:
    """Logits after one prefix: every input written out, one matrix product for each layer."""
    a, places = policy.space.vocab_size, policy.space.max_length
    tokens = torch.zeros((places - 1) * a)
    for k, token in enumerate(prefix):
        tokens[k * a + token] = 1.0
    here = F.one_hot(torch.tensor(len(prefix)), places).float()
    asked = F.one_hot(torch.tensor(prompt), len(policy.prompt)).float()
    x = torch.cat([tokens, here, asked]) @ torch.cat([policy.token, policy.place, policy.prompt])
    for layer in policy.rest[1::2]:
        x = layer.weight @ x.clamp(min=0) + layer.bias
    return x


@pytest.mark.parametrize("space", [rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(4, 3, eos_id=1)])
def test_every_prefix_is_read_as_one_hot(space):
    policy = MLP(space, MLPConfig(3, 16), PROMPTS)
    tokens = space.unrank(torch.randint(space.branching, (6, space.max_length), generator=seeded()))
    ids = torch.tensor([0, 1, 2, 2, 1, 0])
    with torch.no_grad():
        found = policy.logits(tokens, ids)
        for row, prompt, logits in zip(tokens.tolist(), ids.tolist(), found, strict=True):
            for t in range(space.max_length):
                close(logits[t], by_one_hot(policy, row[:t], prompt), 1e-5)
        tree = PrefixTree.full(space)
        nodes = policy.tree_logits(tree, torch.tensor([2, 0]))
        for node in range(0, len(tree), 5):
            depth = int(tree.depth[node])
            prefix = tree.tokens[tree.ancestors[node, 1 : depth + 1]].tolist()
            close(nodes[0, node], by_one_hot(policy, prefix, 2), 1e-5)
            close(nodes[1, node], by_one_hot(policy, prefix, 0), 1e-5)


def test_it_is_trained_and_read_again_by_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    begin = ["train", "--out", str(run), "--agent", "vargrad", "--policy", "mlp", "--layers", "1"]
    flags = ["--hidden", "12", "--vocab-size", "3", "--max-length", "2", "--batch-size", "16"]
    assert cli.main([*begin, *flags, "--steps", "4"]) == 0
    assert json.loads((run / "config.json").read_text())["policy"]["data"] == {
        "layers": 1,
        "hidden": 12,
    }
    policy, ebm = rl_ebm.load(run)
    assert isinstance(policy, MLP)
    again, _ = rl_ebm.train(
        ebm, "vargrad", network=MLPConfig(1, 12), options=options(16), steps=4, progress=False
    )
    assert again.config == policy.config == MLPConfig(1, 12)
    for one, other in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert cli.main(["train", "--resume", str(run), "--steps", "6"]) == 0
    assert cli.main(["verify", str(run)]) == 0
    capsys.readouterr()


def options(batch_size):
    return rl_ebm.agents.AGENTS["vargrad"].config(batch_size=batch_size)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MLPConfig(layers=0), ValueError, "layers must be"),
        (lambda: MLPConfig(hidden=2.5), TypeError, "hidden"),
        (lambda: MLPConfig(layers=10**6), ValueError, "layers must be at most"),
        (lambda: MLP(rl_ebm.TokenSpace(3, 2), 64), TypeError, "config"),
        (
            lambda: MLP(rl_ebm.TokenSpace(50_000, 64), MLPConfig(1, 10**6)),
            ValueError,
            "not enough memory: an MLP",
        ),
        (
            lambda: rl_ebm.train(rl_ebm.envs.make_task("random"), network=3, steps=1),
            TypeError,
            "MLPConfig",
        ),
    ],
)
def test_sizes_that_are_none_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
