"""The contract with SGLang, on small packages of the same shape: every broken piece is named."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from sglangtree import (
    BUCKET,
    CACHE,
    ENGINE,
    FILES,
    MANAGER,
    MESSAGES,
    MIXIN,
    SAMPLING,
    UPDATER,
)
from speciarl.core.cli import main
from speciarl.rollout import sglang_checks as checks
from speciarl.rollout import sglang_contract
from speciarl.rollout.sglang_contract import Report, examine, write_reference
from speciarl.rollout.sglang_needs import NEEDS
from speciarl.rollout.sglang_settings import Launch
from speciarl.rollout.sglang_source import Package, SourceError

Tree = Callable[..., Package]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes the package, in `file` with `old` replaced by `new`, and others over it."""

    def write(file: str = "", old: str = "", new: str = "", **more: str) -> Package:
        files = {**FILES, **{name.replace("__", "/") + ".py": text for name, text in more.items()}}
        if file:
            assert not old or old in files[file]
            files[file] = files[file].replace(old, new) if old else new
        for name, text in files.items():
            path = tmp_path / "sglang" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return Package(tmp_path)

    return write


@pytest.fixture
def recorded(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small package is the reference."""
    write_reference(examine(tree()), tmp_path / "reference.json")
    record = json.loads((tmp_path / "reference.json").read_text())
    found = {name: sglang_contract.Found(**row) for name, row in record["found"].items()}
    monkeypatch.setattr(sglang_contract, "reference", lambda: (record["version"], found))


def failures(report: Report) -> list[tuple[str, str]]:
    return [(lack.what, lack.file) for lack in report.failures]


def test_a_package_with_all_of_it_fits(tree: Tree, recorded: None) -> None:
    report = examine(tree())
    assert report.conforms and not report.lacking and not report.changes
    assert report.version == "0.5.30"
    assert report.text() == "SGLang 0.5.30: fits"
    assert {name.partition(":")[2] for name in report.found} == {need.name for need in NEEDS}


@pytest.mark.parametrize(
    ("file", "old", "new", "wanted"),
    [
        (ENGINE, "async_generate", "agenerate", "Engine.async_generate"),
        (ENGINE, "image_data=None, ", "", "Engine.async_generate(image_data)"),
        (ENGINE, "self, **kwargs", "self, model_path", "Engine.__init__(**)"),
        (ENGINE, "run_detokenizer_process_func", "other", "Engine.run_detokenizer_process_func"),
        (ENGINE, "self.loop", "self.event_loop", "Engine.loop"),
        (ENGINE, "class Engine(EngineBase)", "class Engine", "Engine.shutdown"),
        ("srt/entrypoints/base.py", "resume_memory_occupation(self, tags=None)",
         "resume_memory_occupation(self, kinds=None)", "Engine.resume_memory_occupation(tags)"),
        (MIXIN, "obj, request", "obj, req", "TokenizerManager.update_weights_from_tensor(request)"),
        (MANAGER, "_subprocess_watchdog", "watchdog", "TokenizerManager._subprocess_watchdog"),
        (MANAGER, '"cached_tokens"', '"cached"', "'cached_tokens'"),
        (MESSAGES, "    weight_version: object = None\n", "",
         "UpdateWeightsFromTensorReqInput.weight_version"),
        (SAMPLING, "stop_regex", "stop_pattern", "SamplingParams.stop_regex"),
        (BUCKET, "get_metadata", "metadata", "FlattenedTensorBucket.get_metadata"),
        (UPDATER, '"flattened_bucket"', '"bucket"', "'flattened_bucket'"),
        ("srt/arg_groups/fields/all.py", "mm_attention_backend", "vit_attention_backend",
         "ServerArgs.mm_attention_backend"),
        ("srt/constants.py", "'cuda_graph'", "'graphs'",
         "GPU_MEMORY_TYPE_CUDA_GRAPH = 'cuda_graph'"),
        (CACHE, "SGLANG_VLM_CACHE_SIZE_MB", "SGLANG_MM_CACHE", "'SGLANG_VLM_CACHE_SIZE_MB'"),
        ("srt/models/qwen3_vl.py", "Qwen3VLForC", "Qwen3VlForC", "Qwen3VLForConditionalGeneration"),
        ("srt/utils/common.py", "MultiprocessingSerializer", "Serializer",
         "MultiprocessingSerializer.serialize"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(
    tree: Tree, recorded: None, file: str, old: str, new: str, wanted: str
) -> None:
    report = examine(tree(file, old, new))
    assert wanted in [what for what, _ in failures(report)]
    assert not report.conforms
    (lack,) = [lack for lack in report.failures if lack.what == wanted]
    assert lack.why and lack.file
    assert f"    {lack}" in report.text().splitlines()
    assert report.text().startswith("SGLang 0.5.30: does not fit\n  missing:\n")


def test_a_missing_file_and_one_that_cannot_be_parsed(tree: Tree) -> None:
    package = tree(BUCKET, "", "class FlattenedTensorBucket(:\n")
    (package.root / "srt/utils/patch_torch.py").unlink()
    rows = {lack.what: lack for lack in examine(package).failures}
    assert set(rows) == {
        "FlattenedTensorBucket.__init__", "FlattenedTensorBucket.get_flattened_tensor",
        "FlattenedTensorBucket.get_metadata", "monkey_patch_torch_reductions",
    }  # fmt: skip
    assert f"{BUCKET}, line 1: invalid syntax" in str(rows["FlattenedTensorBucket.get_metadata"])
    missing = rows["monkey_patch_torch_reductions"]
    assert missing.remark == "there is no file srt/utils/patch_torch.py"


def test_a_file_without_the_words_that_does_not_exist(tree: Tree) -> None:
    package = tree()
    (package.root / UPDATER).unlink()
    (lack,) = examine(package).failures
    assert (lack.file, lack.remark) == (UPDATER, f"there is no file {UPDATER}")
    assert "flattened_bucket" in lack.what


def test_what_may_be_missing(tree: Tree, recorded: None) -> None:
    package = tree(ENGINE, "begin_weight_update", "open_session")
    (package.root / "srt/runtime_context.py").unlink()
    report = examine(package)
    assert report.conforms
    assert [lack.what for lack in report.lacking] == [
        "Engine.begin_weight_update", "snapshot_context", "restore_context",
    ]  # fmt: skip
    assert "lacks, and can be used without:" in report.text()
    seeds = examine(tree(SAMPLING, "sampling_seed", "seed"))
    assert seeds.conforms and "SamplingParams.sampling_seed" in [x.what for x in seeds.lacking]


@pytest.mark.parametrize(
    ("file", "old", "new", "wanted"),
    [
        (ENGINE, "input_ids=None,", "input_ids=None, cache_salt='',",
         "Engine.async_generate has a further cache_salt = ''"),
        (ENGINE, "*, stream=False", "*, priority", "Engine.async_generate is without stream"),
        (ENGINE, "*, stream=False", "*, stream",
         "Engine.async_generate: stream is required, was False"),
        (BUCKET, "named_tensors=None, flattened_tensor=None", "named_tensors=(), "
         "flattened_tensor=None", "FlattenedTensorBucket.__init__: named_tensors is (), was None"),
        (BUCKET, "named_tensors=None, flattened_tensor=None",
         "flattened_tensor=None, named_tensors=None",
         "FlattenedTensorBucket.__init__ has its parts in another order: "
         "flattened_tensor, named_tensors, metadata"),
        (MESSAGES, "class Update", "    priority: int = 0\nclass Update",
         "UpdateWeightsFromTensorReqInput has a further priority = 0"),
        (SAMPLING, "    top_k: object = None", "    top_k: int = -1",
         "SamplingParams: top_k is -1, was None"),
        ("srt/arg_groups/fields/all.py", "    port: object = None", "    port: int = 1",
         "ServerArgs: port is 1, was None"),
    ],
)  # fmt: skip
def test_what_changed_is_named(
    tree: Tree, recorded: None, file: str, old: str, new: str, wanted: str
) -> None:
    report = examine(tree(file, old, new))
    assert report.conforms
    assert wanted in report.changes
    assert f"    {wanted}" in report.text().splitlines()


def test_definitions_that_move(tree: Tree, recorded: None) -> None:
    common = FILES["srt/utils/common.py"]
    moved = examine(
        tree("srt/utils/common.py", common, "from sglang.srt.utils.pickles import *\n",
             srt__utils__pickles=common)
    )  # fmt: skip
    change = "MultiprocessingSerializer.serialize is in srt/utils/pickles.py, not in {}"
    assert moved.conforms
    assert moved.changes == (change.format("srt/utils/common.py"),)
    gone = examine(tree("srt/utils/__init__.py", FILES["srt/utils/__init__.py"], "import io\n"))
    (lack,) = gone.failures
    assert lack.remark == "MultiprocessingSerializer is in srt/utils/common.py"
    words = examine(tree(UPDATER, FILES[UPDATER], "", srt__loader=FILES[UPDATER]))
    assert words.conforms
    assert words.changes[-1].startswith("the format of packed weights is in srt/loader.py, not in")


def test_names_are_followed_through_imports(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "from .b import One as Two\nfrom .c import *\nif True:\n    X = 1\n",
        "b.py": "from sglang.a import Two\ntry:\n    import torch\nexcept ImportError:\n"
        "    class One: ...\n",
        "c.py": "from sglang.a import *\nclass Three(Missing, One): ...\n",
    }
    for name, text in files.items():
        (tmp_path / "sglang").mkdir(exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    package = Package(tmp_path / "sglang")
    where = {name: package.find("a", name) for name in ("Two", "Three", "X", "Four")}
    assert {name: found and found.file for name, found in where.items()} == {
        "Two": "b.py", "Three": "c.py", "X": "a.py", "Four": None,
    }  # fmt: skip
    assert package.find("a", "Three.member") is None
    assert package.version == "unknown"
    with pytest.raises(SourceError, match=r"there is no file d\.py"):
        package.find("d", "One")
    with pytest.raises(FileNotFoundError, match="holds no package sglang"):
        Package(tmp_path / "other")


def test_every_argument_of_an_engine_is_in_the_table() -> None:
    asked = {p for need in NEEDS if need.kind == "arguments" for p in need.parts}
    launch = Launch(Path("x"), "cpu", memory=0.5, sleeps=True, keep_weights=True)
    assert set(launch.server_arguments(0, 0)) <= asked


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_an_engine_of_a_package_that_does_not_fit_is_refused(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tree(ENGINE, "image_data=None, ", "")
    monkeypatch.syspath_prepend(str(package.root.parent))
    try:
        with pytest.raises(
            ImportError,
            match=r"SGLang 0\.5\.30 is not supported, it has no "
            r"Engine\.async_generate\(image_data\) \(srt/entrypoints/engine\.py\); supported are",
        ):
            checks.find()
        tree()
        found = checks.find()
        assert (found.version, found.weight_sessions) == ("0.5.30", True)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]


def test_the_command(tree: Tree, tmp_path: Path) -> None:
    folder, out = str(tree().root.parent), tmp_path / "contract.json"
    fits = CliRunner().invoke(main, ["rollout", "contract", folder, "--json", str(out)])
    assert fits.exit_code == 0, fits.output
    assert fits.output.startswith("SGLang 0.5.30: fits\n")
    found = json.loads(out.read_text())
    assert found["reference"] == "0.5.21"
    assert found["versions"]["0.5.30"]["conforms"] is True
    tree(ENGINE, "async_generate", "agenerate")
    broken = CliRunner().invoke(main, ["rollout", "contract", folder, "--json", str(out)])
    assert broken.exit_code == 1
    assert f"Engine.async_generate in {ENGINE}: completions" in broken.output
    (lack, *_) = json.loads(out.read_text())["versions"]["0.5.30"]["failures"]
    assert (lack["what"], lack["file"]) == ("Engine.async_generate", ENGINE)


def test_the_commands_errors(tmp_path: Path) -> None:
    empty = CliRunner().invoke(main, ["rollout", "contract", str(tmp_path)])
    assert empty.exit_code == 1 and "holds no package sglang" in empty.output
    lost = CliRunner().invoke(main, ["rollout", "contract", "--json", str(tmp_path / "no/x.json")])
    assert lost.exit_code == 2 and "there is no folder" in lost.output
    help_text = CliRunner().invoke(main, ["rollout", "contract", "--help"]).output
    assert "Examples:" in help_text and "speciarl rollout contract" in help_text


def test_the_recorded_versions_fit() -> None:
    file = Path(__file__).parents[2] / "bench/results/sglang-contract.json"
    record = json.loads(file.read_text())
    version, found = sglang_contract.reference()
    assert record["reference"] == version == "0.5.21"
    assert {name.partition(":")[2] for name in found} == {need.name for need in NEEDS}
    assert all(row["conforms"] for row in record["versions"].values())
    assert record["versions"][version] == {
        "conforms": True, "failures": [], "lacking": [], "changes": [],
    }  # fmt: skip
