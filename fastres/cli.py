"""``celery -A proj fastres ...``: the commands of fastres in Celery's command line."""

from __future__ import annotations

import contextlib
import platform
import signal
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Callable

import amqp
import celery
import click
import kombu
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid

import fastres as package
from fastres.chords.status import ask
from fastres.connections import establish
from fastres.native import Native, dialect
from fastres.transport import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.chords.status import ShardStatus
    from fastres.transport import Dialect

#: Seconds to wait for the probe's message.
PATIENCE = 5.0


@click.group(name="fastres")
def fastres() -> None:
    """The AMQP result backend: does it work here, and what of its chords."""


@fastres.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def doctor(ctx: Any) -> None:
    """Check the result backend: what is installed, can it reach the broker, declare, publish, consume."""
    check = Checkup(ctx.obj)
    with contextlib.suppress(Failed):
        examine(ctx.obj.app, check)
    ctx.exit(check.conclude())


@fastres.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def joiner(ctx: Any) -> None:
    """Join chords, until told to stop (Ctrl-C, SIGTERM): as workers do, without running tasks."""
    backend = _backend_with_chords(ctx.obj.app)
    ctx.obj.app.log.setup(loglevel="INFO")
    with _in_one_line(backend), contextlib.closing(backend.connector.open()) as connection:
        establish(connection)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: backend.joiner.stop())
    ctx.obj.echo(f"Joining the chords of {', '.join(_shards(backend))} at {backend.as_uri()}")
    backend.joiner.run()


@fastres.command(cls=CeleryCommand)
@click.option(
    "--timeout", type=float, default=PATIENCE, show_default=True, help="Seconds to wait for each joiner."
)
@click.pass_context
@handle_preload_options
def status(ctx: Any, timeout: float) -> None:
    """Show the open chords: parts that came, parts that are missing, and how old they are."""
    backend = _backend_with_chords(ctx.obj.app)
    silent = False
    with _in_one_line(backend):
        shards = ask(backend, timeout)
    for shard in shards:
        silent = silent or shard.open is None
        for line in _describe(shard):
            ctx.obj.echo(line)
    ctx.exit(int(silent))


@contextlib.contextmanager
def _in_one_line(backend: Any) -> Iterator[None]:
    """Say what is wrong with the broker without a traceback; the exit code is 1."""
    try:
        yield
    except (package.Error, ImproperlyConfigured) as exc:
        raise click.ClickException(str(exc)) from exc
    except (OSError, amqp.AMQPError, OperationalError) as exc:
        uri = backend.connector.open().as_uri()
        raise click.ClickException(f"cannot reach the broker {uri}: {exc!r}") from exc


def _backend_with_chords(app: Any) -> Any:
    backend = app.backend
    if getattr(backend, "joiner", None) is None:
        raise click.UsageError(f"result_backend {app.conf.result_backend!r} does not join chords; fastres:// does")
    return backend


def _shards(backend: Any) -> list[str]:
    return [backend.addresses.chords(number).name for number in range(backend.options.chord_shards)]


def _describe(shard: ShardStatus) -> Iterator[str]:
    where = f"{shard.queue}: {shard.joiners} joiners, {shard.waiting} events waiting"
    if not shard.joiners:
        yield f"{where}. Nobody joins these chords: start a worker, or `celery -A proj fastres joiner`."
        return
    if shard.open is None:
        yield f"{where}. The joiner did not answer."
        return
    yield f"{where}, {shard.open.count} open chords"
    if shard.open.chords:
        yield f"  {'chord':<36} {'parts':>9} {'missing':>9} {'age':>10} {'last part':>12}"
    now = time.time()
    for chord in shard.open.chords:
        missing = "?" if chord.total is None else f"{chord.total - chord.parts:,}"
        age, silence = (_duration(now - then) for then in (chord.since, chord.last))
        yield f"  {chord.id:<36} {chord.parts:>9,} {missing:>9} {age:>10} {silence + ' ago':>12}"
    if shard.open.count > len(shard.open.chords):
        yield f"  ... and {shard.open.count - len(shard.open.chords):,} younger ones"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, int(seconds))))


class Failed(Exception):
    """A check failed that the next ones depend on."""


