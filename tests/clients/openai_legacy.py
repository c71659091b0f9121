"""The openai client of the guide's time, 0.28.1, with the guide's snippet.

Run it where that client is installed: ``python -m pytest tests/clients/openai_legacy.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


def snippet(server: ChatServer, secret: str) -> str:
    """Run the guide's snippet with a secret and the address of a server, and return the content of its response."""
    names: dict[str, Any] = {}
    source = SNIPPET.replace("sk-a1b2c3d4e5f6...", secret).replace("http://localhost:8000", server.url)
    exec(compile(source, "the guide", "exec"), names)
    return str(names["response"].choices[0].message.content)


def streamed(server: ChatServer, secret: str) -> str:
    """Ask for a stream, and return the pieces of content that arrive, with a bar after each."""
    openai.api_key, openai.api_base = secret, f"{server.url}/v1"
    deltas = [chunk.choices[0].delta for chunk in openai.ChatCompletion.create(**QUESTION, stream=True)]
    return "".join(f"{delta.get('content', '')}|" for delta in deltas)


def asynchronous(server: ChatServer, secret: str) -> str:
    """Ask by the asynchronous call, and return the content of the response."""
    openai.api_key, openai.api_base = secret, f"{server.url}/v1"
    response = asyncio.run(openai.ChatCompletion.acreate(**QUESTION))
    return str(response.choices[0].message.content)


Call = Callable[["ChatServer", str], str]
ANSWERS = [(snippet, "You said: Hello!"), (streamed, "|You| said:| Hello!||"), (asynchronous, "You said: Hello!")]


@pytest.mark.parametrize(("call", "answer"), ANSWERS)
def test_good_token(chat_server: ChatServer, call: Call, answer: str) -> None:
    """The snippet works as the guide prints it; a stream arrives piece by piece; the asynchronous call works too."""
    assert call(chat_server, chat_server.secrets["good"]) == answer
    assert chat_server.refusals(CHAT) == []


@pytest.mark.parametrize("call", [snippet, streamed, asynchronous])
def test_refused(chat_server: ChatServer, reason: str, call: Call) -> None:
    """A refused token ends each call with AuthenticationError after a single request, with the heading of the guide."""
    with pytest.raises(openai.error.AuthenticationError) as caught:
        call(chat_server, chat_server.secrets[reason])
    assert "Invalid API key provided" in str(caught.value)
    assert caught.value.http_status == 401
    assert caught.value.json_body["error"]["code"] == caught.value.error.code == "invalid_api_key"
    assert chat_server.refusals(CHAT) == [reason]


def test_models(chat_server: ChatServer) -> None:
    """The list of models is answered."""
    openai.api_key, openai.api_base = chat_server.secrets["good"], f"{chat_server.url}/v1"
    assert [model.id for model in openai.Model.list().data] == ["freegpt-4"]
