"""Which route, mode and chunk a call gets, and the check of a route at start."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headcases import draw
from speciarl.kernels import launch, routes
from speciarl.kernels.anchored import ReferenceHead
from speciarl.kernels.head import linear_logprob

CPU = torch.device("cpu")
GIB = 1 << 30


def on(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A stand-in for a tensor that this machine may have no device for."""
    return SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device(device))


def test_without_a_gpu_auto_is_the_reference() -> None:
    hidden, weight, _ = draw(8, 30, 4, dtype=torch.bfloat16)
    choice = routes.choose(hidden, weight, route="auto", mode="auto", chunk=None, gradients=True)
    assert (choice.route, choice.mode) == ("reference", "store")
    choice = routes.choose(hidden, weight, route="auto", mode="store", chunk=5, gradients=False)
    assert choice == routes.Choice("reference", "forward", 5)
    assert routes.select("auto", (400, 128), device=CPU, dtype=torch.float32) == "reference"


@pytest.mark.parametrize(
    ("reasons", "wanted"),
    [
        ({}, ["expsum", "rows", "reference"]),
        ({"expsum": "too old"}, ["rows", "reference"]),
        ({"expsum": "too old", "rows": "fp16"}, ["reference"]),
    ],
)
def test_a_gpu_takes_the_fastest_that_can_run(
    monkeypatch: pytest.MonkeyPatch, reasons: dict[str, str], wanted: list[str]
) -> None:
    monkeypatch.setattr(routes, "unsupported", lambda name, hidden, weight: reasons.get(name))
    hidden, weight = on("cuda", 8, 64), on("cuda", 100, 64)
    assert routes.candidates(hidden, weight) == wanted


def test_a_table_is_stored_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(device: str, free: int = 0, rows: int = 100) -> str:
        monkeypatch.setattr(routes, "free_bytes", lambda device: free)
        how: Any = {"route": "reference", "mode": "auto", "chunk": None}
        tensors = on(device, rows, 4), on(device, 50, 4)
        return routes.choose(*tensors, gradients=True, **how).mode

    table = 100 * 50 * 4  # the reference's are fp32
    assert mode("cuda", int(table / routes.STORE_SHARE)) == "store"
    assert mode("cuda", int(table / routes.STORE_SHARE) - 2) == "recompute"
    assert mode("cpu", rows=100) == "store"
    assert mode("cpu", rows=10**6) == "recompute"


