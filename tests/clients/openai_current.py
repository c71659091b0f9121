"""Today's openai client: synchronous, asynchronous, and streamed.

Run it where that client is installed: ``python -m pytest tests/clients/openai_current.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.clients.conftest import ChatServer

CHAT = "/v1/chat/completions"
QUESTION: dict[str, Any] = {"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}


def options(server: ChatServer, reason: str = "good") -> dict[str, Any]:
    """Return the arguments of a client; its number of retries is the default."""
    # The client refuses an empty key. headers() removes the header from each call instead.
    return {"base_url": f"{server.url}/v1", "api_key": server.secrets[reason] or "not-sent"}


def headers(reason: str) -> dict[str, Any]:
    """Return the headers to add to a call, or to remove from it."""
    return {"Authorization": openai.Omit()} if reason == "missing" else {}


def assert_refused(error: openai.AuthenticationError) -> None:
    """Check that the client's own error has the heading of the guide's section on troubleshooting."""
    assert "Invalid API key provided" in error.message
    assert error.status_code == 401
    assert error.code == "invalid_api_key"
    assert error.type == "invalid_request_error"


def ask(client: openai.OpenAI, reason: str = "good") -> Any:
    """Ask for a chat completion."""
    return client.chat.completions.create(**QUESTION, extra_headers=headers(reason))


def ask_for_stream(client: openai.OpenAI, reason: str = "good") -> Any:
    """Ask for a streamed chat completion."""
    return client.chat.completions.create(**QUESTION, stream=True, extra_headers=headers(reason))


def ask_for_models(client: openai.OpenAI, reason: str = "good") -> Any:
    """Ask for the list of models."""
    return client.models.list(extra_headers=headers(reason))


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio only: the client leaves open generators, which asyncio closes and trio warns about."""
    return "asyncio"


def test_good_token(chat_server: ChatServer) -> None:
    """With a good token a chat completion is answered."""
    with openai.OpenAI(**options(chat_server)) as client:
        completion = ask(client)
    assert completion.choices[0].message.content == "You said: Hello!"
    assert completion.choices[0].finish_reason == "stop"


def test_good_token_streamed(chat_server: ChatServer) -> None:
    """With a good token a streamed chat completion arrives piece by piece and whole."""
    with openai.OpenAI(**options(chat_server)) as client:
        chunks = list(ask_for_stream(client))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "You", " said:", " Hello!", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]


def test_usage(chat_server: ChatServer) -> None:
    """An answer has token counts, and so does a stream that requests them."""
    with openai.OpenAI(**options(chat_server)) as client:
        completion = ask(client)
        stream = client.chat.completions.create(**QUESTION, stream=True, stream_options={"include_usage": True})
        *_, last = stream
    assert completion.usage.total_tokens == 4
    assert last.usage == completion.usage


def test_good_token_models(chat_server: ChatServer) -> None:
    """With a good token the list of models is answered."""
    with openai.OpenAI(**options(chat_server)) as client:
        assert [model.id for model in ask_for_models(client)] == ["freegpt-4"]


@pytest.mark.parametrize(("call", "path"), [(ask, CHAT), (ask_for_stream, CHAT), (ask_for_models, "/v1/models")])
def test_refused(chat_server: ChatServer, reason: str, call: Callable[[openai.OpenAI, str], Any], path: str) -> None:
    """A refused token raises the client's AuthenticationError after a single request."""
    with openai.OpenAI(**options(chat_server, reason)) as client, pytest.raises(openai.AuthenticationError) as caught:
        call(client, reason)
    assert_refused(caught.value)
    assert chat_server.refusals(path) == [reason]


@pytest.mark.anyio
async def test_async_good_token(chat_server: ChatServer) -> None:
    """The asynchronous client is answered, plainly and streamed."""
    async with openai.AsyncOpenAI(**options(chat_server)) as client:
        completion = await client.chat.completions.create(**QUESTION)
        stream = await client.chat.completions.create(**QUESTION, stream=True)
        contents = [chunk.choices[0].delta.content or "" async for chunk in stream]
        models = [model.id async for model in client.models.list()]
    assert completion.choices[0].message.content == "".join(contents) == "You said: Hello!"
    assert models == ["freegpt-4"]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_async_refused(chat_server: ChatServer, reason: str, stream: bool) -> None:  # noqa: FBT001
    """The asynchronous client raises AuthenticationError after a single request."""
    async with openai.AsyncOpenAI(**options(chat_server, reason)) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(**QUESTION, stream=stream, extra_headers=headers(reason))
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]
