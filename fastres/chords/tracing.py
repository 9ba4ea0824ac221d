"""The body of a chord continues the trace of its last part, with OpenTelemetry and Sentry."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ("continued",)


@contextlib.contextmanager
def continued(headers: Mapping[str, Any], attributes: Mapping[str, Any]) -> Iterator[None]:
    """A context that continues the trace in a task's headers; in OpenTelemetry, in a span of its own.

    The worker of the task is another process: its span has ended, and is known by its headers alone.

    Args:
        attributes: of the span.
    """
    with contextlib.ExitStack() as stack:
        for module, enter in (("opentelemetry.trace", _opentelemetry), ("sentry_sdk", _sentry)):
            # An application that has not imported the SDK does not trace.
            if module in sys.modules:
                try:
                    enter(sys.modules[module], stack, headers, attributes)
                except Exception as exc:
                    logger.debug("The trace of a chord's part is not continued: %r", exc)
        yield


def _opentelemetry(
    trace: Any, stack: contextlib.ExitStack, headers: Mapping[str, Any], attributes: Mapping[str, Any]
) -> None:
    context: Any = importlib.import_module("opentelemetry.context")
    propagate: Any = importlib.import_module("opentelemetry.propagate")
    token = context.attach(propagate.extract(headers))
    stack.callback(context.detach, token)
    tracer = trace.get_tracer("fastres")
    stack.enter_context(tracer.start_as_current_span("fastres.chord.join", attributes=attributes))


def _sentry(
    sentry_sdk: Any, stack: contextlib.ExitStack, headers: Mapping[str, Any], attributes: Mapping[str, Any]
) -> None:
    if "sentry-trace" in headers:
        stack.enter_context(sentry_sdk.isolation_scope())
        # Sentry only adds headers to messages that are sent in a transaction.
        transaction = sentry_sdk.continue_trace(headers, op="queue.task.celery", name="celery.chord")
        stack.enter_context(sentry_sdk.start_transaction(transaction))
