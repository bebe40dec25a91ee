"""The steering benchmark: its text, its guided policy, and a run of small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("peft", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")

import torch

import rl_ebm
from benchmarks.steer import text
from benchmarks.steer.models import FORBIDDEN, PROMPTS, QUICK, WANTED, Guided, make
from rl_ebm.policies.scoring import log_prob, q_values

ROOT = Path(__file__).parents[2]


def test_the_same_seed_gives_the_same_sentences():
    texts = text.sentences(200, seed=3)
    assert texts == text.sentences(200, seed=3)
    assert texts != text.sentences(200, seed=4)
    assert len(set(texts)) > 150
    assert {len(text.split()) for text in texts} >= {3, 5, 8}


def test_words_are_inflected():
    assert [text.past(w) for w in ("see", "walk", "hide", "carry", "play")] == [
        "saw",
        "walked",
        "hid",
        "carried",
        "played",
    ]
    assert [text.plural(w) for w in ("river", "witch", "city", "key")] == [
        "rivers",
        "witches",
        "cities",
        "keys",
    ]


@pytest.fixture(scope="module")
def task():
    return make(QUICK)


def test_encoding_keeps_what_fits_and_decoding_undoes_it(task):
    texts = text.sentences(300, seed=1)
    batch = text.encode(task.tokenizer, texts, task.space)
    task.space.check(batch.tokens, batch.lengths)
    kept = [x for x in texts if len(task.tokenizer.encode(x).ids) < task.space.max_length]
    assert 0 < len(kept) < len(texts)
    assert text.decode(task.tokenizer, batch) == kept


def test_shares_are_of_texts_and_not_of_tokens(task):
    texts = [f"a {WANTED}", f"the {FORBIDDEN}s", f"a {FORBIDDEN} in two {WANTED}s", "a dog"]
    rows = [task.tokenizer.encode(text).ids for text in texts]
    # The first one spelled letter by letter.
    rows[0] = [task.tokenizer.token_to_id(piece) for piece in ("▁", "a", "▁", *WANTED)]
    width = max(map(len, rows)) + 1
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    batch = rl_ebm.tokens.Batch(tokens, torch.tensor([len(r) + 1 for r in rows]), tokens[:, 0] * 0)
    wanted, forbidden = task.shares(batch)
    assert wanted.tolist() == [1, 0, 1, 0]
    assert forbidden.tolist() == [0, 1, 1, 0]


def test_guiding_the_reference_by_its_own_values_gives_the_exact_solution(task):
    ebm = rl_ebm.EBM(task.space, task.reward, 1.0, task.ngram, PROMPTS)
    solution = rl_ebm.solve(ebm)
    guided = Guided(task.ngram, solution, task.ngram)
    batch = solution.sample(20, torch.Generator().manual_seed(0))
    args = (task.space, batch.tokens, batch.lengths, batch.prompt_ids)
    torch.testing.assert_close(log_prob(guided, *args), solution.log_prob(*args[1:]))
    # By the caches the same.
    state = guided.start(batch.prompt_ids)
    rows = q_values(guided, task.space, batch.tokens, batch.prompt_ids)
    for t in range(task.space.max_length - 1):
        row = guided.step(state, batch.tokens[:, t - 1] if t else None)
        running = batch.lengths > t
        torch.testing.assert_close(
            row.log_softmax(-1)[running], rows[:, t].log_softmax(-1)[running]
        )


@pytest.mark.slow
def test_the_script_runs_and_writes_nothing():
    results = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))
    command = [sys.executable, "-m", "benchmarks.steer", "--quick", "--seeds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("| GPT-2 distilled |", "| `vargrad` |", "effective sample size", "Measured on"):
        assert part in done.stdout
    now = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))
    assert now == results, "a trial run overwrote the measured results"
