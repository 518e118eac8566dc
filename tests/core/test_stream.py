"""The stream of prompts: one order for any number of ranks, bad images replaced and listed."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runs import json_of, lines, lot, run_config
from speciarl.core.examples import BadImage, DataTable, Example, load_examples
from speciarl.core.prompts import PromptBuilder
from speciarl.core.stream import DataConfig, PromptStore, PromptStream
from speciarl.core.train import train
from speciarl.core.world import World
from threadranks import Rank, on_ranks


@pytest.fixture(scope="module")
def birds(toy_root: Path) -> list[Example]:
    table = DataTable("cub", str(toy_root / "birds"), "train", k=11)
    return load_examples("birds", table)


class Counting:
    """Stands in for a builder; knows which prompts were built, and cannot build some."""

    def __init__(self, bad: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.bad = bad
        self.built: list[str] = []

    def build(self, example: Example) -> object:
        self.built.append(example.key)
        if example.key in self.bad:
            raise BadImage(example.image, "bad")
        return example.key


def stream(examples: list[Example], world: Any, **given: Any) -> PromptStream:
    store = PromptStore(Counting(given.pop("bad", set())), 100)  # type: ignore[arg-type]
    return PromptStream(examples, store, world, given.pop("seed", 0), **given)


def keys(examples: list[Example]) -> list[str]:
    return [example.key for example in examples]


def test_order_is_the_same_for_any_number_of_ranks(birds: list[Example]) -> None:
    bad = {birds[2].key, birds[7].key}

    def draws(rank: Rank) -> tuple[list[list[str]], dict[str, str]]:
        drawn = stream(birds, rank, bad=bad, batch=4)
        return [keys(drawn.draw(4)) for _ in range(6)], drawn.skipped

    alone = on_ranks(1, draws)[0]
    assert set(alone[1]) == bad
    for size in (2, 3, 4):
        assert on_ranks(size, draws) == [alone] * size


def test_ranks_share_the_work_of_building(birds: list[Example]) -> None:
    def built(rank: Rank) -> list[str]:
        drawn = stream(birds, rank)
        drawn.draw(8)
        return drawn.store.builder.built  # type: ignore[attr-defined]

    shares = on_ranks(2, built)
    assert len(shares[0]) == len(shares[1]) == 4 and not set(shares[0]) & set(shares[1])


def test_an_epoch_shows_everything_once_and_the_next_in_another_order(
    birds: list[Example], world: World
) -> None:
    drawn = stream(birds, world)
    epochs = [keys(drawn.draw(11)) for _ in range(3)]
    assert [set(epoch) for epoch in epochs] == [set(keys(birds))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(stream(birds, world, seed=1).draw(11)) != epochs[0]


def test_epochs_of_whole_batches_leave_the_rest_for_the_next_shuffle(
    birds: list[Example], world: World
) -> None:
    drawn = stream(birds, world, batch=4)
    epoch = keys(drawn.draw(4)) + keys(drawn.draw(4))
    assert len(set(epoch)) == 8 and drawn.position == 8
    assert keys(drawn.draw(4)) == keys(stream(birds, world, batch=4, position=8).draw(4))


def test_it_goes_on_from_a_position(birds: list[Example], world: World) -> None:
    first = stream(birds, world)
    first.draw(4)
    later = stream(birds, world, position=first.position)
    assert [keys(first.draw(3)) for _ in range(5)] == [keys(later.draw(3)) for _ in range(5)]


def test_no_example_comes_twice_where_an_epoch_ends(birds: list[Example], world: World) -> None:
    drawn = stream(birds, world, bad={birds[0].key})
    for _ in range(20):
        batch = keys(drawn.draw(7))
        assert len(set(batch)) == 7


def test_too_few_usable_examples(birds: list[Example], world: World) -> None:
    with pytest.raises(ValueError, match="training set is empty"):
        stream([], world)
    drawn = stream(birds, world, bad=set(keys(birds[:4])))
    with pytest.raises(ValueError, match=r"8 prompts .* only 7 of 11 .* one skipped: .*: bad"):
        drawn.draw(8)
    with pytest.raises(ValueError, match=r"12 prompts .* only 11 of 11"):
        stream(birds, world).require(12)


def test_the_store_keeps_the_prompts_last_used(birds: list[Example]) -> None:
    counting = Counting({birds[4].key})
    store = PromptStore(counting, 2)  # type: ignore[arg-type]
    for i in (0, 1, 0, 2, 0, 1, 4, 4):
        store.get(birds[i])
    assert counting.built == [birds[i].key for i in (0, 1, 2, 1, 4)]
    assert store.problems == {birds[4].key: f"{birds[4].image}: bad"}


def spoil(folder: Path) -> dict[str, str]:
    """Images that no model can use, and a part of the reason that is to be given for each."""
    folder.mkdir(parents=True)
    whole = Image.effect_noise((64, 64), 60).convert("RGB")
    whole.save(folder / "good.jpg")
    data = (folder / "good.jpg").read_bytes()
    (folder / "good.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    whole.convert("CMYK").save(folder / "print.jpg")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    frames = [whole.rotate(angle) for angle in (0, 90)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    return {
        "empty.jpg": "zero bytes",
        "cut.jpg": "truncated",
        "text.jpg": "cannot identify",
        "print.jpg": "CMYK",
        "dot.png": "tiny: 1 x 1",
        "film.gif": "animated",
    }


def test_bad_images_are_skipped_counted_listed_and_replaced(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)
    reasons = spoil(tmp_path / "mine" / "golden warbler")
    for i in range(3):
        noise = Image.effect_noise((64, 64), 60 + i).convert("RGB")
        noise.save(tmp_path / "mine" / "golden warbler" / f"{i}.png")
    words = [
        "data.train.birds=none",
        "data.train.mine.format=folder",
        f"data.train.mine.path={tmp_path / 'mine'}",
        "data.train.mine.split=all",
        f"data.eval.mine.path={tmp_path / 'mine'}",
        "data.eval.mine.format=folder",
        "data.eval.mine.split=all",
        f"data.eval.mine.taxonomy={toy_root / 'taxonomy.json'}",
        "train.prompts=3",
        "train.mini_batch=3",
        "train.steps=4",
        "train.samples_every=1",
    ]
    out = tmp_path / "run"
    train(run_config(toy_root, toy_model_dir, out, *words), world)

    listed = json_of(out / "skipped.json")
    assert {Path(key).name for key in listed} == set(reasons)
    assert all(reasons[Path(key).name] in reason for key, reason in listed.items())
    shown = capsys.readouterr().out
    assert all(f"skipped {key}" in shown for key in listed)
    metrics = [line for line in lines(out / "metrics.jsonl") if "time/step" in line]
    assert metrics[-1]["skipped/prompts"] == len(reasons)
    assert [line["groups/count"] for line in metrics] == [3] * 4
    sampled = {Path(row["key"]).name for row in lines(out / "samples.jsonl")}
    assert sampled == {"0.png", "1.png", "2.png"}
    state = json_of(out / "checkpoints" / "step-4" / "state.json")
    assert state["skipped_prompts"] == listed
    evaluated = json_of(out / "evaluation" / "step-000004" / "metrics.json")
    assert {Path(key).name for key in evaluated["skipped"]} == set(reasons)
    assert evaluated["datasets"]["mine"]["n"] == 3


def test_prompts_over_the_limit_are_dropped_not_cut(
    birds: list[Example], toy_model_dir: Path, world: World
) -> None:
    free = PromptBuilder(toy_model_dir)
    lengths = {example.key: len(free.build(example).input_ids) for example in birds}
    limit = sorted(lengths.values())[len(birds) // 2]
    builder = PromptBuilder(toy_model_dir, max_prompt_tokens=limit)
    fitting = {key for key, length in lengths.items() if length <= limit}
    drawn = PromptStream(birds, PromptStore(builder, 100), world, 0)
    batch = drawn.draw(len(fitting))
    assert set(keys(batch)) == fitting
    for example in batch:
        prompt = drawn.store.get(example)
        assert prompt is not None and len(prompt.input_ids) == lengths[example.key]
    with pytest.raises(ValueError, match=f"one skipped: .* tokens, max_prompt_tokens is {limit}"):
        drawn.draw(len(fitting) + 1)
    assert drawn.skipped.keys() == lengths.keys() - fitting


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"variant": "specific"}, "variant='specific': one of general, be-specific"),
        ({"answer": "no place"}, "must hold {} exactly once"),
        ({"cached_prompts": 0}, "cached_prompts must be at least 1"),
    ],
)
def test_impossible_data_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**given)


def test_a_prompt_that_vanished_is_an_error(birds: list[Example]) -> None:
    builder = Counting()
    store = PromptStore(builder, capacity=1)  # type: ignore[arg-type]
    assert store.need(birds[0]) == store.get(birds[0]) == birds[0].key
    store.get(birds[1])  # takes the only place
    builder.bad = {birds[0].key}
    with pytest.raises(RuntimeError, match="could be read before, not now: .*bad"):
        store.need(birds[0])
