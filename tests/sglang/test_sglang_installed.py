"""The installed SGLang has what is used, and its source tells the truth about its classes."""

import inspect

from speciarl.rollout.sglang_contract import examine
from speciarl.rollout.sglang_needs import NEEDS
from speciarl.rollout.sglang_scope import unchanged
from speciarl.rollout.sglang_source import installed


def test_the_installed_package_fits() -> None:
    report = examine(installed())
    assert report.conforms, report.text()
    assert report.version.startswith("0.5.")


def test_what_the_source_says_is_what_is_imported() -> None:
    found = examine(installed()).found
    with unchanged({"SGLANG_USE_CPU_ENGINE": "1"}):
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils import MultiprocessingSerializer

        checked = 0
        for need in NEEDS:
            if need.kind != "call" or not need.name.startswith("Engine."):
                continue
            function = getattr(Engine, need.name.removeprefix("Engine."))
            names = [name for name in inspect.signature(function).parameters if name != "self"]
            parts = found[f"{need.module}:{need.name}"].parts
            assert names == [part.lstrip("*") for part in parts], need.name
            checked += 1
        assert checked > 8
        arguments = inspect.signature(ServerArgs).parameters
        assert set(found["srt.server_args:ServerArgs"].parts) <= set(arguments)
        assert callable(MultiprocessingSerializer.serialize)
