"""Once it has been created, a secret appears nowhere: no output, log, file, error or object of ours shows it, or a part of it.

What is looked for is each secret beyond its visible prefix: whole, each half of it, in hexadecimal and in base64. The same
goes for the environment key, which may stand only where the operator put it.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from base64 import b64encode
from collections import deque
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest

import freegpt_auth
from freegpt_auth import BearerTokenMiddleware, FileTokenStore, FreeGPTAuthError, Settings
from freegpt_auth.guard.credentials import SUBPROTOCOL
from freegpt_auth.tokens import PREFIX_LENGTH, checked_name, digest_of, find, generate_secret, issue
from tests.helpers.applications import LIFESPAN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

APPLICATION = (
    LIFESPAN
    + """
import gc, json, logging, os
from freegpt_auth import BearerTokenMiddleware

logging.basicConfig(level=1, format="%(name)s: %(message)s")

def live():
    "Return what is alive of what is looked for, but for what the operator put there."
    gc.collect()
    with open("traces") as file:
        traces = file.read().split()
    put = {id(value) for value in (*os.environ._data.values(), *os.environ._data)} | {id(trace) for trace in traces}
    values = {id(value): value for found in gc.get_objects() for value in gc.get_referents(found) if id(value) not in put}
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
"""What uvicorn and websockets themselves log of a handshake at the levels TRACE and DEBUG, before we are asked."""

LOGGED_COMMAND = """
import contextlib, itertools, logging, os, sys

logging.basicConfig(level=1)
numbers = itertools.count()

def keep(event, arguments):
    "Keep what a file held that is removed, or renamed, under another name."
    if event in ("os.remove", "os.rename"):
        with contextlib.suppress(OSError):
            os.link(arguments[0], f"kept/{os.getpid()}-{next(numbers)}")

sys.addaudithook(keep)
from freegpt_auth.cli import main
raise SystemExit(main())
"""
NOW = datetime.now(UTC)
KEY = generate_secret()
KINDS = ("valid", "revoked", "expired")
CREATED = 5
PACKAGE = str(Path(freegpt_auth.__file__).parent)
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: realtime, "
)


def traces(secret: str) -> list[str]:
    """Return what must not be found of a secret."""
    hidden = secret[PREFIX_LENGTH:]
    middle = len(hidden) // 2
    whole = secret.encode()
    return [hidden[:middle], hidden[middle:], whole.hex()[2 * PREFIX_LENGTH :], b64encode(whole).decode()[20:-4]]


def shown(text: str | bytes, secrets: Iterable[str]) -> list[str]:
    """Return which traces of *secrets* stand in *text*."""
    text = text if isinstance(text, str) else text.decode("latin-1")
    return [trace for secret in secrets for trace in traces(secret) if trace in text]


def files_that_show(folder: Path, secrets: list[str], *, but: Iterable[str] = ()) -> Iterator[tuple[Path, bool]]:
    """Tell of each file in *folder*, its name included, whether it shows one of *secrets*."""
    for path in folder.rglob("*"):
        if path.name not in but and path.is_file():
            try:
                yield path, bool(shown(path.read_bytes() + os.fsencode(path), secrets))
            except FileNotFoundError:  # a temporary file, gone again
                continue


class Watcher:
    """Reads every file of a folder all the time, so that no temporary file goes unread."""

    def __init__(self, folder: Path, secrets: list[str]) -> None:
        self._folder, self._secrets, self._going = folder, secrets, True
        self.seen: set[str] = set()
        self.leaking: set[str] = set()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while self._going:
            for path, leaks in files_that_show(self._folder, list(self._secrets), but=["traces"]):
                self.seen.add(path.name)
                if leaks and path.suffix != ".log":  # the log is looked at by line
                    self.leaking.add(path.name)

    def stop(self) -> None:
        """Read no more."""
        self._going = False
        self._thread.join(timeout=30)


class Done(NamedTuple):
    """What a command printed."""

    out: str
    err: str


