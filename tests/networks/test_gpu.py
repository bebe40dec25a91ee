"""On a GPU the same numbers as on the CPU, and steps that do not wait for it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.envs import make_task
from rl_ebm.policies import Transformer, TransformerConfig

pytestmark = pytest.mark.gpu

SMALL = TransformerConfig(layers=1, heads=2, dim=16, hidden=16)


def ebms():
    yield make_task("random", vocab_size=4, max_length=3)
    yield make_task("random", vocab_size=4, max_length=3, eos_id=1, reference="uniform")
    yield make_task("prompts")


@pytest.mark.parametrize("case", range(3))
def test_solutions_and_reports_are_those_of_the_cpu(case):
    ebm = list(ebms())[case]
    torch.manual_seed(0)
    policy = Transformer(ebm.space, SMALL, ebm.prompts)
    here, there = rl_ebm.solve(ebm), rl_ebm.solve(ebm.to("cuda"))
    torch.testing.assert_close(there.log_z.cpu(), here.log_z, rtol=1e-10, atol=1e-10)
    want = rl_ebm.verify(policy, here).scalars()
    got = rl_ebm.verify(policy.to("cuda"), there).scalars()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("case", range(3))
def test_certificates_hold_there_too(case, values):
    ebm = list(ebms())[case].to("cuda")
    torch.manual_seed(0)
    policy = Transformer(ebm.space, SMALL, ebm.prompts, logits_are_values=values).to("cuda")
    solution = rl_ebm.solve(ebm)
    ids = torch.arange(ebm.num_prompts, device="cuda").repeat_interleave(400)
    target = solution.sample(len(ids), prompt_ids=ids)
    generator = torch.Generator("cuda").manual_seed(1)
    for particles in (None, 8):
        got = rl_ebm.certify(policy, ebm, 400, 0.999, target, 100.0, generator, particles=particles)
        want = rl_ebm.verify(policy, solution)
        assert got.log_z.low <= want.log_z <= got.log_z.high
        assert got.kl_policy_target.low <= want.kl_policy_target <= got.kl_policy_target.high


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail where the card is waited for; PyTorch warns that it may not see all of these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:  # whatever happens: it would stay on for every later test
            torch.cuda.set_sync_debug_mode("default")


# What keeps a tree by what was drawn asks how much that is.
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("agent", sorted(AGENTS.keys() - {"tree-backup"}))
def test_every_agent_trains_there_without_waiting(agent, case):
    ebm = list(ebms())[case].to("cuda")
    entry = AGENTS[agent]
    policy = Transformer(ebm.space, SMALL, ebm.prompts).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    made = entry.agent(ebm, policy, None, generator, rl_ebm.solve(ebm))

    def step():
        batch = made.sample()
        return made.update(None if batch is None else ebm.score(batch), 0.5)

    step()  # what is made once may wait
    with no_waits():
        metrics = step()
    assert torch.isfinite(metrics["losses/loss"])


@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_ends_and_goes_on_there(agent, tmp_path):
    ebm = make_task("random", vocab_size=3, max_length=3).to("cuda")
    source = {"task": "random", "task_seed": 0}
    rl_ebm.train(ebm, agent, tmp_path, steps=5, network=SMALL, source=source)
    _, report, went_on = rl_ebm.resume(tmp_path, steps=8, device="cuda")
    assert went_on
    assert report.tv < 1
