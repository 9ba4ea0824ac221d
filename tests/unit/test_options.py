"""The options of ``result_backend_transport_options``: defaults, values, and the errors of wrong ones."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from fastres.options import Options

NAMES = sorted(option.name for option in fields(Options))


def test_defaults() -> None:
    assert Options.parse(None) == Options.parse({}) == Options()
    assert {name: getattr(Options(), name) for name in NAMES} == {
        "namespace": None,
        "confirm": True,
        "confirm_window": 1000,
        "confirm_timeout": 60,
        "task_ids": "fastres",
        "take": "joins",
        "queue_type": "classic",
        "keep_chord_results": True,
        "chord_shards": 1,
        "chord_joiner": True,
        "chord_renewal": 600,
        "chord_unlock": False,
        "prefetch": 2000,
        "max_unpacked_size": 1 << 30,
        "retry_policy": None,
        "ssl": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", "shop"),
        ("namespace", None),
        ("confirm", False),
        ("task_ids", "celery"),
        ("take", "always"),
        ("take", "never"),
        ("namespace", "a" * 100),
        ("namespace", "shop-1.results_2"),
        ("keep_chord_results", False),
        ("chord_shards", 16),
        ("chord_joiner", False),
        ("chord_renewal", 5),
        ("chord_unlock", True),
        ("prefetch", 1),
        ("prefetch", 65535),
        ("max_unpacked_size", 1),
        ("max_unpacked_size", 1 << 40),
        ("retry_policy", {"max_retries": 2, "timeout": 5.0}),
        ("retry_policy", None),
        ("ssl", {"ca_certs": "ca.pem"}),
        ("ssl", None),
    ],
)
def test_value(name: str, value: Any) -> None:
    assert getattr(Options.parse({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("namespace", 1, "a str"),
        ("namespace", b"shop", "a str"),
        ("confirm", 1, "a bool"),
        ("confirm", None, "a bool"),
        ("confirm", "yes", "a bool"),
        ("task_ids", 0, "a str"),
        ("take", None, "a str"),
        ("keep_chord_results", "no", "a bool"),
        ("chord_shards", 0, "a positive int"),
        ("chord_joiner", 1, "a bool"),
        ("chord_unlock", "yes", "a bool"),
        ("chord_renewal", 0.5, "a positive int"),
        ("prefetch", 0, "a positive int"),
        ("prefetch", -1, "a positive int"),
        ("prefetch", 1.5, "a positive int"),
        ("prefetch", True, "a positive int"),
        ("prefetch", "2000", "a positive int"),
        ("prefetch", None, "a positive int"),
        ("max_unpacked_size", 0, "a positive int"),
        ("max_unpacked_size", 1e6, "a positive int"),
        ("ssl", True, "a mapping"),
        ("ssl", "ca.pem", "a mapping"),
    ],
)
def test_wrong_value(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ImproperlyConfigured) as refused:
        Options.parse({name: value})
    assert str(refused.value) == f"result_backend_transport_options: {name} must be {expected}, not {value!r}"


def test_prefetch_over_the_protocols_limit() -> None:
    with pytest.raises(ImproperlyConfigured, match="prefetch is at most 65535, not 65536"):
        Options.parse({"prefetch": 65536})


@pytest.mark.parametrize("key", ["visibility_timeout", "", 7, ("namespace",)])
def test_unknown_key_lists_the_known_ones(key: Any) -> None:
    with pytest.raises(ImproperlyConfigured) as refused:
        Options.parse({key: 1})
    assert f"fastres has no option {key!r}." in str(refused.value)
    assert f"It has: {', '.join(NAMES)}." in str(refused.value)


def test_misspelt_key_gets_a_hint() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"Did you mean 'prefetch'\?"):
        Options.parse({"prefetch_count": 10})


def test_a_known_option_does_not_hide_an_unknown_one() -> None:
    with pytest.raises(ImproperlyConfigured, match="no option 'confrim'"):
        Options.parse({"prefetch": 10, "confrim": False})


def test_options_reach_the_backend() -> None:
    app = Celery(broker="memory://", backend="fastres://", set_as_current=False)
    app.conf.result_backend_transport_options = {"namespace": "shop", "prefetch": 10}
    assert app.backend.options == Options(namespace="shop", prefetch=10)


def test_wrong_options_fail_where_the_backend_is_made() -> None:
    app = Celery(broker="memory://", backend="fastres://", set_as_current=False)
    app.conf.result_backend_transport_options = {"master_name": "redis"}
    with pytest.raises(ImproperlyConfigured, match="no option 'master_name'"):
        _ = app.backend


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("task_ids", "uuid", "is one of 'fastres', 'celery', not 'uuid'"),
        ("take", "join", "is one of 'joins', 'always', 'never', not 'join'"),
        ("namespace", "", "has 1 to 100 letters"),
        ("namespace", "a" * 101, "has 1 to 100 letters"),
        ("namespace", "amq.shop", "does not begin with 'amq.'"),
        ("namespace", "a\nb", "has 1 to 100 letters"),
        ("namespace", "sh\u00f6p", "has 1 to 100 letters"),
    ],
)
def test_value_that_is_not_a_choice(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=expected):
        Options.parse({name: value})
