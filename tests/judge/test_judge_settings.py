"""Which judge a configuration makes, and what it must never show."""

import json
from pathlib import Path

import pytest

from judges import FakeJudge
from speciarl.core.settings import SettingsError, describe, load, to_dict, to_toml
from speciarl.judge.base import Judge, Pair
from speciarl.judge.cache import CachedJudge
from speciarl.judge.panel import PanelJudge
from speciarl.judge.registry import FACTORIES, build_judge, make_judge
from speciarl.judge.rules import RuleJudge
from speciarl.judge.settings import KINDS, SAME, JudgeConfig
from speciarl.judge.unique import UniqueJudge
from speciarl.kernels.codes import S_MINUS, S, W

SERVER = {"kind": "openai", "model": "m", "base_url": "http://localhost:1/v1"}
Made = list[tuple[JudgeConfig, FakeJudge]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """(settings, back-end) of every model judge that is built; each says S-."""
    back_ends: Made = []

    def build(config: JudgeConfig, taxonomies: object) -> Judge:
        judge = FakeJudge(
            lambda pair: S_MINUS,
            f"{config.model}:{config.variant}",
            concurrent=config.kind == "openai",
        )
        back_ends.append((config, judge))
        return judge

    for kind in KINDS[1:]:
        monkeypatch.setitem(FACTORIES, kind, build)
    return back_ends


@pytest.fixture
def taxonomy(tmp_path: Path) -> str:
    nodes = [{"name": "bird"}, {"name": "robin", "parent": "bird", "synonyms": ["Erithacus"]}]
    (tmp_path / "t.json").write_text(json.dumps({"nodes": nodes}))
    return str(tmp_path / "t.json")


def test_every_kind_has_a_factory() -> None:
    assert tuple(FACTORIES) == KINDS


def test_a_model_gets_rules_then_deduplication_then_the_cache(
    made: Made, tmp_path: Path, taxonomy: str
) -> None:
    config = JudgeConfig(**SERVER)  # type: ignore[arg-type]
    judge = build_judge(config, taxonomies=[taxonomy], names=["wren"], cache=tmp_path / "v.sqlite")
    assert isinstance(judge, RuleJudge) and isinstance(judge.inner, UniqueJudge)
    assert isinstance(judge.inner.inner, CachedJudge) and judge.inner.inner.inner is made[0][1]
    judge.check(["robin"])
    pairs = [Pair("robin", text) for text in ("Robin", "song bird", "song bird", "robin, wren")]
    verdicts = judge.grade(pairs)
    assert [verdict.category for verdict in verdicts] == [S, S_MINUS, S_MINUS, W]
    assert made[0][1].asked == [Pair("robin", "song bird")]
    judge.grade(pairs)
    assert len(made[0][1].asked) == 1
    tally = judge.tally()
    assert {name: tally[name] for name in ("pairs", "by_rule", "by_batch", "by_cache")} == {
        "pairs": 8,
        "by_rule": 4,
        "by_batch": 2,
        "by_cache": 1,
    }
    assert (tmp_path / "v.sqlite").exists()
    judge.close()


@pytest.mark.parametrize("off", [True, False])
def test_no_cache_where_none_is_wanted(made: Made, off: bool, tmp_path: Path) -> None:
    config = JudgeConfig(**SERVER, cache="" if off else "auto")  # type: ignore[arg-type]
    judge = build_judge(config, cache=tmp_path / "v.sqlite" if off else None)
    assert judge.inner.inner is made[0][1]  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_the_exact_judge_stands_alone(taxonomy: str, tmp_path: Path) -> None:
    judge = make_judge("taxonomy", taxonomy=taxonomy)
    assert not hasattr(judge, "inner") and judge.concurrent
    build_judge(JudgeConfig(), taxonomies=[taxonomy], cache=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_panel_shares_one_cache_and_its_members_do_not_mix(made: Made, tmp_path: Path) -> None:
    panel = ("variant=relation", "variant=referee model=other timeout=5")
    config = JudgeConfig(**SERVER, panel=panel, vote="median")  # type: ignore[arg-type]
    judge = build_judge(config, cache=tmp_path / "v.sqlite")
    assert isinstance(judge, PanelJudge) and judge.vote == "median"
    assert [(c.variant, c.model, c.timeout) for c, _ in made] == [
        ("relation", "m", 30.0),
        ("referee", "other", 5.0),
    ]
    judge.check(["robin"])
    judge.grade([Pair("robin", "song bird")])
    judge.grade([Pair("robin", "song bird")])
    assert [len(back_end.asked) for _, back_end in made] == [1, 1]
    assert "rules" in judge.identity and "m:relation" in judge.identity
    judge.close()


def test_judges_on_the_engines_device_come_asleep(made: Made) -> None:
    config = JudgeConfig("transformers", "m", panel=("variant=ladder", "variant=relation"))
    judge = build_judge(config)
    assert not judge.concurrent
    assert [back_end.events for _, back_end in made] == [["sleep"]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "openia"}, "kind = 'openia': did you mean 'openai'"),
        ({"kind": "openai"}, "model = '': kind 'openai' needs it"),
        ({"kind": "sglang"}, "model = ''"),
        ({"kind": "openai", "model": "m"}, "base_url = '': kind 'openai' needs it"),
        ({**SERVER, "base_url": "http://[::1"}, "base_url is no address: must be http"),
        ({**SERVER, "base_url": "localhost:8000"}, "base_url = 'localhost:8000': must be http"),
        ({"variant": "laddr"}, "variant = 'laddr': did you mean 'ladder'"),
        ({"vote": "mean"}, "vote = 'mean': .*median"),
        ({"dtype": "fp8"}, "dtype = 'fp8'"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"concurrency": 0}, "concurrency = 0"),
        ({"token_budget": 0}, "token_budget = 0"),
        ({"retries": -1}, "retries = -1"),
        ({"workers": -1}, "workers = -1"),
        ({"timeout": 0.0}, "timeout = 0.0"),
        ({"timeout": float("nan")}, "timeout = nan"),
        ({"noise": 1.5}, "noise = 1.5: must be from 0 to 1"),
        ({"max_fault_share": float("nan")}, "max_fault_share = nan"),
        ({**SERVER, "panel": ("variant=ladder",)}, "needs two members"),
        ({**SERVER, "panel": ("varant=x", "")}, r"panel\[0\]: 'varant' .* did you mean variant"),
        ({**SERVER, "panel": ("", "noise=1")}, r"panel\[1\]: 'noise' is no key of a member"),
        ({**SERVER, "panel": ("", "timeout=soon")}, r"panel\[1\]: timeout = 'soon': must be float"),
        ({**SERVER, "panel": ("", "kind=sglag")}, r"panel\[1\]: kind = 'sglag'"),
    ],
)
def test_impossible_settings_name_the_value_and_the_fix(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**given)  # type: ignore[arg-type]


