"""Wrong input is refused in a line that names it, before a model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import run_config, settings
from speciarl.core.config import Config, load_config
from speciarl.core.settings import SettingsError, load
from speciarl.core.train import train
from speciarl.core.world import World

Configure = Callable[..., Config]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.step=3",), r"unknown key train.step = 3 \(--set\): .*train.steps"),
        (("optim.learning_rate=1",), r"unknown key optim.learning_rate.* optim.lr"),
        (("optim.lr=fast",), r"optim.lr = fast \(--set\): expected float"),
        (("rollout.n=1",), r"rollout.n=1 with objective.normalize: .* at least 2"),
        (("rollout.n=0",), r"rollout: n=0: must be at least 1"),
        (
            ("model.head_mode=chunked", "objective.algorithm=gspo"),
            r"head_mode=chunked with objective.algorithm=gspo: .*model.head_mode=auto",
        ),
        (("rollout.temperature=0",), r"rollout: temperature=0.0: .* positive temperature"),
        (("rollout.engine=nativ",), r"rollout: engine='nativ': .* did you mean native"),
        (("objective.clip_high=-0.1",), r"objective: clip_high = -0.1 must be finite"),
        (("objective.dual_clip=0.5",), r"objective: dual_clip = 0.5 must be finite and above 1"),
        (("objective.algorithm=ppo",), r"objective: algorithm='ppo': one of grpo, dr-grpo, dapo"),
        (("objective.kl=k4",), r"objective: kl = 'k4' is unknown; known: k1, k2, k3"),
        (("train.mini_batch=3",), r"train: prompts=2 is not divisible by mini_batch=3"),
        (("train.steps=0",), r"train: steps, .* at least 1"),
        (("train.resume=no",), r"train: resume='no': one of auto, previous, never"),
        (("train.device=gpu",), r"train: device='gpu': one of auto, cpu, cuda"),
        (("mismatch.stop=-1",), r"mismatch: stop=-1.0: must not be negative; 0 is off"),
        (("mismatch.alarm=nan",), r"mismatch: alarm=nan: must not be negative"),
        (("mismatch.jump=0.5",), r"mismatch: jump=0.5: must be above 1; 0 is off"),
        (("mismatch.min_ess=1.5",), r"mismatch: min_ess=1.5: must be in \[0, 1\]"),
        (("train.trace_steps=-2",), r"train: trace_steps=-2: at least 0, or -1 for all"),
        (("train.out=",), r"train: out='': name the run folder"),
        (("reward.rule=speciarl-orderd",), r"reward rule = 'speciarl-orderd'.*'speciarl-ordered'"),
        (("reward.rule=table",), r"reward: table = None does not go with rule = 'table'"),
        (("judge.kind=taxonomi",), r"judge: kind = 'taxonomi': did you mean 'taxonomy'"),
        (("evaluation.judge.kind=llm",), r"evaluation.judge: kind = 'llm': known: taxonomy"),
        (("evaluation.k=0",), r"evaluation: every .* k at least 1"),
        (("data.train.birds.split=tset",), r"data.train.birds: split = 'tset': .*'test'"),
        (("data.train.new.path=x",), r"missing data.train.new.format"),
        (("data.variant=brief",), r"data: variant='brief': one of general, be-specific"),
        (("model.dtype=fp8",), r"model: dtype='fp8': one of auto, float32, bfloat16"),
    ],
)
def test_impossible_settings(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        run_config(tmp_path, tmp_path, tmp_path, *words)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    words = ("rollout.n=0", "train.resume=no", "optim.warmup=-1", "reward.wrong_penalti=1")
    with pytest.raises(SettingsError) as refused:
        run_config(tmp_path, tmp_path, tmp_path, *words)
    assert len(refused.value.problems) == 4


def test_unknown_presets_and_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown preset 'toyword'; the nearest is toyworld"):
        load_config("toyword", None, ())
    with pytest.raises(SettingsError, match="cannot read .*nowhere.toml"):
        load_config("", tmp_path / "nowhere.toml", ())
    (tmp_path / "half.toml").write_text("[train\n")
    with pytest.raises(SettingsError, match="cannot read .*half.toml.*line 1"):
        load_config("", tmp_path / "half.toml", ())


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("grpo", (0.2, 0.01, True, "token-mean", False)),
        ("dr-grpo", (0.2, 0.0, False, "constant", False)),
        ("dapo", (0.28, 0.0, True, "token-mean", True)),
    ],
)
def test_an_algorithm_given_in_a_file_decides_what_is_left_open(
    algorithm: str, expected: tuple[object, ...], tmp_path: Path
) -> None:
    given = settings(tmp_path, tmp_path, tmp_path) | {"objective": {"algorithm": algorithm}}
    chosen = load(Config, [given]).objective
    assert expected == (
        chosen.clip_high,
        chosen.kl_coef,
        chosen.normalize,
        chosen.aggregation,
        chosen.dynamic_sampling,
    )
    assert load(Config, [given], ("objective.clip_high=0.25",)).objective.clip_high == 0.25


@pytest.fixture
def configure(
    toy_root: Path, toy_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Configure:
    """configure(*words) of runs that must fail before any weights are loaded."""
    monkeypatch.setattr(
        "speciarl.core.policy.load_model", lambda *given: pytest.fail("weights were loaded")
    )
    return lambda *words: run_config(toy_root, toy_model_dir, tmp_path / "run", *words)


@pytest.fixture
def copy(toy_root: Path, tmp_path: Path) -> Path:
    """A copy of the toy birds that a test may damage."""
    ignore = shutil.ignore_patterns("*.jpg", "*.png")
    return Path(shutil.copytree(toy_root / "birds", tmp_path / "birds", ignore=ignore))


@pytest.mark.parametrize(
    "missing",
    [
        "images.txt",
        "classes.txt",
        "image_class_labels.txt",
        "train_test_split.txt",
        "images",
        "",
    ],
)
def test_a_missing_part_of_a_data_set_is_named(
    missing: str, copy: Path, configure: Configure, world: World
) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"no (file|folder) {path}; expected .*CUB_200_2011"
    ):
        train(configure(f"data.train.birds.path={copy}"), world, quiet=True)


def test_a_malformed_line_is_named(copy: Path, configure: Configure, world: World) -> None:
    with (copy / "image_class_labels.txt").open("a") as file:
        file.write("99999 1 2\n")
    with pytest.raises(ValueError, match=r"image_class_labels.txt:\d+: expected .*'99999 1 2'"):
        train(configure(f"data.eval.birds.path={copy}"), world, quiet=True)


def test_labels_without_an_entry_are_named(
    toy_root: Path, configure: Configure, world: World, tmp_path: Path
) -> None:
    tree = json.loads((toy_root / "taxonomy.json").read_text())
    tree["nodes"] = [node for node in tree["nodes"] if node["name"] != "golden warbler"]
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    words = [
        f"data.{table}.taxonomy={tmp_path / 'tree.json'}"
        for table in ("train.birds", "eval.birds", "eval.flowers")
    ]
    with pytest.raises(
        ValueError, match=r"1 of \d+ labels .* no entry .*tree.json: 'Golden warbler'"
    ):
        train(configure(*words), world, quiet=True)


def test_no_taxonomy_or_none_at_its_place(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    tables = ("train.birds", "eval.birds", "eval.flowers")
    none = [f"data.{table}.taxonomy=" for table in tables]
    with pytest.raises(ValueError, match=r"judge kind 'taxonomy' needs .* \(birds, eval.birds, "):
        train(configure(*none), world, quiet=True)
    missing = [f"data.{table}.taxonomy={tmp_path / 'tree.json'}" for table in tables]
    with pytest.raises(FileNotFoundError, match="no taxonomy file .*tree.json"):
        train(configure(*missing), world, quiet=True)


def test_nothing_to_train_on(configure: Configure, world: World) -> None:
    with pytest.raises(ValueError, match=r"no \[data.train.NAME\] table"):
        train(configure("data.train.birds=none"), world, quiet=True)
    words = ("train.prompts=4", "train.mini_batch=4", "data.train.birds.k=3")
    with pytest.raises(ValueError, match=r"4 prompts .*train.prompts.* only 3 of 3"):
        train(configure(*words), world, quiet=True)
    with pytest.raises(ValueError, match=r"k = 99999, but split 'train' of .* has only \d+"):
        train(configure("data.train.birds.k=99999"), world, quiet=True)


@pytest.mark.parametrize("path", ["/nowhere", "nowhere", "nowhere/at/all", "{tmp}/nowhere"])
def test_a_missing_model_folder(
    path: str, configure: Configure, world: World, tmp_path: Path
) -> None:
    path = path.format(tmp=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model.path='{path}': there is no folder"):
        train(configure(f"model.path={path}"), world, quiet=True)


def test_a_relative_folder_is_not_looked_for_on_the_hub(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model.path='runs/model': there is no folder"):
        train(configure("model.path=runs/model"), world, quiet=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json"),
        ("preprocessor_config.json", "model.path=.*preprocessor_config.json"),
    ],
)
def test_a_model_folder_that_lacks_a_file(
    file: str, message: str, configure: Configure, world: World, toy_model_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(toy_model_dir, tmp_path / "model"))
    (model / file).unlink()
    with pytest.raises(OSError, match=message):
        train(configure(f"model.path={model}"), world, quiet=True)


@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_damaged_weights_are_named(
    left: float, configure: Configure, world: World, toy_model_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(toy_model_dir, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(left * weights.stat().st_size)])
    with pytest.raises(ValueError, match=f"{weights} is corrupted"):
        train(configure(f"model.path={model}"), world, quiet=True)


def test_a_run_folder_that_is_a_file(configure: Configure, world: World, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(FileExistsError, match="train.out='.*notes' is a file"):
        train(configure(f"train.out={tmp_path / 'notes'}"), world, quiet=True)


def test_a_toy_world_is_not_drawn_over_other_files(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="mine exists and is not a toy world"):
        train(configure(f"data.toyworld={tmp_path / 'mine'}"), world, quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