class Checkup:
    """Runs checks, tells their outcome, and remembers whether one failed."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._failed = 0
        self._warned = 0

    def tell(self, what: str, detail: object) -> None:
        self._out.echo(f"{'':4} {what:<16} {detail}")

    def warn(self, what: str, detail: object) -> None:
        self._warned += 1
        self._out.echo(f"{self._out.style('warn', fg='yellow')} {what:<16} {detail}")

    @contextlib.contextmanager
    def step(self, what: str, advice: str) -> Iterator[Callable[[object], None]]:
        """A check: it passes with what is told in it, or fails with what it raises."""
        said: list[object] = []
        try:
            yield said.append
        except Exception as exc:
            self._failed += 1
            why = str(exc) or type(exc).__name__
            self._out.echo(f"{self._out.style('FAIL', fg='red', bold=True)} {what:<16} {why}")
            self._out.echo(f"{'':4} {'':16} -> {advice}")
            raise Failed(what) from exc
        self._out.echo(f"{self._out.style('  ok', fg='green')} {what:<16} {', '.join(map(str, said))}")

    def conclude(self) -> int:
        if self._failed:
            self._out.echo("The result backend does not work: see FAIL above.")
        elif self._warned:
            self._out.echo("The result backend works, with the warnings above.")
        else:
            self._out.echo("The result backend works.")
        return 1 if self._failed else 0


def examine(app: Any, check: Checkup) -> None:
    slow = package.__impl__ == "python"
    tell = check.warn if slow else check.tell
    tell("implementation", f"{package.__impl__}{' (slower: this installation has no compiled modules)' * slow}")
    check.tell("fastres", package.__version__)
    check.tell("Celery", f"{celery.__version__}, kombu {kombu.__version__}, py-amqp {amqp.__version__}")
    check.tell("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    with check.step("backend", 'set result_backend = "fastres://" in the configuration of the application') as say:
        backend = app.backend
        if not isinstance(backend, package.AMQPBackend):
            raise ImproperlyConfigured(
                f"the application's result_backend is {app.conf.result_backend!r}, not one of fastres"
            )
        say(f"{type(backend).__name__} at {backend.as_uri()}")
    if not backend.expires:
        check.warn("result_expires", "off: results that nobody reads stay in the broker for ever")
    connection = backend.connector.open()
    address = backend.addresses.probe(uuid())
    with check.step(
        "broker", f"is a broker running at {connection.as_uri()}, and are user, password and virtual host right?"
    ) as say:
        establish(connection)
        speak = dialect(connection)
        for fact in _broker(connection, speak):
            say(fact)
    with contextlib.closing(connection):
        may = f"the user needs permission to configure, write and read queues like {address.name!r}"
        with check.step("declare", may) as say:
            queue = backend.addresses.queue(address)
            say(f"queue {address.name}, {_milliseconds(lambda: speak.declare(queue))}")
        _tell_of_chords(backend, speak, check)
        try:
            with check.step("publish", f"{may}; is the broker out of memory or disk?") as say:
                how = "confirmed" if speak.confirms else "sent (this transport has no confirms)"
                say(f"{how}, {_milliseconds(lambda: _publish(backend, address))}")
            with check.step("consume", may) as say:
                say(f"read back, {_milliseconds(lambda: _consume(connection, speak, address.name))}")
        finally:
            speak.delete(speak.channel(), [address.name])


def _tell_of_chords(backend: Any, speak: Dialect, check: Checkup) -> None:
    if backend.joiner is None:
        check.tell("chords", "none with this backend")
    elif not speak.single_active_consumer:
        check.tell("chords", "joined by celery.chord_unlock (the broker has no single active consumers)")
    else:
        states = [speak.inspect(name) for name in _shards(backend)]
        joiners = [0 if state is None else state.consumers for state in states]
        check.tell("chords", f"{min(joiners)} workers or joiners at {', '.join(_shards(backend))}")


def _broker(connection: Any, speak: Dialect) -> Iterator[str]:
    if not isinstance(speak, Native):
        yield f"{connection.as_uri()} (kombu's own drain: slower than RabbitMQ through py-amqp)"
        return
    properties = connection.connection.server_properties
    yield f"{properties.get('product')} {properties.get('version')} at {connection.as_uri()}"
    yield "with TLS" if connection.ssl else "without TLS"


def _publish(backend: Any, address: Any) -> None:
    backend._publisher.publish(
        address, Message(b"{}", "application/json", "utf-8", address.name, 1, {}), declare=True
    )


def _consume(connection: Any, speak: Dialect, name: str) -> None:
    end = time.monotonic() + PATIENCE
    while not speak.take(name, 1, lambda deliveries: [delivery.delivery_tag for delivery in deliveries]):
        if time.monotonic() > end:
            raise TimeoutError(f"the message that was published did not come within {PATIENCE:.0f} seconds")


def _milliseconds(action: Callable[[], object]) -> str:
    start = time.perf_counter()
    action()
    return f"{(time.perf_counter() - start) * 1000:.1f} ms"
