"""Addresses of results: queue names, queue arguments, and the exchanges that may carry results."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import kombu
import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from fastres.addresses import Address, Addresses
from fastres.amqp.publishing import MAX_EXPIRES
from fastres.ids import Kind, kin_of, new_id

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
#: The kin of the ids.
KIN = "0f8fad5bd9cb69f"
MEMBER, STEP, PAGE = (new_id(kin_of(ID), kind) for kind in Kind)


def addresses(
    namespace: str | None = None,
    exchange: str | None = None,
    exchange_type: str = "direct",
    expires: float | None = None,
    queue_type: str = "classic",
) -> Addresses:
    return Addresses(namespace, exchange, exchange_type, expires, queue_type, kombu.Queue, kombu.Exchange)


def backend_of(**conf: Any) -> Any:
    app = Celery(broker="memory://", backend="fastres://", set_as_current=False)
    app.conf.update(conf)
    return app.backend


def declared(addresses: Addresses, address: Address) -> dict[str, Any]:
    """The arguments of a queue, except its type."""
    arguments = dict(addresses.queue(address).queue_arguments)
    assert arguments.pop("x-queue-type") == "classic"
    return arguments


def arguments(expires: Any) -> dict[str, Any]:
    backend = backend_of(result_expires=expires)
    return declared(backend.addresses, backend.addresses.group(ID))


def test_names() -> None:
    given = addresses()
    assert given.rkey(ID) == given.result(ID).name == f"fastres.task.{ID}"
    assert given.states(ID).name == f"fastres.task.{ID}.states"
    assert given.rkey(MEMBER) == given.result(MEMBER).name == f"fastres.{KIN}"
    assert given.states(MEMBER).name == f"fastres.{KIN}.states"
    assert given.rkey(STEP) == f"fastres.{KIN}.steps"
    assert given.group(ID).name == f"fastres.{KIN}"
    assert given.group(PAGE).name == given.result(PAGE).name == f"fastres.{KIN}"
    assert given.saved(ID).name == f"fastres.saved.{ID}"
    assert given.mailbox(ID).name == ID


def test_every_name_but_a_mailboxs_begins_with_the_namespace() -> None:
    given = addresses(namespace="shop")
    assert given.rkey(ID) == f"shop.task.{ID}"
    assert given.rkey(MEMBER) == given.group(ID).name == f"shop.{KIN}"
    assert given.states(MEMBER).name == f"shop.{KIN}.states"
    assert given.saved(ID).name == f"shop.saved.{ID}"
    # The name of a mailbox travels in the task message: Celery's rpc workers send to it too.
    assert given.mailbox(ID).name == ID


@pytest.mark.parametrize("namespace", [None, "shop"])
def test_addresses_of_one_id_differ(namespace: str | None) -> None:
    given = addresses(namespace)
    made = [
        given.result(ID),
        given.group(ID),
        given.states(ID),
        given.saved(ID),
        given.rkey(STEP),
    ]
    assert len(set(map(str, made))) == len(made)


def test_task_ids_by_queue() -> None:
    given = addresses()
    mixed = [MEMBER, ID, STEP, "x", MEMBER]
    assert given.by_result(mixed) == {
        given.rkey(MEMBER): [MEMBER, MEMBER],
        given.rkey(ID): [ID],
        given.rkey(STEP): [STEP],
        given.rkey("x"): ["x"],
    }


def test_the_number_of_kept_states_is_limited_and_that_of_results_is_not() -> None:
    given = addresses()
    assert declared(given, given.states(ID)) == {"x-max-length": 1}
    assert declared(given, given.states(MEMBER)) == {"x-max-length": 10_000}
    for address in (given.result(ID), given.group(ID), given.result(PAGE), given.saved(ID), given.mailbox(ID)):
        assert declared(given, address) == {}


def test_results_of_a_reused_id_expire_one_by_one() -> None:
    given = addresses(expires=60)
    assert declared(given, given.result(ID)) == {"x-expires": 60_000, "x-message-ttl": 60_000}
    assert declared(given, given.result(MEMBER)) == {"x-expires": 60_000}


def test_results_are_in_quorum_queues_and_mailboxes_are_classic() -> None:
    given = addresses(queue_type="quorum")
    for address in (given.result(ID), given.group(ID), given.states(PAGE), given.saved(ID), given.chords(0)):
        assert address.is_quorum
        assert given.queue(address).queue_arguments["x-queue-type"] == "quorum"
    assert given.queue(given.mailbox(ID)).queue_arguments == {"x-queue-type": "classic"}
    assert given.queue(given.states(ID)).queue_arguments["x-max-length"] > 1, "they may get out of order"


def test_queues_are_durable_and_outlive_their_consumers() -> None:
    given = addresses(expires=60)
    for address in (given.result(ID), given.group(ID), given.mailbox(ID)):
        queue = given.queue(address)
        assert queue.name == queue.routing_key == address.name
        assert queue.durable
        assert not queue.auto_delete
        assert not queue.exclusive
        assert queue.queue_arguments["x-expires"] == 60_000


@pytest.mark.parametrize(
    ("expires", "milliseconds"),
    [
        (60, 60_000),
        (0.5, 500),
        (0.0001, 1),
        (timedelta(minutes=2), 120_000),
        (timedelta(milliseconds=1500), 1500),
        (timedelta(days=365), MAX_EXPIRES),
        (10**12, MAX_EXPIRES),
        (MAX_EXPIRES / 1000, MAX_EXPIRES),
    ],
)
def test_result_expires(expires: Any, milliseconds: int) -> None:
    assert arguments(expires) == {"x-expires": milliseconds}


@pytest.mark.parametrize("expires", [None, 0, 0.0, timedelta()])
def test_results_that_never_expire(expires: Any) -> None:
    assert arguments(expires) == {}


def test_celerys_default_is_a_day() -> None:
    backend = backend_of()
    assert declared(backend.addresses, backend.addresses.group(ID)) == {"x-expires": 86_400_000}


def test_results_go_through_the_default_exchange() -> None:
    for name in (None, "", "celeryresults"):
        given = addresses(exchange=name)
        assert given.exchange.name == ""
        assert given.queue(given.result(ID)).exchange.name == ""


@pytest.mark.parametrize("kind", ["direct", "topic"])
def test_a_configured_exchange(kind: str) -> None:
    given = addresses(exchange="shop.results", exchange_type=kind)
    assert (given.exchange.name, given.exchange.type) == ("shop.results", kind)
    assert given.queue(given.result(ID)).exchange == given.exchange
    assert given.exchange.durable


@pytest.mark.parametrize("kind", ["fanout", "headers", "x-consistent-hash", ""])
def test_an_exchange_that_does_not_route_by_key_is_refused(kind: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"result_exchange_type='{kind}'.*'direct' or a 'topic'"):
        addresses(exchange="shop.results", exchange_type=kind)
