"""After its creation no part of a secret appears in any output, log, file, error or object of the library.

The tests search for each secret beyond its visible prefix: whole, each half, in hexadecimal and in base64. They search
for the environment key too, which may be only where the operator put it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from base64 import b64encode
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import freegpt_auth
from freegpt_auth import BearerTokenMiddleware, FileTokenStore, FreeGPTAuthError, Settings
from freegpt_auth.guard.credentials import SUBPROTOCOL
from freegpt_auth.names import checked_name
from freegpt_auth.tokens import PREFIX_LENGTH, digest_of, generate_secret, issue
from tests.helpers.applications import LIFESPAN
from tests.helpers.asgi import ask
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from starlette.types import Receive, Scope, Send

    from tests.conftest import Keep
    from tests.helpers.servers import Serve

APPLICATION = (
    LIFESPAN
    + """
import gc, json, logging, os
from freegpt_auth import BearerTokenMiddleware

logging.basicConfig(level=1, format="%(name)s: %(message)s")

def live():
    "Return the traces that live objects hold, or what they contain, except those that the operator put there."
    gc.collect()
    with open("traces") as file:
        traces = file.read().split()
    put = {id(value) for value in (*os.environ._data.values(), *os.environ._data)} | {id(trace) for trace in traces}
    found = (value for tracked in gc.get_objects() for value in gc.get_referents(tracked))
    values = {id(value): value for value in found if id(value) not in put}
    for value in [value for value in values.values() if not gc.is_tracked(value)]:  # such as a dict of strings
        values.update((id(part), part) for part in gc.get_referents(value) if id(part) not in put)
    texts = [value for value in values.values() if isinstance(value, str)]
    texts += [bytes(value).decode("latin-1") for value in values.values() if isinstance(value, (bytes, bytearray))]
    return [trace for trace in traces if any(trace in text for text in texts)]

async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    logging.getLogger("application").info("%r", scope)
    if scope["path"] == "/fail":
        raise RuntimeError("the application failed")
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        return
    body = json.dumps(live() if scope["path"] == "/live" else [scope["user"].display_name]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})

app = BearerTokenMiddleware(hello, public_paths=["/live"], usage_interval=0.1)
"""
)
SERVERS = {
    "h11": ("uvicorn", "--http", "h11", "--ws", "wsproto", "--log-level", "trace"),
    "httptools": ("uvicorn", "--http", "httptools", "--ws", "websockets-sansio", "--log-level", "trace"),
    "workers": ("uvicorn", "--workers", "2", "--log-level", "trace"),
    "hypercorn": ("hypercorn", "--log-level", "debug", "--access-logfile", "-", "--error-logfile", "-"),
}
THEIRS = re.compile(r"ASGI \[\d+\] Started scope=.*'subprotocols'|DEBUG: +< sec-websocket-protocol: ")
"""The lines that uvicorn and websockets log of a handshake at TRACE and DEBUG, before the middleware runs."""

DATE = re.compile(rb"\r\ndate: [^\r]*", re.IGNORECASE)
LOGGED_COMMAND = """
import contextlib, itertools, logging, os, sys

logging.basicConfig(level=1)
numbers = itertools.count()

def keep(event, arguments):
    "Keep a link to each file that is removed or renamed."
    if event in ("os.remove", "os.rename"):
        with contextlib.suppress(OSError):
            os.link(arguments[0], f"kept/{os.getpid()}-{next(numbers)}")

