"""The example server, run as a reader runs it: every endpoint, every way to configure it."""

from __future__ import annotations

import json
import re
import runpy
import socket
import struct
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.protocol import State
from websockets.sync.client import connect
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.helpers.servers import Serve

EXAMPLE = Path(__file__).parent.parent / "examples" / "chat_server.py"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
KEY_PROTOCOL = "openai-insecure-api-key."
TOKEN, SECRET = issue("a-token", now=datetime.now(UTC))
WRONG = SECRET[:-1] + ("0" if SECRET[-1] != "0" else "1")


def call(server: Any, path: str, token: str | None = None, body: object = None) -> httpx.Response:
    """Send one request, a POST if there is a body. A body that is not bytes is sent as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    method = "GET" if content is None else "POST"
    return httpx.request(method, server.url + path, headers=headers, content=content, timeout=60)


def chat(server: Any, token: str | None, messages: object = HELLO, **others: object) -> httpx.Response:
    """Request a chat completion."""
    return call(server, CHAT, token, {"model": "freegpt-4", "messages": messages, **others})


def realtime(server: Any, token: str | None = None, protocols: Sequence[str] = ()) -> Any:
    """Open the WebSocket, with a token in the header or with subprotocols."""
    url, headers = f"ws{server.url.removeprefix('http')}/v1/realtime", {"Authorization": f"Bearer {token}"}
    offered = [Subprotocol(protocol) for protocol in protocols] or None
    return connect(
        url, additional_headers=headers if token else None, subprotocols=offered, proxy=None, open_timeout=60
    )


@pytest.fixture(scope="module")
def server(serve_once: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one server for all tests of its answers; its log must hold no traceback and no secret."""
    file = tmp_path_factory.mktemp("tokens") / "mine.json"
    FileTokenStore(file).add(digest_of(SECRET), TOKEN)
    server = serve_once(script=EXAMPLE, FREEGPT_AUTH_STORE=str(file))
    yield server
    log = server.stop()
    assert "Traceback" not in log
    assert SECRET not in log
    assert WRONG not in log


def test_endpoints(server: Any) -> None:
    """Only the health check needs no token; the list of models and chat completions do."""
    assert call(server, "/health").json() == {"status": "ok"}
    assert [call(server, path).status_code for path in ("/health/", "/v1/models")] == [401, 401]
    models = call(server, "/v1/models", SECRET).json()["data"]
    assert [(model["object"], model["id"]) for model in models] == [("model", "freegpt-4")]
    for token, stream in ((None, False), (WRONG, True)):
        refused = chat(server, token, stream=stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_completion(server: Any) -> None:
    """A completion has OpenAI's form; streamed, it is events: the role, the words, the finish reason, and [DONE]."""
    plain, stream = (chat(server, SECRET, stream=stream) for stream in (False, True))
    common = {key: plain.json()[key] for key in ("id", "created", "model")}
    assert common["id"].startswith("chatcmpl-")
    assert common["model"] == "freegpt-4"
    assert isinstance(common["created"], int)
    message = {"role": "assistant", "content": "You said: Hello!"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert plain.json() == {**common, "object": "chat.completion", "choices": [choice], "usage": usage}
    assert stream.headers["content-type"].startswith("text/event-stream")
    *events, done, end = stream.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {(chunk["object"], chunk["id"]) for chunk in chunks} == {("chat.completion.chunk", common["id"])}
    assert not any("usage" in chunk for chunk in chunks)  # unless the client asks for it
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in ("You", " said:", " Hello!")), {}]
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"} for delta in deltas
    ]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([*HELLO, {"role": "user", "content": "And now?"}], "And now?"),
        ([*HELLO, {"role": "assistant", "content": "Yes?"}], "Hello!"),
        ([{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "image"}]}], "One."),
        ([{"role": "user", "content": "a  b\nc"}], "a  b\nc"),
        ([{"role": "user", "content": "\ud83d"}], "\ud83d"),  # half an emoji
    ],
)
def test_last_message_is_repeated(server: Any, messages: object, said: str) -> None:
    """The user's last message is repeated character for character, whether streamed or not."""
    plain = chat(server, SECRET, messages).json()["choices"][0]["message"]["content"]
    events = chat(server, SECRET, messages, stream=True).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert plain == "".join(delta.get("content", "") for delta in deltas) == f"You said: {said}"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b'{"model": "\xff"}', 400, None, id="encoding"),
        pytest.param(b"[" * 200_000, 400, None, id="depth"),
        pytest.param(b"9" * 5000, 400, None, id="digits"),
        ({"messages": HELLO}, 400, None),
        ({"model": "freegpt-4", "messages": "Hello!"}, 400, None),
        ({"model": "freegpt-4", "messages": [None, {"role": "system"}]}, 400, None),
        ({"model": "\ud83d", "messages": HELLO}, 404, "model_not_found"),
    ],
)
def test_bad_requests(server: Any, body: object, status: int, code: str | None) -> None:
    """A request that cannot be answered gets an error in OpenAI's form."""
    reply = call(server, CHAT, SECRET, body)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (reply.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)


BY_PROTOCOL = ["openai-beta.realtime-v1", KEY_PROTOCOL + SECRET, "realtime"]


@pytest.mark.parametrize(
    ("token", "protocols", "chosen"),
    [(SECRET, [], None), (None, BY_PROTOCOL, "realtime"), (None, BY_PROTOCOL[1:2], None)],
    ids=["header", "protocols", "protocol"],
)
def test_websocket(server: Any, token: str | None, protocols: list[str], chosen: str | None) -> None:
    """A WebSocket sends its token in a header or as a subprotocol, which is never sent back; its messages are."""
    with realtime(server, token, protocols) as websocket:
        assert websocket.subprotocol == chosen
        assert SECRET not in str(websocket.response.headers)
        for message in ("Hello!", b"\x00\xff"):
            websocket.send(message)
            assert websocket.recv(timeout=60) == message


