"""The toy world is a real data set: it is read by the real loader, and says what it claims."""

import colorsys
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speciarl.core import toyworld
from speciarl.core.examples import DataTable, Example, load_examples, open_image
from speciarl.core.toyshapes import FAMILIES, FRAMINGS, HUE_JITTER, HUES
from speciarl.core.toyworld import (
    CAPTION_MIX,
    DOMAINS,
    FAVOURITE,
    FAVOURITE_SHARE,
    NEAR_SHARE,
    WorldSpec,
    class_names,
    cue_images,
    ensure_toyworld,
    taxonomy,
)
from speciarl.judge.base import Pair
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import S_MINUS, G, S, W

SPEC = WorldSpec(train=10, test=10)
TINY = WorldSpec(train=1, test=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toyworld(tmp_path_factory.mktemp("data") / "toyworld", SPEC)


def examples(small: Path, domain: str, split: str) -> list[Example]:
    return load_examples(domain, DataTable(format="cub", path=str(small / domain), split=split))


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_cub_loader_reads_every_domain(small: Path, domain: str) -> None:
    for split, count in (("train", SPEC.train), ("test", SPEC.test)):
        labels = Counter(example.truth for example in examples(small, domain, split))
        assert labels == {
            f"{species.capitalize()} {family}": count
            for family in FAMILIES[domain]
            for species in HUES
        }
    assert class_names("birds")[0] == "001.Golden_warbler"


def test_images_are_small_of_several_sizes_and_two_formats(small: Path) -> None:
    paths = [e.image for domain in DOMAINS for e in examples(small, domain, "test")]
    sizes = [open_image(path).size for path in paths]
    assert all(53 <= side <= 87 for size in sizes for side in size)
    assert {(round(w / 28), round(h / 28)) for w, h in sizes} == {(2, 2), (3, 2), (2, 3), (3, 3)}
    assert {path.suffix for path in paths} == {".jpg", ".png"}


def coloured(image: Any) -> np.ndarray:
    """Hues, in degrees, of the clearly coloured pixels of an RGB image."""
    pixels = np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255
    pixels = pixels[(pixels.max(1) - pixels.min(1)) > 0.3]
    return np.array([360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])


def test_the_colour_tells_the_species_and_only_where_the_cue_is(small: Path) -> None:
    cues = cue_images(small)
    assert Counter(cues.values())[False] == round(SPEC.cueless * len(cues))
    for example in [e for d in DOMAINS for e in examples(small, d, "test")][::3]:
        image = open_image(example.image)
        if not cues[example.image]:
            pixels = np.asarray(image, dtype=int)
            assert np.ptp(pixels, axis=2).max() == 0, example.key
            continue
        centre = HUES[example.truth.split()[0].lower()]
        away = np.median(np.abs((coloured(image) - centre + 180) % 360 - 180))
        assert away < HUE_JITTER + 6, example.key
    hues = sorted(HUES.values())
    gaps = np.diff([*hues, hues[0] + 360])
    assert gaps.min() > 2 * HUE_JITTER + 10


def test_every_species_and_split_has_its_share_of_cueless_and_near_images() -> None:
    spec = WorldSpec(train=20, test=10)
    for domain in DOMAINS:
        seen: dict[tuple[int, bool], list[toyworld.Thing]] = {}
        for class_id, thing in toyworld.things(domain, spec):
            seen.setdefault((class_id, thing.train), []).append(thing)
        for (_, train), things in seen.items():
            count = spec.train if train else spec.test
            assert len({thing.file for thing in things}) == len(things) == count
            assert sum(not thing.cue for thing in things) == round(0.3 * count)
            assert sum(thing.framing == "near" for thing in things) == round(NEAR_SHARE * count)


def test_taxonomy_grades_the_labels(small: Path) -> None:
    judge = TaxonomyJudge(Taxonomy.load(small / "taxonomy.json"))
    for domain in DOMAINS:
        for example in examples(small, domain, "test")[::10]:
            family = example.truth.split()[1]
            said = [example.truth.lower(), family, DOMAINS[domain], "boat"]
            verdicts = judge.grade([Pair(example.truth, text) for text in said])
            assert [v.category for v in verdicts] == [S, S_MINUS, G, W]
    assert len(taxonomy()["nodes"]) == 3 + 15 + 90


def test_captions_are_a_blind_mix_of_levels(small: Path) -> None:
    rows = [json.loads(line) for line in (small / "captions.jsonl").read_text().splitlines()]
    table = DataTable(format="jsonl", path=str(small / "captions.jsonl"), split="train")
    captions = load_examples("captions", table)
    assert len(rows) == len(captions) == 3 * 30 * SPEC.train * SPEC.captions
    truths = {e.image: e for domain in DOMAINS for e in examples(small, domain, "train")}
    cues = cue_images(small)
    levels: Counter[str] = Counter()
    guesses: Counter[str] = Counter()
    for caption in captions:
        truth = truths[caption.image].truth.lower()
        assert caption.domain == truths[caption.image].domain
        if caption.truth == DOMAINS[caption.domain]:
            levels["generic"] += 1
        elif caption.truth == truth.split()[1]:
            levels["family"] += 1
        else:
            levels["species"] += 1
            colour, family = caption.truth.split()
            assert family == truth.split()[1]
            if cues[caption.image]:
                assert caption.truth == truth
            else:
                guesses[colour] += 1
    shares = {level: count / len(captions) for level, count in levels.items()}
    assert shares == pytest.approx({"generic": 0.5, "family": 0.25, "species": 0.25}, abs=0.03)
    share = guesses[FAVOURITE] / sum(guesses.values())
    assert share == pytest.approx(FAVOURITE_SHARE, abs=0.04)
    assert CAPTION_MIX.keys() == FRAMINGS.keys()
    assert all(sum(mix) == pytest.approx(1) for mix in CAPTION_MIX.values())


def test_the_same_specification_gives_the_same_files(tmp_path: Path) -> None:
    first, again = (tree(ensure_toyworld(tmp_path / name, TINY)) for name in ("a", "b"))
    assert first == again
    other = tree(ensure_toyworld(tmp_path / "c", WorldSpec(train=1, test=1, seed=1)))
    assert first.keys() == other.keys() and first != other


def test_it_is_made_once_and_replaced_when_the_specification_changes(tmp_path: Path) -> None:
    root = ensure_toyworld(tmp_path / "world", TINY)
    stamp = (root / "toyworld.json").stat().st_mtime_ns
    assert ensure_toyworld(root, TINY) == root
    assert (root / "toyworld.json").stat().st_mtime_ns == stamp
    ensure_toyworld(root, WorldSpec(train=2, test=1))
    assert len(examples(root, "birds", "train")) == 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ensure_toyworld(tmp_path / "world", TINY)
    before = tree(root)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(toyworld, "render", broken)
    with pytest.raises(OSError, match="no space"):
        ensure_toyworld(root, SPEC)
    assert tree(root) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("a year of work")
    (tmp_path / "note").write_text("")
    for name in ("thesis", "note"):
        with pytest.raises(FileExistsError, match=name):
            ensure_toyworld(tmp_path / name, TINY)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "a year of work"


def test_several_writers_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        roots = list(pool.map(lambda _: ensure_toyworld(tmp_path / "world", TINY), range(3)))
    assert len(examples(roots[0], "cars", "test")) == 30
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