sys.addaudithook(keep)
from freegpt_auth.cli import main
raise SystemExit(main())
"""
NOW = datetime.now(UTC)
TOKEN, _ = issue("x", now=NOW)
KEY = generate_secret()
PACKAGE = str(Path(freegpt_auth.__file__).parent)
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: realtime, "
)


def traces(secret: str) -> list[str]:
    """Return the parts of a secret that must not be found."""
    hidden = secret[PREFIX_LENGTH:]
    middle = len(hidden) // 2
    whole = secret.encode()
    return [hidden[:middle], hidden[middle:], whole.hex()[2 * PREFIX_LENGTH :], b64encode(whole).decode()[20:-4]]


def shown(text: str | bytes, secrets: Iterable[str]) -> list[str]:
    """Return the traces of *secrets* in *text*."""
    text = text if isinstance(text, str) else text.decode("latin-1")
    return [trace for secret in secrets for trace in traces(secret) if trace in text]


def files_that_show(folder: Path, secrets: list[str], *, but: Iterable[str] = ()) -> Iterator[tuple[Path, bool]]:
    """Yield each file in *folder*, and whether its name or content shows one of *secrets*."""
    for path in folder.rglob("*"):
        if path.name not in but and path.is_file():
            try:
                yield path, bool(shown(path.read_bytes() + os.fsencode(path), secrets))
            except FileNotFoundError:  # a temporary file that was removed
                continue


class Watcher(threading.Thread):
    """Reads every file of a folder all the time, to see temporary files too."""

    def __init__(self, folder: Path, secrets: list[str]) -> None:
        super().__init__()
        self._folder, self._secrets, self._over = folder, secrets, threading.Event()
        self.seen: set[str] = set()
        self.leaking: set[str] = set()

    def run(self) -> None:
        """Read until :meth:`stop`."""
        while not self._over.is_set():
            for path, leaks in files_that_show(self._folder, list(self._secrets), but=["traces"]):
                self.seen.add(path.name)
                if leaks and path.suffix != ".log":  # the log is checked line by line
                    self.leaking.add(path.name)

    def stop(self) -> None:
        """Stop reading."""
        self._over.set()
        self.join(timeout=30)


def run(*arguments: str, typed: str = "") -> tuple[str, str]:
    """Run a command while every library logs at the lowest level; return its output and errors."""
    command = [sys.executable, "-c", LOGGED_COMMAND, *arguments]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout, done.stderr


def create(*arguments: str) -> tuple[str, str]:
    """Create a token with the command, and return its secret and the other output."""
    out, err = run("create", "somebody", *arguments)
    (secret,) = re.findall(r"sk-\w{49}", out)
    return secret, out.replace(secret, "") + err


def talk(address: tuple[str, int], request: str) -> bytes:
    """Send a request and return the whole answer."""
    answer = b""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(request.encode())
        while data := connection.recv(65536):
            answer += data
            head, _, frames = answer.partition(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 101") and b"\x88" in frames:  # the server closes the WebSocket
                connection.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
                break
    return answer


def request(path: str, lines: str, *, method: str = "GET") -> str:
    """Return a request after which the connection is closed."""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n\r\n"


def upgrade(path: str, protocol: str) -> str:
    """Return a WebSocket's opening handshake."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{UPGRADE}{protocol}\r\n\r\n"


def attack(address: tuple[str, int], secrets: Iterable[str]) -> bytes:
    """Present each secret in every way, right and wrong, and return all answers."""
    heard = b""
    for secret, path in product(secrets, ("/v1/messages", "/fail")):
        for lines in (
            f"Authorization: Bearer {secret}",
            f"X-Api-Key: {secret}",
            f"api-key: {secret}",
            f"Authorization: {secret}",
            f"Authorization: Basic {secret}",
            f"Authorization: Bearer {secret}\r\nAuthorization: Bearer {secret}",
            f"Authorization: Bearer {secret}\r\nX-Api-Key: {secret[::-1]}",
            f"Authorization: Bearer {secret}, Bearer {secret}",
            f"Authorization: Bearer Bearer {secret}",
            f'X-Api-Key: "{secret}"',
            f"Authorization: Bearer {secret}\r\nX-Api-Key: {secret}",
        ):
            heard += talk(address, request(path, lines))
        heard += talk(address, request(path, f"X-Api-Key: {secret}", method="HEAD"))
        heard += talk(address, request(path, f"Api-Key: {secret}\r\nContent-Length: 2", method="POST") + "hi")
        heard += talk(address, upgrade(path, SUBPROTOCOL + secret))
        heard += talk(address, upgrade(path, f"{SUBPROTOCOL}{secret}, {SUBPROTOCOL}{secret}"))
    return heard


def family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(child))


def assert_processes_hide(pid: int, secrets: list[str]) -> None:
    """Check that no argument of a process shows a secret, and no variable but the one that the operator set."""
    for each in family(pid):
        process = Path(f"/proc/{each}")
        assert shown((process / "cmdline").read_bytes(), secrets) == []
        variables = (process / "environ").read_bytes().split(b"\0")
        assert [variable.partition(b"=")[0] for variable in variables if shown(variable, secrets)] == [
            b"FREEGPT_API_KEY"
        ]
        assert variables.count(f"FREEGPT_API_KEY={KEY}".encode()) == 1


def alive(address: tuple[str, int]) -> str:
    """Return the list of the traces in a server's objects."""
    return str(re.findall(r"\[.*\]", talk(address, request("/live", "X: y")).decode())[0])


