"""Data tables in their three layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from speciarl.core.examples import (
    DataTable,
    clean_label,
    load_examples,
    load_union,
    open_image,
)

CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Black_and_white_Warbler"]


def picture(seed: int = 0, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """12 images: 4 of each class, the first half of each in the training split."""
    root = tmp_path / "CUB_200_2011"
    rows = []
    for label in CLASSES:
        (root / "images" / label).mkdir(parents=True)
        for i in range(4):
            path = f"{label}/{label[4:]}_{i:04d}.jpg"
            picture(i).save(root / "images" / path)
            rows.append(path)
    ids = range(1, len(rows) + 1)
    lists = {
        "images": [f"{i} {path}" for i, path in zip(ids, rows, strict=True)],
        "classes": [f"{i} {label}" for i, label in enumerate(CLASSES, start=1)],
        "image_class_labels": [f"{i} {(i - 1) // 4 + 1}" for i in ids],
        "train_test_split": [f"{i} {int((i - 1) % 4 < 2)}" for i in ids],
    }
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def table(path: Path, kind: str = "cub", split: str = "all", **rest: Any) -> DataTable:
    return DataTable(kind, str(path), split, **rest)


def test_cub_labels_keys_and_splits(cub: Path) -> None:
    train = load_examples("birds", table(cub, split="train", domain="bird"))
    test = load_examples("birds", table(cub, split="test"))
    both = load_examples("birds", table(cub))
    assert [len(train), len(test), len(both)] == [6, 6, 12]
    assert {e.key for e in train} | {e.key for e in test} == {e.key for e in both}
    first = both[0]
    assert first.truth == "Black footed Albatross"
    assert first.key == "birds/001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg"
    assert (first.dataset, first.domain, train[0].domain) == ("birds", "birds", "bird")
    assert all(open_image(example.image).size == (24, 16) for example in both)


def test_cub_without_split_file_if_none_is_asked(cub: Path) -> None:
    (cub / "train_test_split.txt").unlink()
    assert len(load_examples("birds", table(cub))) == 12
    with pytest.raises(FileNotFoundError, match="train_test_split.txt; expected the layout"):
        load_examples("birds", table(cub, split="train"))


@pytest.mark.parametrize("name", ["images.txt", "classes.txt", "image_class_labels.txt"])
def test_cub_missing_file_is_named(cub: Path, name: str) -> None:
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}; expected .*CUB_200_2011"):
        load_examples("birds", table(cub))


def test_cub_missing_folders_are_named(cub: Path) -> None:
    (cub / "images").rename(cub / "pictures")
    with pytest.raises(FileNotFoundError, match="no folder .*CUB_200_2011/images"):
        load_examples("birds", table(cub))
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_examples("birds", table(cub / "nowhere"))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("images", "2", r"images.txt:2: expected '<id> <path below images/>', not '2'"),
        ("images", "1 x.jpg", r"images.txt:2: id 1 is listed before"),
        ("images", "99 x.jpg", r"image_class_labels.txt: no line for image 99 \(x.jpg\)"),
        ("image_class_labels", "2 77", r"image_class_labels.txt:2: expected '<id> <id of a class"),
        ("image_class_labels", "77 1", r"image_class_labels.txt: no line for image 2"),
        ("train_test_split", "2 yes", r"train_test_split.txt:2: expected '<id> <1 for train or 0"),
        ("train_test_split", "77 1", r"train_test_split.txt: no line for image 2"),
    ],
)
def test_cub_malformed_line(cub: Path, name: str, line: str, message: str) -> None:
    path = cub / f"{name}.txt"
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_examples("birds", table(cub, split="train"))


def test_not_utf8(cub: Path) -> None:
    (cub / "images.txt").write_bytes(b"1 \xff\xfe.jpg\n")
    with pytest.raises(ValueError, match="images.txt: not UTF-8"):
        load_examples("birds", table(cub))


def test_subset_is_seeded_ordered_and_nested(cub: Path) -> None:
    everything = [e.key for e in load_examples("b", table(cub))]
    chosen = [e.key for e in load_examples("b", table(cub, k=5))]
    assert chosen == [e.key for e in load_examples("b", table(cub, k=5, seed=42))]
    assert len(chosen) == 5 and chosen == [key for key in everything if key in chosen]
    larger = [e.key for e in load_examples("b", table(cub, k=8))]
    assert set(chosen) < set(larger)
    assert (
        len({tuple(e.key for e in load_examples("b", table(cub, k=5, seed=s))) for s in range(9)})
        > 5
    )
    assert [e.key for e in load_examples("b", table(cub, k=12))] == everything


def test_subset_is_the_same_for_good(cub: Path) -> None:
    # random.Random(42): .639 .025 .275 .223 .736 .677 .892 .087 .422 .030 .219 .505
    keys = [e.key for e in load_examples("b", table(cub, k=4))]
    assert [key[-8:-4] for key in keys] == ["0001", "0003", "0001", "0002"]


def test_subset_larger_than_the_data(cub: Path) -> None:
    with pytest.raises(ValueError, match="k = 7, but split 'train' of .* has only 6 images"):
        load_examples("birds", table(cub, split="train", k=7))


def make_folder(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / file)
    return root


def test_folder_without_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", "house_cat/b.JPG", "house_cat/a.png", "train/x.jpg")
    (root / "house_cat" / "notes.txt").write_text("no image")
    (root / "house_cat" / "._a.png").write_text("no image either")
    (root / "README.md").write_text("nor this")
    found = load_examples("pets", table(root, "folder"))
    assert [(e.key, e.truth) for e in found] == [
        ("pets/house_cat/a.png", "house cat"),
        ("pets/house_cat/b.JPG", "house cat"),
        ("pets/train/x.jpg", "train"),
    ]
    with pytest.raises(ValueError, match="no train/ or test/ with label folders; .*'all'"):
        load_examples("pets", table(root, "folder", "train"))


def test_folder_with_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", "train/cat/a.jpg", "train/dog/a.jpg", "test/cat/a.jpg")
    keys = {
        s: [e.key for e in load_examples("p", table(root, "folder", s))] for s in ("train", "test")
    }
    assert keys == {
        "train": ["p/train/cat/a.jpg", "p/train/dog/a.jpg"],
        "test": ["p/test/cat/a.jpg"],
    }
    assert len(load_examples("p", table(root, "folder"))) == 3


def test_folder_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*gone; expected a folder of <label>/"):
        load_examples("p", table(tmp_path / "gone", "folder"))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="data table 'p': no images of split 'all'"):
        load_examples("p", table(tmp_path, "folder"))


def write_jsonl(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_jsonl(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "d.jsonl",
        {"image": "img/a.jpg", "label": " crème brûlée ", "split": "train", "domain": "food"},
        "",
        {"image": "img/b.jpg", "label": "under_score", "split": "val", "note": 3},
        {"image": "img/a.jpg", "label": "dessert", "split": "train"},
    )
    both = load_examples("d", table(file, "jsonl", domain="things"))
    assert [(e.key, e.truth, e.domain) for e in both] == [
        ("d/img/a.jpg", "crème brûlée", "food"),
        ("d/img/b.jpg", "under_score", "things"),
        ("d/img/a.jpg#2", "dessert", "things"),
    ]
    assert both[2].image == tmp_path / "img/a.jpg"
    assert len(load_examples("d", table(file, "jsonl", "train"))) == 2
    with pytest.raises(ValueError, match="no images of split 'test'"):
        load_examples("d", table(file, "jsonl", "test"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "d.jsonl:2: not JSON"),
        ([1], "d.jsonl:2: expected an object"),
        ({"label": "a"}, "d.jsonl:2: 'image' must be a text, not ''"),
        ({"image": "a.jpg"}, "d.jsonl:2: 'label' must be a text, not ''"),
        ({"image": "a.jpg", "label": 3}, "d.jsonl:2: 'label' must be a text, not 3"),
        ({"image": "a.jpg", "label": "a", "domain": None}, "'domain' must be a text, not None"),
        ({"image": "/a.jpg", "label": "a"}, "d.jsonl:2: 'image' must be relative"),
    ],
)
def test_jsonl_malformed_line(tmp_path: Path, row: object, message: str) -> None:
    good = {"image": "a.jpg", "label": "a"}
    file = write_jsonl(tmp_path / "d.jsonl", good, row)
    with pytest.raises(ValueError, match=message):
        load_examples("d", table(file, "jsonl"))


def test_jsonl_without_the_split_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "label": "a", "split": "train"}, {"image": "b.jpg", "label": "b"}]
    file = write_jsonl(tmp_path / "d.jsonl", *rows)
    with pytest.raises(ValueError, match="d.jsonl:2: no 'split'"):
        load_examples("d", table(file, "jsonl", "train"))
    with pytest.raises(FileNotFoundError, match="no file .*gone.jsonl; expected a file of lines"):
        load_examples("d", table(tmp_path / "gone.jsonl", "jsonl"))


def test_union_in_table_order(cub: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d", "cat/a.jpg")
    made = load_union({"z": table(folder, "folder"), "a": table(cub, k=2)})
    assert [example.dataset for example in made] == ["z", "a", "a"]
    assert len({example.key for example in made}) == 3
    with pytest.raises(ValueError, match="no data tables"):
        load_union({})


def test_union_refuses_equal_keys(tmp_path: Path) -> None:
    rows = [{"image": name, "label": "a"} for name in ("a.jpg", "a.jpg", "a.jpg#2")]
    file = write_jsonl(tmp_path / "d.jsonl", *rows)
    with pytest.raises(ValueError, match="two examples have the key 'd/a.jpg#2'"):
        load_union({"d": table(file, "jsonl")})


def test_table_name(cub: Path) -> None:
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="not empty and has no slash"):
            load_examples(name, table(cub))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "cubs"}, "format = 'cubs': did you mean 'cub'"),
        ({"format": "?"}, "format = .*known: cub, folder, jsonl"),
        ({"split": "tests"}, "split = 'tests': did you mean 'test'"),
        ({"path": ""}, "path = ''"),
        ({"k": -1}, "k = -1"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_table_validation(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataTable(**{"format": "cub", "path": "x", "split": "all", **fields})


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("003.Black-and-white_Warbler", "Black-and-white Warbler"),
        ("737.800", "737.800"),
        ("2012_BMW__X5 ", "2012 BMW X5"),
        ("9.Éclair", "Éclair"),
    ],
)
def test_clean_label(folder: str, label: str) -> None:
    assert clean_label(folder) == label