def run(*arguments: str, typed: str = "") -> Done:
    """Run a command with every library logging at the lowest level."""
    done = subprocess.run(
        [sys.executable, "-c", LOGGED_COMMAND, *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Done(done.stdout, done.stderr)


def create(*arguments: str) -> tuple[str, str]:
    """Create a token by the command, and return its secret and what else was printed."""
    done = run("create", "somebody", *arguments)
    (secret,) = re.findall(r"sk-\w{49}", done.out)
    return secret, done.out.replace(secret, "") + done.err


def talk(url: str, request: str) -> bytes:
    """Send a request as it is and return all that comes back."""
    address = urlsplit(url)
    answer = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as connection:
        connection.sendall(request.encode())
        while data := connection.recv(65536):
            answer += data
            if (
                answer.startswith(b"HTTP/1.1 101") and b"\x88" in answer.partition(b"\r\n\r\n")[2]
            ):  # it was closed at once
                connection.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
                break
    return answer


def request(path: str, lines: str, *, method: str = "GET") -> str:
    """Return a request after which the connection is closed."""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n\r\n"


def upgrade(path: str, protocol: str) -> str:
    """Return a WebSocket's opening handshake."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{UPGRADE}{protocol}\r\n\r\n"


def attack(url: str, secrets: Iterable[str]) -> bytes:
    """Present each secret in every way, right and wrong, and return all that was answered."""
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
            heard += talk(url, request(path, lines))
        heard += talk(url, upgrade(path, SUBPROTOCOL + secret))
        heard += talk(url, upgrade(path, f"{SUBPROTOCOL}{secret}, {SUBPROTOCOL}{secret}"))
    return heard


def family(pid: int) -> Iterator[int]:
    """Return a process and all that it started."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(child))


def assert_processes_hide(pid: int, secrets: list[str]) -> None:
    """Fail if an argument of a process shows a secret, or a variable does that the operator did not set to it."""
    for each in family(pid):
        process = Path(f"/proc/{each}")
        assert shown((process / "cmdline").read_bytes(), secrets) == []
        variables = (process / "environ").read_bytes().split(b"\0")
        assert [variable.partition(b"=")[0] for variable in variables if shown(variable, secrets)] == [
            b"FREEGPT_API_KEY"
        ]
        assert variables.count(f"FREEGPT_API_KEY={KEY}".encode()) == 1


def still_alive(url: str) -> str:
    """Return what a server's objects show once its connections are closed; a server takes its time to close some."""
    deadline = time.monotonic() + 60
    while True:
        (alive,) = re.findall(r"\[.*\]", talk(url, request("/live", "X: y")).decode())
        if alive == "[]" or time.monotonic() > deadline:
            return alive.strip("[]")
        time.sleep(0.1)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_secret_is_nowhere_once_it_was_created(tmp_path: Path, serve: Callable[..., Any], kind: str) -> None:
    """Neither commands nor servers leave a secret in what they print, log, write, answer, or in how they were called."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "kept").mkdir()
    secrets = [KEY]
    watcher = Watcher(tmp_path, secrets)
    try:
        said = []
        for number in range(CREATED):
            secret, rest = create(*(["--json"] if number % 2 else []), *(["--expires-in", "1s"] if number == 2 else []))
            secrets.append(secret)
            said.append(rest)
        valid, revoked, expired, deleted = secrets[1:5]
        (tmp_path / "traces").write_text("\n".join(trace for secret in secrets for trace in traces(secret)))
        (tmp_path / "app.py").write_text(APPLICATION)
        module, *arguments = SERVERS[kind]
        server = serve("app:app", *arguments, module=module, FREEGPT_API_KEY=KEY, TMPDIR=str(tmp_path / "tmp"))
        said += run("revoke", "-", typed=f"{revoked}\n")
        heard = attack(server.url, [valid, revoked, expired, deleted, KEY])
        assert b"200" in heard
        assert b"401" in heard
        if kind != "hypercorn":  # a look at all its objects leaves it unable to stop
            assert still_alive(server.url) == ""
        assert_processes_hide(server.process.pid, secrets)
        said += [*run("revoke", valid), *run("revoke", revoked), *run("delete", deleted), *run("delete", deleted)]
        said += [*run("list"), *run("list", "--json"), *run("revoke", f"{valid[:-1]}-"), *run("create", "a", valid)]
        heard += attack(server.url, [valid, deleted])
        log = server.stop()
    finally:
        watcher.stop()
    assert {"api_tokens.json", "api_tokens.json.lock", "api_tokens.usage.db"} <= watcher.seen
    assert len(list((tmp_path / "kept").iterdir())) > CREATED, "what was removed is there to be looked at"
    assert watcher.leaking == set()
    assert [path for path, leaks in files_that_show(tmp_path, secrets, but=["traces", server.log.name]) if leaks] == []
    assert [shown(text, secrets) for text in said if shown(text, secrets)] == []
    assert shown(heard, secrets) == []
    assert [line for line in log.splitlines() if shown(line, secrets) and not THEIRS.search(line)] == []
    assert "refused" in log


@pytest.mark.parametrize("kind", ["h11", "httptools", "hypercorn"])
def test_unknown_revoked_and_expired_have_one_face(serve: Callable[..., Any], kind: str) -> None:
    """Byte for byte the same is answered to a secret that never was one, that was revoked and that has expired."""
    secrets = dict(zip(KINDS, keep_tokens(FileTokenStore("api_tokens.json")), strict=True))
    secrets["unknown"] = generate_secret()
    del secrets["valid"]
    Path("app.py").write_text(APPLICATION)
    module, *arguments = SERVERS[kind]
    server = serve("app:app", *arguments, module=module)
    for path in ("/v1/models", "/v1/messages", "/nowhere", "/fail"):
        for make in (
            lambda path, secret: request(path, f"Authorization: Bearer {secret}"),
            lambda path, secret: request(path, f"X-Api-Key: {secret}", method="HEAD"),
            lambda path, secret: request(path, f"Api-Key: {secret}\r\nContent-Length: 2", method="POST") + "hi",
            lambda path, secret: upgrade(path, SUBPROTOCOL + secret).replace(
                "Connection: Upgrade", "Connection: close, Upgrade"
            ),
        ):
            faces = {re.sub(rb"(?i)\r\ndate: [^\r]*", b"", talk(server.url, make(path, s))) for s in secrets.values()}
            assert len(faces) == 1
            assert faces.pop().startswith(b"HTTP/1.1 401")


def keep_tokens(store: Any) -> list[str]:
    """Put a token of each kind into *store*, and return their secrets."""
    secrets = []
    for kind in KINDS:
        token, secret = issue(kind, now=NOW, expires_at=NOW - timedelta(days=1) if kind == "expired" else None)
        store.add(digest_of(secret), token)
        if kind == "revoked":
            store.revoke(token.id, NOW)
        secrets.append(secret)
    return secrets


def scope(secret: str, kind: str = "http") -> dict[str, Any]:
    """Return a request that presents a secret in every way at once."""
    value = secret.encode()
    headers = [(b"authorization", b"Bearer " + value), (b"x-api-key", value), (b"api-key", value)]
    common = {"type": kind, "path": "/v1/models", "headers": headers, "client": ("127.0.0.1", 50000)}
    return {**common, "subprotocols": [SUBPROTOCOL + secret]} if kind == "websocket" else {**common, "method": "GET"}


async def fails(_scope: Any, _receive: Any, _send: Any) -> None:
    """Fail as an application does."""
    raise ZeroDivisionError


async def receive() -> dict[str, Any]:
    """Return the whole of an empty request."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(_message: Any) -> None:
    """Take a message."""


async def answers(_scope: Any, _receive: Any, _send: Any) -> None:
    """Answer nothing, without fail."""


class Failing(FileTokenStore):
    """A store with a mistake."""

    def peek(self, _digest: bytes) -> Any:
        """Fail as no store should."""
        raise ZeroDivisionError


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("store", [FileTokenStore, Failing])
async def test_traceback_with_locals_shows_no_verified_secret(store: type[FileTokenStore], kind: str) -> None:
    """Where an application fails no frame holds the secret; where a store fails, before it is verified, the scope does."""
    secret, *_ = keep_tokens(FileTokenStore("api_tokens.json"))
    middleware = BearerTokenMiddleware(fails, store=store("api_tokens.json"))
    middleware._authenticator.mode = freegpt_auth.AuthMode.TOKEN_FILE
    with pytest.raises(ZeroDivisionError) as caught:
        await middleware(scope(secret, kind), receive, send)
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in told.stack if frame.filename.startswith((PACKAGE, __file__)) and frame.locals]
    assert any(frame.filename.startswith(PACKAGE) for frame in frames)
    ours = {"caught", "secret"}  # of this test itself
    found = [(name, value) for frame in frames for name, value in (frame.locals or {}).items() if name not in ours]
    assert {name for name, value in found if shown(value, [secret])} == ({"scope"} if store is Failing else set())
    if store is not Failing:
        assert repr(digest_of(secret)) not in repr(found)
    assert shown("".join(traceback.format_exception(caught.value)), [secret]) == []


def ancestral(secret: str, record: str) -> bytes:
    """Return a token file in the format that holds plain tokens."""
    return f'{{"{secret}": {record}}}'.encode()


def read_file(content: bytes) -> object:
    """Read a token file as commands do."""
    Path("t").write_bytes(content)
    return FileTokenStore("t").tokens()


BROKEN = {
    "a key with a control character": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY": f"{s}\x07"}),
    "a key that is too long": lambda s: Settings.from_env(environ={"OPENAI_API_KEY": s * 100}),
    "a key in place of its file": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY_FILE": s}),
    "two keys": lambda s: Settings.from_env(environ={"FREEGPT_API_KEY": s, "FREEGPT_API_KEY_FILE": s}),
    "a wrong record": lambda s: read_file(ancestral(s, '{"name": 5}')),
    "a wrong date": lambda s: read_file(ancestral(s, '{"name": "x", "created_at": "0001-01-01T00:00:00+14:00"}')),
    "no record": lambda s: read_file(ancestral(s, "5")),
    "half a file": lambda s: read_file(ancestral(s, '{"name": "x')),
    "a file nested deeply": lambda s: read_file(ancestral(s, "[" * 100_000)),
    "a file that is not text": lambda s: read_file(ancestral(s, '{"name": "x"}').replace(b"x", b"\xff")),
    "a plain token for a digest": lambda s: read_file(b'{"version": 1, "tokens": [{"digest": "%b"}]}' % s.encode()),
    "the same token twice": lambda s: [FileTokenStore("t").add(digest_of(s), issue("x", now=NOW)[0]) for _ in "12"],
    "a secret for an id": lambda s: FileTokenStore("t").revoke(s[:PREFIX_LENGTH], NOW),
    "a name with a line end": lambda s: checked_name(s[:PREFIX_LENGTH] + "\n"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_no_error_shows_a_secret(what: str) -> None:
    """An error about a key, a request or a token file says what is wrong without saying the secret, and so do its causes."""
    secret = generate_secret()
    with pytest.raises((FreeGPTAuthError, ValueError)) as caught:
        BROKEN[what](secret)
    error: BaseException | None = caught.value
    assert shown("".join(traceback.format_exception(error)), [secret]) == []
    while error is not None:
        assert shown(f"{error!r} {error} {error.args!r} {vars(error)!r}", [secret]) == []
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def texts_of(*roots: object) -> set[str]:
    """Return every text that can be reached from *roots* by what objects refer to, not by what their code may name."""
    ends = (ModuleType, type, CodeType, FrameType, BuiltinFunctionType, logging.Logger)
    seen, waiting, texts = {id(root) for root in roots}, deque(roots), set()
    while waiting:
        found = waiting.popleft()
        if isinstance(found, (str, bytes, bytearray)):
            texts.add(found if isinstance(found, str) else bytes(found).decode("latin-1"))
            continue
        code = isinstance(found, FunctionType)
        for other in (found.__closure__, found.__defaults__) if code else gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, ends):
                seen.add(id(other))
                waiting.append(other)
    return texts


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_no_object_of_ours_keeps_a_secret(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """After requests of all kinds nothing that the middleware or the package refers to holds a secret, or the key."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    secrets = [*keep_tokens(FileTokenStore("api_tokens.json")), KEY, generate_secret()]
    middleware = BearerTokenMiddleware(answers, usage_interval=60.0)
    for secret in secrets:
        await middleware(scope(secret, kind), receive, send)
        repeated = scope(secret, kind)
        await middleware({**repeated, "headers": repeated["headers"] * 2}, receive, send)
    ours = [vars(module) for name, module in sys.modules.items() if name.partition(".")[0] == "freegpt_auth"]
    texts = texts_of(middleware, *ours)
    assert digest_of(KEY).decode("latin-1") in texts, "the walk reaches what is kept"
    assert shown("\n".join(texts), secrets) == []
    assert shown(repr(middleware) + repr(vars(middleware)) + repr(Settings.from_env()), secrets) == []
    assert find(secrets[0], FileTokenStore("api_tokens.json").tokens())[0].name == "valid"