@pytest.mark.parametrize(
    "kind", ["h11", "httptools", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("workers", "hypercorn"))]
)
def test_secret_appears_nowhere(tmp_path: Path, serve: Serve, kind: str) -> None:
    """No command and no server shows a secret in its output, log, files, answers, arguments, variables or objects."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "kept").mkdir()
    secrets = [KEY]
    watcher = Watcher(tmp_path, secrets)
    watcher.start()
    try:
        printed: list[str] = []
        for options in ((), ("--json",), ("--expires-in", "1s"), ("--json",), ()):
            secret, rest = create(*options)
            secrets.append(secret)
            printed.append(rest)
        valid, revoked, expired, deleted = secrets[1:5]
        (tmp_path / "traces").write_text("\n".join(trace for secret in secrets for trace in traces(secret)))
        (tmp_path / "app.py").write_text(APPLICATION)
        module, *arguments = SERVERS[kind]
        server = serve("app:app", *arguments, module=module, FREEGPT_API_KEY=KEY, TMPDIR=str(tmp_path / "tmp"))
        printed += run("revoke", "-", typed=f"{revoked}\n")
        heard = attack(server.address, [valid, revoked, expired, deleted, KEY])
        assert b"200" in heard
        assert b"401" in heard
        if kind != "hypercorn":  # it cannot stop after a walk over all its objects
            wait_until(lambda: alive(server.address) == "[]", lambda: alive(server.address))  # connections end late
        assert_processes_hide(server.process.pid, secrets)
        printed += [*run("revoke", valid), *run("revoke", revoked), *run("delete", deleted), *run("delete", deleted)]
        printed += [*run("list"), *run("list", "--json"), *run("revoke", f"{valid[:-1]}-"), *run("create", "a", valid)]
        refusals = [attack(server.address, [secret]) for secret in (valid, revoked, expired, deleted)]
        log = server.stop()
    finally:
        watcher.stop()
    assert {"api_tokens.json", "api_tokens.json.lock", "api_tokens.usage.db"} <= watcher.seen
    assert len(list((tmp_path / "kept").iterdir())) > len(secrets)
    assert watcher.leaking == set()
    assert [path for path, leaks in files_that_show(tmp_path, secrets, but=["traces", server.log.name]) if leaks] == []
    assert shown("\n".join(printed), secrets) == []
    assert shown(heard + b"".join(refusals), secrets) == []
    assert len({DATE.sub(b"", refusal) for refusal in refusals}) == 1, (
        "a refusal tells whether the token was valid once"
    )
    assert [line for line in log.splitlines() if shown(line, secrets) and not THEIRS.search(line)] == []
    assert "refused" in log


async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Fail, as an application may."""
    raise ZeroDivisionError


class Failing(FileTokenStore):
    """A store with a bug."""

    def peek(self, _digest: bytes) -> NoReturn:
        """Fail."""
        raise ZeroDivisionError


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("store", [FileTokenStore, Failing])
async def test_traceback_shows_no_verified_secret(store: type[FileTokenStore], kind: str, keep: Keep) -> None:
    """If an application fails, no frame holds the secret; if a store fails before verification, only the scope does."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    middleware, value = BearerTokenMiddleware(fails, store=store("api_tokens.json")), secret.encode()
    headers = [(b"authorization", b"Bearer " + value), (b"x-api-key", value), (b"api-key", value)]
    offers: dict[str, Any] = {"subprotocols": [SUBPROTOCOL + secret]} if kind == "websocket" else {}
    with pytest.raises(ZeroDivisionError) as caught:
        await ask(middleware, type=kind, headers=headers, **offers)
    formatted = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in formatted.stack if frame.filename.startswith(PACKAGE) or frame.name == "fails"]
    found = [pair for frame in frames for pair in (frame.locals or {}).items()]
    assert found
    assert {name for name, value in found if shown(value, [secret])} == ({"scope"} if store is Failing else set())
    if store is not Failing:
        assert repr(digest_of(secret)) not in repr(found)
    assert shown("".join(traceback.format_exception(caught.value)), [secret]) == []


def ancestral(secret: str, record: str) -> bytes:
    """Return a token file in the ancestor's format, with plain tokens."""
    return f'{{"{secret}": {record}}}'.encode()


def read_file(content: bytes) -> object:
    """Read a token file, as commands do."""
    Path("t").write_bytes(content)
    return FileTokenStore("t").tokens()


BROKEN: dict[str, Callable[[str], object]] = {
    "a key with a control character": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY": f"{s}\x07"}),
    "a key that is too long": lambda s: Settings.from_env(environ={"OPENAI_API_KEY": s * 100}),
    "a key in place of its file": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY_FILE": s}),
    "two keys": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY": s, "FREEGPT_API_KEY_FILE": s}),
    "a wrong record": lambda s: read_file(ancestral(s, '{"name": 5}')),
    "a wrong date": lambda s: read_file(ancestral(s, '{"name": "x", "created_at": "0001-01-01T00:00:00+14:00"}')),
    "a file that is not text": lambda s: read_file(ancestral(s, '{"name": "x"}').replace(b"x", b"\xff")),
    "a plain token for a digest": lambda s: read_file(b'{"version": 1, "tokens": [{"digest": "%b"}]}' % s.encode()),
    "the same token twice": lambda s: [*map(partial(FileTokenStore("t").add, digest_of(s)), [TOKEN, TOKEN])],
    "a secret for an id": lambda s: FileTokenStore("t").revoke(s[:PREFIX_LENGTH], NOW),
    "a name with a line end": lambda s: checked_name(s[:PREFIX_LENGTH] + "\n"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_no_error_shows_a_secret(case: str) -> None:
    """An error about a key, a request or a token file does not contain the secret, and neither do its causes."""
    secret = generate_secret()
    with pytest.raises((FreeGPTAuthError, ValueError)) as caught:
        BROKEN[case](secret)
    error: BaseException | None = caught.value
    assert shown("".join(traceback.format_exception(error)), [secret]) == []
    while error is not None:
        assert shown(f"{error!r} {error} {error.args!r} {vars(error)!r}", [secret]) == []
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
