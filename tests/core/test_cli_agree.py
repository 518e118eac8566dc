import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from speciarl.core.cli import main

TREE = {
    "nodes": [
        {"name": "bird"},
        {"name": "thrush", "parent": "bird"},
        {"name": "robin", "parent": "thrush"},
    ]
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    tree, flat, pairs = (tmp_path / name for name in ("tree.json", "flat.json", "pairs.csv"))
    tree.write_text(json.dumps(TREE))
    # Here a thrush is no relative of the robin.
    flat.write_text(json.dumps({"nodes": [{"name": "thrush"}, {"name": "robin"}]}))
    pairs.write_text(
        "truth,prediction,category\nrobin,robin,specific\nrobin,thrush,less specific\n"
        "robin,bird,wrong\nwren,wren,specific\n"
    )
    return {"tree": str(tree), "flat": str(flat), "pairs": str(pairs), "out": str(tmp_path / "o")}


def agree(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["judge", "agree", *arguments])


def test_a_judge_is_compared_with_labels(files: dict[str, str]) -> None:
    found = agree(
        files["pairs"], "--taxonomy", files["tree"], "--judge", "kind=taxonomy",
        "--json", files["out"],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "3 pairs judged by both (not by labels: 0, not by kind=taxonomy: 1)" in found.output
    assert "'bird' for 'robin' (labels: wrong, kind=taxonomy: generic)" in found.output
    assert "wren" not in found.output  # not judged, so no disagreement
    text = Path(files["out"]).read_text()
    assert "NaN" not in text and '"more specific": [\n   0,\n   null' in text
    figures = json.loads(text)
    assert figures["same"] == pytest.approx(2 / 3) and figures["groups"] == 1
    assert figures["confusion"][0][2] == 1  # wrong by people, generic by the judge


def test_two_judges_are_compared_with_each_other(files: dict[str, str]) -> None:
    found = agree(
        files["pairs"], "--judge", "kind=taxonomy", "--judge", "kind=taxonomy variant=relation",
        "--taxonomy", files["tree"],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "same category 1.000" in found.output and "differ" not in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "kind=taxonomi"], "did you mean 'taxonomy'?"),
        (["--judge", "kind=taxonomy"], "needs a taxonomy file"),
        (["--judge", "kind=taxonomy", "--rule", "speciarl-x"], "nearest: 'speciarl"),
        (["--judge", "kind=openai model=m"], "base_url = '': kind 'openai' needs it"),
        (["--judge", "a=1"] * 3, "3 judges"),
        (["--judge", "taxonomy"], "--judge: 'taxonomy' is no key=value word"),
        (["--judge", "kind=taxonomy", "--json", "no/such/out.json"], "there is no folder no/such"),
        (["--judge", "kind=taxonomy", "--show", "-1"], "--show"),
    ],
)
def test_bad_arguments_are_named(files: dict[str, str], arguments: list[str], message: str) -> None:
    found = agree(files["pairs"], *arguments)
    assert found.exit_code != 0 and message in found.output


def test_labels_are_needed_for_one_judge(files: dict[str, str], tmp_path: Path) -> None:
    pairs = tmp_path / "bare.csv"
    pairs.write_text("truth,prediction\nrobin,robin\n")
    found = agree(str(pairs), "--taxonomy", files["tree"], "--judge", "kind=taxonomy")
    assert found.exit_code != 0 and "has no labels" in found.output
