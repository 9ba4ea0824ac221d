"""The ids that fastres gives to Celery's tasks: the number of queues for each shape of canvas."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backend_kit import in_another_process
from celery import Celery, chord, group
from celery.canvas import StampingVisitor
from celery.result import GroupResult

import fastres
from fastres import canvas
from fastres.ids import Kind, kin_of, parse, queue_name

#: RabbitMQ's transport: no test here connects to it.
NOWHERE = "fastres://127.0.0.1:1//"

Sent = list[tuple[dict[str, Any], Any]]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """An application whose messages go nowhere."""
    with Celery("shapes", broker="memory://", backend=NOWHERE, set_as_current=False) as app:
        for name in ("apply_chord", "set_chord_size"):
            monkeypatch.setattr(app.backend, name, lambda *args, **options: None)
        yield app


@pytest.fixture
def sent(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The headers and the embedded signatures of the sent messages."""
    sent: Sent = []

    def record(producer: Any, name: str, message: Any, **options: Any) -> None:
        sent.append((message.headers, message.body[2]))

    monkeypatch.setattr(app.amqp, "send_task_message", record)
    return sent


@pytest.fixture
def a(app: Celery) -> Any:
    @app.task(name="a", shared=False)
    def a(*args: Any) -> None: ...

    return a


def signatures(embedded: Any) -> Iterator[dict[str, Any]]:
    """The simple signatures embedded in a message."""
    if isinstance(embedded, (list, tuple)):
        for each in embedded:
            yield from signatures(each)
    elif isinstance(embedded, dict) and "task" in embedded and "options" in embedded:
        if embedded.get("subtask_type") in ("group", "chain", "chord"):
            yield from signatures(list(embedded["kwargs"].values()))
        else:
            yield embedded
    elif isinstance(embedded, dict):
        yield from signatures(list(embedded.values()))


def ids_in(sent: Sent) -> set[str]:
    """The ids of all tasks that were sent or are embedded in a sent message."""
    ids = {headers["id"] for headers, _ in sent}
    for _, embedded in sent:
        ids.update(found["options"]["task_id"] for found in signatures(embedded) if "task_id" in found["options"])
    return ids


def queues(ids: set[str]) -> dict[str, int]:
    """The number of ids in each queue."""
    found: dict[str, int] = {}
    for task_id in ids:
        name = queue_name(task_id)
        found[name] = found.get(name, 0) + 1
    return found


def apart(result: Any) -> list[str]:
    """Members of groups, in a result and its parents, whose results are in another queue than their group's."""
    found: list[str] = []
    if isinstance(result, GroupResult):
        for child in result.results:
            if isinstance(child, GroupResult):
                found += apart(child)
            else:
                member = parse(child.id)
                if member is None or member.kin != kin_of(result.id) or member.kind == Kind.STEP:
                    found.append(child.id)
                found += [other for other in apart(child) if other != child.id]
    if result.parent is not None:
        found += apart(result.parent)
    return found


