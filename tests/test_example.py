"""The example server, run as a reader would run it: every endpoint, every way to configure it."""

from __future__ import annotations

import http.client
import json
import logging
import re
import runpy
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.protocol import State
from websockets.sync.client import connect
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from freegpt_auth import FileTokenStore

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = Path(__file__).parent.parent / "examples" / "chat_server.py"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
KEY_PROTOCOL = "openai-insecure-api-key."


class Reply(NamedTuple):
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


def call(server: Any, path: str, token: str | None = None, body: object = None) -> Reply:
    """Send one request: a POST if there is a body. What is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    connection.request("GET" if content is None else "POST", path, content, headers)
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    reply = Reply(response.status, headers, response.read())
    connection.close()
    return reply


def chat(server: Any, token: str | None, messages: object = HELLO, **others: object) -> Reply:
    """Ask for a chat completion."""
    return call(server, CHAT, token, {"model": "freegpt-4", "messages": messages, **others})


def realtime(server: Any, token: str | None = None, protocols: list[str] | None = None) -> Any:
    """Open the WebSocket, with a token in the header or with subprotocols."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    return connect(
        f"ws://{host}:{port}/v1/realtime",
        sock=socket.create_connection((host, int(port)), timeout=10),
        additional_headers={"Authorization": f"Bearer {token}"} if token else None,
        subprotocols=[Subprotocol(protocol) for protocol in protocols] if protocols else None,
    )


@pytest.fixture
def secret(keep: Callable[..., Any], tmp_path: Path) -> str:
    """Put a token into the token file and return its secret."""
    return str(keep(FileTokenStore(tmp_path / "api_tokens.json"))[1])


def test_endpoints(serve: Callable[..., Any], secret: str) -> None:
    """Only the health check needs no token; the list of models and chat completions do."""
    server = serve(script=EXAMPLE)
    assert call(server, "/health").content == {"status": "ok"}
    assert call(server, "/health/").status == 401
    assert call(server, "/v1/models").status == 401
    models = call(server, "/v1/models", secret)
    assert models.status == 200
    assert [(model["object"], model["id"]) for model in models.content["data"]] == [("model", "freegpt-4")]
    for token, stream in ((None, False), (None, True), ("sk-wrong", False), ("sk-wrong", True)):
        refused = chat(server, token, stream=stream)
        assert refused.status == 401
        assert refused.headers["content-type"] == "application/json"
        assert refused.content["error"]["code"] == "invalid_api_key"
    assert "Traceback" not in server.stop()


def test_plain_completion(serve: Callable[..., Any], secret: str) -> None:
    """A chat completion has the form of OpenAI's, and the same question gets the same answer."""
    server = serve(script=EXAMPLE)
    first, again = (chat(server, secret) for _ in range(2))
    created = first.content["created"]
    assert first.status == 200
    assert isinstance(created, int)
    assert first.content == {
        "id": again.content["id"],
        "object": "chat.completion",
        "created": created,
        "model": "freegpt-4",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "You said: Hello!"}, "finish_reason": "stop"}
        ],
    }
    assert first.content["id"].startswith("chatcmpl-")


def test_streamed_completion(serve: Callable[..., Any], secret: str) -> None:
    """A streamed completion is server-sent events: the role, the words, why it ended, and [DONE]."""
    server = serve(script=EXAMPLE)
    reply = chat(server, secret, stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, end = reply.body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {chat(server, secret).content["id"]}
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"index": 0, "delta": {"content": "You"}, "finish_reason": None},
        {"index": 0, "delta": {"content": " said:"}, "finish_reason": None},
        {"index": 0, "delta": {"content": " Hello!"}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    ]


MESSAGES = {
    "the last message": ([*HELLO, {"role": "user", "content": "And now?"}], "And now?"),
    "the last of the user": ([*HELLO, {"role": "assistant", "content": "Yes?"}], "Hello!"),
    "a list of parts": ([{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "image"}]}], "One."),
    "two spaces": ([{"role": "user", "content": "a  b\nc"}], "a  b\nc"),
    "half a surrogate pair": ([{"role": "user", "content": "\ud83d"}], "\ud83d"),
    "an emoji": ([{"role": "user", "content": "\U0001f511"}], "\U0001f511"),
}


