"""The application whose numbers the dashboard shows: ``celery -A dashboard_app``."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from prometheus_client import CollectorRegistry, start_http_server

from fastres.metrics import ProcessCollector

app = Celery("dashboard_app", broker=os.environ.get("DASHBOARD_BROKER"), backend="fastres://")
app.conf.update(broker_connection_retry_on_startup=True)


@app.task
def work(number: int) -> int:
    """Takes some time, and fails now and then."""
    time.sleep(random.expovariate(20))
    if random.random() < 0.0005:
        raise ValueError(number)
    return number


@app.task(ignore_result=True)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@worker_ready.connect
def serve(**_: Any) -> None:
    registry = CollectorRegistry()
    registry.register(ProcessCollector(app))
    start_http_server(int(os.environ["DASHBOARD_PORT"]), "127.0.0.1", registry)