def test_same_is_for_evaluation(taxonomy: str) -> None:
    with pytest.raises(ValueError, match="'same' is for"):
        build_judge(JudgeConfig(SAME), taxonomies=[taxonomy])


@pytest.mark.parametrize(
    ("given", "threads"),
    [({}, 1), (SERVER, 32), ({**SERVER, "concurrency": 999}, 64), ({**SERVER, "workers": 3}, 3)],
)
def test_as_many_threads_as_questions(given: dict[str, object], threads: int) -> None:
    assert JudgeConfig(**given).threads == threads  # type: ignore[arg-type]


KEY = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize(
    "word",
    [
        f"key_env={KEY}",
        f"base_url=http://user:{KEY}@host/v1",
        f"base_url=http://host/v1?api-key={KEY}",
        f"api_key={KEY}",
        f'panel=["base_url=http://{KEY}@host/v1", "variant=ladder"]',
        f'panel=["key={KEY}", "variant=ladder"]',
    ],
)
def test_a_key_that_stands_where_none_belongs_is_refused_and_not_repeated(word: str) -> None:
    given = {k: v for k, v in SERVER.items() if not word.startswith(k)}
    with pytest.raises(SettingsError) as refused:
        load(JudgeConfig, [given], [word])
    assert KEY not in str(refused.value) and "0123456789" not in str(refused.value)


def test_a_key_is_nowhere_in_what_is_written_or_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    config = JudgeConfig(**SERVER, key_env="JUDGE_KEY")  # type: ignore[arg-type]
    judge = build_judge(config)
    shown = [
        *(repr(config), to_toml(config, comments=True), json.dumps(to_dict(config))),
        *(describe(JudgeConfig), judge.identity, json.dumps(judge.tally()), repr(judge)),
        *(repr(vars(judge)), repr(vars(judge.inner))),  # type: ignore[attr-defined]
    ]
    judge.close()
    assert not [text for text in shown if KEY in text]
    assert load(JudgeConfig, [to_dict(config)]) == config