def test_what_is_repeated(serve: Callable[..., Any], secret: str, subtests: pytest.Subtests) -> None:
    """The user's last message is repeated character for character, whether streamed or not."""
    server = serve(script=EXAMPLE)
    for case, (messages, said) in MESSAGES.items():
        with subtests.test(case):
            plain = chat(server, secret, messages).content["choices"][0]["message"]["content"]
            events = chat(server, secret, messages, stream=True).body.decode().split("\n\n")[:-2]
            deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
            assert plain == "".join(delta.get("content", "") for delta in deltas) == f"You said: {said}"
    assert "Traceback" not in server.stop()


BAD_REQUESTS: dict[str, tuple[object, int, str | None]] = {
    "no body": (b"", 400, None),
    "no JSON": (b'{"model": ', 400, None),
    "no UTF-8": (b'{"model": "\xff"}', 400, None),
    "nested too deeply": (b"[" * 200_000, 400, None),
    "a number too long to read": (b"9" * 5000, 400, None),
    "a list": ([], 400, None),
    "no model": ({"messages": HELLO}, 400, None),
    "no messages": ({"model": "freegpt-4"}, 400, None),
    "messages that are text": ({"model": "freegpt-4", "messages": "Hello!"}, 400, None),
    "no message of the user": ({"model": "freegpt-4", "messages": [None, {"role": "system"}]}, 400, None),
    "an unknown model": ({"model": "gpt-9", "messages": HELLO}, 404, "model_not_found"),
    "a model that UTF-8 cannot hold": ({"model": "\ud83d", "messages": HELLO}, 404, "model_not_found"),
}


def test_bad_requests(serve: Callable[..., Any], secret: str, subtests: pytest.Subtests) -> None:
    """A request that cannot be answered gets an error in OpenAI's form, and never shows as a traceback."""
    server = serve(script=EXAMPLE)
    for case, (body, status, code) in BAD_REQUESTS.items():
        with subtests.test(case):
            reply = call(server, CHAT, secret, body)
            error = reply.content["error"]
            assert reply.status == status
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert "Traceback" not in server.stop()


def test_websocket_with_a_header(serve: Callable[..., Any], secret: str) -> None:
    """A WebSocket that presents its token in the header is opened and sends back text and bytes."""
    server = serve(script=EXAMPLE)
    with realtime(server, secret) as websocket:
        assert websocket.subprotocol is None
        for message in ("Hello!", b"\x00\xff"):
            websocket.send(message)
            assert websocket.recv(timeout=10) == message
    assert "Traceback" not in server.stop()


def test_websocket_with_a_subprotocol(serve: Callable[..., Any], secret: str) -> None:
    """A browser's WebSocket presents its token as a subprotocol, which is never sent back nor logged."""
    server = serve(script=EXAMPLE)
    for protocols, chosen in (
        (["realtime", KEY_PROTOCOL + secret], "realtime"),
        (["openai-beta.realtime-v1", KEY_PROTOCOL + secret, "realtime"], "realtime"),
        ([KEY_PROTOCOL + secret], None),
    ):
        with realtime(server, protocols=protocols) as websocket:
            assert websocket.subprotocol == chosen
            assert secret not in str(websocket.response.headers)
            websocket.send("Hello!")
            assert websocket.recv(timeout=10) == "Hello!"
    log = server.stop()
    assert secret not in log
    assert "Traceback" not in log


def test_websocket_refused(serve: Callable[..., Any], secret: str) -> None:
    """A WebSocket without a token that works is refused with HTTP 401, before it is one."""
    server = serve(script=EXAMPLE)
    wrong = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    for token, protocols in ((None, None), (None, ["realtime"]), (wrong, None), (None, [KEY_PROTOCOL + wrong])):
        with pytest.raises(InvalidStatus) as caught:
            realtime(server, token, protocols)
        response = caught.value.response
        assert response.status_code == 401
        assert "sec-websocket-protocol" not in response.headers
        assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
        assert wrong not in str(response.headers) + response.body.decode()
    log = server.stop()
    assert wrong not in log
    assert "Traceback" not in log


def test_websocket_client_leaves(serve: Callable[..., Any], secret: str) -> None:
    """A client that leaves while it is being answered is no error of the server."""
    server = serve(script=EXAMPLE)
    host, _, port = server.url.removeprefix("http://").partition(":")
    client = ClientProtocol(parse_uri(f"ws://{host}:{port}/v1/realtime"))
    request = client.connect()
    request.headers["Authorization"] = f"Bearer {secret}"
    client.send_request(request)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
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
    assert "Traceback" not in server.stop()


