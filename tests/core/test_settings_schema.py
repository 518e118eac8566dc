import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speciarl.core.settings import SettingsError, describe, load, preset_path, to_dict, to_toml


@dataclass(frozen=True)
class Table:
    path: str
    """Where the images are."""
    k: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Inner:
    kind: str = "exact"
    depth: int | None = 3


@dataclass(frozen=True)
class Base:
    lr: float = 1e-6
    """Peak learning rate,
    after the warm-up."""


@dataclass(frozen=True)
class Section(Base):
    cap: float | None = None
    """Set "none" for no cap."""
    note: str | None = "a"
    fused: bool = True
    tags: tuple[str, ...] = ("x",)
    rows: tuple[int, ...] | None = None
    inner: Inner = field(default_factory=lambda: Inner(kind="same"))
    """Who grades."""
    spare: Inner | None = None


@dataclass(frozen=True)
class Root:
    seed: int = 0
    section: Section = field(default_factory=Section)
    train: dict[str, Table] = field(default_factory=lambda: {"birds": Table("birds")})
    """Tables of training images."""


def test_to_toml_puts_docs_above() -> None:
    text = to_toml(Root(train={"a b": Table("x")}), comments=True)
    assert "# Peak learning rate, after the warm-up.\nlr = 1e-06\n" in text
    assert (
        '# Tables of training images.\n[train."a b"]\n# Where the images are.\npath = "x"' in text
    )
    assert '# Set "none" for no cap.\ncap = "none"\n' in text
    assert "# Who grades.\n[section.inner]\n" in text
    assert "#" not in to_toml(Root())


def test_describe_lists_every_key_with_default_and_doc() -> None:
    lines = describe(Root).splitlines()
    assert "section.lr = 1e-06    float" in lines
    assert "    Peak learning rate, after the warm-up." in lines
    assert "train.NAME.path (required)    str" in lines
    assert "train.NAME.k = 0    int" in lines
    assert 'section.inner.kind = "same"    str' in lines  # the field's default, not the class's
    assert 'section.cap = "none"    float or "none"' in lines
    assert 'section.tags = ["x"]    list of str' in lines
    assert "section.fused = true    true or false" in lines


def test_docs_of_a_class_without_source_are_empty() -> None:
    names: dict[str, Any] = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1", names)
    assert describe(names["A"]) == "x = 1    int"


def test_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    for name in ("toyworld", "cub-7b"):
        (tmp_path / "presets" / f"{name}.toml").write_text("")
    monkeypatch.setattr("speciarl.core.settings.resources.files", lambda package: tmp_path)
    assert preset_path("toyworld") == tmp_path / "presets" / "toyworld.toml"
    with pytest.raises(SettingsError, match="'toywrld'.*nearest is toyworld.*cub-7b, toyworld"):
        preset_path("toywrld")
    with pytest.raises(SettingsError, match="unknown preset"):
        preset_path("../presets/toyworld")


def test_shipped_presets_are_found() -> None:
    assert preset_path("toyworld").is_file()


number = st.floats(allow_nan=False)
words = st.text(max_size=8)
inners = st.builds(Inner, kind=words, depth=st.none() | st.integers())
sections = st.builds(
    Section,
    lr=number,
    cap=st.none() | number,
    note=st.none() | words.filter(lambda text: text.lower() != "none"),
    fused=st.booleans(),
    tags=st.lists(words, max_size=3).map(tuple),
    rows=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    inner=inners,
    spare=st.none() | inners,
)
tables = st.builds(Table, path=words, k=st.integers(), scale=number)
roots = st.builds(
    Root,
    seed=st.integers(),
    section=sections,
    train=st.dictionaries(words, tables, max_size=3),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(root=roots, comments=st.booleans())
def test_toml_round_trip(root: Root, comments: bool) -> None:
    written = tomllib.loads(to_toml(root, comments=comments))
    assert load(Root, [written]) == root
    other = to_dict(Root(section=Section(cap=1.0, spare=Inner()), train={"z": Table("z")}))
    assert load(Root, [other, {"train": "none"}, written]) == root


@settings(derandomize=True, deadline=None, max_examples=100)
@given(root=roots)
def test_dict_round_trip_directly_and_through_json(root: Root) -> None:
    assert load(Root, [to_dict(root)]) == root
    assert load(Root, [json.loads(json.dumps(to_dict(root)))]) == root


@settings(derandomize=True, deadline=None, max_examples=100)
@given(section=sections)
def test_set_round_trip(section: Section) -> None:
    sets = []
    table = "section"
    for line in to_toml(section).split("\n"):
        if line.startswith("["):
            table = f"section.{line.strip('[]')}"
        elif line:
            sets.append(f"{table}.{line}")
    assert load(Root, [], sets).section == section
