"""``celery -A proj fastres ...``: the commands of fastres in Celery's command line."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import amqp
import celery
import click
import kombu
from celery import states
from celery.app.task import Context
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import OperationalError

import fastres as package
from fastres import ids
from fastres.amqp.connector import establish
from fastres.amqp.rabbitmq import RabbitMQ, session_of
from fastres.chords.status import ask
from fastres.management import limits
from fastres.watching import line_of, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.amqp.session import Session
    from fastres.chords.status import ShardStatus

#: Seconds to wait for what was stored.
PATIENCE = 5.0
#: How many results are stored to see whether they stay, and for how many seconds they are watched.
PROBES, PROBED = 20, 2.0


@click.group(name="fastres")
def fastres() -> None:
    """The AMQP result backend: does it work here, and what of its chords."""


@fastres.command(cls=CeleryCommand)
@click.option(
    "--management",
    metavar="URL",
    help="RabbitMQ's management API, which knows of policies that drop results: http://guest:guest@localhost:15672",
)
@click.pass_context
@handle_preload_options
def doctor(ctx: Any, management: str | None) -> None:
    """Check the result backend: what is installed, and do storing, looking, joining and chords work."""
    check = Checkup(ctx.obj)
    with contextlib.suppress(Failed):
        examine(ctx.obj.app, check, management)
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
@click.option("--watch", "interval", type=click.FloatRange(min=0.1), help="Again each time after so many seconds.")
@click.pass_context
@handle_preload_options
def status(ctx: Any, timeout: float, interval: float | None) -> None:
    """Show the open chords, the oldest first: parts that came, failed, or are missing, and how old they are.

    The exit code is 1 if a joiner did not answer, or if there is none.
    """
    backend = _backend_with_chords(ctx.obj.app)
    while True:
        with _in_one_line(backend):
            shards = ask(backend, timeout)
        if interval:
            click.clear()
        for shard in shards:
            for line in _describe(shard):
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
    """Watch a group, or a chord's header, until all of its tasks have ended: `celery -A proj fastres watch ID`.

    ID is that of the GroupResult; of a chord that is `result.parent.id`. The exit code is 0 when it is complete,
    and 1 when the broker cannot be reached. Of a group only the number of results is known, of a chord what failed
    too.
    """
    app = ctx.obj.app
    backend = app.backend
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


def examine(app: Any, check: Checkup, management: str | None = None) -> None:
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
    with check.step(
        "broker", f"is a broker running at {connection.as_uri()}, and are user, password and virtual host right?"
    ) as say:
        establish(connection)
        session = session_of(connection)
        for fact in _broker(connection, session):
            say(fact)
    with contextlib.closing(connection):
        if isinstance(session, RabbitMQ) and backend.joiner is not None:
            _tell_of_permissions(backend, connection, check)
        _examine_results(backend, check)
        if isinstance(session, RabbitMQ) and backend.joiner is not None:
            _examine_policies(backend, session, check)
            if management is not None:
                _ask_for_policies(management, backend, connection, check)
        _tell_of_chords(backend, session, check)


def _examine_results(backend: Any, check: Checkup) -> None:
    """Do what workers and clients do with the results of a group of two."""
    kin = ids.new_kin()
    first, second = (ids.new_id(kin, ids.Kind.MEMBER) for _ in range(2))
    may = "does the user have the permissions above?"
    for task_id in (first, second):
        # A client with a mailbox opens it when it sends a task.
        backend.on_task_call(None, task_id)
    with check.step("store", f"{may} Is the broker out of memory or disk?") as say:
        how = "confirmed" if backend.options.confirm else "not waited for: confirm is off"
        say(f"{_milliseconds(lambda: _store(backend, first))}, {how}")
    with check.step("look", may) as say:
        say(_milliseconds(lambda: _look(backend, first)))
    with check.step("join", may) as say:
        _store(backend, second)
        say(f"2 results, {_milliseconds(lambda: list(backend.get_many([first, second], timeout=PATIENCE)))}")


def _examine_policies(backend: Any, session: Session, check: Checkup) -> None:
    """Whether results stay where they are. AMQP does not tell of policies: those that act later are not seen."""
    kin = ids.new_kin()
    members = [ids.new_id(kin, ids.Kind.MEMBER) for _ in range(PROBES)]
    address = backend.addresses.result(members[0])
    with check.step("policies", "a policy limits the queues of results: see docs/brokers.md") as say:
        for task_id in members:
            _store(backend, task_id)
        time.sleep(PROBED)
        state = session.inspect(address.name)
        left = 0 if state is None else state.messages
        session.drop(address.name)
        if left < PROBES:
            raise package.ResultsGone(
                f"of {PROBES} results {left} are left after {PROBED:.0f} s: max-length, message-ttl or expires"
            )
        say(f"{PROBES} results are there after {PROBED:.0f} s")


def _ask_for_policies(url: str, backend: Any, connection: Any, check: Checkup) -> None:
    kin = ids.new_kin()
    results = [backend.addresses.result(ids.new_id(kin, kind)).name for kind in (ids.Kind.MEMBER, ids.Kind.PAGE)]
    queue_type = "quorum" if backend.addresses.is_quorum else "classic"
    advice = "is the plugin rabbitmq_management on, and may the user read policies (the tag policymaker)?"
    with check.step("management API", advice) as say:
        found = limits(url, connection.virtual_host, [*results, *_shards(backend)], queue_type)
        say("no policy drops or refuses results" if not found else f"{len(found)} policies limit results")
    for line in found:
        check.warn("policy", f"{line}: see docs/brokers.md")


def _store(backend: Any, task_id: str) -> None:
    request = Context(id=task_id, correlation_id=task_id, reply_to=backend.app.thread_oid)
    backend.store_result(task_id, "probe", states.SUCCESS, request=request)


def _look(backend: Any, task_id: str) -> None:
    end = time.monotonic() + PATIENCE
    while backend.get_task_meta(task_id, cache=False)["status"] != states.SUCCESS:
        if time.monotonic() > end:
            raise TimeoutError(f"the result that was stored is not seen within {PATIENCE:.0f} seconds")


def _tell_of_permissions(backend: Any, connection: Any, check: Checkup) -> None:
    """The least that clients and workers need: what Celery needs for the tasks is in it."""
    prefix = re.escape(backend.addresses.prefix + ".")
    app, vhost, exchange = backend.app, shlex.quote(connection.virtual_host), backend.addresses.exchange.name
    results = (f"^{prefix}", r"^amq\.default$", f"^{prefix}")
    if exchange:
        # Queues are bound to it, which is written to the queue and read from the exchange.
        prefix = f"{prefix}|{re.escape(exchange)}$"
        results = (f"^({prefix})", rf"^(amq\.default$|{prefix})", f"^({prefix})")
    lines = {"client": results, "worker": results}
    if backend.connector.is_applications:
        names = {queue.name for queue in app.amqp.queues.values()}
        names |= {queue.exchange.name for queue in app.amqp.queues.values() if queue.exchange.name}
        # Remote control and events: of `celery inspect`, and of workers among themselves.
        own = "|".join([*(f"{re.escape(name)}$" for name in sorted(names)), r"(.*\.)?celery\.pidbox$", "celeryev"])
        written = f"{prefix}|{own}" if exchange else own
        lines["worker"] = (f"^({prefix}|{own})", rf"^(amq\.default$|{written})", f"^({prefix}|{own})")
    for who, permissions in lines.items():
        quoted = " ".join(f"'{permission}'" for permission in permissions)
        check.tell(f"{who} needs", f"rabbitmqctl set_permissions -p {vhost} USER {quoted}")


def _tell_of_chords(backend: Any, session: Session, check: Checkup) -> None:
    if backend.joiner is None:
        check.tell("chords", "none with this backend")
    elif not session.single_active_consumer:
        check.tell("chords", "joined by celery.chord_unlock (the broker has no single active consumers)")
    else:
        with check.step("chords", "does the user have the permissions above?") as say:
            for number in range(backend.options.chord_shards):
                session.declare(backend.addresses.queue(backend.addresses.chords(number)))
            shards = [session.inspect(name) for name in _shards(backend)]
            joiners = [0 if shard is None else shard.consumers for shard in shards]
            say(f"{min(joiners)} workers or joiners at {', '.join(_shards(backend))}")
        own = backend.app.conf.task_default_queue
        for shard in ask(backend, PATIENCE):
            theirs = shard.open.queue if shard.open is not None else ""
            if theirs and theirs != own:
                check.warn(
                    "chords",
                    f"the joiner at {shard.queue} has task_default_queue = {theirs!r}, and this application "
                    f"{own!r}: if they are two applications, give each a `namespace` of its own",
                )


def _broker(connection: Any, session: Session) -> Iterator[str]:
    if not isinstance(session, RabbitMQ):
        yield f"{connection.as_uri()} (kombu's own drain: slower than RabbitMQ through py-amqp)"
        return
    properties = connection.connection.server_properties
    yield f"{properties.get('product')} {properties.get('version')} at {connection.as_uri()}"
    yield "with TLS" if connection.ssl else "without TLS"


def _milliseconds(action: Callable[[], object]) -> str:
    start = time.perf_counter()
    action()
    return f"{(time.perf_counter() - start) * 1000:.1f} ms"
