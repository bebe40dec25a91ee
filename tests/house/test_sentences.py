"""Wrong kinds of arguments at the doors: one sentence each, as people meet them.

In a process of its own: in the tests annotations are checked before the library can speak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from run_cases import HANGS

PROGRAM = """
import json, math, sys, traceback
import numpy as np, torch, rl_ebm
from rl_ebm import policies
from rl_ebm.certificates.smc import smc
from rl_ebm.training.loop import Trainer

S = rl_ebm.TokenSpace(3, 3)
E = rl_ebm.TokenSpace(4, 3, eos_id=1)
R = torch.randn(27, generator=torch.Generator().manual_seed(0))
ebm, eos = rl_ebm.EBM(S, R), rl_ebm.EBM(E, torch.randn(E.num_sequences))
solution, other = rl_ebm.solve(ebm), policies.Tabular(S)
network = policies.Transformer(S, policies.TransformerConfig(1, 1, 4, 4))
tokens = S.sequences()[0][:4]
by_sum = lambda t, n, p: t.sum(1).double()
text = lambda prompts: rl_ebm.EBM(S, by_sum, 1.0, None, prompts)
two = lambda prompts: policies.Tabular(S, prompts)
VALUES = [None, True, 2.5, "a", -1, [1], (1, 2), {}, object(), torch.tensor(3.0), np.zeros(3),
          math.nan, 10**30, len, torch.zeros(2, 2), b"x", int, math.inf]
