"""The application of the demo: fastres needs only the name of the result backend."""

from __future__ import annotations

from celery import Celery

app = Celery("demo_app", backend="fastres://")


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)
