"""The machine of a run, and the versions of all programs and packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("celery", "kombu", "amqp", "redis", "celery-amqp-backend")


def describe(rabbitmq: str, redis: str) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "memory": round(int(_first("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        # The load: a busy machine has larger figures; ratios change less.
        "load": round(os.getloadavg()[0], 1),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "versions": {
            "Python": platform.python_version(),
            **{"redis-py" if name == "redis" else name: version(name) for name in PACKAGES},
            "RabbitMQ": rabbitmq,
            "Redis": redis,
        },
    }


def _first(path: str, name: str) -> str:
    """The value of the first line of a file that begins with a name."""
    lines = Path(path).read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
