"""Reads policies from RabbitMQ's management API; AMQP does not show them."""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ("limits",)

#: Settings of a policy that drop or refuse messages.
LIMITS = ("message-ttl", "expires", "max-length", "max-length-bytes", "overflow", "delivery-limit")
#: Seconds that an answer may take.
TIMEOUT = 10.0


def limits(url: str, virtual_host: str, names: Iterable[str], queue_type: str) -> list[str]:
    """Describe the policies that limit some queues, one line for each policy.

    Args:
        url: of the management API, with user and password: ``http://guest:guest@localhost:15672``.
        names: names of queues, which need not be there.
        queue_type: their type, ``classic`` or ``quorum``.

    Raises:
        OSError: it does not answer, or refuses.
        ValueError: the reply is not JSON, or the URL is invalid.
    """
    acting: dict[str, list[str]] = {}
    for kind in ("policies", "operator-policies"):
        policies = _get(url, f"/api/{kind}/{quote(virtual_host, safe='')}")
        for name in names:
            for line in _acting(policies, kind, name, queue_type):
                acting.setdefault(line, []).append(name)
    return [f"{line} acts on {', '.join(queues)}" for line, queues in acting.items()]


def _acting(policies: list[dict[str, Any]], kind: str, name: str, queue_type: str) -> Iterator[str]:
    """The policy that RabbitMQ chooses for a queue, if it limits it: one of each kind, by priority."""
    places = ("all", "queues", f"{queue_type}_queues")
    for_it = [policy for policy in policies if policy["apply-to"] in places and re.search(policy["pattern"], name)]
    if not for_it:
        return
    chosen = max(for_it, key=lambda policy: policy.get("priority", 0))
    found = [f"{key}: {value}" for key, value in chosen["definition"].items() if key in LIMITS]
    if found:
        word = "the policy" if kind == "policies" else "the operator policy"
        yield f"{word} {chosen['name']!r} ({', '.join(found)})"


def _get(url: str, path: str) -> Any:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a management API, such as http://guest:guest@localhost:15672")
    credentials = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}"
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(
        f"{parts.scheme}://{host}{parts.path.rstrip('/')}{path}",
        headers={"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)
