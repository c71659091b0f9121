"""The responses for refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freegpt_auth.guard.denials import RETRY_AFTER, denial


def scope(path: str = "/v1/chat/completions", *headers: tuple[bytes, bytes], method: str = "POST") -> dict[str, Any]:
    """Return the scope of a request."""
    return {"type": "http", "method": method, "path": path, "headers": [*headers]}


def message_of(reason: str, status: int, header: tuple[bytes, bytes], kind: str, code: str, anthropic_kind: str) -> str:
    """Check the denials for OpenAI, Anthropic and MCP, and return their message."""
    clients = scope(), scope("/v1/messages"), scope("/mcp", (b"mcp-protocol-version", b"2025-06-18"))
    answers = [denial(client, reason) for client in clients]
    for answer in answers:
        assert answer.status == status
        length = (b"content-length", str(len(answer.body)).encode())
        common = [(b"content-type", b"application/json"), length, (b"cache-control", b"no-store")]
        assert answer.headers == [*common, header]
    openai, anthropic, mcp = (json.loads(answer.body) for answer in answers)
    message = openai["error"]["message"]
    assert openai == {"error": {"message": message, "type": kind, "param": None, "code": code}}
    assert anthropic == {"type": "error", "error": {"type": anthropic_kind, "message": message}}
    assert mcp == {"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": message}}
    return str(message)


INVALID = ', error="invalid_token"'


@pytest.mark.parametrize(
    ("reason", "challenge", "words"),
    [
        ("missing", "", "Authorization: Bearer YOUR_KEY"),
        ("unknown", INVALID, "it is unknown, revoked or expired"),
        ("revoked", INVALID, "it is unknown, revoked or expired"),
        ("expired", INVALID, "it is unknown, revoked or expired"),
        ("prefixed", INVALID, "begins with the word Bearer"),
        ("quoted", INVALID, "wrapped in quotation marks"),
    ],
)
def test_clients_read_their_own_error(reason: str, challenge: str, words: str) -> None:
    """Clients of each protocol get the error in their form and words, with the challenge of RFC 6750."""
    header = (b"www-authenticate", f'Bearer realm="freegpt_auth"{challenge}'.encode())
    message = message_of(reason, 401, header, "invalid_request_error", "invalid_api_key", "authentication_error")
    for each in (words, "Invalid API key provided", "Incorrect API key provided"):
        assert each in message


def test_ambiguous_request_is_a_bad_one() -> None:
    """A request that sends its credentials twice is malformed, which is no failed authentication."""
    header = (b"www-authenticate", b'Bearer realm="freegpt_auth", error="invalid_request"')
    assert message_of("malformed", 400, header, "invalid_request_error", "invalid_api_key", "invalid_request_error")


def test_an_outage_is_soon_over() -> None:
    """A client waits some seconds, not an hour, until it tries again."""
    header = (b"retry-after", str(RETRY_AFTER).encode())
    assert message_of("unavailable", 503, header, "server_error", "service_unavailable", "api_error")
    assert 1 <= RETRY_AFTER <= 60


BOTH = (b"accept", b"application/json, text/event-stream")
VERSION = (b"anthropic-version", b"2023-06-01")


@pytest.mark.parametrize(
    ("client", "form"),
    [
        (scope("/v1/messages"), "anthropic"),
        (scope("/anthropic/v1/messages"), "anthropic"),
        (scope("/messages/"), "anthropic"),
        (scope("/a/b/v1/messages/count_tokens"), "anthropic"),
        (scope("/v1/messages/batches/msgbatch_1/results", method="GET"), "anthropic"),
        (scope("/threads/v1/messages"), "anthropic"),
        (scope("/v1/threads/thread_1/messages"), "openai"),
        (scope("/api/v1/threads/thread_1/messages/msg_1"), "openai"),
        (scope("/v1/chat/completions/chatcmpl_1/messages", method="GET"), "openai"),
        (scope("/v1/messagesx"), "openai"),
        (scope("messages"), "anthropic"),
        (scope(""), "openai"),
        (scope("/v1/models", VERSION, method="GET"), "anthropic"),
        (scope("/mcp", BOTH), "mcp"),
        (scope("/mcp", (b"accept", b"text/event-stream,application/json;q=0.9")), "mcp"),
        (scope("/mcp", BOTH, method="GET"), "openai"),
        (scope("/mcp", (b"accept", b"application/json")), "openai"),
        (scope("/v1/messages", BOTH), "anthropic"),
        (scope("/messages/", (b"mcp-protocol-version", b"2025-06-18"), method="DELETE"), "mcp"),
        ({"type": "websocket", "path": "/v1/realtime", "headers": [BOTH]}, "openai"),
    ],
)
def test_the_request_chooses_the_form(client: dict[str, Any], form: str) -> None:
    """The version header of a client decides, else the path, else the types it accepts."""
    content = json.loads(denial(client, "unknown").body)
    assert form == ("mcp" if "jsonrpc" in content else "anthropic" if "type" in content else "openai")
