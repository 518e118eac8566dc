"""What goes wrong with a model in this process: no room, no sleep, no such model."""

import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, ViTConfig

import tinyjudge
from speciarl.judge import causal, modelfile
from speciarl.judge.base import Pair
from speciarl.judge.causal import TransformersJudge
from speciarl.judge.guard import LONGEST
from speciarl.judge.modelfile import device_of, digest_of, dtype_of, find_model

PAIRS = [Pair("robin", "bird " * n) for n in (3, 1, 7, 2, 0, 5, 4, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judge")
    return tinyjudge.save_judge(root / "small", "llama", tinyjudge.bytes_tokenizer())


@pytest.fixture(autouse=True)
def own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test has a model that another one has spoilt."""
    monkeypatch.setattr(causal, "_LOADED", WeakValueDictionary())


class Cramped:
    """A device with room for a few rows: a scorer that fails as CUDA does when given more."""

    def __init__(self, judge: TransformersJudge, rows: int) -> None:
        self.inner: Any = judge._scorer
        self.lock, self.awake, self.rows = self.inner.lock, True, rows
        self.sizes: list[int] = []

    def scores(self, head: tuple[int, ...], suffixes: Sequence[Sequence[int]]) -> Tensor:
        self.sizes.append(len(suffixes))
        if len(suffixes) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.scores(head, suffixes)


def test_out_of_memory_halves_the_batch(folder: Path) -> None:
    judge = TransformersJudge(folder)
    wanted = judge.grade(PAIRS)
    cramped: Any = Cramped(judge, rows=3)
    judge._scorer = cramped
    found = judge.grade(PAIRS)
    assert [v.category for v in found] == [v.category for v in wanted]
    assert cramped.sizes[:3] == [8, 4, 2] and max(cramped.sizes[2:]) <= 3
    cramped.sizes.clear()
    judge.grade(PAIRS)
    assert max(cramped.sizes) <= 3  # learnt: what did not fit is not tried again
    assert judge.tally()["faults"] == 0 and judge.tally()["model_calls"] == 24


def test_a_pair_without_room_is_a_fault_and_the_rest_is_judged(folder: Path) -> None:
    judge = TransformersJudge(folder)
    cramped: Any = Cramped(judge, rows=0)
    judge._scorer = cramped
    verdicts = judge.grade(PAIRS)
    assert {(v.category, v.source) for v in verdicts} == {(None, "out-of-memory")}
    cramped.rows = 1
    assert all(v.category is not None for v in judge.grade(PAIRS))
    assert judge.tally()["faults"] == len(PAIRS)


def test_other_errors_are_not_swallowed(folder: Path) -> None:
    judge = TransformersJudge(folder)
    scorer: Any = judge._scorer
    scorer.scores = lambda head, suffixes: 1 / 0
    with pytest.raises(ZeroDivisionError):
        judge.grade(PAIRS)


def test_scores_that_are_not_numbers(folder: Path) -> None:
    judge = TransformersJudge(folder)
    scorer: Any = judge._scorer
    scorer._labels.weight[2] = torch.nan
    assert [(v.category, v.source) for v in judge.grade(PAIRS[:1])] == [(None, "no-label")]
    assert judge.tally()["faults"] == 1


def test_sleep_and_wake(folder: Path) -> None:
    """On the rollout engine's device, weights leave and return, and scores stay what they were."""
    judge = TransformersJudge(folder)
    before = judge.grade(PAIRS)
    judge.sleep()
    assert judge.grade(PAIRS) == before  # a CPU is nobody's: nothing to do
    judge.concurrent = False
    scorer: Any = judge._scorer
    for _ in range(2):
        on_device = [tensor.data_ptr() for tensor in scorer._tensors()]
        judge.sleep()
        judge.sleep()
        assert not set(on_device) & {tensor.data_ptr() for tensor in scorer._tensors()}
        assert not scorer._prefixes
        with pytest.raises(RuntimeError, match="asleep: wake it"):
            judge.grade(PAIRS)
        judge.wake()
        judge.wake()
        for tensor in scorer._tensors():
            tensor.data = tensor.data.clone()  # as a copy to a device would be
        assert judge.grade(PAIRS) == before


def test_close(folder: Path) -> None:
    judge = TransformersJudge(folder)
    weights = weakref.ref(next(judge._scorer._tensors()))  # type: ignore[union-attr]
    judge.close()
    judge.close()
    judge.sleep()
    judge.wake()
    assert weights() is None
    with pytest.raises(RuntimeError, match="closed"):
        judge.grade(PAIRS)


def test_labels_that_cannot_be_judged(folder: Path) -> None:
    judge = TransformersJudge(folder)
    judge.check(["robin", "Golden-winged Warbler", "robin"])
    for truth in ("", "  ", "\u200b"):
        with pytest.raises(ValueError, match="a label is empty"):
            judge.check(["robin", truth])
    with pytest.raises(ValueError, match=f"a label has {LONGEST + 1} characters"):
        judge.check(["a" * (LONGEST + 1)])


def test_a_pair_beyond_the_context(folder: Path) -> None:
    judge = TransformersJudge(folder)
    judge._context = len(judge._prompt.head) + len(judge._prompt.suffix(PAIRS[2])) - 1
    verdicts = judge.grade(PAIRS)
    assert [v.source for v in verdicts] == ["model"] * 2 + ["too-long"] + ["model"] * 5
    assert judge.tally()["faults"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 0}, "token_budget = 0"),
        ({"dtype": "fp8"}, "judge dtype 'fp8': use auto, float32"),
        ({"device": "gpu"}, "judge device 'gpu': use auto, cpu"),
        ({"variant": "best"}, "prompt variant 'best': known are ladder"),
        ({"attention": "fast"}, "fast"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersJudge(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(folder: Path) -> None:
    with pytest.raises(ValueError, match="'cuda': no CUDA device is visible"):
        TransformersJudge(folder, device="cuda")
    assert device_of("auto") == torch.device("cpu")
    assert dtype_of("auto", torch.device("cpu")) == torch.float32
    assert dtype_of("auto", torch.device("cuda", 0)) == torch.bfloat16


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"judge model '.*none': there is no such folder"):
        TransformersJudge(tmp_path / "none")
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"run': no config.json of a model in it$"):
        TransformersJudge(run)
    (run / "config.json").write_text('{"judge": {"kind": "openai"}}')  # settings of the run
    (run / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match=r"did you mean .*run/model\?"):
        TransformersJudge(run)

    def offline(name: str, file: str) -> str:
        raise OSError(f"We couldn't connect to load {file}.\nCheck your connection.")

    monkeypatch.setattr(modelfile, "cached_file", offline)
    with pytest.raises(FileNotFoundError, match="'owner/judge': no such folder, and not .*connect"):
        TransformersJudge("owner/judge")
    monkeypatch.setattr(modelfile, "cached_file", lambda name, file: str(run / "model" / file))
    assert find_model("owner/judge") == run / "model"


def test_models_that_cannot_judge(folder: Path, tmp_path: Path) -> None:
    tokenizer = tinyjudge.bytes_tokenizer()
    other = tmp_path / "pictures"
    ViTConfig().save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="pictures' is of type vit, which is neither"):
        TransformersJudge(other)
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    with pytest.raises(ValueError, match="short' has a context of 512 tokens, and the .* take"):
        TransformersJudge(short)