@pytest.mark.parametrize("vocab", [257, 151936, 152064])
@pytest.mark.parametrize("chunk", [1, 16, 2048, 7168])
def test_a_chunk_is_the_whole_workspace_of_the_exp_sum(chunk: int, vocab: int) -> None:
    rows = routes.rows_within(chunk, vocab)
    sums = 2 * 4 * -(-vocab // 256)  # log-prob and entropy, fp32, one a column tile
    assert rows == 1 or rows * (vocab * 2 + sums) <= chunk * vocab * 2
    assert rows >= chunk - max(chunk // 16, 256) and (rows < 256 or rows % 128 == 0)
    hidden, weight = draw(4, vocab, 4, dtype=torch.bfloat16)[:2]
    chosen = routes.choose(
        hidden, weight, route="expsum", mode="recompute", chunk=chunk, gradients=True
    )
    assert chosen.chunk == rows


def test_chunks_of_a_gpu_are_tuned_sizes_or_even_pieces() -> None:
    assert routes.gpu_chunk(32768, 2048, 10**6) == 8192
    assert routes.gpu_chunk(32768, 2048, 5000) == 4096
    assert routes.gpu_chunk(7168 * 3, 3584, 10**6) == 7168
    assert routes.gpu_chunk(7168 * 3, 3584, 5000) == 3584
    assert routes.gpu_chunk(0, 3584, 5000) == 3584
    assert routes.gpu_chunk(2048, 2048, 10) == 2048  # smaller ones are slow: try
    for rows in (1, 300, 4097, 8200, 8193 * 3):
        chunk = routes.gpu_chunk(rows, 2048, 10**6)
        count = -(-rows // 8192)
        assert chunk <= 8192 and -(-rows // chunk) == count and chunk % 128 == 0
        assert rows - (count - 1) * chunk > chunk / 2 or count == 1


def test_a_chunks_workspace_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "free_bytes", lambda device: 20 * GIB)
    hidden, weight = on("cuda", 10**6, 2048), on("cuda", 151936, 2048)
    for route, row in (("expsum", 2), ("rows", 6)):
        chunk = routes.default_chunk(route, hidden, weight)
        assert chunk >= 2048 and chunk * 151936 * row <= 5 * GIB
    assert routes.default_chunk("reference", hidden, weight) * 151936 * 4 <= GIB


def test_a_cpus_chunk_follows_the_vocabulary() -> None:
    for vocab in (1, 400, 32768, 152064):
        weight = torch.empty(vocab, 2, device="meta")
        rows = routes.default_chunk("reference", torch.empty(1, 2), on("cpu", vocab, 2))
        assert rows >= 16 and (rows == 16 or rows * len(weight) * 4 <= 1 << 25)


def test_a_triton_route_without_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "has_triton", lambda: False)
    inputs = draw(4, 30, 4, dtype=torch.bfloat16)
    for route in ("rows", "expsum"):
        with pytest.raises(ValueError, match=rf"'{route}' cannot run.*speciarl\[triton\]"):
            linear_logprob(*inputs, route=route)


def test_a_triton_route_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from speciarl.kernels import expsum, rowwise  # noqa: F401  kernels stay interpreted

    monkeypatch.delenv("TRITON_INTERPRET")
    assert not launch.interpreted()
    inputs = draw(4, 30, 4, dtype=torch.bfloat16)
    for route in ("rows", "expsum"):
        with pytest.raises(ValueError, match="CUDA tensors.*cpu.*TRITON_INTERPRET=1"):
            linear_logprob(*inputs, route=route)
        with pytest.raises(ValueError, match=f"'{route}'.*CUDA.*model.head_route=auto"):
            routes.select(route, (30, 4), device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("route", "dtype"),
    [("rows", torch.bfloat16), ("rows", torch.float32), ("expsum", torch.bfloat16)],
)
def test_routes_pass_their_check(route: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert routes.select(route, (101, 32), device=CPU, dtype=dtype) == route


def wrong_gradient(self: ReferenceHead, *args: Any) -> Tensor:
    """A fault of a kind that was found in a peer: a factor of one row is used for all."""
    factor = super(ReferenceHead, self).gradient(*args)
    return factor[:1].expand_as(factor)


def test_a_route_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ReferenceHead):
        gradient = wrong_gradient

    plain = routes.make
    monkeypatch.setattr(
        routes, "make", lambda name, *args: Wrong(*args) if name == "rows" else plain(name, *args)
    )
    monkeypatch.setattr(routes, "unsupported", lambda name, hidden, weight: None)
    with pytest.raises(RuntimeError, match=r"'rows' is wrong.*d weight [1-9].*model.head_route"):
        routes.select("rows", (50, 16), device=CPU, dtype=torch.float32)

    # Under "auto" it gives way to the next one, and says so.
    monkeypatch.setattr(routes, "candidates", lambda hidden, weight: ["rows", "reference"])
    hidden, weight, _ = draw(12, 50, 16, dtype=torch.float32)
    with pytest.warns(UserWarning, match="head route 'rows' is not used.*wrong"):
        assert routes.first_right(hidden, weight) == "reference"


def test_auto_takes_the_first_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    hidden, weight, _ = draw(12, 50, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(routes, "candidates", lambda hidden, weight: ["rows", "reference"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routes.first_right(hidden, weight) == "rows"


def test_a_tiny_vocabulary_can_be_checked() -> None:
    for vocab in (1, 2, 4):
        hidden, weight, _ = draw(6, vocab, 4, dtype=torch.float32)
        assert max(routes.check("reference", hidden, weight).values()) < 1e-5
