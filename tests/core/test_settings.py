import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from speciarl.core.settings import SettingsError, load


@dataclass(frozen=True)
class Table:
    path: str
    k: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k = {self.k}: must not be negative")


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_low: float = 0.2
    clip_high: float = 0.2
    fused: bool = True

    def __post_init__(self) -> None:
        if self.clip_low >= 1:
            raise ValueError(f"clip_low = {self.clip_low}: must be below 1")


@dataclass(frozen=True)
class Inner:
    kind: str = "exact"
    depth: int | None = 3


@dataclass(frozen=True)
class Outer:
    steps: int = 10
    cap: float | None = None
    note: str | None = None
    tags: tuple[str, ...] = ()
    rows: tuple[int, ...] | None = None
    inner: Inner = field(default_factory=lambda: Inner(kind="same"))
    spare: Inner | None = None


@dataclass(frozen=True)
class Root:
    seed: int = 0
    optim: Optim = field(default_factory=Optim)
    outer: Outer = field(default_factory=Outer)
    train: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ValueError("seed = 13 brings bad luck")


@dataclass(frozen=True)
class Required:
    table: Table
    count: int


def problems(*sets: str, sources: tuple[Path | dict, ...] = (), cls: type = Root) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(cls, sources, sets)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def problem(*sets: str, sources: tuple[Path | dict, ...] = (), cls: type = Root) -> str:
    found = problems(*sets, sources=sources, cls=cls)
    assert len(found) == 1, found
    return found[0]


def test_defaults_without_sources() -> None:
    assert load(Root, [], []) == Root()


def test_later_sources_override_key_by_key_and_sets_come_last(tmp_path: Path) -> None:
    first = tmp_path / "first.toml"
    first.write_text('seed = 1\n[optim]\nlr = 1.0\nclip_low = 0.1\n[train.a]\npath = "x"\nk = 1\n')
    second = {"optim": {"lr": 2.0}, "train": {"a": {"k": 2}, "b": {"path": "y"}}}
    got = load(Root, [first, second], ["optim.clip_low=0.3", "train.b.k=5", "train.b.k=6"])
    assert got == Root(
        seed=1,
        optim=Optim(lr=2.0, clip_low=0.3),
        train={"a": Table("x", k=2), "b": Table("y", k=6)},
    )


def test_sections_keep_the_defaults_of_their_field() -> None:
    assert load(Root, [], ["outer.inner.depth=1"]).outer.inner == Inner(kind="same", depth=1)
    assert load(Root, [], ["outer.spare.depth=1"]).outer.spare == Inner(kind="exact", depth=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("speciarl", "speciarl"),
        ("./a b/c.toml", "./a b/c.toml"),
        (".5", ".5"),
        ("7", "7"),
        ("true", "true"),
        ("2024-01-01", "2024-01-01"),
        ('"quoted = x"', "quoted = x"),
        ("a=b", "a=b"),
        ("", ""),
        ("none", "none"),
    ],
)
def test_a_string_takes_words_as_typed(text: str, value: str) -> None:
    assert load(Root, [], [f"outer.inner.kind={text}"]).outer.inner.kind == value


@pytest.mark.parametrize(
    ("word", "section", "name", "value"),
    [
        ("optim.lr=1e-5", "optim", "lr", 1e-5),
        ("optim.lr = 3", "optim", "lr", 3.0),
        ("optim.lr=.5", "optim", "lr", 0.5),
        ("optim.lr=inf", "optim", "lr", math.inf),
        ("optim.fused=False", "optim", "fused", False),
        ("optim.betas=[0, 1.5]", "optim", "betas", (0.0, 1.5)),
        ('outer.tags=["a", "b"]', "outer", "tags", ("a", "b")),
        ("outer.rows=[1]", "outer", "rows", (1,)),
        ("outer.rows=none", "outer", "rows", None),
        ("outer.note=None", "outer", "note", None),
        ("outer.note=7", "outer", "note", "7"),
        ("outer.cap=2", "outer", "cap", 2.0),
    ],
)
def test_set_values(word: str, section: str, name: str, value: object) -> None:
    got = getattr(getattr(load(Root, [], [word]), section), name)
    assert got == value and type(got) is type(value)


def test_set_takes_inline_tables_and_quoted_names() -> None:
    words = ['train."my birds"={path = "a", k = 1}', 'train."my birds".k=2']
    assert load(Root, [], words).train == {"my birds": Table("a", k=2)}


def test_none_removes_values_sections_and_tables() -> None:
    given = {
        "outer": {"cap": 1.0, "spare": {"depth": 2}},
        "train": {"a": {"path": "x"}, "b": {"path": "y"}},
    }
    got = load(Root, [given], ["outer.cap=none", "outer.spare=none", "train.a=none"])
    assert got.outer.cap is None and got.outer.spare is None
    assert list(got.train) == ["b"]
    assert load(Root, [given], ["train=none"]).train == {}
    assert list(load(Root, [given], ["train=none", "train.c.path=z"]).train) == ["c"]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.clip_lo=0.1", ("optim.clip_lo = 0.1", "nearest valid key is optim.clip_low")),
        ("optm.lr=0.1", ("optm.lr = 0.1", "nearest valid key is optim.lr")),
        ("lr=0.1", ("unknown key lr = 0.1", "nearest valid key is optim.lr")),
        ("optim.learning_rate=1", ("optim.learning_rate = 1", "nearest valid key is optim.lr")),
        ("optim.step=1", ("optim.step = 1", "nearest valid key is outer.steps")),
        ("optim.zzz=1", ("optim.zzz", "nearest valid key is optim.", "lr, betas, clip_low")),
        ("train.a.pth=x", ("train.a.pth = x", "nearest valid key is train.a.path")),
        ("tran.a.path=x", ("tran.a.path = x", "nearest valid key is train.NAME.path")),
        ("optim.lr.x=1", ("optim.lr.x = 1", "nearest valid key is optim.lr")),
        ("optim.kind=1", ("optim.kind = 1", "nearest valid key is outer.inner.kind")),
    ],
)
def test_unknown_keys_name_value_and_nearest(word: str, parts: tuple[str, ...]) -> None:
    found = problems(word, "train.a.path=x")[0]
    assert all(part in found for part in parts), found


