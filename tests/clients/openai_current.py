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
    assert (error.status_code, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio only: the client leaves open generators, which asyncio closes and trio warns about."""
    return "asyncio"


def test_good_token(chat_server: ChatServer) -> None:
    """With a good token a completion is answered, a stream arrives piece by piece, and both have token counts."""
    with openai.OpenAI(**options(chat_server)) as client:
        completion = client.chat.completions.create(**QUESTION)
        chunks = list(client.chat.completions.create(**QUESTION, stream=True))
        *_, last = client.chat.completions.create(**QUESTION, stream=True, stream_options={"include_usage": True})
        assert [model.id for model in client.models.list()] == ["freegpt-4"]
    choice = completion.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("You said: Hello!", "stop")
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "You", " said:", " Hello!", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert completion.usage.total_tokens == 4
    assert (last.usage, last.choices) == (completion.usage, [])
    assert not any(chunk.usage for chunk in chunks)


CALLS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "chat": lambda client, extra: client.chat.completions.create(**QUESTION, extra_headers=extra),
    "stream": lambda client, extra: client.chat.completions.create(**QUESTION, stream=True, extra_headers=extra),
    "models": lambda client, extra: client.models.list(extra_headers=extra),
}


@pytest.mark.parametrize("call", CALLS)
def test_refused(chat_server: ChatServer, reason: str, call: str) -> None:
    """A refused token raises the client's AuthenticationError after a single request."""
    with openai.OpenAI(**options(chat_server, reason)) as client, pytest.raises(openai.AuthenticationError) as caught:
        CALLS[call](client, headers(reason))
    assert_refused(caught.value)
    assert chat_server.refusals("/v1/models" if call == "models" else CHAT) == [reason]


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
@pytest.mark.parametrize("call", ["chat", "stream"])
async def test_async_refused(chat_server: ChatServer, reason: str, call: str) -> None:
    """The asynchronous client raises AuthenticationError after a single request."""
    async with openai.AsyncOpenAI(**options(chat_server, reason)) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await CALLS[call](client, headers(reason))
    assert_refused(caught.value)
    assert chat_server.refusals(CHAT) == [reason]
