"""Compiles every kernel for compute capabilities 8.0 and 9.0, with no GPU, and judges the result.

    python bench/compile_report.py [--match REGEX] [--json FILE]

Prints registers, shared memory, spills and the instructions that matter for each kernel and
configuration; ends with status 1 if one of the gates of `failures` does not hold. Another Triton
than the installed one is measured by putting its folder first on PYTHONPATH.
"""

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 makes kernels that cannot be compiled: unset it")
if not find_spec("triton"):
    sys.exit("compiling needs triton: pip install 'speciarl[triton]'")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import speciarl.kernels
from speciarl.bench.compile_cases import Case, cases

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65_536
# Of a multiprocessor, of which the system keeps RESERVED bytes for each program; and of a program.
SHARED_PER_SM = {80: 167_936, 90: 233_472}
RESERVED = 1024
SHARED = {80: 166_912, 90: 232_448}
COLUMNS = ("registers", "stack", "spills", "shared", "matrix", "serial", "loads", "stores")


@dataclass(frozen=True)
class Compiled:
    """What became of one case for one capability; shared memory and stack in bytes."""

    name: str
    capability: int
    registers: int
    """Of a thread."""
    stack: int
    spills: int
    """Loads and stores of local memory."""
    shared: int
    scratch: int
    """Bytes of global memory that Triton would have to allocate for each launch."""
    matrix: int
    """HGMMA or HMMA instructions."""
    serial: int
    """HGMMA that wait for the one before, against which ptxas only warns."""
    loads: int
    """TMA loads."""
    stores: int
    """TMA stores."""


def compiled(case: Case, capability: int) -> Compiled:
    """Compiles ahead of time, with Triton's own ptxas, and reads the machine code."""
    names = case.kernel.arg_names
    places = {name: (index,) for index, name in enumerate(names)}
    constants = {places[name]: value for name, value in case.constants.items()}
    aligned = {
        places[parameter.name]: [["tt.divisibility", 16]]
        for parameter in case.kernel.params
        if case.types.get(parameter.name, "").startswith("*")
        and not parameter.do_not_specialize_on_alignment
    }
    signature = {name: case.types.get(name, "constexpr") for name in names}
    source = ASTSource(case.kernel, signature, constants, aligned)
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    usage, code = _disassembled(binary.asm["cubin"])
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)", code, re.M)
    count = opcodes.count
    return Compiled(
        case.full_name,
        capability,
        registers=_figure("REG", usage),
        stack=_figure("STACK", usage),
        spills=count("LDL") + count("STL"),
        shared=binary.metadata.shared,
        scratch=binary.metadata.global_scratch_size,
        matrix=count("HGMMA") + count("HMMA"),
        serial=_serialised(code),
        loads=count("UTMALDG"),
        stores=count("UTMASTG"),
    )


def failures(case: Case, found: Compiled) -> list[str]:
    """Which gates do not hold, each with its figure."""
    limit = SHARED[found.capability]
    threads = 32 * case.warps * case.per_sm
    # Registers are given to warps in units of 8 to a thread.
    registers = -(-found.registers // 8) * 8 * threads
    shared = case.per_sm * (found.shared + RESERVED)
    hopper = found.capability >= 90
    gates = {
        f"a stack of {found.stack} bytes": found.stack > 0,
        f"{found.spills} accesses to local memory": found.spills > 0,
        f"{found.shared} bytes of shared memory, above {limit}": found.shared > limit,
        f"{shared} bytes of shared memory for {case.per_sm} programs": (
            shared > SHARED_PER_SM[found.capability]
        ),
        f"{registers} registers for {threads} threads": registers > REGISTERS,
        f"{found.scratch} bytes of global memory for each launch": found.scratch > 0,
        "no matrix instruction": case.product and not found.matrix,
        f"{found.serial} matrix instructions that wait for the last": found.serial > 0,
        "no TMA load": case.product and hopper and not found.loads,
        "no TMA store": case.tma_stores and hopper and not found.stores,
    }
    return [gate for gate, broken in gates.items() if broken]


def missing(known: Iterable[Case]) -> list[str]:
    """Kernels of kernels/ that no case compiles."""
    covered = {case.kernel.__name__ for case in known}
    return [name for name in _kernel_names() if name not in covered]


def _kernel_names() -> Iterator[str]:
    """Triton functions that are launched: by convention, their names end in `_kernel`."""
    for module in pkgutil.iter_modules(speciarl.kernels.__path__):
        members = vars(import_module(f"speciarl.kernels.{module.name}"))
        for name, member in members.items():
            own = isinstance(member, JITFunction) and member.fn.__module__.endswith(module.name)
            if own and name.endswith("_kernel"):
                yield name


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [["cuobjdump", "-res-usage"], ["nvdisasm", "-c"]]
        usage, code = (
            subprocess.run(
                [str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in commands
        )
    return usage, code


def _figure(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found, usage
    return int(found.group(1))


def _serialised(code: str) -> int:
    """HGMMA that follow another one in straight-line code with a wait in between."""
    number, pending, waited = 0, False, False
    for line in code.splitlines():
        if line.startswith(".L") or "BRA" in line:
            pending = waited = False
        elif "WARPGROUP.DEPBAR" in line:
            waited = pending
        elif "HGMMA" in line:
            number += waited
            pending, waited = True, False
    return number


def _row(found: Compiled, width: int) -> str:
    figures = "".join(f"{getattr(found, column):>11,}" for column in COLUMNS)
    return f"{found.name:<{width}}{found.capability:>4}{figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only cases whose 'name sm_90' has this regex")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    known = cases()
    chosen = [
        (case, capability)
        for case in known
        for capability in case.capabilities
        if re.search(arguments.match, f"{case.full_name} sm_{capability}")
    ]
    width = max((len(case.full_name) for case, _ in chosen), default=0) + 1
    print(f"Triton {triton.__version__}: {len(chosen)} binaries of {len(known)} cases")
    print(" " * width + "  sm" + "".join(f"{column:>11}" for column in COLUMNS))
    rows, broken = [], [f"{name} is in no case of compile_cases" for name in missing(known)]
    for case, capability in chosen:
        found = compiled(case, capability)
        rows.append(found)
        print(_row(found, width), flush=True)
        broken += [f"{found.name} sm_{capability}: {gate}" for gate in failures(case, found)]
    if arguments.json:
        table = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(table | {"failures": broken}, indent=1) + "\n")
    for line in broken:
        print(f"FAILED: {line}")
    sys.exit(1 if broken or not chosen else 0)


if __name__ == "__main__":
    main()
