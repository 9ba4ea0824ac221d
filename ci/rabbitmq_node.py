"""A private RabbitMQ node (or Redis) in a temporary folder, for the demo, the tests and the benchmarks.

Every program ends with the Python process that started it, even if that is killed; its folder is removed too.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mirakuru.base
import port_for
from mirakuru import Executor, TCPExecutor
from mirakuru.exceptions import ExecutorError

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
START_TIMEOUT = 120  # seconds: a node takes 4 on two idle cores, and has taken 24 on a busy machine

# At exit mirakuru kills all processes whose parent's pid begins with this one, perhaps another one's children.
atexit.unregister(mirakuru.base.cleanup_subprocesses)


class StartError(RuntimeError):
    """A program did not start. The message has the end of its log, and advice."""


class Leashed(Executor):
    """A program in its own temporary folder. Both are removed when this Python process ends."""

    name: str  # for people
    hint = ""  # advice when it does not start

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            command=["sh"], timeout=START_TIMEOUT, sleep=0.05, stdin=subprocess.DEVNULL, stdout=None, **kwargs
        )
        self.folder: Path | None = None
        self._leash: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def shell_line(self, folder: Path) -> str:
        """The command, run with `folder` as its working folder; called at every start."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start and wait until it is ready, in a new folder or, after kill(), in the existing one.

        Raises StartError when the program ends or is not ready in time.
        """
        if self.running():
            return self
        self.kill()  # left behind by a crash
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-".lower()))
            # The shell reads from a pipe that only this process holds open: it is closed when this process ends.
            leash = 'read -r _; read -r group <"$0/group" && kill -s KILL -- "-$group"; rm -rf -- "$0"'
            self._leash = subprocess.Popen(
                ["sh", "-c", leash, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            prepare = f"cd {shlex.quote(str(self.folder))} && echo $$ >group && exec >>output.log 2>&1 || exit\n"
            self.command_parts = ["sh", "-c", prepare + self.shell_line(self.folder)]
            (self.folder / "output.log").write_text("")  # its output from now on
            super().start()
        except ExecutorError as error:
            message = f"{self.name} did not start: {error}\n{self.reason()}\n{self.hint}".rstrip()
            self.stop()
            raise StartError(message) from error
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self, wait: bool = True, sig: int | None = None) -> Self:
        """SIGKILL the whole process tree; the folder stays, so that start() goes on with the same data."""
        # A forked child has a copy of this object, and must not stop its parent's program.
        if self.process is not None and os.getpid() == self._owner:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sig or signal.SIGKILL)
            super().kill(wait, sig)
            if self.folder is not None:
                (self.folder / "group").unlink(missing_ok=True)
        return self

    def stop(self, stop_signal: int | None = None, expected_returncode: int | None = None) -> Self:
        """Kill the whole process tree and delete the folder."""
        if os.getpid() == self._owner and self.folder is not None and self._leash is not None:
            self.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._leash.communicate(b"\n")  # deletes files that a dying process has written since
            self.folder = self._leash = None
        return self

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of all that the program has logged, "" once it is stopped."""
        if self.folder is None:
            return ""
        texts = [path.read_text("utf-8", "replace") for path in sorted(self.folder.glob("*.log"))]
        return "\n".join("\n".join(text.splitlines()[-lines:]) for text in texts).strip()

    def reason(self) -> str:
        """The part of the log with the reason why it did not start."""
        return self.log_tail()

    def __str__(self) -> str:
        return self.name


