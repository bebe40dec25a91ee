"""The comparison beyond enumeration: estimates, and times that are claimed by their intervals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peer_cases import Clock, contender, row, run_of

from benchmarks.peers.__main__ import Options, main
from benchmarks.peers.crossings import crossed, crossing, kl_at, winner
from benchmarks.peers.entries import CONTENDERS
from benchmarks.peers.files import Results, read_rows
from benchmarks.peers.machines import log_weights, tables
from benchmarks.peers.policies import PrefixPolicy
from benchmarks.peers.processes import Run, command
from benchmarks.peers.report import picture, remarks, table
from benchmarks.peers.watch import FIGURES, TimeUp, Watch, figures_of
from rl_ebm import EBM, TokenSpace, policies, solve, verify
from rl_ebm.envs import make_task
from rl_ebm.policies import Tabular, Transformer, TransformerConfig, Uniform
from rl_ebm.rewards import Automaton
from rl_ebm.studies.bench import Problem
from rl_ebm.verification import verify as verifying


def sampled(kls, width=0.02, name="a", seed=0):
    """A run of estimates."""
    found = run_of(kls, name, seed)
    for look in found:
        look["samples"] = 100
        for key in FIGURES:
            look |= {f"{key}_low": look[key] - width, f"{key}_high": look[key] + width}
    return found


def test_a_look_beyond_enumeration_has_intervals(monkeypatch, tmp_path):
    ebm = make_task("potts", vocab_size=3, max_length=3, reference="uniform")
    policy = Tabular(ebm.space, generator=torch.Generator().manual_seed(1))
    exact = verify(policy, solve(ebm))
    assert set(figures_of(exact)) == set(FIGURES)
    for module in ("benchmarks.peers.watch.lists", "rl_ebm.verification.verify.lists"):
        monkeypatch.setattr(module, lambda solution: False)
    assert verifying.lists(None) is False
    watch = Watch(solve(ebm), 2.0, 2, Clock(), samples=400)
    watch.start(1)
    watch(policy, 1, 16)
    (look,) = watch.rows
    assert look["samples"] == 400
    for key in FIGURES:
        assert look[f"{key}_low"] <= float(getattr(exact, key)) <= look[f"{key}_high"]
        assert look[f"{key}_low"] < look[key] < look[f"{key}_high"]
    # The file keeps them, numbers as numbers.
    run = Run("a", Problem("potts"), 0, 2.0, 2, 1)
    Results(tmp_path, "potts").add(run, 2.0, {"version": "v", "parameters": 1, "rows": watch.rows})
    kept = read_rows(tmp_path / "potts.csv")[0]
    assert {key: kept[key] for key in look} == look
    told = Results(tmp_path, "potts").last("a")
    assert f"target) {look['kl_policy_target']:.2f}" in told
    assert "[" in told


def test_a_time_is_claimed_by_the_upper_end():
    run = sampled([1.0, 0.11, 0.09, 0.05])
    assert crossed(run, 0.1, "seconds") == (2.0, 4.0)
    assert crossed(run[:3], 0.1, "seconds") == (2.0, None)
    assert crossed(run, 0.03, "seconds") == (None, None)
    a = contender()
    assert crossing([run], 0.1, "seconds", a) == "2 to 4"
    assert crossing([run[:3]], 0.1, "seconds", a) == "undecided, not before 2"
    assert crossing([run], 0.03, "seconds", a) == "not reached"
    assert crossing([run], 0.03, "seconds", contender(fixed_point="else")) == "cannot"
    clear = sampled([1.0, 0.05])
    assert crossing([clear], 0.1, "seconds", a) == "2", "one number where nothing is open"
    assert crossing([run, run[:3]], 0.1, "seconds", a) == "2 to 4 (1 of 2 runs)"
    open_end = sampled([0.05])
    open_end[0]["kl_policy_target_high"] = math.inf
    assert crossed(open_end, 0.1, "seconds") == (1.0, None)


def test_nobody_has_won_where_another_may_have():
    fast = sampled([1.0, 0.05], name="fast")
    open_rows = fast + sampled([0.11, 0.11, 0.01], name="open")
    assert winner(fast + sampled([1.0, 1.0, 0.01], name="slow"), 0.1, "seconds") == ("fast", 2.0)
    assert winner(open_rows, 0.1, "seconds") is None
    assert winner(open_rows, 0.001, "seconds") is None
    assert "is left open" in remarks(sampled([0.11, 0.11]))
    assert "Nobody came below" in remarks(sampled([1.0, 0.9]))
    assert "100 exact samples" in remarks(fast)
    assert "exact samples" not in remarks(run_of([1.0]))


def test_the_table_and_the_picture_have_the_intervals():
    rows = sampled([1.0, 0.05]) + sampled([1.0, 0.07], seed=1)
    assert kl_at([rows[1], rows[3]]) == "0.06 ± 0.1 [0.04, 0.08]"
    assert kl_at(sampled([17.234], 0.2)) == "17.23 [17.03, 17.43]"
    text = table(rows, [contender()], {}, 2.0)
    assert "| 0.06 ± 0.1 [0.04, 0.08] |" in text
    axes = picture(rows, [contender()], "potts").axes[0]
    assert len(axes.collections) == 2
    assert "95% intervals" in axes.get_ylabel()
    plain = picture(run_of([1.0, 0.05]), [contender()], "random").axes[0]
    assert not plain.collections
    assert plain.get_ylabel() == "exact KL(policy, target) (nats)"


def test_who_cannot_do_a_task_says_so_in_the_table(tmp_path, monkeypatch, capsys):
    phrases, potts = Problem("phrases").make()[0], Problem("potts").make()[0]
    for c in CONTENDERS.values():
        assert c.cannot(potts) == ""
        told = c.cannot(phrases)
        assert (told == "") == (c.package == "rl-ebm"), c.name
        assert told == "" or "EOS" in told
    trl = next(c for c in CONTENDERS.values() if c.package == "trl")
    other = EBM(TokenSpace(2, 2), torch.zeros(4))
    assert "uniform law" in trl.cannot(other)

    def worker(run, interpreter):
        assert run.samples == 7
        looks = [{k: v for k, v in look.items() if k not in row()} for look in sampled([1.0])]
        looks[0] |= {"seconds": 1.0, "updates": 1, "reward_calls": 1}
        looks[0] |= dict.fromkeys(FIGURES, 1.0)
        return {"version": "v 1", "parameters": 5, "rows": looks}

    monkeypatch.setattr("benchmarks.peers.__main__.start", worker)
    name, peer = "rl-ebm vargrad", "torchgfn TB (its MLP)"
    main(Options(tasks=("phrases",), contenders=(name, peer), out=tmp_path, threads=1, samples=7))
    said = capsys.readouterr().out
    assert f"- {peer}: cannot do this task: its responses end with an EOS" in said
    assert "| rl-ebm vargrad |" in said
    run = Run(name, Problem("potts"), 0, 1.0, 2, 1, 7)
    assert "--samples=7" in command(run, "python", tmp_path)
    with pytest.raises(ValueError, match="--samples must be >= 2, got 1"):
        Options(samples=1)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_automata_as_arrays_are_the_log_weight(beta):
    space = TokenSpace(4, 5)
    paid = Automaton.contains(space, [1, 2], 3.0) + Automaton.counts(space, [3, 3], -1.5)
    texts = policies.sample(Uniform(space), space, 50, torch.Generator().manual_seed(0))
    for ebm in (
        EBM(space, paid, beta, Uniform(space)),
        EBM(space, paid, beta),
        EBM(space, paid, beta, policies.fit_ngram(space, texts, order=2, smoothing=0.5)),
        make_task("potts", vocab_size=4, max_length=5, beta=beta, reference="uniform"),
    ):
        tokens, _ = space.sequences()
        found = log_weights(tokens.numpy(), tables(ebm))
        assert torch.from_numpy(found) == pytest.approx(ebm.log_weight(tokens).double())
    with pytest.raises(ValueError, match="paid by an automaton"):
        tables(make_task("random"))


def test_prefixes_that_no_number_counts():
    """Against the network that the rows are of; by logits and by steps."""
    space = TokenSpace(64, 16)
    net = Transformer(space, TransformerConfig(layers=1, heads=1, dim=8, hidden=8))
    generator = torch.Generator().manual_seed(0)

    def rows(prefixes):
        depth = (prefixes >= 0).sum(1)
        at = torch.arange(len(prefixes)), depth.clamp(max=15)
        return net.logits(prefixes.clamp(min=0))[at]

    policy = PrefixPolicy(space, rows)
    tokens = torch.randint(0, 64, (5, 16), generator=generator)
    with torch.no_grad():
        whole = net.logits(tokens)
    torch.testing.assert_close(policy.logits(tokens), whole)
    state = policy.start(torch.zeros(5, dtype=torch.int64))
    stepped = [policy.step(state, tokens[:, t - 1] if t else None) for t in range(16)]
    torch.testing.assert_close(torch.stack(stepped, 1), whole)


@pytest.mark.parametrize("name", ["rl-ebm vargrad, 256 responses"])
def test_ours_trains_where_nothing_is_listed(name):
    ebm = make_task("potts", vocab_size=4, max_length=12, reference="uniform")
    clock = Clock()

    class Ticking(Watch):
        def __call__(self, policy, updates, reward_calls):
            clock.now += 1.0
            super().__call__(policy, updates, reward_calls)

    watch = Ticking(solve(ebm), 1.0, 2, clock, samples=4)
    with pytest.raises(TimeUp):
        CONTENDERS[name].train(ebm, 0, watch)
    (look,) = watch.rows
    assert look["reward_calls"] == 256
    assert look["kl_policy_target"] > 1
    teacher = CONTENDERS["rl-ebm on-policy-distillation, 256 responses"]
    calls = []
    with pytest.raises(TimeUp):
        teacher.train(ebm, 0, _first(calls))
    assert calls == [0], "an automaton is not asked for rewards"


def _first(calls):
    def look(policy, updates, reward_calls):
        calls.append(reward_calls)
        raise TimeUp

    return _Stopwatch(look)


class _Stopwatch(SimpleNamespace):
    def __init__(self, look):
        super().__init__(look=look, progress=0.0, start=lambda parameters: None)

    def __call__(self, *found):
        return self.look(*found)
