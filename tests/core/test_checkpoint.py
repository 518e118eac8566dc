"""Checkpoints: bit-exact, atomic, resharded, and loud about every kind of damage."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speciarl.core.checkpoint import CheckpointError, CheckpointStore, check_shared
from speciarl.core.shards import Shard, write_manifest

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Odd shapes, all dtypes, a 0-dim and an empty tensor, a transposed view and a tied pair."""
    draw = torch.Generator().manual_seed(seed)
    out = {
        f"model.layers.0.w_{str(dtype)[6:]}": (torch.randn(5, 3, generator=draw) * 50).to(dtype)
        for dtype in DTYPES
    }
    out["optim.step"] = torch.tensor(7.0 + seed)
    out["mask"] = torch.rand(4, generator=draw) > 0.5
    out["empty"] = torch.zeros(0, 3)
    out["transposed"] = torch.randn(4, 6, generator=draw).t()
    out["grad"] = torch.randn(3, generator=draw, requires_grad=True)
    out["special"] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    out["embed"] = torch.randn(6, 2, generator=draw)
    out["lm_head"] = out["embed"]
    return out


def zeros_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def bits(value: Tensor) -> bytes:
    return bytes(value.detach().contiguous().flatten().view(torch.uint8).tolist())


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        assert bits(left[name]) == bits(right[name]), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard_of(store: CheckpointStore, step: int) -> Path:
    return next(store.path(step).glob("*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=3)


def test_round_trip_is_bit_exact_and_in_place(store: CheckpointStore) -> None:
    saved = some_tensors()
    state = {"step": 3, "lr": 0.1 + 0.2, "order": [3, 1, 2], "name": "ü"}
    folder = store.save(3, saved, state)
    target = zeros_of(saved)
    addresses = {name: value.data_ptr() for name, value in target.items()}
    assert store.load(3, target) == state
    assert_same_bits(target, saved)
    assert addresses == {name: value.data_ptr() for name, value in target.items()}
    assert folder == store.path(3)
    assert names(folder) == [
        "manifest.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "state.json",
    ]


def test_a_part_of_the_tensors_can_be_loaded(store: CheckpointStore) -> None:
    saved = some_tensors()
    store.save(1, saved, {})
    part = {"grad": torch.zeros(3)}
    store.load(1, part)
    assert_same_bits(part, {"grad": saved["grad"]})


def test_big_tensors_are_spread_over_several_files(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speciarl.core.shards.FILE_BYTES", 100)
    saved = some_tensors()
    store.save(1, saved, {})
    assert len(list(store.path(1).glob("*.safetensors"))) > 3
    target = zeros_of(saved)
    store.load(1, target)
    assert_same_bits(target, saved)


def test_small_saves_are_quick(store: CheckpointStore) -> None:
    tensors = {f"w{i}": torch.randn(4000) for i in range(200)}  # 3.2 MB
    store.save(0, tensors, {})
    seconds = []
    for step in (1, 2, 3):
        start = time.perf_counter()
        store.save(step, tensors, {})
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_steps_latest_previous(store: CheckpointStore) -> None:
    assert store.latest() is None and store.steps() == [] and store.previous(5) is None
    for step in (2, 10, 9):
        store.folder.mkdir(exist_ok=True)
        (store.folder / f"step-{step}").mkdir()
    for name in ("step-11.tmp", "step-12.aside", "step-x", "other"):
        (store.folder / name).mkdir()
    assert store.steps() == [2, 9, 10]
    assert store.latest() == 10
    assert store.previous(10) == 9 and store.previous(2) is None


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5])]
)
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep=keep)
    for step in range(1, 6):
        store.save(step, {"w": torch.ones(1)}, {})
    assert store.steps() == left
    assert names(store.folder) == [f"step-{step}" for step in left]
    with pytest.raises(ValueError, match="-1"):
        CheckpointStore(tmp_path, keep=-1)