def test_open_mode(serve: Callable[..., Any], command: Callable[..., Any]) -> None:
    """With nothing configured every request passes and a warning says so, until a token is created."""
    server = serve(script=EXAMPLE)
    assert chat(server, None).status == chat(server, "DUMMY_KEY").status == 200
    with realtime(server) as websocket:
        websocket.send("Hello!")
        assert websocket.recv(timeout=10) == "Hello!"
    assert re.search(
        r"^WARNING:freegpt_auth:open mode: .*api_tokens\.json.* create NAME$", server.log.read_text(), re.MULTILINE
    )
    secret = command("create", "my-application").stdout.strip()
    assert chat(server, None).status == 401
    assert chat(server, secret).status == 200


def test_key_in_dotenv(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A key in .env of the working directory is the only one that works, and the log says which variable it is from."""
    (tmp_path / ".env").write_text("FREEGPT_API_KEY=sk-from-dotenv\n")
    server = serve(script=EXAMPLE)
    assert [chat(server, token).status for token in (None, "sk-other", "sk-from-dotenv")] == [401, 401, 200]
    log = server.stop()
    assert re.search(
        r"^INFO:freegpt_auth:environment mode: 0 active tokens .* from FREEGPT_API_KEY$", log, re.MULTILINE
    )
    assert "sk-from-dotenv" not in log


def test_environment_wins_over_dotenv(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A key in the real environment wins over the one in .env."""
    (tmp_path / ".env").write_text("FREEGPT_API_KEY=sk-from-dotenv\n")
    server = serve(script=EXAMPLE, FREEGPT_API_KEY="sk-from-environment")
    assert [chat(server, token).status for token in ("sk-from-dotenv", "sk-from-environment")] == [401, 200]


def test_token_file_and_key(serve: Callable[..., Any], secret: str) -> None:
    """Beside a token file the environment key works too, and the log says where both are from."""
    server = serve(script=EXAMPLE, OPENAI_API_KEY="sk-environment")
    assert [chat(server, token).status for token in (None, secret, "sk-environment")] == [401, 200, 200]
    log = server.stop()
    line = r"^INFO:freegpt_auth:token-file mode: 1 active tokens from .*api_tokens\.json, .* from OPENAI_API_KEY$"
    assert re.search(line, log, re.MULTILINE)
    assert secret not in log


def test_a_tokens_life(serve: Callable[..., Any], command: Callable[..., Any], secret: str) -> None:
    """A token works as soon as it is created, is refused as soon as it is revoked, and its use is listed."""
    server = serve(script=EXAMPLE)
    created = json.loads(command("create", "my-application", "--json").stdout)
    assert [chat(server, token).status for token in (secret, created["token"])] == [200, 200]
    assert command("revoke", created["prefix"] + "...").returncode == 0
    assert [chat(server, token).status for token in (secret, created["token"])] == [200, 401]
    assert f"refused 127.0.0.1 {CHAT}: revoked ({created['id']})" in server.stop()
    listed = json.loads(command("list", "--json").stdout)
    assert [(token["status"], token["use_count"]) for token in listed] == [("active", 2), ("revoked", 1)]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FREEGPT_AUTH_REQUIRED", "1", "authentication is required"),
        ("FREEGPT_API_KEY", "", "FREEGPT_API_KEY is set but empty"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, variable: str, value: str, message: str) -> None:
    """A server whose settings cannot be used does not start, and says why."""
    (tmp_path / ".env").write_text(f"{variable}={value}\n")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--port", "0"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_served_by_name(serve: Callable[..., Any], tmp_path: Path) -> None:
    """The application can also be served by uvicorn's own command, and reads .env then too."""
    (tmp_path / ".env").write_text("FREEGPT_API_KEY=sk-from-dotenv\n")
    server = serve("chat_server:app", "--app-dir", str(EXAMPLE.parent))
    assert [chat(server, token).status for token in (None, "sk-from-dotenv")] == [401, 200]


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([], ("127.0.0.1", 8000)),
        (["--port", "9000"], ("127.0.0.1", 9000)),
        (["--host", "::1"], ("::1", 8000)),
    ],
)
def test_address(monkeypatch: pytest.MonkeyPatch, arguments: list[str], address: tuple[str, int]) -> None:
    """The server listens on 127.0.0.1:8000, or where --host and --port say."""
    served: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.run", lambda _app, *, host, port, **_: served.append((host, port)))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert served == [address]


def test_importing_it_does_nothing(tmp_path: Path) -> None:
    """Importing the example starts no server, writes no file and leaves logging alone."""
    before = list(logging.getLogger().handlers)
    assert callable(runpy.run_path(str(EXAMPLE), run_name="chat_server")["app"])
    assert logging.getLogger().handlers == before
    assert list(tmp_path.iterdir()) == []
