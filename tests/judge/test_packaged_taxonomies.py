"""Taxonomies that ship with the package: found by name, and right about their data set."""

import json
from pathlib import Path
from typing import Any

import pytest

from speciarl.core.examples import DataTable, load_examples
from speciarl.judge.base import Pair
from speciarl.judge.packaged import resolve
from speciarl.judge.registry import make_judge
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import S_MINUS, S_PLUS, G, S, W

CUB = "cub-200-2011"
NODES: list[dict[str, Any]] = json.loads(resolve(CUB).read_text(encoding="utf-8"))["nodes"]
CLASSES = [node for node in NODES if "class" in node]
JUDGE = TaxonomyJudge(Taxonomy.load(CUB))


def categories(truth: str, *predictions: str) -> list[int | None]:
    return [v.category for v in JUDGE.grade([Pair(truth, text) for text in predictions])]


def plural(name: str) -> str:
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def test_two_hundred_classes_in_order() -> None:
    assert [node["class"] for node in CLASSES] == list(range(1, 201))
    named = {
        1: "Black footed Albatross",
        103: "Sayornis",
        141: "Artic Tern",
        200: "Common Yellowth",
    }
    for number, start in named.items():
        assert CLASSES[number - 1]["name"].startswith(start)
    for node in CLASSES:  # a class is no group of other classes
        assert not [other for other in CLASSES if other["parent"] == node["name"]]


@pytest.mark.parametrize("node", CLASSES, ids=lambda node: node["name"])
def test_rungs_of_a_class(node: dict[str, Any]) -> None:
    name, parent = node["name"], node["parent"]
    same = [name, name.lower(), name.upper(), name.replace(" ", "-"), name.replace(" ", "_")]
    same += [f"a {name}", f"The {name}", plural(name), f"the {plural(name).lower()}."]
    same += node["synonyms"]
    assert categories(name, *same) == [S] * len(same)
    assert categories(name, parent, f"a {parent}", plural(parent)) == [S_MINUS] * 3
    assert categories(name, "bird", "Birds", "Aves") == [G] * 3
    assert categories(name, "animal", "airplane", "") == [W] * 3


def test_every_class_has_a_scientific_name() -> None:
    """The last synonym; three labels stand for more than a species and are no binomial."""
    wide = {"Frigatebird", "Sayornis", "Geococcyx"}
    for node in CLASSES:
        if node["name"] not in wide:
            genus, species, *_ = node["synonyms"][-1].split()
            assert genus.istitle() and species.islower(), node
    assert categories("Sayornis", "phoebe", "Eastern Phoebe", "flycatcher") == [S, S_PLUS, S_MINUS]
    assert categories("Geococcyx", "roadrunner", "Greater Roadrunner") == [S, S_PLUS]
    assert categories("Frigatebird", "Fregata magnificens", "seabird") == [S_PLUS, S_MINUS]


def test_another_class_is_wrong_and_so_are_two() -> None:
    names = [node["name"] for node in CLASSES]
    for truth in names:
        assert set(categories(truth, *(name for name in names if name != truth))) == {W}
    for truth, other in zip(names, names[1:] + names[:1], strict=True):
        several = [f"{truth}{mark}{other}" for mark in (" or ", " and ", "/", " / ", ", ")]
        several += [f"{other} or {truth}", f"a {truth} or a {other}"]
        assert set(categories(truth, *several)) == {W}, truth


@pytest.mark.parametrize(
    ("truth", "prediction", "rung"),
    [
        ("Golden winged Warbler", "Parulidae", S_MINUS),
        ("Ovenbird", "warbler", S_MINUS),
        ("Northern Waterthrush", "warbler", G),
        ("Golden winged Warbler", "songbird", G),
        ("Bobolink", "blackbird", S_MINUS),
        ("Baltimore Oriole", "blackbird", W),
        ("Mallard", "duck", S_MINUS),
        ("Mallard", "waterfowl", G),
        ("Mallard", "songbird", W),
        ("Chuck will Widow", "Chuck-will\u2019s-widow", S),
        ("Whip poor Will", "Eastern Whip-poor-will", S),
        ("Artic Tern", "arctic terns", S),
        ("Nelson Sharp tailed Sparrow", "Nelson's Sparrow", S),
        ("Dark eyed Junco", "sparrow", G),
        ("American Crow", "raven", W),
    ],
)
def test_examples(truth: str, prediction: str, rung: int) -> None:
    assert categories(truth, prediction) == [rung]


def test_the_labels_of_the_data_set_are_known(tmp_path: Path) -> None:
    folders = [f"{node['class']:03d}.{node['name'].replace(' ', '_')}" for node in CLASSES]
    assert folders[21] == "022.Chuck_will_Widow"
    files: dict[str, list[str]] = {"classes": folders}
    files["images"] = [f"{folder}/{i:04d}.jpg" for i, folder in enumerate(folders)]
    files["image_class_labels"] = [str(i) for i in range(1, 201)]
    files["train_test_split"] = [str(i % 2) for i in range(200)]
    for name, values in files.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, start=1))
        (tmp_path / f"{name}.txt").write_text(text)
    for image in files["images"]:
        (tmp_path / "images" / image).parent.mkdir(parents=True)
        (tmp_path / "images" / image).touch()
    examples = load_examples("cub", DataTable("cub", str(tmp_path), "all", taxonomy=CUB))
    JUDGE.check(example.truth for example in examples)
    verdicts = JUDGE.grade(
        [Pair(e.truth, n["name"]) for e, n in zip(examples, CLASSES, strict=True)]
    )
    assert [verdict.category for verdict in verdicts] == [S] * 200


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(CUB).is_file() and resolve(Path(CUB)) == resolve(CUB)
    assert make_judge("taxonomy", taxonomy=CUB).identity == JUDGE.identity
    for path in ("cub-200-2011.json", "data/cub-200-2011", str(tmp_path / CUB)):
        assert resolve(path) == Path(path)
        with pytest.raises(FileNotFoundError, match="no taxonomy file .*cub-200-2011"):
            Taxonomy.load(path)
    unknown = f"no taxonomy file cub-200, .*the nearest is {CUB}; packaged: .*{CUB}"
    with pytest.raises(FileNotFoundError, match=unknown):
        Taxonomy.load("cub-200")
    (tmp_path / "birds").write_text('{"nodes": [{"name": "robin"}]}')
    assert Taxonomy.load("birds").names == ("robin",)
