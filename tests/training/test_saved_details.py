"""Checkpoints and tensor files: what is off by one, overlaps, or is of another run."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import damage
import pytest
import torch
from run_cases import NETWORK, load_state, small_options

import rl_ebm
from rl_ebm.files import RunError
from rl_ebm.files.tensors import holds, load_tensors, save_tensors
from rl_ebm.training.checkpoint import _reach, _rebuild, _Storage, save_state
from rl_ebm.training.checkpoint import load_state as read_state
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


def test_a_tensor_has_at_most_64_dimensions():
    """One shape of a million, said once, can be that of many tensors."""
    with pytest.raises(ValueError, match="too many dimensions"):
        _rebuild(_Storage(torch.float32, "0", 1), 0, (1,) * 65, (1,) * 65)


# Outlines -----------------------------------------------------------------------------------------


def write_outline(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")


class Called:
    """What an outline calls and then changes."""

    def __init__(self, *told):
        self.told = told

    def __reduce__(self):
        return self.told


def test_a_key_that_takes_for_ever_to_be_hashed(run, tmp_path):
    """A tuple of one tuple twice, 60 times: 2^60 steps, which no signal ends."""
    twice = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    write_outline(run / "state.pt", b"\x80\x02})" + twice + b"K\x01s.")
    assert (run / "state.pt").stat().st_size < 600
    result = damage.run_limited(["train", "--resume", str(run), "--steps", "9"], tmp_path / "log")
    assert (result.code, result.fault()) == (2, None)
    assert "a key is neither text nor a whole number" in result.err


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({(1, (2,)): 3}, "a key is neither"),
        ({1.5: 3}, "a key is neither"),
        ({k * (2**61 - 1): 3 for k in range(3)}, "a key is neither"),  # of one hash
        (Called(OrderedDict, ([("a", 1)],)), "it calls what it does not"),
        (Called(torch._utils._rebuild_parameter, tuple(range(9))), "it calls what it does not"),
        (Called(torch._utils._rebuild_parameter, ({},), {"a": 1}), "it changes what is no dict"),
    ],
    ids=["tuple", "float", "one hash", "items", "arguments", "change"],
)
def test_what_no_checkpoint_is_written_with(value, words, tmp_path):
    write_outline(tmp_path / "s", pickle.dumps({"format": 1, "x": value}, protocol=2))
    with pytest.raises(RunError, match=f"damaged or no checkpoint of rl-ebm .{words}"):
        read_state(tmp_path / "s")
    with pytest.raises(RunError, match="a checkpoint cannot hold it"):
        save_state(tmp_path / "other", {"x": value})


def test_plain_nested_states_are_read_as_they_were(tmp_path):
    twice = [1, "a"]
    deep = ((twice, (twice, ())), {"x": {-1: {2**31: None}}, 0: [[], {}, ()], "t": 2**70})
    state = {"format": 1, "deep": deep, "many": {k: {f"{k}": (k, 0.5)} for k in range(-2000, 2000)},
             "ordered": OrderedDict(a=OrderedDict(b=(deep, deep)))}  # fmt: skip
    torch.save(state, tmp_path / "s")
    assert read_state(tmp_path / "s") == state
    tensors = {"format": 1, "x": [(torch.ones(2), {"y": torch.nn.Parameter(torch.ones(2))})] * 2}
    torch.save(tensors, tmp_path / "t")
    found = read_state(tmp_path / "t")["x"]
    assert [y.tolist() for x, more in found for y in (x, more["y"])] == [[1.0, 1.0]] * 4


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
