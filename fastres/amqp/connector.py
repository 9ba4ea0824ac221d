"""Opens connections to the broker of the results, and abandons them in forked children."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import amqp.exceptions
from celery.exceptions import ImproperlyConfigured

from fastres.errors import AccessRefused, BrokerUnreachable

if TYPE_CHECKING:
    from fastres.options import Options

__all__ = ("Connector", "abandon", "drop", "establish", "set_socket_options")

#: URL schemes of the backend that mean RabbitMQ; the value is whether it is over TLS.
SCHEMES = {"fastres": False, "fastres-rpc": False, "fastress": True, "fastress-rpc": True, "amqp": False}

#: Of the sockets: for how long the broker may take nothing in, in milliseconds, before the system ends the
#: connection. py-amqp sets one second, in which a busy broker, or one short of memory, may read nothing either; and
#: unconfirmed messages would be lost with the connection.
SOCKET_SETTINGS = {socket.TCP_USER_TIMEOUT: 60_000} if hasattr(socket, "TCP_USER_TIMEOUT") else {}


class Connector:
    """Opens connections to the broker: that of the backend's URL, of a given connection, or of the application.

    Args:
        app: the Celery application.
        url: the backend's URL; without a host, the application's broker is meant.
        connection: a kombu connection to clone instead, None for none.
        options: the backend's options.
    """

    def __init__(self, app: Any, url: str | None, connection: Any, options: Options) -> None:
        self._app = app
        self._given = connection
        self._options = options
        # Several brokers stand in one URL, as in Celery's broker_url.
        parsed = [self._parse(each) for each in (url or "").split(";")]
        self._url = ";".join(each for each, _ in parsed if each) or None
        self._tls = any(tls for _, tls in parsed)

    @staticmethod
    def _parse(url: str) -> tuple[str | None, bool]:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            # "fastres+redis://host" reaches us as "redis://host": any transport of kombu.
            return url or None, False
        if not parts.netloc:
            return None, SCHEMES[parts.scheme]
        return urlunsplit(("pyamqp", *parts[1:])), SCHEMES[parts.scheme]

    @property
    def is_applications(self) -> bool:
        """Whether this is the broker that the application sends its tasks to."""
        own, tasks = self.open(), self._app.connection_for_write()
        return _where(own) == _where(tasks)

    @property
    def is_amqp(self) -> bool:
        """Whether this is a broker that speaks AMQP, and not another transport of kombu."""
        return bool(self._connection().get_transport_cls().driver_type == "amqp")

    def open(self) -> Any:
        """A kombu connection, not yet established."""
        connection = self._connection()
        if connection.get_transport_cls().driver_name == "py-amqp":
            options = dict(connection.transport_options)
            options["socket_settings"] = {**SOCKET_SETTINGS, **(options.get("socket_settings") or {})}
            connection.transport_options = options
        return connection

    def _connection(self) -> Any:
        if self._given is not None:
            return self._given.clone()
        if self._url is None and not self._tls:
            return self._app.connection_for_write()
        if not self._tls:
            return self._app.connection_for_write(self._url)
        given = self._options.ssl or self._app.conf.broker_use_ssl
        # The name that the certificate must have is that of the host: see establish().
        tls = {"server_hostname": None, **(given if isinstance(given, Mapping) else {})}
        return self._app.connection_for_write(self._url, ssl=tls)


def _where(connection: Any) -> tuple[Any, ...]:
    info = connection.info()
    driver = connection.transport.driver_name
    return (
        driver,
        info["hostname"],
        info["port"],
        info["virtual_host"],
        [urlsplit(url)[1:3] for url in connection.alt],
    )


def establish(connection: Any) -> None:
    """Connect to the broker: each of its URLs is tried once.

    Raises:
        celery.exceptions.ImproperlyConfigured: a file of its TLS settings is not there.
        fastres.AccessRefused: it does not know the user, or the password is another.
        fastres.BrokerUnreachable: its certificate is not trusted, which no other attempt will change.
        Exception: one of ``connection.connection_errors``.
    """
    for left in reversed(range(max(1, len(connection.alt)))):
        _prepare_tls(connection)
        try:
            connection.ensure_connection(
                max_retries=0, interval_start=0, interval_step=0, interval_max=0, reraise_as_library_errors=False
            )
        except ssl.SSLCertVerificationError as exc:
            raise BrokerUnreachable(
                f"the certificate of {connection.as_uri()} is not trusted: {exc.verify_message}; "
                "ca_certs of broker_use_ssl, or of ssl in result_backend_transport_options, names who is"
            ) from exc
        except amqp.exceptions.AccessRefused as exc:
            raise AccessRefused(f"the broker {connection.as_uri()} says: {exc.reply_text}") from exc
        except connection.connection_errors:
            if not left:
                raise
            connection.maybe_switch_next()
        else:
            return


def _prepare_tls(connection: Any) -> None:
    tls = connection.ssl
    if not isinstance(tls, dict):
        return
    for name in ("ca_certs", "certfile", "keyfile"):
        if tls.get(name) and not os.path.exists(tls[name]):
            raise ImproperlyConfigured(
                f"TLS to {connection.as_uri()}: there is no file {tls[name]!r}, which {name} names "
                "(broker_use_ssl, or ssl in result_backend_transport_options)"
            )
    if tls.get("server_hostname", "") is None:
        # kombu would have 127.0.0.1 for localhost, and keep the name of the first of several hosts.
        connection.ssl = {**tls, "server_hostname": connection.hostname or "localhost"}


def set_socket_options(sock: Any) -> None:
    """Set the socket options for a busy broker on a connection that was opened elsewhere."""
    for option, value in SOCKET_SETTINGS.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def drop(connection: Any, broken: bool = True) -> None:
    """Close a connection that is or may be broken, and ignore all errors.

    Args:
        broken: False closes the connection with the broker's consent.
    """
    sock = _socket_of(connection)
    with contextlib.suppress(Exception):
        connection.collect() if broken else connection.release()
    if sock is not None:
        # py-amqp leaves it open when the other side has closed it before.
        with contextlib.suppress(Exception):
            sock.close()


def _socket_of(connection: Any) -> Any:
    """The socket of an established connection of py-amqp, otherwise None."""
    transport = getattr(getattr(connection, "_connection", None), "_transport", None)
    return getattr(transport, "sock", None)


def abandon(connection: Any) -> None:
    """Abandon a connection of the parent process.

    Closing it the usual way shuts the socket down, for the parent too: only this process's descriptor is closed.
    """
    sock = _socket_of(connection)
    if sock is not None:
        with contextlib.suppress(OSError):
            os.close(sock.detach())
