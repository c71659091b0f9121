"""The openai client of the guide's time, 0.28.1, with the guide's snippet.

Run it where that client is installed: ``python -m pytest tests/clients/openai_legacy.py``.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.clients.conftest import ChatServer

# Any: most names are gone from today's openai, and requests has no types.
openai: Any = import_module("openai")
requests: Any = import_module("requests")

CHAT = "/v1/chat/completions"
QUESTION = {"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}
SNIPPET = """\
import openai

openai.api_key = "sk-a1b2c3d4e5f6..."
openai.api_base = "http://localhost:8000/v1"

response = openai.ChatCompletion.create(
    model="freegpt-4",
    messages=[{"role": "user", "content": "Hello!"}]
)
"""


@pytest.fixture(autouse=True)
def _session() -> Iterator[None]:
    """Close the client's connections, which it would keep until the interpreter ends."""
    with requests.Session() as session:
        openai.requestssession = session
        yield


def run_snippet(server: ChatServer, secret: str) -> Any:
    """Run the guide's snippet with a secret and the address of a server, and return its response."""
    names: dict[str, Any] = {}
    source = SNIPPET.replace("sk-a1b2c3d4e5f6...", secret).replace("http://localhost:8000", server.url)
    exec(compile(source, "the guide", "exec"), names)
    return names["response"]


def assert_refused(error: Any) -> None:
    """Check that the client's own error has the heading of the guide's section on troubleshooting."""
    assert "Invalid API key provided" in str(error)
    assert error.http_status == 401
    assert error.json_body["error"]["code"] == "invalid_api_key"
    assert error.error.code == "invalid_api_key"


def test_snippet(chat_server: ChatServer) -> None:
    """The snippet works as the guide prints it."""
    response = run_snippet(chat_server, chat_server.secrets["good"])
    assert response.choices[0].message.content == "You said: Hello!"
    assert chat_server.refusals(CHAT) == []


def test_snippet_refused(chat_server: ChatServer, reason: str) -> None:
    """A refused token ends the snippet with AuthenticationError after a single request."""
    with pytest.raises(openai.error.AuthenticationError) as caught:
        run_snippet(chat_server, chat_server.secrets[reason])
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_stream(chat_server: ChatServer) -> None:
    """A streamed answer arrives piece by piece and whole."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    deltas = [chunk.choices[0].delta for chunk in openai.ChatCompletion.create(**QUESTION, stream=True)]
    assert [delta.get("content", "") for delta in deltas] == ["", "You", " said:", " Hello!", ""]


def test_stream_refused(chat_server: ChatServer, reason: str) -> None:
    """A refused token ends a request for a stream with AuthenticationError after a single request."""
    openai.api_key, openai.api_base = chat_server.secrets[reason], f"{chat_server.url}/v1"
    with pytest.raises(openai.error.AuthenticationError) as caught:
        openai.ChatCompletion.create(**QUESTION, stream=True)
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_async(chat_server: ChatServer) -> None:
    """The asynchronous call works with a good token."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    response = asyncio.run(openai.ChatCompletion.acreate(**QUESTION))
    assert response.choices[0].message.content == "You said: Hello!"


def test_async_refused(chat_server: ChatServer, reason: str) -> None:
    """A refused token ends the asynchronous call with AuthenticationError after a single request."""
    openai.api_key, openai.api_base = chat_server.secrets[reason], f"{chat_server.url}/v1"
    with pytest.raises(openai.error.AuthenticationError) as caught:
        asyncio.run(openai.ChatCompletion.acreate(**QUESTION))
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_models(chat_server: ChatServer) -> None:
    """The list of models is answered."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    assert [model.id for model in openai.Model.list().data] == ["freegpt-4"]
