"""The tables and the plot of a run: bench/RESULTS.md and bench/results.svg."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from gate import HEAD, judge, read_floors, table
from plot import draw
from records import Key, Records

HERE = Path(__file__).parent

INTRODUCTION = """\
Results are stored ahead; what is measured is reading them, each time in a process of its own that has imported and
connected before. Peers take turns (A B C, A B C); figures are medians. CPU is the reading process's own, kernel
included. The broker keeps its queues as RabbitMQ 4 does (`classic_queue.default_version = 2`). All AMQP peers
read the same bytes: what Celery's worker writes, 320 bytes of JSON unless a table says otherwise, in transient
messages. Growth is the peak memory over what the process had when the join began, with the ids, and for
`GroupResult.get` the result objects, already there. System calls are counted by strace, where there is one, in a
pass of its own over fewer results.
"""

CHORDS = """\
A part is what Celery calls when a task of a chord's header returns; its result is 100 bytes of JSON. The last part
is stored when all others have come, by the method that a worker calls; the body goes to a queue that nobody reads.
The joiner is a process that finds all parts of a chord in the log. Celery's redis backend has none: there whoever
stores the last part joins. Memory is what is resident over what was when the joiner began. Whole chords run on
two prefork children, with RabbitMQ for the tasks of either backend. The body of a single chord runs, and its
result ends the time; many chords are sent one after the other, until the bodies of all are in their queue.
"""

SENDING = """\
Tasks of two small arguments, which no worker takes. Celery's group makes signatures from a generator;
`apply_many` takes the arguments from one. rabbitmq-c publishes copies of the message that `apply_many` sends, with
confirms in windows of 20,000, as many as `apply_many` has on the way.
"""

#: Rows of chords: method, name in the table, counted things, measure, unit, digits.
CHORD_ROWS = (
    ("part", "storing a result without chord", "results", "stored", "µs of CPU", 0),
    ("part", "a part of a chord, over that", "parts", "part", "µs of CPU", 0),
    ("fire", "last part stored to body in its queue", "parts", "wall", "s", 3),
    ("fire", "CPU of who stores the last part", "parts", "cpu", "µs per part", 1),
    ("join", "CPU of the joiner", "parts", "cpu", "µs per part", 1),
    ("hold", "CPU of the joiner while a part is missing", "parts", "cpu", "µs per part", 1),
    ("hold", "memory of the joiner while a part is missing", "parts", "held", "MB", 1),
    ("open", "joining chords of 10 tasks that are all open at once", "chords", "wall", "s", 2),
    ("refer", "last part stored to body that gets the results by reference", "parts", "wall", "s", 3),
    ("refer", "memory of the joiner for it", "parts", "joiner", "MB", 1),
    ("refer", "memory of the body while it reads them", "parts", "growth", "MB", 1),
    ("refer", "time of the body to read them", "parts", "read", "µs per part", 1),
    ("chord", "a chord of tasks that do nothing", "tasks", "wall", "s", 2),
    ("small", "chords of 10 tasks", "chords", "wall", "s", 2),
    ("small", "queues declared by chords of 10 tasks", "chords", "queues", "queues", 0),
)
#: The same for tasks that are sent and read one by one, and for the queues of tasks.
SINGLE_ROWS = (
    ("store_lone", "storing a result, confirmed", "results", "each", "ms", 3),
    ("pending", "state of a task that has not run", "looks", "each", "ms", 3),
    ("pending_threads", "the same, from 8 threads", "looks", "each", "ms", 3),
    ("done", "state of a task whose result is there", "looks", "each", "ms", 3),
    ("round_trip", "`delay().get()` of a task that does nothing, median", "tasks", "p50", "ms", 2),
    ("alone", "queues declared by tasks sent one by one", "tasks", "queues", "queues", 0),
    ("group", "queues declared by a group", "tasks", "queues", "queues", 0),
    ("chains", "queues declared by a group of chains of two", "chains", "queues", "queues", 0),
)
SEND_ROWS = (
    ("send_group", "CPU of Celery's `group.apply_async`", "tasks", "cpu", "µs per task", 1),
    ("send_group", "the group until its last task is in the queue", "tasks", "each", "ms per task", 3),
    ("send", "CPU of `apply_many`; of rabbitmq-c with the same bytes", "tasks", "cpu", "µs per task", 1),
    ("send", "`apply_many` until its last task is in the queue", "tasks", "rate", "tasks per s", 0),
    ("send", "memory that the sender grows by", "tasks", "growth", "MB", 1),
    ("send_chord", "a chord until its last task is in the queue", "tasks", "wall", "s", 2),
)
SEND_PEERS = {"Celery redis": "Celery redis", "fastres": "fastres", "rabbitmq-c": "rabbitmq-c"}
SINGLE_PEERS = {"Celery redis": "Celery redis", "fastres": "fastres"}
CHORD_PEERS = {
    "Celery redis": "Celery redis",
    "fastres": "fastres",
    "fastres, not kept": "fastres, results not kept",
}

#: The names of the methods in the tables.
WAYS = {"get": "`GroupResult.get`", "get_many": "`get_many`", "lone": "`get_many`", "store": "`store_result`"}

PLACES = {
    "fastres": "group queue",
    "fastres (Python)": "group queue",
    "fastres-rpc": "mailbox",
    "Celery rpc": "mailbox",
    "Celery redis": "keys in Redis",
    "kombu Consumer": "a queue",
    "rabbitmq-c": "a queue",
    "rabbitmq-c, acknowledging": "a queue",
}


@click.command(help=__doc__)
@click.argument("json", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--command", default="ci/bench --report", help="what was run, for the table")
@click.option(
    "--beside",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="a run with another broker, for a column of its own in the table of ratios",
)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=HERE)
def main(json: Path, command: str, beside: Path | None, output: Path) -> None:
    records = Records(json)
    other = None if beside is None else Records(beside)
    (output / "RESULTS.md").write_text("\n\n".join(sections(records, command, other)) + "\n", "utf-8")
    draw(records, output / "results.svg")


def sections(records: Records, command: str, beside: Records | None) -> Iterable[str]:
    yield "# Benchmark results"
    yield INTRODUCTION.strip()
    yield machine(records, command)
    if beside is not None:
        system = beside.machine["fastres"]["system"]
        yield (
            f"On the same machine, {beside.date[:10]}: {system},\n{versions(beside)}.\n"
            "Its ratios are in a column of their own; everything else below is of the first run."
        )
    yield "## Ratios"
    yield ratios(records, beside)
    for count in joined(records):
        yield f"## Joins of {count:,} results"
        yield joins(records, count)
    if other := matrix(records):
        yield "## Other results"
        yield other
    yield "## Lone tasks"
    yield lone(records)
    yield figures(records, SINGLE_ROWS, SINGLE_PEERS)
    yield "## Storing a result"
    yield stored(records)
    yield "## Chords"
    yield CHORDS.strip()
    yield figures(records, CHORD_ROWS, CHORD_PEERS)
    yield "## Sending"
    yield SENDING.strip()
    yield figures(records, SEND_ROWS, SEND_PEERS)


def machine(records: Records, command: str) -> str:
    info: dict[str, Any] = records.machine["fastres"]
    return (
        f"`{command}`, {records.date[:10]}: {info['cores']} cores of {info['cpu']}, {info['memory']} GB,\n"
        f"{info['system']}, everything on this one machine, whose load average was {info['load']} before.\n"
        f"{versions(records)}.\n"
        "fastres is compiled unless it says Python."
    )


def versions(records: Records) -> str:
    return ", ".join(f"{name} {version}" for name, version in records.machine["fastres"]["versions"].items())


def ratios(records: Records, beside: Records | None) -> str:
    """The ratios that the gate judges, those of two brokers side by side."""
    floors = read_floors()
    rows = table(judge(records, floors))
    if beside is None:
        return markdown(HEAD, rows)
    *first, measured, word = HEAD
    brokers = (
        f"{measured}, RabbitMQ {each.machine['fastres']['versions']['RabbitMQ']}" for each in (records, beside)
    )
    others = table(judge(beside, floors))
    return markdown(
        (*first, *brokers, word),
        [
            (*row[:-1], other[-2], row[-1] if row[-1] == other[-1] else f"{row[-1]}, {other[-1]}")
            for row, other in zip(rows, others)
        ],
    )


def joined(records: Records) -> list[int]:
    return sorted({key.count for key in records if key.how in ("get", "get_many") and is_plain(key)})


def is_plain(key: Key) -> bool:
    return not key.traced and (key.workload, key.serializer) == ("dict", "json")


def joins(records: Records, count: int) -> str:
    keys = [key for key in records if key.count == count and key.how in ("get", "get_many") and is_plain(key)]
    calls = {(key.peer, key.how): records.median("calls", key) for key in records if key.traced}
    rows = [
        (
            key.peer,
            PLACES[key.peer],
            "" if key.peer.startswith(("kombu", "rabbitmq")) else WAYS[key.how],
            number(records.median("cpu", key), 1),
            number(calls.get((key.peer, key.how)), 3) or "not counted",
            number(records.median("wall", key), 2),
            number(records.median("rate", key), 0),
            number(records.median("peak", key), 0),
            number(records.median("growth", key), 0),
        )
        for key in by_cpu(records, keys)
    ]
    return markdown(
        ("reader", "results are in", "call", "CPU, µs per result", "system calls per result", "wall, s",
         "results per second", "peak memory, MB", "growth, MB"),
        rows,
    )  # fmt: skip


def matrix(records: Records) -> str:
    """CPU per result of each workload and serializer, one column for each peer."""
    keys = [key for key in records if key.how == "get" and not key.traced]
    others = [key for key in keys if not is_plain(key)]
    if not others:
        return ""
    peers = [peer for peer in PLACES if any(key.peer == peer for key in others)]
    counts = {key.count for key in others}
    rows = sorted({(key.workload, key.serializer, key.count) for key in keys if key.count in counts})
    return markdown(
        ("result", "serializer", "results", *(f"{peer}, µs of CPU per result" for peer in peers)),
        [
            (
                workload,
                serializer,
                f"{count:,}",
                *(
                    number(records.median("cpu", Key(peer, "get", count, workload, serializer)), 1)
                    for peer in peers
                ),
            )
            for workload, serializer, count in rows
        ],
    )


def lone(records: Records) -> str:
    keys = by_cpu(records, [key for key in records if key.how == "lone"])
    return markdown(
        ("reader", "results", "CPU, µs per result", "wall, ms per result"),
        [
            (
                key.peer,
                f"{key.count:,}",
                number(records.median("cpu", key), 1),
                number((records.median("wall", key) or 0) / key.count * 1e3, 2),
            )
            for key in keys
        ],
    )


def stored(records: Records) -> str:
    keys = by_cpu(records, [key for key in records if key.how == "store"])
    return markdown(
        ("writer", "results", "CPU, µs per result", "results per second"),
        [
            (
                f"{key.peer}, confirmed" if key.peer == "fastres" else key.peer,
                f"{key.count:,}",
                number(records.median("cpu", key), 1),
                number(records.median("rate", key), 0),
            )
            for key in keys
        ],
    )


def figures(records: Records, lines: Iterable[tuple[str, str, str, str, str, int]], peers: dict[str, str]) -> str:
    """A row for each figure, a column for each peer."""
    rows = []
    for how, what, unit, measure, of, digits in lines:
        for count in sorted({key.count for key in records if key.how == how}):
            figures = [records.median(measure, Key(peer, how, count)) for peer in peers]
            rows.append((f"{what}, {of}", f"{count:,} {unit}", *(number(figure, digits) for figure in figures)))
    return markdown(("figure", "of", *peers.values()), rows)


def by_cpu(records: Records, keys: Iterable[Key]) -> list[Key]:
    return sorted(keys, key=lambda key: records.median("cpu", key) or 0)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