#: Each shape, and the number of queues for its results: queues of groups, of their steps, and one page.
SHAPES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "group": (lambda a: group(a.s(i) for i in range(3)), 1),
    "group of a list": (lambda a: group([a.s(i) for i in range(3)]), 1),
    "chord": (lambda a: chord([a.s(i) for i in range(3)], a.s()), 1),
    "chord of a generator": (lambda a: chord((a.s(i) for i in range(3)), a.s()), 2),
    "chord of a group": (lambda a: chord(group(a.s(i) for i in range(3)), a.s()), 1),
    "large chord": (lambda a: chord([a.s(i) for i in range(200)], a.s()), 2),
    "lazy chord": (lambda a: chord([a.s(i) for i in range(3)], fastres.lazy(a.s())), 2),
    "chain": (lambda a: a.s(1) | a.s() | a.s(), 1),
    "group at a chain's end": (lambda a: a.s(1) | group(a.s(i) for i in range(3)), 2),
    "group in a chain": (lambda a: a.s(1) | group(a.s(i) for i in range(3)) | a.s(), 1),
    "group of chains": (lambda a: group(a.s(i) | a.s() | a.s() for i in range(3)), 2),
    "group in group": (lambda a: group(group(a.s(1), a.s(2)), group(a.s(3), a.s(4))), 1),
    "chords in a group": (lambda a: group(chord([a.s(1), a.s(2)], a.s()), chord([a.s(3)], a.s())), 2),
    "chords in a chord": (lambda a: chord([chord([a.s(1), a.s(2)], a.s()), chord([a.s(3)], a.s())], a.s()), 1),
    "chord with a chain as body": (lambda a: chord([a.s(1), a.s(2)], a.s() | a.s()), 1),
    "chord with a group as body": (lambda a: chord([a.s(1), a.s(2)], group(a.s(), a.s())), 2),
    "group | group": (lambda a: group(a.s(1), a.s(2)) | group(a.s(3), a.s(4)), 2),
    "all together": (lambda a: a.s(0) | chord([a.s(1), a.s(2)], a.s()) | a.s() | group(a.s(3), a.s(4)), 2),
    "chains in groups, three deep": (
        lambda a: group(a.s(1) | group(a.s(2) | group(a.s(3) | a.s(), a.s(4)), a.s(5)), a.s(6)), 6,
    ),
    "chunks": (lambda a: a.chunks(zip(range(30)), 10), 1),
    "starmap": (lambda a: a.starmap(zip(range(30))), 1),
    "xmap": (lambda a: a.map(range(30)), 1),
    "one task": (lambda a: a.s(1), 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_queues_of_a_shape(shape: str, a: Any, sent: Sent) -> None:
    make, count = SHAPES[shape]
    result = make(a).apply_async()
    found = queues(ids_in(sent))
    assert len(found) <= count, found
    assert not [name for name in found if name.startswith("fastres.task.")], found
    assert not apart(result)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("chunks", "starmap", "xmap")])
def test_shapes_with_stamps(shape: str, a: Any, sent: Sent) -> None:
    class Stamps(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
            return {"stamp": "ed"}

    make, count = SHAPES[shape]
    signature = make(a)
    signature.stamp(visitor=Stamps())
    result = signature.apply_async()
    found = queues(ids_in(sent))
    assert len(found) <= count, found
    assert not apart(result)


@pytest.mark.parametrize("shape", SHAPES)
def test_signatures_that_were_frozen_before_they_are_sent(shape: str, a: Any, sent: Sent) -> None:
    """As ``Task.replace`` does with the signature that replaces the task."""
    make, _ = SHAPES[shape]
    signature = make(a)
    if not hasattr(signature, "freeze"):
        return
    result = signature.freeze()
    assert not apart(result)


def test_large_numbers(a: Any, sent: Sent) -> None:
    for _ in range(10_000):
        a.delay()
    assert len(queues(ids_in(sent))) <= 10_000 / canvas.PAGE_SIZE + 1
    sent.clear()
    group([a.s() for _ in range(10_000)]).apply_async()
    assert list(queues(ids_in(sent)).values()) == [10_000]
    sent.clear()
    group([a.s() | a.s() for _ in range(10_000)]).apply_async()
    assert list(queues(ids_in(sent)).values()) == [10_000, 10_000]
    sent.clear()
    for _ in range(1000):
        chord([a.s() for _ in range(10)])(a.s())
    ids = ids_in(sent)
    assert len(ids) == 11_000
    assert len(queues(ids)) <= 250


def test_ids_of_the_user_are_kept(a: Any, sent: Sent) -> None:
    a.apply_async(task_id="mine")
    group([a.s().set(task_id="member"), a.s()]).apply_async(task_id="ours")
    ids = ids_in(sent)
    assert {"mine", "member"} < ids
    (made,) = ids - {"mine", "member"}
    assert queue_name(made) == f"fastres.{kin_of('ours'):015x}"


def test_a_task_that_is_added_to_a_chord(a: Any) -> None:
    """``Task.add_to_chord`` freezes it with the group of the header, and without an index."""
    page = canvas.TaskIds(None).on_page()
    header = a.s().freeze(group_id=page, chord=a.s())
    assert queue_name(header.id) == queue_name(page)


def test_replaced_tasks_keep_their_id(a: Any) -> None:
    assert a.s().freeze("known").id == "known"
    replaced = (a.s() | a.s()).set(group_id="g", group_index=1)
    result = replaced.freeze("known")
    assert result.id == "known"
    assert queue_name(result.parent.id) == f"fastres.{kin_of('g'):015x}.steps"


def test_applications_with_other_backends_are_not_changed(a: Any) -> None:
    with Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False) as other:

        @other.task(name="b", shared=False)
        def b() -> None: ...

        assert parse(b.s().freeze().id) is None
        assert all(parse(member.id) is None for member in group(b.s(), b.s()).freeze().results)
        assert parse(a.s().freeze().id) is not None


