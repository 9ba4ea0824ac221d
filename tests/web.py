"""A web application whose views wait for tasks of ``proj``: ``uvicorn web:api``."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from fastapi import FastAPI
from proj import app, slow

import fastres
from fastres import aio

api = FastAPI()


async def value_of(result: Any, timeout: float) -> Any:
    """The value of a result; a backend without asyncio support is read in a thread."""
    if isinstance(app.backend, fastres.AMQPBackend):
        return await aio.get(result, timeout=timeout)

    async def poll() -> None:
        while not result.ready():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(poll(), timeout)
    return result.get()


@api.get("/slow")
async def wait(seconds: float, value: int) -> Any:
    return await value_of(slow.delay(seconds, value), 60)


@api.get("/threads")
async def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
