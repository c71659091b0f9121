"""The openai client of the guide's time, 0.28.1, with the guide's own snippet.

Run it where that client is installed: ``python -m pytest tests/clients/openai_legacy.py``.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Typed as anything: most of openai's names are gone from today's release, and requests comes without types.
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
    """Close the client's connections; it would keep them for as long as the interpreter runs."""
    with requests.Session() as session:
        openai.requestssession = session
        yield


def run_snippet(server: Any, secret: str) -> Any:
    """Run the guide's snippet with a secret and the address of a server filled in, and return its response."""
    names: dict[str, Any] = {}
    source = SNIPPET.replace("sk-a1b2c3d4e5f6...", secret).replace("http://localhost:8000", server.url)
    exec(compile(source, "the guide", "exec"), names)
    return names["response"]


def assert_refused(error: Any) -> None:
    """Check that the client's own error says what the guide's section on troubleshooting is headed with."""
    assert "Invalid API key provided" in str(error)
    assert error.http_status == 401
    assert error.json_body["error"]["code"] == "invalid_api_key"
    assert error.error.code == "invalid_api_key"


def test_the_guides_snippet(chat_server: Any) -> None:
    """The snippet works as the guide prints it."""
    response = run_snippet(chat_server, chat_server.secrets["good"])
    assert response.choices[0].message.content == "You said: Hello!"
    assert chat_server.refusals(CHAT) == []


def test_the_guides_snippet_refused(chat_server: Any, reason: str) -> None:
    """A token that does not work ends the snippet in AuthenticationError, after a single request."""
    with pytest.raises(openai.error.AuthenticationError) as caught:
        run_snippet(chat_server, chat_server.secrets[reason])
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_stream(chat_server: Any) -> None:
    """A streamed answer arrives piece by piece and whole."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    deltas = [chunk.choices[0].delta for chunk in openai.ChatCompletion.create(**QUESTION, stream=True)]
    assert [delta.get("content", "") for delta in deltas] == ["", "You", " said:", " Hello!", ""]


def test_stream_refused(chat_server: Any, reason: str) -> None:
    """A request for a stream is refused as plainly as any other, after a single request."""
    openai.api_key, openai.api_base = chat_server.secrets[reason], f"{chat_server.url}/v1"
    with pytest.raises(openai.error.AuthenticationError) as caught:
        openai.ChatCompletion.create(**QUESTION, stream=True)
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_async(chat_server: Any) -> None:
    """The asynchronous call works with a good token."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    response = asyncio.run(openai.ChatCompletion.acreate(**QUESTION))
    assert response.choices[0].message.content == "You said: Hello!"


def test_async_refused(chat_server: Any, reason: str) -> None:
    """A token that does not work ends the asynchronous call in AuthenticationError, after a single request."""
    openai.api_key, openai.api_base = chat_server.secrets[reason], f"{chat_server.url}/v1"
    with pytest.raises(openai.error.AuthenticationError) as caught:
        asyncio.run(openai.ChatCompletion.acreate(**QUESTION))
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]


def test_models(chat_server: Any) -> None:
    """The list of models is answered."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    assert [model.id for model in openai.Model.list().data] == ["freegpt-4"]
