"""Ends of runs, networks of benchmarks, masks with holes, and the name of minus the entropy."""

import json

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm import policies
from rl_ebm.cli import commands as cli
from rl_ebm.studies.audit import audit, to_text
from rl_ebm.studies.bench import Plan, Problem
from rl_ebm.tokens.prompts import check_prompts
from rl_ebm.training.loop import Trainer

SPACE = rl_ebm.TokenSpace(3, 2)
EBM = rl_ebm.EBM(SPACE, torch.randn(9, generator=seeded(0)).double())


@pytest.mark.parametrize(
    ("limits", "own", "want"),
    [
        ({"steps": 3}, {}, (3, None)),
        ({"seconds": 2}, {}, (None, 2.0)),
        ({"steps": 3}, {"seconds": 9}, (3, None)),
        ({}, {"steps": 3}, (3, None)),
        ({}, {}, (None, 60.0)),
    ],
)
def test_the_end_of_a_run_is_that_of_the_call_then_that_of_the_config(
    limits, own, want, tmp_path, monkeypatch
):
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    config = rl_ebm.TrainConfig(log_every=1, **own)
    rl_ebm.train(EBM, out=tmp_path / "run", network="tabular", config=config, **limits)
    found = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (found["steps"], found["seconds"], found["log_every"]) == (*want, 1)


def test_every_step_of_a_run_without_an_end_of_its_own_is_logged(tmp_path):
    config = rl_ebm.TrainConfig(log_every=1)
    rl_ebm.train(EBM, out=tmp_path / "run", network="tabular", steps=3, config=config)
    text = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("losses/loss")
    assert sum(row.split(",")[column] != "" for row in text[1:]) == 3


def test_a_run_folder_without_an_end_is_refused(tmp_path):
    run = tmp_path / "run"
    rl_ebm.train(EBM, out=run, network="tabular", steps=1)
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = None
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a run needs an end"):
        rl_ebm.resume(run)


@pytest.mark.parametrize("network", ["tabular", "transformer", None, policies.Tabular])
def test_the_network_of_a_benchmark_is_the_sizes_of_one(network):
    plan = Plan(("soft-q",), (Problem("lookahead"),))
    object.__setattr__(plan, "network", network)  # past the checks of types that tests have
    with pytest.raises(TypeError, match="network of a benchmark must be a TransformerConfig"):
        plan.__post_init__()


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        ([0, 1, 1, 0], [5, 6]),
        ([1, 1, 1, 1], [4, 5, 6, 7]),
        ([0, 0, 0, 0], []),
        ([1, 0, 0, 0], [4]),
        ([1, 0, 1, 0], None),
        ([1, 0, 0, 1], None),
        ([0, 1, 0, 1], None),
    ],
)
def test_a_mask_with_a_hole_is_refused(mask, want):
    ids = torch.tensor([[4, 5, 6, 7], [1, 2, 3, 0]])
    prompts = {"input_ids": ids, "attention_mask": torch.tensor([mask, [1, 1, 1, 0]])}
    if want is None:
        with pytest.raises(ValueError, match="masks a token between others"):
            check_prompts(prompts)
    else:
        assert check_prompts(prompts) == [want, [1, 2, 3]]


@pytest.mark.slow
def test_without_a_reference_the_audit_shows_minus_the_entropy(capsys):
    lines = audit(rl_ebm.solve(EBM))
    soft_q = next(x for x in lines if x["objective"] == "soft-q")
    p = torch.softmax(EBM.reward_model.scores.double().flatten(), 0)
    assert soft_q["kl_reference"] == pytest.approx(float((p * p.log()).sum()), abs=1e-12)
    assert "-H(fp)" in to_text(lines, reference=False)
    reward = ["audit", "--reward", "contains:a", "--alphabet", "ab", "--max-length", "2"]
    for flags, header in (([], "-H(fp)"), (["--reference", "uniform"], "KL(fp, ref)")):
        assert cli.main(reward + flags) == 0
        assert header in capsys.readouterr().out.splitlines()[0]


def test_a_sparse_tensor_of_the_reward_is_looked_at_and_shares_nothing():
    """It has no one storage: it is itself alone, and training goes on."""
    sparse = torch.eye(3).to_sparse()
    ebm = rl_ebm.EBM(
        rl_ebm.TokenSpace(3, 2), lambda tokens, lengths: sparse.to_dense()[tokens[:, 0]].sum(1)
    )
    policy = rl_ebm.policies.Tabular(ebm.space)
    before = policy.logits(ebm.space.sequences()[0]).clone()
    rl_ebm.train(ebm, policy=policy, steps=1, progress=False)
    assert not torch.equal(policy.logits(ebm.space.sequences()[0]), before)
