import ast
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "judge", "rollout", "core", "bench")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "judge": {"judge", "rollout", "kernels"},  # rollout/ starts the engine of judge/sglang.py
    "rollout": {"rollout", "kernels"},
    "core": {"core", "rollout", "judge", "kernels"},
    "bench": set(PACKAGES),
}
# Dependencies and peers that this environment may lack.
OPTIONAL = {
    *("accelerate", "datasets", "flash_attn", "kernels", "liger_kernel", "peft", "sglang"),
    *("torchvision", "triton", "trl", "verl", "vllm"),
}
TEXT = {".py", ".toml", ".md", ".txt", ".json", ".sh", ".yml", ".yaml", ".cfg", ".ini"}
NOT_OURS = re.compile(
    r"\.(git|venv.*|\w+_cache|hypothesis)|build|runs|data|.*\.egg-info|__pycache__"
)


def files() -> Iterator[Path]:
    """The repository's own text files, relative to its root."""
    for folder, names, members in os.walk(ROOT):
        names[:] = sorted(name for name in names if not NOT_OURS.fullmatch(name))
        for member in sorted(members):
            path = Path(folder, member)
            if path.suffix in TEXT or path.name in ("Makefile", "run"):
                yield path.relative_to(ROOT)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_imported_packages_are_this_tree() -> None:
    for package in PACKAGES:
        file = import_module(f"speciarl.{package}").__file__
        assert file and Path(file).resolve().parent == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_down_the_house(package: str) -> None:
    wrong = []
    for path in modules(package):
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            if top in PACKAGES or (top == "speciarl" and rest.split(".")[0] in PACKAGES):
                # Top-level, `core` would be whatever the working folder holds.
                if top != "speciarl" or rest.split(".")[0] not in MAY_IMPORT[package]:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong


@pytest.mark.parametrize("package", ["core", "bench"])
def test_no_script_folder_shadows_a_module(package: str) -> None:
    """`python core/train.py` puts core/ first on the path of every import in the process."""
    installed = {name for name in packages_distributions() if name != "speciarl"}
    taken = set(sys.stdlib_module_names) | installed | OPTIONAL | {"speciarl"}
    names = {path.stem for path in (ROOT / package).iterdir() if path.stem != "__init__"}
    assert not names & taken


def test_files_stay_short() -> None:
    limit = {"kernels": 400}
    lengths = {
        path: len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in files()
        if path.suffix == ".py"
    }
    assert lengths
    assert not {p: n for p, n in lengths.items() if n > limit.get(p.parts[0], 300)}


def test_test_files_have_names_of_their_own() -> None:
    tests = [path for path in files() if path.parts[0] == "tests" and path.suffix == ".py"]
    assert not [path for path in tests if path.name == "__init__.py"]
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert len(names) == len(set(names))


def test_nothing_names_a_machine_or_a_registry() -> None:
    machine = r"(?<![\w.~])/(work|root|home|Users|opt|mnt|scratch)/\w"
    registry = (
        r"\b(pypi|pythonhosted|anaconda|download\.pytorch|index\.docker|ghcr)\.(org|com|io)\b"
    )
    pattern = re.compile(f"{machine}|{registry}")
    documented = "TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu"
    found = []
    for path in files():
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line) and line != documented and path != Path("tests/test_layout.py"):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found