named = {
    "ebm for a solution": lambda: rl_ebm.verify(other, ebm),
    "two policies": lambda: rl_ebm.verify(other, network),
    "a function": lambda: rl_ebm.verify(lambda tokens: tokens, solution),
    "solution for an ebm": lambda: rl_ebm.certify(other, solution),
    "audit of an ebm": lambda: rl_ebm.audit(ebm),
    "audit of a number": lambda: rl_ebm.audit(0.5),
    "audit of a loss on an ebm": lambda: rl_ebm.audit_loss(lambda *_: R.sum(), ebm),
    "log_prob of a list": lambda: solution.log_prob([[0, 1, 2]]),
    "sample(-1)": lambda: solution.sample(-1),
    "sample(2.5)": lambda: solution.sample(2.5),
    "no end": lambda: Trainer(ebm, None, None, rl_ebm.TrainConfig(log_every=1)),
    "steps=2.5": lambda: rl_ebm.train(ebm, steps=2.5),
    "steps=True": lambda: rl_ebm.train(ebm, steps=True),
    "seconds=nan": lambda: rl_ebm.train(ebm, seconds=math.nan),
    "seed=2.5": lambda: rl_ebm.train(ebm, steps=1, seed=2.5),
    "solve(None)": lambda: rl_ebm.solve(None),
    "space": lambda: rl_ebm.EBM("a", R),
    "text": lambda: text(["the cat"]),
    "one text": lambda: text("the cat"),
    "padded": lambda: text(torch.tensor([[1, 0], [1, 2]])),
    "a large id": lambda: text([[10**9]]),
    "a large id of a policy": lambda: policies.Transformer(S, prompts=[[10**9]]),
    "float tokens": lambda: ebm.log_weight(tokens.double()),
    "tokens out of range": lambda: ebm.log_weight(tokens + 5),
    "prompt ids": lambda: ebm.log_weight(tokens, None, [0] * 4),
    "generator": lambda: solution.sample(3, 7),
    "a class": lambda: rl_ebm.verify(policies.Tabular, solution),
    "layers": lambda: policies.TransformerConfig(layers=10**9),
    "table": lambda: policies.Tabular(rl_ebm.TokenSpace(50257, 128)),
}
swept = {
    "TokenSpace": lambda v: rl_ebm.TokenSpace(v, 3),
    "max_length": lambda v: rl_ebm.TokenSpace(3, v),
    "eos_id": lambda v: rl_ebm.TokenSpace(3, 3, v),
    "EBM": lambda v: rl_ebm.EBM(v, R),
    "beta": lambda v: rl_ebm.EBM(S, R, v),
    "reference": lambda v: rl_ebm.EBM(S, R, 1.0, v),
    "prompts": text,
    "prompt": lambda v: text([v]),
    "prompt token": lambda v: text([[v]]),
    "log_weight": lambda v: ebm.log_weight(v),
    "lengths": lambda v: ebm.log_weight(tokens, v),
    "ids": lambda v: ebm.log_weight(tokens, None, v),
    "to": lambda v: ebm.to(v),
    "solve": lambda v: rl_ebm.solve(v),
    "memory": lambda v: rl_ebm.solve(ebm, v),
    "logits": lambda v: solution.logits(v),
    "log_prob": lambda v: solution.log_prob(v),
    "sample": lambda v: solution.sample(v),
    "sample generator": lambda v: solution.sample(3, v),
    "verify": lambda v: rl_ebm.verify(v, solution),
    "verify solution": lambda v: rl_ebm.verify(other, v),
    "verify memory": lambda v: rl_ebm.verify(other, solution, v),
    "verify samples": lambda v: rl_ebm.verify(other, solution, samples=v),
    "confidence": lambda v: rl_ebm.verify(other, solution, samples=9, confidence=v),
    "certify": lambda v: rl_ebm.certify(v, ebm),
    "certify ebm": lambda v: rl_ebm.certify(other, v),
    "certify samples": lambda v: rl_ebm.certify(other, ebm, v),
    "target samples": lambda v: rl_ebm.certify(other, ebm, 9, 0.9, v),
    "reward_max": lambda v: rl_ebm.certify(other, ebm, 9, 0.9, None, v),
    "particles": lambda v: rl_ebm.certify(other, ebm, 9, particles=v),
    "smc": lambda v: smc(ebm, v, 4),
    "smc particles": lambda v: smc(ebm, other, v),
    "smc threshold": lambda v: smc(ebm, other, 4, ess_threshold=v),
    "train": lambda v: rl_ebm.train(v, steps=0),
    **{
        f"train {k}": lambda v, k=k: rl_ebm.train(ebm, **({"steps": 0} | {k: v}))
        for k in ("agent", "options", "policy", "network", "seconds", "seed", "config",
                  "overwrite", "source", "compile", "progress", "solve")
    },
    **{
        f"TrainConfig {k}": lambda v, k=k: rl_ebm.TrainConfig(**({"steps": 1} | {k: v}))
        for k in ("steps", "seconds", "log_every", "eval_every", "checkpoint_every", "samples")
    },
    "Tabular": lambda v: policies.Tabular(v),
    "Tabular prompts": lambda v: policies.Tabular(S, v),
    "Tabular scale": lambda v: policies.Tabular(S, scale=v),
    "Tabular dtype": lambda v: policies.Tabular(S, dtype=v),
    "tables": lambda v: policies.Tabular.from_tables(v, S),
    "Transformer": lambda v: policies.Transformer(v),
    "Transformer config": lambda v: policies.Transformer(S, v),
    "layers": lambda v: policies.TransformerConfig(layers=v),
    "dim": lambda v: policies.TransformerConfig(dim=v),
    "Uniform": lambda v: policies.Uniform(v),
    "policy logits": lambda v: other.logits(v),
    "network logits": lambda v: network.logits(v),
    "sample policy": lambda v: policies.sample(v, S, 3),
    "sample space": lambda v: policies.sample(other, v, 3),
    "temperature": lambda v: policies.sample(other, S, 3, temperature=v),
    "epsilon": lambda v: policies.sample(other, S, 3, epsilon=v),
    "log_prob tokens": lambda v: policies.log_prob(other, S, v, torch.full((4,), 3)),
    "log_prob lengths": lambda v: policies.log_prob(other, S, tokens, v),
    "q_values": lambda v: policies.q_values(other, S, v),
    "q_from_r": lambda v: rl_ebm.q_from_r(v, S),
}