def test_unknown_key_with_near_ones_in_two_sections_names_both() -> None:
    found = problem(sources=({"outer": {"clip_low": 0.5, "tags": []}},))
    assert "nearest valid key is optim.clip_low" in found
    found = problem(sources=({"optim": {"kinds": "x", "lr": 1.0}},))
    assert "outer.inner.kind" in found

    @dataclass(frozen=True)
    class One:
        limit_low: int = 0

    @dataclass(frozen=True)
    class Two:
        limit: int = 0

    @dataclass(frozen=True)
    class Both:
        one: One = One()
        two: Two = Two()

    found = problem("two.limit_low=1", cls=Both)
    assert "is one.limit_low; in the same section: two.limit" in found


def test_empty_unknown_section_is_reported() -> None:
    assert "unknown key optimizer" in problem(sources=({"optimizer": {}},))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"seed": True}, ("seed = true", "expected int")),
        ({"seed": 1.0}, ("seed = 1.0", "expected int")),
        ({"seed": "none"}, ('seed = "none"', "expected int")),
        ({"seed": None}, ('seed = "none"', "expected int")),
        ({"optim": {"lr": "fast"}}, ('optim.lr = "fast"', "expected float")),
        ({"optim": {"lr": True}}, ("optim.lr = true", "expected float")),
        ({"optim": {"fused": 1}}, ("optim.fused = 1", "expected true or false")),
        ({"optim": {"betas": 0.9}}, ("optim.betas = 0.9", "expected list of float")),
        ({"optim": {"betas": [0.9, "x"]}}, ('optim.betas = [0.9, "x"]', "list of float")),
        ({"optim": 3}, ("optim = 3", "expected a section")),
        ({"train": [1]}, ("train = [1]", "expected named tables")),
        ({"train": {"a": 3}}, ("train.a = 3", "expected a section")),
        ({"outer": {"cap": "x"}}, ('outer.cap = "x"', 'expected float or "none"')),
        ({"outer": {"tags": ["a", {"b": 1}]}}, ("outer.tags", "list of str")),
        ({"outer": {"note": 3}}, ("outer.note = 3", "expected str")),
    ],
)
def test_wrong_types_name_key_value_and_type(given: dict, parts: tuple[str, ...]) -> None:
    found = problem(sources=(given,))
    assert all(part in found for part in parts), found


def test_int_is_accepted_for_float_as_a_float() -> None:
    lr = load(Root, [{"optim": {"lr": 1}}]).optim.lr
    assert lr == 1.0 and type(lr) is float


def test_where_a_value_came_from_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[optim]\nlr = "x"\n')
    assert str(file) in problem(sources=(file,))
    assert problem("optim.lr=x") == "optim.lr = x (--set): expected float"


def test_errors_of_a_section_bear_its_name() -> None:
    assert problem("optim.clip_low=1") == "optim: clip_low = 1.0: must be below 1"
    assert problem("train.a={path='x', k=-1}") == "train.a: k = -1: must not be negative"
    assert problem("seed=13") == "seed = 13 brings bad luck"


def test_all_problems_are_reported_at_once() -> None:
    found = problems("optim.clip_low=1", "optim.bta=1", "seed=x", "train.a.k=-1", "outer.cap=1")
    assert [text for text in found if "optim.bta" in text and "optim.betas" in text]
    assert [text for text in found if text.startswith("seed = x")]
    assert [text for text in found if text.startswith("missing train.a.path: str")]
    assert len(found) == 3  # a section's own check runs once its keys are right


def test_required_values_and_sections() -> None:
    assert problems(cls=Required) == [
        "missing table.path: str, has no default",
        "missing count: int, has no default",
    ]
    assert load(Required, [], ["table.path=x", "count=1"]) == Required(Table("x"), 1)


@pytest.mark.parametrize("word", ["optim.lr", "=3", "optim..lr=3", "a b=3", "optim.lr\n=3", ".=1"])
def test_malformed_set(word: str) -> None:
    assert problem(word) == f"--set {word}: expected section.key=value"


def test_unreadable_files(tmp_path: Path) -> None:
    bad, missing = tmp_path / "bad.toml", tmp_path / "missing.toml"
    bad.write_text("seed = \n")
    found = problems(sources=(bad, missing))
    assert str(bad) in found[0] and "line 1" in found[0]
    assert str(missing) in found[1] and "No such file" in found[1]


def test_a_set_value_cannot_smuggle_in_another_key() -> None:
    assert load(Root, [], ["outer.note=1\nseed=3"]).outer.note == "1\nseed=3"


def test_unsupported_annotation_is_an_error_of_the_program() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: complex = 1j

    with pytest.raises(TypeError, match="value.*complex"):
        load(Odd, [], ["value=1"])


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SettingsError("a", "b")))
    assert error.problems == ("a", "b")
