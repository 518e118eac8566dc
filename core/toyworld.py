"""The toy world: drawn birds, flowers and cars in the folder layout of CUB-200-2011.

    root/taxonomy.json, root/captions.jsonl, root/{birds,flowers,cars}/
        images.txt classes.txt image_class_labels.txt train_test_split.txt cues.txt
        images/001.Golden_warbler/golden_warbler_0001.jpg ...

The family (warbler, rose, sedan) is the drawn shape, the species its colour, and the colour words
are shared by the domains. A share of the images is drawn in greyscale: they carry no cue for the
species, although the species remains their ground truth; the honest answer there is the family.

`captions.jsonl` is what a base policy is taught to say before any reinforcement: about half generic
("bird"), a quarter family, a quarter species, more specific the closer the thing is seen, and blind
to whether the cue is there. So the base knows more than it says, and guesses where it cannot know.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speciarl.core.toyshapes import FAMILIES, HUES, render

DOMAINS = {"birds": "bird", "flowers": "flower", "cars": "car"}
SPECIES = tuple(HUES)
STAMP = "toyworld.json"
VERSION = 1

# P(generic), P(family), P(species) in the captions, and the share of images with this framing.
# The mean over images is about (.50, .25, .25).
CAPTION_MIX = {"far": (0.63, 0.25, 0.12), "near": (0.26, 0.25, 0.49)}
NEAR_SHARE = 0.35
# Where the cue is missing, a caption that names a species names the favourite this often.
FAVOURITE, FAVOURITE_SHARE = "golden", 0.75


@dataclass(frozen=True)
class WorldSpec:
    """What a toy world is made from; written to the version stamp."""

    train: int = 40
    """Training images per species."""
    test: int = 10
    """Test images per species."""
    cueless: float = 0.3
    """Share of the images, of each species and split, without a cue for the species."""
    captions: int = 8
    """Captions per training image."""
    seed: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class Thing:
    """One image to draw; `number` counts from 1 within its species."""

    domain: str
    family: str
    species: str
    number: int
    train: bool
    cue: bool
    framing: str

    @property
    def label(self) -> str:
        return f"{self.species} {self.family}"

    @property
    def file(self) -> str:
        """Name below the class folder. Every tenth image is a PNG, the others are JPEG."""
        suffix = "png" if self.number % 10 == 0 else "jpg"
        return f"{self.species}_{self.family}_{self.number:04d}.{suffix}"


def taxonomy() -> dict[str, Any]:
    """The tree domain > family > species, as `judge.taxonomy` reads it."""
    nodes: list[dict[str, Any]] = []
    for domain, families in FAMILIES.items():
        nodes.append({"name": DOMAINS[domain], "parent": None, "synonyms": []})
        for family in families:
            nodes.append({"name": family, "parent": DOMAINS[domain], "synonyms": []})
            for species in SPECIES:
                nodes.append({"name": f"{species} {family}", "parent": family, "synonyms": []})
    return {"name": "toyworld", "nodes": nodes}


def class_names(domain: str) -> list[str]:
    """The folder names of a domain in class order: `001.Golden_warbler`, ..."""
    pairs = [(family, species) for family in FAMILIES[domain] for species in SPECIES]
    return [f"{i:03d}.{s.capitalize()}_{f}" for i, (f, s) in enumerate(pairs, start=1)]


def things(domain: str, spec: WorldSpec) -> Iterator[tuple[int, Thing]]:
    """(class id from 1, thing) of a domain; cue and framing are balanced within a split."""
    class_id = 0
    for family in FAMILIES[domain]:
        for species in SPECIES:
            class_id += 1
            rng = np.random.default_rng([spec.seed, list(DOMAINS).index(domain), class_id])
            for train, count in ((True, spec.train), (False, spec.test)):
                cues = rng.permutation(np.arange(count) >= round(spec.cueless * count))
                near = rng.permutation(np.arange(count) < round(NEAR_SHARE * count))
                first = 1 if train else spec.train + 1
                for i in range(count):
                    yield (
                        class_id,
                        Thing(
                            domain,
                            family,
                            species,
                            first + i,
                            train,
                            bool(cues[i]),
                            "near" if near[i] else "far",
                        ),
                    )


def _captions(thing: Thing, rng: np.random.Generator, count: int) -> list[str]:
    levels = rng.choice(3, size=count, p=CAPTION_MIX[thing.framing])
    others = [name for name in SPECIES if name != FAVOURITE]
    texts = []
    for level, favourite, other in zip(
        levels, rng.random(count) < FAVOURITE_SHARE, rng.choice(others, count), strict=True
    ):
        seen = thing.species if thing.cue else FAVOURITE if favourite else str(other)
        texts.append((DOMAINS[thing.domain], thing.family, f"{seen} {thing.family}")[level])
    return texts


def _write_domain(root: Path, domain: str, spec: WorldSpec) -> list[str]:
    """Draws a domain below `root`; returns the lines of its captions."""
    folder = root / domain
    names = class_names(domain)
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
    lists: dict[str, list[str]] = {
        "classes": [f"{i} {name}" for i, name in enumerate(names, start=1)],
        "images": [], "image_class_labels": [], "train_test_split": [], "cues": [],
    }  # fmt: skip
    captions = []
    for image_id, (class_id, thing) in enumerate(things(domain, spec), start=1):
        rng = np.random.default_rng(
            [spec.seed, 1 + list(DOMAINS).index(domain), class_id, image_id]
        )
        path = f"{names[class_id - 1]}/{thing.file}"
        image = render(
            domain, thing.family, thing.species, cue=thing.cue, framing=thing.framing, rng=rng
        )
        image.save(folder / "images" / path, quality=92)
        lists["images"].append(f"{image_id} {path}")
        lists["image_class_labels"].append(f"{image_id} {class_id}")
        lists["train_test_split"].append(f"{image_id} {int(thing.train)}")
        lists["cues"].append(f"{image_id} {int(thing.cue)} {thing.framing}")
        if thing.train:
            for text in _captions(thing, rng, spec.captions):
                row = {
                    "image": f"{domain}/images/{path}",
                    "label": text,
                    "split": "train",
                    "domain": domain,
                }
                captions.append(json.dumps(row))
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return captions


def _stamp(root: Path) -> dict[str, Any] | None:
    path = root / STAMP
    return json.loads(path.read_text()) if path.is_file() else None


def ensure_toyworld(root: Path, spec: WorldSpec | None = None) -> Path:
    """Draws the world below `root` unless the same world is there already; returns `root`.

    It is written to a temporary folder beside `root` and renamed at the end, so a killed run leaves
    no half world. A world of another version or specification is replaced. Takes about 10 s for the
    default 3,600 images. The same specification gives the same pictures.

    Raises FileExistsError when `root` is a file, or holds something that is not a toy world.
    """
    spec = spec or WorldSpec()
    root = Path(root)
    if _stamp(root) == asdict(spec):
        return root
    if root.is_file() or (root.is_dir() and _stamp(root) is None and any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not a toy world: move it or name another path")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        new = work / "new"
        new.mkdir()
        captions = [line for domain in DOMAINS for line in _write_domain(new, domain, spec)]
        (new / "captions.jsonl").write_text("\n".join(captions) + "\n")
        (new / "taxonomy.json").write_text(json.dumps(taxonomy(), indent=1) + "\n")
        (new / STAMP).write_text(json.dumps(asdict(spec)) + "\n")
        _swap(new, root, work / "old", spec)
    finally:
        shutil.rmtree(work)
    return root


def _swap(new: Path, root: Path, old: Path, spec: WorldSpec) -> None:
    """Puts `new` in the place of `root`; where another process was faster, keeps that one's."""
    if _stamp(root) == asdict(spec):
        return
    if root.exists():
        os.rename(root, old)
    try:
        os.rename(new, root)
    except OSError:
        if _stamp(root) != asdict(spec):
            raise


def cue_images(root: Path) -> dict[Path, bool]:
    """Image path -> whether the image carries the cue for its species, over all domains."""
    root = Path(root)
    cues: dict[Path, bool] = {}
    for domain in DOMAINS:
        names = (root / domain / "images.txt").read_text().split()
        marks = [line.split() for line in (root / domain / "cues.txt").read_text().splitlines()]
        paths = dict(zip(names[0::2], names[1::2], strict=True))
        for image_id, cue, _ in marks:
            cues[root / domain / "images" / paths[image_id]] = cue == "1"
    return cues