def said(f):
    try:
        f()
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = "rl_ebm" in last.filename.replace("/agents/", "/rl_ebm/") and "raise" in last.line
        return [type(error).__name__, str(error), ours]
    except BaseException as error:
        return [type(error).__name__, str(error), False]
    return None

found = {name: said(f) for name, f in named.items()}
for name, f in swept.items():
    found |= {f"{name} {i}": said(lambda: f(v)) for i, v in enumerate(VALUES)}
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def said():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANGS,
    )
    return json.loads(done.stdout)


WORDS = {
    "ebm for a solution": "got the EBM itself: verify(policy, rl_ebm.solve(ebm)); or",
    "two policies": "got another policy (Transformer)",
    "a function": "the policy must be a policy, with a method logits",
    "solution for an ebm": "ebm must be an rl_ebm.EBM, got TreeSolution",
    "audit of an ebm": "got the EBM itself: pass rl_ebm.solve(ebm)",
    "audit of a number": "got a float: pass rl_ebm.solve(ebm)",
    "audit of a loss on an ebm": "got the EBM itself: pass rl_ebm.solve(ebm)",
    "log_prob of a list": "tokens must be a tensor of integers of shape (B, T), got list",
    "sample(-1)": "n must be an integer in [0, 2147483648], got -1",
    "sample(2.5)": "n must be an integer in [0, 2147483648], got 2.5",
    "no end": "a run needs an end: give its TrainConfig steps, seconds or responses",
    "steps=2.5": "steps must be an integer, got 2.5",
    "steps=True": "steps must be an integer, got True",
    "seconds=nan": "seconds must be a finite number >= 0, got nan",
    "seed=2.5": "seed must be an integer, got 2.5",
    "solve(None)": "solve needs an rl_ebm.EBM, got NoneType",
    "space": "space must be a TokenSpace, got str",
    "text": "text was given: tokenize it first",
    "one text": "text was given: tokenize it first",
    "padded": "nothing in it tells padding from tokens",
    "a large id": "holds the token id 1000000000, and ids must be in [0, ",
    "a large id of a policy": "holds the token id 1000000000",
    "float tokens": "tokens must hold integers (int64), got a tensor of float64",
    "tokens out of range": "token ids must be in [0, 3)",
    "prompt ids": "prompt_ids must be a tensor of integers",
    "generator": "generator must be a torch.Generator",
    "a class": "got a class: make one, Tabular(...)",
    "layers": "layers must be at most 10000, got 1000000000",
    "table": "of them with 50257 logits take",
}


@pytest.mark.parametrize("name", WORDS)
def test_the_slips_that_people_make_are_named(name, said):
    assert said[name] is not None, "accepted"
    kind, text, ours = said[name]
    assert kind in ("ValueError", "TypeError", "WrongTypeError", "TooLargeError"), text
    assert WORDS[name] in text
    assert "\n" not in text
    assert ours


def test_no_wrong_kind_reaches_torch(said):
    """Every constructor and method with eighteen values each: success, or one sentence of ours."""
    bad = {k: v for k, v in said.items() if v is not None and ("\n" in v[1] or not v[2])}
    assert bad == {}
    assert sum(v is not None for v in said.values()) > 800


def test_numbers_of_numpy_are_numbers(tmp_path):
    import numpy as np
    import torch

    import rl_ebm

    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(np.int64(3), np.int32(3)), torch.randn(27), np.float64(0.5))
    options = rl_ebm.agents.SoftQConfig(batch_size=16)
    runs = [
        rl_ebm.train(
            ebm, out=tmp_path / str(i), options=options, seed=s, steps=n, network="tabular"
        )
        for i, (s, n) in enumerate([(np.int64(3), np.int64(2)), (3, 2)])
    ]
    assert torch.equal(runs[0][0].table, runs[1][0].table)
    rl_ebm.load(tmp_path / "0")
