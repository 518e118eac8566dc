"""Taxonomy files: what they mean, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from speciarl.judge.base import Pair
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import S_MINUS, G

NODES: list[dict[str, Any]] = [
    {"name": "songbird", "synonyms": ["Passeriformes"]},
    {"name": "warbler", "parent": "songbird", "rank": "family"},
    {"name": "Setophaga", "parent": "Warbler", "synonyms": []},
    {"name": "Yellow Warbler", "parent": "Setophaga", "synonyms": ["Setophaga petechia"]},
]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def category(judge: TaxonomyJudge, truth: str, prediction: str) -> int | None:
    return judge.grade([Pair(truth, prediction)])[0].category


def test_load(tmp_path: Path) -> None:
    birds = Taxonomy.load(write(tmp_path / "a.json", {"name": "birds", "nodes": NODES}))
    assert birds.names == ("songbird", "warbler", "Setophaga", "Yellow Warbler")
    assert birds.ancestors(3) == (2, 1, 0)
    assert birds.known("Setophaga petechia") and not birds.known("robin")
    judge = TaxonomyJudge(birds)
    assert category(judge, "Yellow Warbler", "setophaga") == S_MINUS
    assert category(judge, "Yellow Warbler", "Passeriformes") == G


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    def identity(nodes: list[dict[str, Any]], indent: int | None = None) -> str:
        text = json.dumps({"nodes": nodes}, indent=indent)
        return TaxonomyJudge(Taxonomy.load(write(tmp_path / "t.json", text))).identity

    assert identity(NODES) == identity(NODES[::-1], indent=3)
    longer = {**NODES[3], "synonyms": [*NODES[3]["synonyms"], "summer yellowbird"]}
    assert identity([*NODES[:3], longer]) != identity(NODES)
    assert identity(NODES[:3]) != identity(NODES)


def test_files_make_one_forest(tmp_path: Path) -> None:
    shared = {"name": "animal", "synonyms": ["beast"]}
    a = write(tmp_path / "a.json", {"nodes": [shared, {"name": "dog", "parent": "animal"}]})
    b = write(tmp_path / "b.json", {"nodes": [{"name": "Animal", "synonyms": ["creature"]}]})
    both = TaxonomyJudge(Taxonomy.load(a, b))
    assert category(both, "dog", "creature") == category(both, "dog", "beast") == S_MINUS
    with pytest.raises(ValueError, match=r"b.json: nodes\[0\].*parent 'x', but None in .*a.json"):
        other = {"nodes": [{"name": "animal", "parent": "x"}, {"name": "x"}]}
        Taxonomy.load(a, write(tmp_path / "b.json", other))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", 'expected {"name": ..., "nodes"'),
        ({"nodes": {}}, 'expected {"name": ..., "nodes"'),
        ({"nodes": []}, "no nodes"),
        ({"nodes": ["robin"]}, r"nodes\[0\]: expected an object"),
        ({"nodes": [{"name": "a"}, {"parent": "a"}]}, r"nodes\[1\]: name must be a text"),
        ({"nodes": [{"name": " . "}]}, r"nodes\[0\]: .* is empty"),
        ({"nodes": [{"name": "x" * 300}]}, "over 256 characters"),
        ({"nodes": [{"name": "a", "parent": 1}]}, "parent must be a text or null"),
        ({"nodes": [{"name": "a", "synonyms": "b"}]}, "synonyms must be a list"),
        ({"nodes": [{"name": "a", "synonym": ["b"]}]}, "did you mean 'synonyms'"),
        ({"nodes": [{"name": "None"}]}, "how an answer abstains"),
        ({"nodes": [{"name": "a"}, {"name": "A."}]}, r"nodes\[1\]: 'A.' is listed before"),
        ({"nodes": [{"name": "bird"}, {"name": "a", "parent": "brid"}]}, "did you mean 'bird'"),
        (
            {"nodes": [{"name": "a", "synonyms": ["c"]}, {"name": "b", "synonyms": ["C"]}]},
            r"nodes\[1\]: 'C' names 'b' and also 'a'",
        ),
        ({"nodes": [{"name": "a", "synonyms": ["b"]}, {"name": "B"}]}, "belongs to one node"),
        ({"nodes": [{"name": "a", "parent": "a"}]}, "in a circle"),
        (
            {"nodes": [{"name": "a", "parent": "b"}, {"name": "b", "parent": "a"}]},
            "in a circle",
        ),
    ],
)
def test_load_names_the_bad_entry(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Taxonomy.load(write(tmp_path / "t.json", content))
    assert "t.json" in str(caught.value)


def test_load_missing_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no taxonomy file .*none.json"):
        Taxonomy.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no taxonomy file given"):
        Taxonomy.load()
