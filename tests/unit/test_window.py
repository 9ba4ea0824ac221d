"""The window of unconfirmed messages, without a broker."""

from __future__ import annotations

import random

from fastres.amqp.publishing import Message, Publishing
from fastres.amqp.window import Window


def publishing(name: str, size: int = 1) -> Publishing:
    return Publishing(Message(b"x" * size, "application/json", "utf-8", name, 2, {}), "", name)


def sent(count: int, depth: int = 1000, size: int = 1 << 20) -> tuple[Window, list[Publishing]]:
    window, publishings = Window(depth, size), [publishing(f"q{number}") for number in range(count)]
    window.add(1, publishings)
    return window, publishings


def test_confirms_one_by_one_and_many_at_a_time() -> None:
    window, _ = sent(5)
    window.confirm(2, False)
    assert window.unconfirmed == 4
    window.confirm(4, True)
    assert window.unconfirmed == len(window) == 1
    window.confirm(4, True)
    window.confirm(99, False)
    assert window.unconfirmed == 1
    window.confirm(5, False)
    assert not window


def test_the_fill_level() -> None:
    by_count, _ = sent(10, depth=10)
    assert by_count.is_full()
    by_count.confirm(5, True)
    assert by_count.has_room()
    assert not by_count.is_full()
    by_size = Window(1000, 100)
    by_size.add(1, [publishing("q", 60), publishing("q", 40)])
    assert by_size.is_full()
    by_size.confirm(1, False)
    assert not by_size.is_full()
    assert by_size.has_room()


def test_returned_messages_are_sent_again_a_few_times() -> None:
    window, (first, second) = sent(2)
    window.give_back("q1")
    window.confirm(2, True)
    assert list(window.again) == [second]
    window.again.clear()
    window.republished([second])
    window.add(3, [second])
    window.confirm(3, False)
    assert not window
    assert first not in window.again


def test_a_lost_connection() -> None:
    window, publishings = sent(3)
    window.confirm(1, False)
    window.lose()
    assert (window.unconfirmed, list(window.again)) == (0, publishings[1:])
    window.add(1, [publishing("later")])
    window.lose()
    # The last sent are first; those that are to be sent again have not been sent since.
    assert [each.routing_key for each in window.again] == ["later", "q1", "q2"]


def test_refused_messages_are_suspects() -> None:
    window, publishings = sent(3)
    window.refuse(2, False)
    assert list(window.suspects) == publishings[1:2]
    window.lose(suspects=True)
    assert list(window.suspects) == [publishings[0], publishings[2], publishings[1]]
    assert len(window) == 3


def test_a_caller_withdraws_its_messages_after_an_error() -> None:
    window, publishings = sent(4)
    window.give_back("q0")
    window.confirm(1, False)
    window.refuse(2, False)
    assert window.withdraw(publishings[:3]) == [publishings[2], publishings[0], publishings[1]]
    assert (window.unconfirmed, list(window.again), list(window.suspects)) == (1, [], [])
    assert window.withdraw(publishings[:3]) == []


def test_no_message_is_lost_in_any_sequence_of_events() -> None:
    """Each of a thousand messages stays in the window until it is confirmed."""
    chance = random.Random(7)
    window, number, there = Window(50, 1 << 20), 0, set()
    for turn in range(2000):
        event = chance.random()
        if event < 0.6:
            one = publishing(f"q{turn}")
            number += 1
            window.add(number, [one])
            there.add(one.routing_key)
        elif event < 0.9 and window.unconfirmed:
            before = window.unconfirmed
            window.confirm(number - chance.randrange(before), chance.random() < 0.5)
            assert window.unconfirmed <= before
        elif event < 0.93:
            window.lose(suspects=chance.random() < 0.5)
            number = 0
        assert len(window) <= len(there)
        for place in (window.again, window.suspects):
            while place:
                number += 1
                window.add(number, [place.popleft()])
    window.confirm(number, True)
    assert not window