@pytest.mark.parametrize(
    ("token", "protocols"),
    [(None, ["realtime"]), (WRONG, []), (None, [KEY_PROTOCOL + WRONG])],
    ids=["nothing", "header", "protocol"],
)
def test_websocket_refused(server: Any, token: str | None, protocols: list[str]) -> None:
    """A WebSocket without a valid token is refused with HTTP 401, before the upgrade."""
    with pytest.raises(InvalidStatus) as caught:
        realtime(server, token, protocols)
    response = caught.value.response
    assert response.status_code == 401
    assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
    assert "sec-websocket-protocol" not in response.headers
    assert WRONG not in str(response.headers) + response.body.decode()


def test_websocket_client_leaves(server: Any) -> None:
    """A client that leaves during an answer causes no error in the server."""
    client = ClientProtocol(parse_uri(f"ws{server.url.removeprefix('http')}/v1/realtime"))
    request = client.connect()
    request.headers["Authorization"] = f"Bearer {SECRET}"
    client.send_request(request)
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(b"".join(client.data_to_send()))
        client.receive_data(connection.recv(65536))
        assert client.state is State.OPEN
        # More than all buffers on the way back hold: the second answer has to wait, and the client does not.
        client.send_binary(bytes(12_000_000))
        client.send_text(b"Hello!")
        connection.sendall(b"".join(client.data_to_send()))
        assert connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.get("/health") == 200


def test_open_mode_until_a_token_is_created(serve: Serve, command: Callable[..., Any]) -> None:
    """With nothing configured every request passes, with a warning; then only the token works, until it is revoked."""
    server = serve(script=EXAMPLE)
    assert chat(server, None).status_code == chat(server, "DUMMY_KEY").status_code == 200
    assert re.search("^WARNING:freegpt_auth:open mode: .* create NAME$", server.log.read_text(), re.MULTILINE)
    created = json.loads(command("create", "my-application", "--json").stdout)
    assert [chat(server, token).status_code for token in (None, created["token"])] == [401, 200]
    assert command("revoke", created["prefix"] + "...").returncode == 0
    assert chat(server, created["token"]).status_code == 401
    assert f"refused 127.0.0.1 {CHAT}: revoked ({created['id']})" in server.stop()
    [listed] = json.loads(command("list", "--json").stdout)
    assert (listed["status"], listed["use_count"]) == ("revoked", 1)


def statuses(server: Any, *tokens: str | None) -> list[int]:
    """Return the status of one request with each of these tokens."""
    return [server.get(token=token) for token in tokens]


def test_key_and_tokens_work_together(serve: Serve, command: Callable[..., Any]) -> None:
    """The preferred environment key and every active token pass; a revoked or deleted one is replaced by a new one."""
    old, gone, kept = (command("create", name).stdout.strip() for name in ("webapp", "mobile-ios", "github-actions"))
    server = serve(script=EXAMPLE, FREEGPT_API_KEY="key-one", OPENAI_API_KEY="key-two")
    assert statuses(server, "key-one", old, gone, kept) == [200] * 4
    assert statuses(server, "key-two", "other", None) == [401] * 3
    new = command("create", "webapp-2").stdout.strip()
    assert statuses(server, old, new) == [200, 200]
    for way, compromised in (("revoke", old), ("delete", gone)):
        assert command(way, f"{compromised[:14]}...").returncode == 0
        assert server.get(token=compromised) == 401
    assert statuses(server, "key-one", old, gone, kept, new) == [200, 401, 401, 200, 200]


def test_authentication_is_turned_off(serve: Serve, command: Callable[..., Any]) -> None:
    """If the key is unset and the token file renamed, a restart opens the server; the renaming alone does not."""
    secret = command("create", "mobile-app").stdout.strip()
    server = serve(script=EXAMPLE, FREEGPT_API_KEY="key-one")
    assert statuses(server, secret, None) == [200, 401]
    Path("api_tokens.json").rename("api_tokens.json.backup")
    wait_until(lambda: server.get(token=secret) == 401)
    assert statuses(server, None, "key-one") == [401, 200]
    server.stop()
    assert serve(script=EXAMPLE).get() == 200


@pytest.mark.parametrize(
    ("served", "environment", "works"),
    [
        ({"script": EXAMPLE}, {"FREEGPT_API_KEY": "sk-from-environment"}, "sk-from-environment"),
        ({}, {}, "sk-from-dotenv"),
    ],
)
def test_key_in_dotenv(serve: Serve, served: dict[str, Any], environment: dict[str, str], works: str) -> None:
    """A key in .env works, also under uvicorn's own command, and one in the real environment wins over it.

    Some editors put a byte order mark before the first line: before python-dotenv 1.2.3 that line was lost.
    """
    Path(".env").write_text("FREEGPT_API_KEY=sk-from-dotenv\n", encoding="utf-8-sig")
    arguments = [] if served else ["chat_server:app", "--app-dir", str(EXAMPLE.parent)]
    server = serve(*arguments, **served, **environment)
    for token in (None, "sk-from-dotenv", "sk-from-environment"):
        assert chat(server, token).status_code == (200 if token == works else 401)
    log = server.stop()
    assert "sk-from" not in log
    assert not served or "INFO:freegpt_auth:environment mode: 0 active token(s)" in log


def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server listens on 127.0.0.1:8000, or on the address in --host and --port."""
    served: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.run", lambda _app, *, host, port, **_: served.append((host, port)))
    for arguments in ([], ["--host", "::1", "--port", "9000"]):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert served == [("127.0.0.1", 8000), ("::1", 9000)]
