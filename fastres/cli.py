"""``celery -A proj fastres ...``: the commands of fastres in Celery's command line."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

import amqp
import click
import msgspec
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import OperationalError

import fastres as package
from fastres.amqp.connector import establish
from fastres.doctor import Checkup, Failed, examine, shards_of
from fastres.watching import line_of, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.chords.status import ShardStatus

#: Seconds for a joiner to answer.
TIMEOUT = 5.0


@click.group(name="fastres")
def fastres() -> None:
    """The AMQP result backend fastres: check it, and watch its groups and chords."""


@fastres.command(cls=CeleryCommand)
@click.option(
    "--management",
    metavar="URL",
    help="RabbitMQ's management API, which knows of policies that drop results: http://guest:guest@localhost:15672",
)
@click.option("--json", "as_json", is_flag=True, help="All that was found as JSON, for scripts.")
@click.pass_context
@handle_preload_options
def doctor(ctx: Any, management: str | None, as_json: bool) -> None:
    """Check the result backend: the installation, storing, reading and joining results, and chords.

    Example: celery -A proj fastres doctor

    The exit code is 0 if it works, with or without warnings, and 1 if something failed.
    """
    check = Checkup(ctx.obj, as_json)
    with contextlib.suppress(Failed):
        examine(ctx.obj.app, check, management)
    ctx.exit(check.conclude())


@fastres.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def joiner(ctx: Any) -> None:
    """Join chords, as workers do, without running tasks, until Ctrl-C or SIGTERM.

    Example: celery -A proj fastres joiner

    The exit code is 0 after Ctrl-C or SIGTERM, and 1 if the broker cannot be reached at the start.
    """
    backend = _backend_with_chords(ctx.obj.app)
    ctx.obj.app.log.setup(loglevel="INFO")
    with _in_one_line(backend), contextlib.closing(backend.connector.open()) as connection:
        establish(connection)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: backend.joiner.stop())
    ctx.obj.echo(f"Joining the chords of {', '.join(shards_of(backend))} at {backend.as_uri()}")
    backend.joiner.run()


@fastres.command(cls=CeleryCommand)
@click.option("--timeout", type=float, default=TIMEOUT, show_default=True, help="Seconds to wait for each joiner.")
@click.option("--watch", "interval", type=click.FloatRange(min=0.1), help="Again each time after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON each time, for scripts.")
@click.pass_context
@handle_preload_options
def status(ctx: Any, timeout: float, interval: float | None, as_json: bool) -> None:
    """Show the open chords, the oldest first: their parts that arrived, failed, or are missing, and their age.

    Example: celery -A proj fastres status --watch 2

    The exit code is 0, and 1 if a joiner did not answer, or if there is none.
    """
    backend = _backend_with_chords(ctx.obj.app)
    while True:
        with _in_one_line(backend):
            shards = backend.asker.status(timeout)
        if interval and not as_json:
            click.clear()
        if as_json:
            ctx.obj.echo(msgspec.json.encode(shards).decode())
        for line in () if as_json else chain.from_iterable(map(_describe, shards)):
            ctx.obj.echo(line)
        if interval is None:
            ctx.exit(int(any(shard.open is None for shard in shards)))
        else:
            time.sleep(interval)


@fastres.command(cls=CeleryCommand)
@click.argument("group_id", metavar="ID")
@click.option("--total", type=click.IntRange(min=1), help="How many tasks a group has that was not saved.")
@click.option("--interval", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="In seconds.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON each time, for scripts.")
@click.pass_context
@handle_preload_options
def watch(ctx: Any, group_id: str, total: int | None, interval: float, as_json: bool) -> None:
    """Watch a group, or a chord's header, until all of its tasks have ended.

    Example: celery -A proj fastres watch 6e5d1c0a-7d6f-4d0e-9c53-0d2f6a1f9b11 --json

    ID is the id of a GroupResult; for a chord, `result.parent.id`. The exit code is 0 when it is complete, and 1 when
    the broker cannot be reached. For a group only the number of results is known, for a chord also the failures.
    """
    app = ctx.obj.app
    backend = _backend(app)
    if not isinstance(backend, package.AMQPBackend):
        raise click.UsageError(f"result_backend {app.conf.result_backend!r} is not one of fastres")
    with _in_one_line(backend):
        if total is None and (saved := app.GroupResult.restore(group_id)) is not None:
            total = len(saved)
        for shown in watched(group_id, total, interval, app):
            if as_json:
                ctx.obj.echo(json.dumps(shown))
            else:
                ctx.obj.echo(line_of(shown), nl=not sys.stdout.isatty())
        if not as_json and sys.stdout.isatty():
            ctx.obj.echo("")


@fastres.command(cls=CeleryCommand)
@click.option("--port", type=click.IntRange(0, 65535), default=9808, show_default=True, help="0: any.")
@click.option("--address", default="127.0.0.1", show_default=True, help="0.0.0.0: from everywhere.")
@click.pass_context
@handle_preload_options
def exporter(ctx: Any, port: int, address: str) -> None:
    """Export the metrics of the application's chords to Prometheus, until Ctrl-C or SIGTERM.

    Example: celery -A proj fastres exporter --port 9808

    The exit code is 0 after Ctrl-C or SIGTERM, and 1 if it cannot start. Without a broker, fastres_up is 0.
    """
    app = ctx.obj.app
    _backend_with_chords(app)
    try:
        from fastres.metrics import serve
    except ImportError as exc:
        raise click.ClickException(f"{exc}: pip install 'fastres[metrics]'") from exc
    app.log.setup(loglevel="INFO")
    stopped = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopped.set())
    try:
        server = serve(app, address, port)
    except OSError as exc:
        raise click.ClickException(f"cannot listen at {address}:{port}: {exc}") from exc
    ctx.obj.echo(f"Metrics at http://{address}:{server.server_port}/metrics")
    stopped.wait()
    server.shutdown()


@contextlib.contextmanager
def _in_one_line(backend: Any) -> Iterator[None]:
    """Print an error of the broker in one line, without a traceback; the exit code is 1."""
    try:
        yield
    except (package.Error, ImproperlyConfigured) as exc:
        raise click.ClickException(str(exc)) from exc
    except (OSError, amqp.AMQPError, OperationalError) as exc:
        uri = backend.connector.open().as_uri()
        raise click.ClickException(f"cannot reach the broker {uri}: {exc!r}") from exc


def _backend(app: Any) -> Any:
    try:
        return app.backend
    except ImproperlyConfigured as exc:
        raise click.ClickException(str(exc)) from exc


def _backend_with_chords(app: Any) -> Any:
    backend = _backend(app)
    if getattr(backend, "joiner", None) is None:
        raise click.UsageError(f"result_backend {app.conf.result_backend!r} does not join chords; fastres:// does")
    return backend


def _describe(shard: ShardStatus) -> Iterator[str]:
    where = f"{shard.queue}: {shard.joiners} joiners, {shard.waiting} events waiting"
    if not shard.joiners:
        yield f"{where}. Nobody joins these chords: start a worker, or `celery -A proj fastres joiner`."
        return
    if shard.open is None:
        yield f"{where}. The joiner did not answer."
        return
    since = _duration(time.time() - shard.open.running_since) if shard.open.running_since else "?"
    yield f"{where}, {shard.open.count} open chords, joiner runs for {since}"
    if shard.open.chords:
        yield f"  {'chord':<36} {'parts':>9} {'failed':>9} {'missing':>9} {'age':>10} {'last part':>12}"
    now = time.time()
    for chord in shard.open.chords:
        missing = "?" if chord.total is None else f"{chord.total - chord.parts:,}"
        age, silence = (_duration(now - then) for then in (chord.since, chord.last))
        failed = f"{chord.failed + chord.revoked:,}"
        yield f"  {chord.id:<36} {chord.parts:>9,} {failed:>9} {missing:>9} {age:>10} {silence + ' ago':>12}"
    if shard.open.count > len(shard.open.chords):
        yield f"  ... and {shard.open.count - len(shard.open.chords):,} younger ones"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, int(seconds))))