class Node(Leashed, TCPExecutor):
    """A RabbitMQ node that listens on 127.0.0.1 only; a context manager.

    `config` is lines of rabbitmq.conf, such as {"consumer_timeout": "5000"}, and `advanced` parameters of RabbitMQ
    that have no line there, such as {"channel_tick_interval": "1000"}. `tls` adds a listener at `tls_port` whose
    certificate for localhost and 127.0.0.1 is signed by `ca_file` (needs trustme). With a running `peer` it
    forms a cluster. There are no plugins but RabbitMQ's management API with `management`, at `management_port`.

    After kill(), a durable queue that was declared less than two seconds before may be missing with its messages:
    Mnesia, RabbitMQ 3's database, writes a transaction to disk at once, but its commit record only later.
    """

    name = "RabbitMQ"
    hint = "Its log above has the reason: a wrong line of configuration, perhaps, or a full disk."

    def __init__(
        self,
        config: dict[str, str] | None = None,
        tls: bool = False,
        advanced: dict[str, str] | None = None,
        peer: Node | None = None,
        management: bool = False,
    ) -> None:
        self._management = management
        self._config = config or {}
        self._advanced = advanced or {}
        if os.environ.get("FASTRES_TEST_QUEUES") == "quorum":
            # How often a quorum queue is counted for `rabbitmqctl list_queues`: every five seconds by default.
            self._advanced = {"quorum_tick_interval": "1000", **self._advanced}
        self._tls = tls
        ports = free_ports(5)
        self.management_port = ports.pop()
        self.tls_port = ports.pop()
        # Its own port mapper (epmd): a shared one would stay behind, and knows the machine's other nodes.
        self._epmd_port = ports.pop()
        self._distribution_port = ports.pop()
        #: The Erlang cookie that the nodes of a cluster share.
        self.cookie = secrets.token_hex(16)
        self._peer = peer
        if peer is not None:
            self._epmd_port, self.cookie = peer._epmd_port, peer.cookie
        super().__init__(host=HOST, port=ports.pop())

    @property
    def url(self) -> str:
        """Broker URL of the default virtual host, without TLS."""
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    @property
    def name_in_cluster(self) -> str:
        return f"node-{self.port}@localhost"

    @property
    def ca_file(self) -> str:
        """Path of the certificate authority's certificate; only with tls=True, once started."""
        if not self._tls or self.folder is None:
            raise RuntimeError("ca_file is there with Node(tls=True), once it is started")
        return str(self.folder / "ca.pem")

    def restart(self) -> Self:
        """Stop in good order and start again: same ports, same data."""
        TCPExecutor.stop(self)
        return self.start()

    def ctl(self, *args: str) -> str:
        """Output of `rabbitmqctl --quiet ARGS`; takes about a second. Raises RuntimeError with its message."""
        done = subprocess.run(
            [str(_server().parent / "rabbitmqctl"), "--quiet", *args],
            env=self.envvars,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {shlex.join(args)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def queues(self) -> dict[str, int]:
        """Every queue of the default virtual host with its messages, ready and unacknowledged."""
        lines = self.ctl("list_queues", "--no-table-headers", "name", "messages").splitlines()
        return {name: int(messages) for name, _, messages in (line.rpartition("\t") for line in lines)}

    def shell_line(self, folder: Path) -> str:
        conf = {"listeners.tcp.1": f"{HOST}:{self.port}", "log.file.level": "info"}
        if self._tls:
            conf.update(_certificates(folder), **{"listeners.ssl.1": f"{HOST}:{self.tls_port}"})
        if self._management:
            conf.update({"management.tcp.ip": HOST, "management.tcp.port": str(self.management_port)})
        if self._peer is not None:
            conf["cluster_formation.peer_discovery_backend"] = "classic_config"
            conf["cluster_formation.classic_config.nodes.1"] = self._peer.name_in_cluster
        if os.environ.get("FASTRES_TEST_DEFAULT_QUEUES"):
            # RabbitMQ 4: the type of queues that are declared without a type.
            conf["default_queue_type"] = os.environ["FASTRES_TEST_DEFAULT_QUEUES"]
        conf.update(self._config)
        (folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in conf.items()))
        parameters = ", ".join(f"{{{key}, {value}}}" for key, value in self._advanced.items())
        (folder / "advanced.config").write_text(f"[{{rabbit, [{parameters}]}}].\n")
        plugins = ["rabbitmq_management"] if self._management else []
        (folder / "enabled_plugins").write_text(f"[{', '.join(plugins)}].\n")
        cookie = folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(self.cookie)
        server = _lean_home(_server(), folder / "home", plugins)
        mapper = "" if self._peer is not None else f"epmd -address {HOST} -port {self._epmd_port} & "
        return f"{mapper}exec {shlex.quote(str(server))}"

    def after_start_check(self) -> bool:
        return super().after_start_check() and (not self._tls or _accepts(self.tls_port))

    def reason(self) -> str:
        # RabbitMQ logs the reason around these words, before many crash reports.
        before, failed, after = self.log_tail(1000).partition("BOOT FAILED")
        if not failed:
            return self.log_tail()
        return "\n".join(before.splitlines()[-6:]) + failed + "\n".join(after.splitlines()[:16])

    @property
    def envvars(self) -> dict[str, str]:
        """Environment of the node and of rabbitmqctl, without any settings of the machine's own RabbitMQ."""
        folder = str(self.folder)
        only_loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        others = ("RABBITMQ_", "ERL_", "NOTIFY_SOCKET")
        inherited = {key: value for key, value in super().envvars.items() if not key.startswith(others)}
        return {
            **inherited,
            "HOME": folder,  # of the Erlang cookie
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": self.name_in_cluster,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": only_loopback,
            "RABBITMQ_CTL_ERL_ARGS": only_loopback,
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/no-rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_LOGS": f"{folder}/rabbit.log",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node instead of waiting for it
        }


class Redis(Leashed, TCPExecutor):
    """A Redis that keeps nothing on disk and listens on 127.0.0.1 only; a context manager."""

    name = "Redis"
    hint = "Is redis-server installed? As root: apt-get install redis-server"

    def __init__(self) -> None:
        super().__init__(host=HOST, port=free_ports(1).pop())

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def shell_line(self, folder: Path) -> str:
        return f"exec redis-server --bind {HOST} --port {self.port} --save '' --appendonly no"


def installed() -> bool:
    """Whether this machine has a RabbitMQ to start."""
    with suppress(StartError):
        return _server().exists()
    return False


def free_ports(count: int) -> set[int]:
    """Ports that are free now and outside the kernel's range for outgoing connections.

    With a port inside that range, a client that reconnects in a loop while the node is down may connect to itself.
    """
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(port_for.select_random(exclude_ports=ports))
    return ports


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def _server() -> Path:
    """RabbitMQ's own script. Debian's wrapper requires root or the user rabbitmq, and switches the user."""
    path = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin") or shutil.which("rabbitmq-server")
    if path is None:
        raise StartError("RabbitMQ is not installed. As root: apt-get install rabbitmq-server")
    return Path(path).resolve()


def _lean_home(server: Path, home: Path, plugins: list[str]) -> Path:
    """Create another home for the same RabbitMQ, without plugins. Returns: its script, or `server` if that fails.

    At its start, the node searches the folders of all plugins for each of hundreds of modules.
    With only the 20 of 70 folders that `rabbit` depends on, it starts in two thirds of the time.
    """
    apps = {path.stem: path for path in (server.parent.parent / "plugins").glob("*/ebin/*.app")}
    wanted, todo = set(), ["rabbit", *plugins]
    while todo:
        app = todo.pop()
        if app in apps and app not in wanted:
            wanted.add(app)
            needs = re.search(r"\{applications,\s*\[(.*?)\]\}", apps[app].read_text("utf-8"), re.DOTALL)
            todo += re.findall(r"\w+", needs[1]) if needs else []
    if len(wanted) < 2:
        return server
    if not home.exists():
        (home / "plugins").mkdir(parents=True)
        (home / "sbin").symlink_to(server.parent)
        for app in wanted:
            folder = apps[app].parent.parent
            (home / "plugins" / folder.name).symlink_to(folder)
    return home / "sbin" / server.name


def _certificates(folder: Path) -> dict[str, str]:
    """Create the authority and the server's certificate, once. Returns: their lines of rabbitmq.conf."""
    if not (folder / "ca.pem").exists():
        import trustme

        authority = trustme.CA()
        server = authority.issue_cert("localhost", HOST)
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        server.private_key_pem.write_to_path(str(folder / "key.pem"))
        server.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return {
        "ssl_options.cacertfile": f"{folder}/ca.pem",
        "ssl_options.certfile": f"{folder}/cert.pem",
        "ssl_options.keyfile": f"{folder}/key.pem",
        "ssl_options.verify": "verify_none",
    }