def test_a_leftover_of_a_killed_save_is_ignored_and_removed(store: CheckpointStore) -> None:
    saved = {"w": torch.arange(3.0)}
    store.save(1, saved, {"a": 1})
    for name in ("step-2.tmp", "step-9.tmp"):
        (store.folder / name).mkdir()
        (store.folder / name / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert store.latest() == 1
    assert store.load(1, {"w": torch.zeros(3)}) == {"a": 1}
    store.save(2, saved, {})
    assert names(store.folder) == ["step-1", "step-2"]


def test_the_same_step_can_be_saved_again(store: CheckpointStore) -> None:
    store.save(4, {"w": torch.zeros(2)}, {"try": 1})
    store.save(4, {"w": torch.ones(2)}, {"try": 2})
    target = {"w": torch.zeros(2)}
    assert store.load(4, target) == {"try": 2}
    assert target["w"].tolist() == [1, 1] and names(store.folder) == ["step-4"]


def test_a_run_that_went_back_resumes_on_its_new_path(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10):
        store.save(step, {"w": torch.tensor(float(step))}, {})
    store.save(7, {"w": torch.tensor(7.5)}, {})
    assert store.latest() == 7 and store.steps() == [5, 7]
    assert names(store.folder) == ["step-10.aside", "step-5", "step-7"]


def flip_a_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "data flipped": (lambda path: flip_a_byte(path, -1), "corrupted"),
    "header flipped": (lambda path: flip_a_byte(path, 20), "corrupted"),
    "length flipped": (lambda path: flip_a_byte(path, 6), "corrupted"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 5), "bytes"),
    "emptied": (lambda path: os.truncate(path, 0), "bytes"),
    "missing": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_nothing_is_loaded(
    store: CheckpointStore, kind: str, pattern: str
) -> None:
    store.save(1, {"w": torch.ones(64)}, {"step": 1})
    store.save(2, {"w": torch.ones(64)}, {"step": 2, "padding": "x" * 40})
    damaged = next(store.path(2).glob(pattern))
    hurt, reason = DAMAGE[kind]
    hurt(damaged)
    target = {"w": torch.zeros(64)}
    with pytest.raises(CheckpointError) as caught:
        store.load(2, target)
    assert "delete it or pass --set train.resume=previous" in str(caught.value)
    if pattern != "manifest.json":
        assert damaged.name in str(caught.value) and reason in str(caught.value)
    assert not target["w"].any()
    assert store.load(store.previous(2) or 0, target) == {"step": 1}
    assert target["w"].all()


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("v", torch.zeros(2, 3), "tensor v is not in the checkpoint"),
        ("w", torch.zeros(3, 2), r"tensor w: .*\[2, 3\].* in the checkpoint.*\[3, 2\]"),
        ("w", torch.zeros(6), "tensor w"),
        ("w", torch.zeros(2, 3, dtype=torch.bfloat16), "float32.*bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(
    store: CheckpointStore, name: str, target: Tensor, reason: str
) -> None:
    store.save(1, {"w": torch.ones(2, 3)}, {})
    with pytest.raises(CheckpointError, match=reason):
        store.load(1, {name: target})
    with pytest.raises(CheckpointError, match="step-8"):
        store.load(8, {})


@pytest.mark.parametrize(
    ("tensors", "state", "reason"),
    [
        ({"optim.lr": 0.1}, {}, "optim.lr is float, not a tensor"),
        ({"w": torch.ones(1)}, {"path": Path()}, "not JSON serializable"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    store: CheckpointStore, tensors: dict, state: dict, reason: str
) -> None:
    store.save(1, {"w": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=reason):
        store.save(2, tensors, state)
    assert names(store.folder) == ["step-1"]


def test_elements_that_the_writer_lost_are_noticed(tmp_path: Path) -> None:
    half = Shard(bytes=0, digest="", elements={"w": 2})
    write_manifest(tmp_path, 1, {"w": torch.ones(4)}, b"{}", [{"a": half}, {"b": half}])
    with pytest.raises(OSError, match="w: 2 of 4 elements"):
        write_manifest(tmp_path, 1, {"w": torch.ones(4)}, b"{}", [{"a": half}, {}])


def test_no_file_is_pickle(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled something")

    store.save(1, some_tensors(), {})
    assert {path.suffix for path in store.path(1).iterdir()} == {".json", ".safetensors"}
    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    store.load(1, zeros_of(some_tensors()))


def test_one_process_shares_its_folder_with_itself(tmp_path: Path) -> None:
    check_shared(tmp_path / "new")
    assert names(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="one folder that all nodes share"):
        check_shared(tmp_path / "file")
