"""The checks of ``celery fastres doctor``."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import amqp
import celery
import kombu
from celery import states
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured

import fastres as package
from fastres import ids
from fastres.amqp.connector import establish
from fastres.amqp.rabbitmq import RabbitMQ, session_of
from fastres.management import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.amqp.session import Session

__all__ = ("Checkup", "Failed", "examine", "shards_of")

#: Seconds to wait for a stored result.
TIMEOUT = 5.0
#: The number of results that are stored to see whether they stay, and the seconds for which they are watched.
PROBES, PROBE_SECONDS = 20, 2.0
#: The result backends of fastres, as ``result_backend`` names them.
ALIASES = ("fastres", "fastress", "amqp", "amqps", "fastres-rpc", "fastress-rpc")


class Failed(Exception):
    """A check failed that later checks depend on."""


class Checkup:
    """Runs checks, prints their outcomes, and remembers failures.

    Args:
        out: Celery's context of a command, which prints.
        as_json: print nothing but the end, as JSON.
    """

    def __init__(self, out: Any, as_json: bool = False) -> None:
        self._out = out
        self._as_json = as_json
        self._checks: list[dict[str, str]] = []

    def tell(self, what: str, detail: object) -> None:
        self._add("info", what, str(detail))

    def warn(self, what: str, detail: object) -> None:
        self._add("warn", what, str(detail))

    @contextlib.contextmanager
    def step(self, what: str, advice: str) -> Iterator[Callable[[object], None]]:
        """A context for a check: it passes with the text set in it, or fails with the exception that it raises."""
        said: list[object] = []
        try:
            yield said.append
        except Exception as exc:
            self._add("fail", what, str(exc) or type(exc).__name__, advice)
            raise Failed(what) from exc
        self._add("ok", what, ", ".join(map(str, said)))

    def _add(self, outcome: str, what: str, detail: str, advice: str = "") -> None:
        self._checks.append({"check": what, "outcome": outcome, "detail": detail})
        if advice:
            self._checks[-1]["advice"] = advice
        if not self._as_json:
            self._out.echo(f"{self._label(outcome)} {what:<16} {detail}")
            if advice:
                self._out.echo(f"{'':4} {'':16} -> {advice}")

    def _label(self, outcome: str) -> str:
        words = {"ok": ("  ok", {"fg": "green"}), "warn": ("warn", {"fg": "yellow"}), "info": ("    ", {})}
        word, style = words.get(outcome, ("FAIL", {"fg": "red", "bold": True}))
        return str(self._out.style(word, **style)) if style else word

    def conclude(self) -> int:
        """Print the summary. Returns: the exit code."""
        outcomes = [check["outcome"] for check in self._checks]
        failed = "fail" in outcomes
        if self._as_json:
            self._out.echo(json.dumps({"works": not failed, "checks": self._checks}, indent=2))
        elif failed:
            self._out.echo("The result backend does not work: see FAIL above.")
        elif "warn" in outcomes:
            self._out.echo("The result backend works, with the warnings above.")
        else:
            self._out.echo("The result backend works.")
        return 1 if failed else 0


def examine(app: Any, check: Checkup, management: str | None = None) -> None:
    slow = package.__impl__ == "python"
    tell = check.warn if slow else check.tell
    tell("implementation", f"{package.__impl__}{' (slower: this installation has no compiled modules)' * slow}")
    check.tell("fastres", package.__version__)
    check.tell("Celery", f"{celery.__version__}, kombu {kombu.__version__}, py-amqp {amqp.__version__}")
    check.tell("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    of_us = str(app.conf.result_backend or "").partition(":")[0] in ALIASES
    advice = (
        "mend result_backend, or result_backend_transport_options, in the configuration of the application"
        if of_us
        else 'set result_backend = "fastres://" in the configuration of the application'
    )
    with check.step("backend", advice) as say:
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
            _print_permissions(backend, connection, check)
        _examine_results(backend, check)
        if isinstance(session, RabbitMQ) and backend.joiner is not None:
            _examine_policies(backend, session, check)
            if management is not None:
                _ask_for_policies(management, backend, connection, check)
        _check_chords(backend, session, check)


def _examine_results(backend: Any, check: Checkup) -> None:
    """Store, look up and join the results of a group of two, as workers and clients do."""
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
        say(f"2 results, {_milliseconds(lambda: list(backend.get_many([first, second], timeout=TIMEOUT)))}")


def _examine_policies(backend: Any, session: Session, check: Checkup) -> None:
    """Check that results stay in their queue. AMQP does not show policies: delayed effects are not noticed."""
    kin = ids.new_kin()
    members = [ids.new_id(kin, ids.Kind.MEMBER) for _ in range(PROBES)]
    address = backend.addresses.result(members[0])
    with check.step("policies", "a policy limits the queues of results: see docs/brokers.md") as say:
        for task_id in members:
            _store(backend, task_id)
        time.sleep(PROBE_SECONDS)
        state = session.inspect(address.name)
        left = 0 if state is None else state.messages
        session.drop(address.name)
        if left < PROBES:
            raise package.ResultsGone(
                f"of {PROBES} results {left} are left after {PROBE_SECONDS:.0f} s: max-length, message-ttl or expires"
            )
        say(f"{PROBES} results are there after {PROBE_SECONDS:.0f} s")


def _ask_for_policies(url: str, backend: Any, connection: Any, check: Checkup) -> None:
    kin = ids.new_kin()
    results = [backend.addresses.result(ids.new_id(kin, kind)).name for kind in (ids.Kind.MEMBER, ids.Kind.PAGE)]
    queue_type = "quorum" if backend.addresses.is_quorum else "classic"
    advice = "is the plugin rabbitmq_management on, and may the user read policies (the tag policymaker)?"
    with check.step("management API", advice) as say:
        found = limits(url, connection.virtual_host, [*results, *shards_of(backend)], queue_type)
        say("no policy drops or refuses results" if not found else f"{len(found)} policies limit results")
    for line in found:
        check.warn("policy", f"{line}: see docs/brokers.md")


def _store(backend: Any, task_id: str) -> None:
    request = Context(id=task_id, correlation_id=task_id, reply_to=backend.app.thread_oid)
    backend.store_result(task_id, "probe", states.SUCCESS, request=request)


def _look(backend: Any, task_id: str) -> None:
    end = time.monotonic() + TIMEOUT
    while backend.get_task_meta(task_id, cache=False)["status"] != states.SUCCESS:
        if time.monotonic() > end:
            raise TimeoutError(f"the result that was stored is not seen within {TIMEOUT:.0f} seconds")


def _print_permissions(backend: Any, connection: Any, check: Checkup) -> None:
    """The permissions that clients and workers need, with those that Celery needs for tasks."""
    prefix = re.escape(backend.addresses.prefix + ".")
    app, vhost, exchange = backend.app, shlex.quote(connection.virtual_host), backend.addresses.exchange.name
    results = (f"^{prefix}", r"^amq\.default$", f"^{prefix}")
    if exchange:
        # Binding a queue needs the permission to write to the queue and to read from the exchange.
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


def _check_chords(backend: Any, session: Session, check: Checkup) -> None:
    if backend.joiner is None:
        check.tell("chords", "none with this backend")
    elif not session.single_active_consumer:
        check.tell("chords", "joined by celery.chord_unlock (the broker has no single active consumers)")
    else:
        with check.step("chords", "does the user have the permissions above?") as say:
            for number in range(backend.options.chord_shards):
                session.declare(backend.addresses.queue(backend.addresses.chords(number)))
            shards = [session.inspect(name) for name in shards_of(backend)]
            joiners = [0 if shard is None else shard.consumers for shard in shards]
            say(f"{min(joiners)} workers or joiners at {', '.join(shards_of(backend))}")
        own = backend.app.conf.task_default_queue
        for shard in backend.asker.status(TIMEOUT):
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


def shards_of(backend: Any) -> list[str]:
    """The names of the queues of the chords' log."""
    return [backend.addresses.chords(number).name for number in range(backend.options.chord_shards)]


def _milliseconds(action: Callable[[], object]) -> str:
    start = time.perf_counter()
    action()
    return f"{(time.perf_counter() - start) * 1000:.1f} ms"
