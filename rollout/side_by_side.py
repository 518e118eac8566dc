"""Requests that run side by side in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def as_finished(work: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[T]:
    """What they return, as it comes; those under way are cancelled when the iterator is closed."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for task in tasks:
            task.cancel()
