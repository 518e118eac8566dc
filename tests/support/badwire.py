"""What a misbehaving server puts on the wire; see badserver.py for the names."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

CRASH = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def said(content: str | None, *tokens: str) -> dict[str, Any]:
    listed = [{"token": token, "logprob": -1.0 - i} for i, token in enumerate(tokens)]
    logprobs = {"content": [{**listed[0], "top_logprobs": listed}]} if listed else None
    return {"choices": [{"message": {"content": content}, "logprobs": logprobs}]}


ANSWERS: dict[str, Any] = {
    "not-json": b"<html>It works!</html>",
    "not-chat": ["not", "a", "completion"],
    "no-choices": {"choices": []},
    "no-content": said(None),
    "wrong-label": said("Z", "Z", "The"),
    "two-labels": said("A or B"),
}


def message(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> tuple[bytes, bytes]:
    """Head and body of an answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), body


async def send(
    writer: asyncio.StreamWriter,
    content: Any,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> None:
    writer.write(b"".join(message(content, status, headers)))
    await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CRASH)
    writer.transport.abort()


async def _hang(writer: asyncio.StreamWriter, content: Any) -> bool:
    await asyncio.sleep(3600)
    return False


async def _drip(writer: asyncio.StreamWriter, content: Any) -> bool:
    head, body = message(content)
    writer.write(head)
    for at in range(len(body)):
        writer.write(body[at : at + 1])
        await writer.drain()
        await asyncio.sleep(0.005)
    return True


async def _endless(writer: asyncio.StreamWriter, content: Any) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b" " * 65536)
        await writer.drain()


async def _crash(writer: asyncio.StreamWriter, content: Any) -> bool:
    reset(writer)
    return False


async def _crash_in_body(writer: asyncio.StreamWriter, content: Any) -> bool:
    head, body = message(content)
    writer.write(head + body[: len(body) // 2])
    await writer.drain()
    await asyncio.sleep(0.005)  # a reset may overtake what is on its way
    reset(writer)
    return False


async def _half_close(writer: asyncio.StreamWriter, content: Any) -> bool:
    writer.write(message(content)[0][:20])
    writer.write_eof()
    await asyncio.sleep(3600)
    return False


async def _half_body(writer: asyncio.StreamWriter, content: Any) -> bool:
    head, body = message(content)
    writer.write(head + body[: len(body) // 2])
    writer.write_eof()
    await asyncio.sleep(3600)
    return False


async def _garbage(writer: asyncio.StreamWriter, content: Any) -> bool:
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    await writer.drain()
    return False


BREAKS: dict[str, Callable[[asyncio.StreamWriter, Any], Any]] = {
    "hang": _hang,
    "drip": _drip,
    "endless": _endless,
    "reset": _crash,
    "reset-body": _crash_in_body,
    "half-close": _half_close,
    "half-body": _half_body,
    "garbage": _garbage,
}
