"""Checkpoints for the real SGLang, which these tests skip when it is not installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder starts engines: it needs SGLang, and more time than others."""
    skip = pytest.mark.skip(reason="SGLang is not installed: make test-sglang")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(300))
            if find_spec("sglang") is None:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def judge_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random judges: "qwen2" and "llama" (text only), "toy" (Qwen2.5-VL)."""
    import tinyjudge
    from speciarl.core.toymodel import save_toymodel

    root = tmp_path_factory.mktemp("judges")
    learnt, pieces = tinyjudge.bytes_tokenizer(), tinyjudge.pieces_tokenizer()
    folders = {
        "qwen2": tinyjudge.save_judge(root / "qwen2", "qwen2", learnt),
        "llama": tinyjudge.save_judge(root / "llama", "llama", pieces),
        "toy": save_toymodel(root / "toy"),
    }
    # As released chat models have them; a judge's scores must not see them.
    sampling = {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.5}
    (folders["qwen2"] / "generation_config.json").write_text(json.dumps(sampling))
    return folders
