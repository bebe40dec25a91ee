"""Checkpoints and tensor files: what is off by one, overlaps, or is of another run."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from run_cases import NETWORK, load_state, small_options

import rl_ebm
from rl_ebm.files import RunError
from rl_ebm.files.tensors import holds, load_tensors, save_tensors
from rl_ebm.training.checkpoint import _reach, _rebuild, _Storage
from rl_ebm.training.run import resume, train

SPACE = rl_ebm.TokenSpace(3, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    scores = torch.randn(27, generator=torch.Generator().manual_seed(1))
    train(rl_ebm.EBM(SPACE, scores), out=run, options=small_options("soft-q"), network=NETWORK,
          steps=2)  # fmt: skip
    return run


# Tensors within their storages --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4,), (1,)), ((2, 3), (3, 1)), ((2, 2), (1, 2)), ((3, 2), (2, 1)), ((1, 3), (0, 2)),
     ((2, 2), (1, 1)), ((3,), (0,)), ((2, 3), (2, 1)), ((2, 2, 2), (4, 2, 2))],
)  # fmt: skip
def test_where_a_tensor_ends_and_whether_it_overlaps_itself(shape, stride):
    places = [
        sum(i * s for i, s in zip(index, stride, strict=True))
        for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist()
    ]
    overlaps = len(set(places)) < len(places)
    assert _reach(shape, stride) == (None if overlaps else max(places))
    for size in (max(places), max(places) + 1, max(places) + 2):
        for offset in (0, 1):
            storage = _Storage(torch.float32, "0", size)
            if overlaps or offset + max(places) >= size:
                with pytest.raises(ValueError, match="overlaps itself, or leaves its storage"):
                    _rebuild(storage, offset, shape, stride)
            else:
                assert _rebuild(storage, offset, shape, stride).shape == shape


# Another run's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step", "seconds", "tokens", "reward_calls", "metrics_rows"])
@pytest.mark.parametrize("value", [-1, 2**62])
def test_counts_are_neither_negative_nor_beyond_64_bits(name, value, run):
    torch.save(load_state(run) | {name: value}, run / "state.pt")
    with pytest.raises(RunError, match=f"its {name} is"):
        resume(run, steps=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda group: group.update(params=group["params"][::-1]), "has other parameters"),
        (lambda group: group.update(lr=-1e-3), "has no learning rate"),
        (lambda group: group.update(lr=float("inf")), "has no learning rate"),
        (lambda group: group.update(betas=(0.5, 0.999)), "has another betas"),
    ],
    ids=["params", "negative lr", "infinite lr", "betas"],
)
def test_an_optimiser_is_that_of_the_run(change, words, run):
    state = load_state(run)
    change(state["agent"]["learner"]["param_groups"][0])
    torch.save(state, run / "state.pt")
    with pytest.raises(RunError, match=words):
        resume(run, steps=4)


# Tensor files -------------------------------------------------------------------------------------


def write(path, entries, data):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_tensors_of_a_file_neither_overlap_nor_leave_gaps(tmp_path):
    def entry(begin, end):
        return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}

    data = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    write(tmp_path / "good", {"a": entry(0, 8), "b": entry(8, 16)}, data)
    found = load_tensors(tmp_path / "good")
    assert (found["a"].tolist(), found["b"].tolist()) == ([1.0, 2.0], [3.0, 4.0])
    for name, places in {
        "same": [(0, 16), (0, 16)],
        "overlap": [(0, 12), (8, 16)],
        "gap": [(0, 4), (8, 16)],
        "late": [(4, 8), (8, 16)],
        "short": [(0, 4), (4, 12)],
        "long": [(0, 8), (8, 20)],
    }.items():
        entries = {n: entry(*place) for n, place in zip("ab", places, strict=True)}
        write(tmp_path / name, entries, data)
        with pytest.raises(RunError, match="damaged or no safetensors file"):
            load_tensors(tmp_path / name)


def test_views_of_one_memory_keep_their_own_values(tmp_path):
    x = torch.arange(9.0).view(3, 3)
    tensors = {"x": x, "t": x.t(), "same": x.view(3, 3), "bits": x.view(torch.int32),
               "row": x[0], "flat": x.view(9)}  # fmt: skip
    save_tensors(tmp_path / "f", tensors)
    found = load_tensors(tmp_path / "f")
    for name, want in tensors.items():
        assert torch.equal(found[name], want), name


def test_a_file_holds_the_same_bits(tmp_path):
    x = torch.tensor([0.0, float("nan"), 1.0])
    save_tensors(tmp_path / "f", {"x": x})
    assert holds(tmp_path / "f", {"x": x.clone()})
    assert not holds(tmp_path / "f", {"x": torch.tensor([-0.0, float("nan"), 1.0])})
    assert not holds(tmp_path / "f", {"x": torch.tensor([0.0, float("nan"), 2.0])})
