import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from speciarl.core.cli import main
from speciarl.core.config import Config
from speciarl.core.datacheck import check_table
from speciarl.core.examples import DataTable
from speciarl.core.settings import load
from speciarl.core.settings_schema import slots

PRESETS = sorted(path.stem for path in Path(__file__).parents[2].glob("core/presets/*.toml"))


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder data set of three images under two labels, and a taxonomy with one of them."""
    for name, size in (("house sparrow/a.png", 16), ("house sparrow/b.png", 1), ("dodo/c.png", 16)):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(file)
    nodes = [{"name": "bird"}, {"name": "sparrow", "parent": "bird"}]
    nodes.append({"name": "house sparrow", "parent": "sparrow"})
    (tmp_path / "taxonomy.json").write_text(json.dumps({"name": "birds", "nodes": nodes}))
    return tmp_path


def table(root: Path) -> DataTable:
    taxonomy = str(root / "taxonomy.json")
    return DataTable("folder", str(root / "images"), "all", taxonomy=taxonomy)


def test_help_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys; from speciarl.core.cli import main; main(['--help'], standalone_mode=False);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 5  # 0.1 s on an idle machine
    for command in ("train", "evaluate", "sft", "data", "judge", "Examples:"):
        assert command in run.stdout


@pytest.mark.parametrize("command", [["train"], ["evaluate"], ["sft"], ["data", "check"]])
def test_scripts_are_subcommands(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0, result.output
    assert "--preset" in result.output and "Examples:" in result.output


@pytest.mark.parametrize("preset", PRESETS)
def test_printed_configuration_of_a_preset_is_the_same_configuration(
    preset: str, tmp_path: Path
) -> None:
    printed = CliRunner().invoke(main, ["train", "--preset", preset, "--print-config"])
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "printed.toml"
    file.write_text(printed.output)
    shipped = Path(__file__).parents[2] / "core" / "presets" / f"{preset}.toml"
    assert load(Config, [file]) == load(Config, [shipped])


def test_every_setting_is_documented() -> None:
    assert not [slot.key for slot in slots(Config) if not slot.doc]


def test_mistakes_in_settings_are_listed_and_nothing_runs() -> None:
    words = ["--set", "train.stps=3", "--set", "optim.lr=fast"]
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code != 0
    assert "train.stps = 3 (--set): the nearest valid key is train.steps" in result.output
    assert "optim.lr = fast (--set): expected float" in result.output


@pytest.mark.parametrize(
    ("prediction", "printed"),
    [
        ("House Sparrow", "specific (name)"),
        ("sparrow", "less specific (name)"),
        ("<answer>a bird</answer>", "generic (name)"),
        ("rose", "wrong (unknown)"),
        ("<answer>bird", "format (not exactly one pair of answer tags)"),
    ],
)
def test_judge_grade(birds: Path, prediction: str, printed: str) -> None:
    words = ["judge", "grade", "--taxonomy", str(birds / "taxonomy.json")]
    words += ["--truth", "house sparrow", "--prediction", prediction]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.output) == (0, f"{printed}\n")


def test_judge_grade_of_an_unknown_truth(birds: Path) -> None:
    words = ["judge", "grade", "--taxonomy", str(birds / "taxonomy.json")]
    result = CliRunner().invoke(main, [*words, "--truth", "dodo", "--prediction", "bird"])
    assert result.exit_code == 1 and "'dodo'" in result.output


def test_check_table_lists_images_and_labels(birds: Path) -> None:
    summary, problems = check_table("birds", table(birds))
    assert summary == "3 images, 1 unusable; 2 labels, 1 without a taxonomy entry"
    assert len(problems) == 2
    assert "b.png: tiny" in problems[0] and "'dodo' (1 images)" in problems[1]


def test_check_table_names_what_is_missing(birds: Path) -> None:
    os.remove(birds / "taxonomy.json")
    assert "no taxonomy file" in check_table("birds", table(birds))[1][-1]
    missing = DataTable("cub", str(birds / "nowhere"), "all")
    summary, problems = check_table("birds", missing)
    assert summary == "cannot be loaded" and "nowhere" in problems[0]


def test_data_check_exits_with_the_result(birds: Path) -> None:
    words = ["data", "check", "--preset", ""]
    for key, value in {"format": "folder", "path": birds / "images", "split": "all"}.items():
        words += ["--set", f"data.train.birds.{key}={value}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "data.train.birds: 3 images, 1 unusable" in result.output
    os.remove(birds / "images" / "house sparrow" / "b.png")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and "2 images, 0 unusable; 2 labels, no taxonomy" in result.output


def test_data_toyworld_refuses_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    result = CliRunner().invoke(main, ["data", "toyworld", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "not a toy world" in result.output