def test_no_room_for_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(modelfile, "_free", lambda device: 100_000)
        patch.setattr(modelfile.AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(MemoryError, match=r"small' takes 0.0 GiB in .*float32, and .* on cpu"):
            TransformersJudge(folder)
    free = modelfile._free(torch.device("cpu"))
    assert free is None or free > 2**20


def test_identity(folder: Path, tmp_path: Path) -> None:
    def identity(path: Path, **options: str) -> str:
        return TransformersJudge(path, **options).identity  # type: ignore[arg-type]

    own = identity(folder)
    assert str(tmp_path) not in own and own.startswith("transformers:small:")
    copy = shutil.copytree(folder, tmp_path / "small")
    assert identity(copy) == own
    assert identity(folder, variant="referee") != own
    assert identity(folder, dtype="bfloat16") != own
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1:] = b"\x00" if content[-1:] != b"\x00" else b"\x01"
    weights.write_bytes(content)
    assert identity(copy) != own
    other = tinyjudge.save_judge(
        tmp_path / "other" / "small", "llama", tinyjudge.bytes_tokenizer(["warbler"] * 9)
    )
    assert identity(other) != own


def test_digest_of_large_files_is_cheap(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as stream:
        stream.truncate(4 * 2**30)  # sparse: 4 GiB of zeros
    before = digest_of(tmp_path)
    assert before == digest_of(tmp_path)
    with weights.open("r+b") as stream:
        stream.seek(-100, 2)
        stream.write(b"trained")
    assert digest_of(tmp_path) != before
    (tmp_path / "notes.md").write_text("not the model")
    after = digest_of(tmp_path)
    (tmp_path / "notes.md").unlink()
    assert digest_of(tmp_path) == after
    snapshot = tmp_path / "snapshots" / "0123456789abcdef0123"
    snapshot.mkdir(parents=True)
    LlamaConfig().save_pretrained(snapshot)  # weights may come later
    assert digest_of(snapshot) == "0123456789abcdef"