def test_ids_of_celery() -> None:
    options = {"task_ids": "celery"}
    with Celery("shapes", broker="memory://", backend="fastres+memory://", set_as_current=False) as app:
        app.conf.result_backend_transport_options = options
        assert app.backend.options.task_ids == "celery"

        @app.task(name="b", shared=False)
        def b() -> None: ...

        assert parse(b.s().freeze().id) is None
        assert parse(b.delay().id) is None


def test_threads_and_forks_have_ids_of_their_own(a: Any) -> None:
    def lone(count: int) -> list[str]:
        return [a.s().freeze().id for _ in range(count)]

    found: list[str] = lone(10)
    threads = [threading.Thread(target=lambda: found.extend(lone(500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2010
    assert len(queues(set(found))) <= 2010 / canvas.PAGE_SIZE + 1

    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(lone(10)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = set(json.loads(os.read(read, 65536)))
    os.close(read)
    os.close(write)
    assert not queues(theirs).keys() & queues(set(found)).keys()


def test_a_page_ends_after_a_time(a: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task_ids = canvas.TaskIds(10.0)
    now = [0.0]
    monkeypatch.setattr(canvas.time, "monotonic", lambda: now[0])
    before = task_ids.on_page()
    now[0] = 0.9
    assert queue_name(task_ids.on_page()) == queue_name(before)
    now[0] = 1.2
    assert queue_name(task_ids.on_page()) != queue_name(before)


CHANGED = """
import json, logging, sys
from celery import Celery, canvas, chord, group
reported = []
logging.Logger.warning = lambda self, message, *args: reported.append(message % args)
for cls, name in ((canvas.group, "_freeze_unroll"), (canvas._chord, "run")):
    original = getattr(cls, name)
    delattr(cls, name)
    setattr(cls, name + "_of_a_new_celery", original)
canvas.group._freeze_unroll_of_a_new_celery.__name__
app = Celery("x", broker="memory://", backend="fastres+memory://")
app.backend
@app.task
def add(x): ...
print(json.dumps([reported, [member.id for member in group(add.s(1)).apply_async().results]]))
"""


def test_a_celery_whose_functions_have_other_names() -> None:
    """It logs a warning; the only effect is that ids are in queues of their own."""
    reported, ids = in_another_process(CHANGED)
    assert [line for line in reported if "_freeze_unroll" in line]
    assert [line for line in reported if "_chord" in line]
    assert len(ids) == 1


FIRST = """
import json, sys
from celery import Celery, group
app = Celery("x", broker="memory://", backend="fastres+memory://")
@app.task
def add(x): ...
sent = []
app.amqp.send_task_message = lambda producer, name, message, **options: sent.append(message.headers["id"])
ids = [member.id for member in group(add.s(i) for i in range(10)).apply_async().results]
print(json.dumps([ids, sent]))
"""


@pytest.mark.parametrize("before", ["", "app.backend"])
def test_the_first_group_in_a_process(before: str) -> None:
    """The backend is created after the first id, unless it is used before."""
    ids, sent = in_another_process(FIRST.replace("sent = []", f"sent = []; {before}"))
    assert ids == sent
    assert sorted(queues(set(ids)).values()) == ([10] if before else [1, 9])
