"""Servers of two workers that get requests without a pause while something changes, and checks of every answer."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from freegpt_auth.stores.file.store import FRESHNESS
from tests.helpers.applications import HELLO
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.servers import Server

APPLICATION = f"""
{HELLO}
import glob, logging, os, time
from freegpt_auth import BearerTokenMiddleware

right = time.time  # the size of this file in bytes is the number of seconds by which the clock is ahead
time.time = lambda: right() + (os.stat("ahead").st_size if os.path.exists("ahead") else 0)

logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(message)s")
logging.getLogger("freegpt_auth").addFilter(lambda record: not record.msg.startswith("refused"))

guarded = {{"/": BearerTokenMiddleware(hello, usage_interval=0.1)}}
for folder in glob.glob("start-*"):  # applications with token files of their own
    guarded["/" + folder] = BearerTokenMiddleware(hello, store=folder + "/api_tokens.json", usage="off")

async def app(scope, receive, send):
    async def signed(message):
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"worker", str(os.getpid()).encode())]
        await send(message)
    await guarded[scope.get("path", "/")](scope, receive, signed)
"""
# Under root the server gives up root's right to read every file. It creates files without a umask. With MOUNT, which
# names a file and its mount point, or two folders, it runs in a mount namespace of its own, as in a container.
UVICORN = """
import os, sys
fewer = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
command = [*fewer, sys.executable, "-m", "uvicorn", "app:app", "--workers", "2", "--no-access-log", *sys.argv[1:]]
if "MOUNT" in os.environ:
    fresh = ["unshare", "--mount", *["--map-root-user"][:os.geteuid()]]
    command = [*fresh, "sh", "-c", 'mount --bind $MOUNT && exec "$@"', "sh", *command]
os.umask(0)
os.execvp(command[0], command)
"""
TOKENS = "api_tokens.json"
ANSWER = re.compile(rb"HTTP/1.1 (\d+) .*\r\nworker: (\d+)\r\n", re.DOTALL)
LINE = re.compile(r"^(\d+) ((?:INFO|WARNING|ERROR) .*)\n", re.MULTILINE)

Asked = tuple[str, str]  # a path, and the name of the presented secret


def answers(
    valid: int = 200, wrong: int = 401, revoked: int = 401, nothing: int = 401, at: str = ""
) -> dict[Asked, int]:
    """Return the expected statuses; by default those without a fault. The environment key always works."""
    presented = {"valid": valid, "wrong": wrong, "revoked": revoked, "nothing": nothing, "key": 200}
    return {(f"/{at}", name): status for name, status in presented.items()}


def broken(reason: str, kept: int = 2, at: str = "") -> str:
    """Return the line about a token file that cannot be used."""
    return rf"ERROR \S*{at}/{TOKENS} cannot be used: {reason}\. Tokens read before \({kept}\) stay in force"


def gone(at: str = "") -> str:
    """Return the line about a token file that is gone."""
    return rf"ERROR \S*{at}/{TOKENS} is gone: its tokens are refused until it is back\. To open this server, restart it"


def read_again(active: int = 1, at: str = "") -> str:
    """Return the line about a token file that was read after a change."""
    return rf"INFO \S*{at}/{TOKENS} was read again: {active} active token\(s\)"


class Answer(NamedTuple):
    """The begin of a request, its path and secret, and its status and worker; 0 if the connection broke."""

    began: float
    asked: Asked
    status: int
    worker: int


@dataclass
class Watch:
    """Clients that send requests without a pause, on a new connection each time."""

    server: Server
    secrets: dict[str, str]
    expected: dict[Asked, int]
    may_break: bool = False
    given: list[Answer] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        headers = {name: f"Authorization: Bearer {secret}\r\n" for name, secret in self.secrets.items()}
        headers["nothing"] = ""
        self._requests = {
            (path, name): f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers[name]}\r\n".encode()
            for path, name in self.expected
            if name in headers
        }
        self._seen = self._read = 0
        self._stopping = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(6)]
        for client in self._clients:
            client.start()

    def _ask(self) -> None:
        while not self._stopping.is_set():
            for asked, request in self._requests.items():
                began, answer = time.monotonic(), b""
                with contextlib.suppress(OSError), socket.create_connection(self.server.address, timeout=60) as client:
                    client.sendall(request)
                    answer = b"".join(iter(partial(client.recv, 65536), b""))
                status, worker = (ANSWER.findall(answer) or [(0, 0)])[0]
                self.given.append(Answer(began, asked, int(status), int(worker)))

    def change(
        self,
        act: Callable[[], object],
        expected: dict[Asked, int],
        *lines: str,
        new: int = 0,
        each: bool = True,
        hold: float = 0.0,
    ) -> None:
        """Do something, and check that the server answers as *expected* from then on and logs *lines*.

        Args:
            act: the change.
            expected: the status of each path and secret.
            lines: the lines that each worker logs once; it logs no other warnings or errors.
            new: the number of new workers that must answer.
            each: false if only one worker logs *lines*.
            hold: seconds for which the answers are checked.
        """
        act()
        in_force = time.monotonic() + 2 * FRESHNESS
        wait_until(lambda: self._is_done(in_force + hold, lines, new, each=each), lambda: (lines, self._state()))
        self.workers = self._thorough(in_force + hold)
        fresh = self.given[self._seen :]
        self._seen += len(fresh)
        for answer in fresh:
            old = {self.expected[answer.asked]} if answer.began < in_force else set()
            assert answer.status in {expected[answer.asked]} | old | self._broken(), (answer, in_force, lines)
        self.expected = expected
        for logged in self._logged(self.workers, each=each):
            warnings = [line for line in logged if not line.startswith("INFO")]
            assert len(warnings) == sum(not line.startswith("INFO") for line in lines), warnings
        self._read = self.server.log.read_text().rfind("\n") + 1

    def end(self) -> str:
        """Stop the clients and the server; return its log."""
        self.stop()
        assert all(one.status in {self.expected[one.asked]} | self._broken() for one in self.given[self._seen :])
        log = self.server.stop()
        assert "Traceback" not in log
        return log

    def stop(self) -> None:
        """Stop the clients."""
        self._stopping.set()
        for client in self._clients:
            client.join()

    def _broken(self) -> set[int]:
        """Return 0 if a worker may end: it closes connections on which no request has begun."""
        return {0} if self.may_break else set()

    def _is_done(self, since: float, lines: tuple[str, ...], new: int, *, each: bool) -> bool:
        workers = self._thorough(since)
        if len(workers) < 2 or len(workers - self.workers) < new:
            return False
        groups = self._logged(workers, each=each)
        return all(any(re.search(one, line) for line in logged) for logged in groups for one in lines)

    def _thorough(self, since: float) -> set[int]:
        """Return the workers that have answered every kind of request since then."""
        pairs = {(answer.worker, answer.asked) for answer in self.given[self._seen :] if answer.began >= since}
        counts = Counter(worker for worker, _ in pairs)
        return {worker for worker, count in counts.items() if worker and count == len(self._requests)}

    def _logged(self, workers: set[int], *, each: bool) -> list[list[str]]:
        """Return the new lines in the log: of each worker, or of all together."""
        lines = LINE.findall(self.server.log.read_text()[self._read :])
        groups = [{worker} for worker in workers] if each else [workers]
        return [[line for worker, line in lines if int(worker) in group] for group in groups]

    def _state(self) -> object:
        return self.workers, self.given[-20:], self.server.log.read_text()[-2000:]
