"""The responses for refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freegpt_auth.guard.denials import REALM, RETRY_AFTER, denial


def scope(path: str = "/v1/chat/completions", *headers: tuple[bytes, bytes], method: str = "POST") -> dict[str, Any]:
    """Return the scope of a request."""
    return {"type": "http", "method": method, "path": path, "headers": [*headers]}


OPENAI, ANTHROPIC, MCP = scope(), scope("/v1/messages"), scope("/mcp", (b"mcp-protocol-version", b"2025-06-18"))
INVALID = "Invalid API key provided"
UNAUTHORIZED = ("invalid_request_error", "invalid_api_key", "authentication_error")


@pytest.mark.parametrize(
    ("reason", "status", "challenge", "faces"),
    [
        ("missing", 401, "", UNAUTHORIZED),
        ("unknown", 401, ', error="invalid_token"', UNAUTHORIZED),
        ("prefixed", 401, ', error="invalid_token"', UNAUTHORIZED),
        ("quoted", 401, ', error="invalid_token"', UNAUTHORIZED),
        ("malformed", 400, ', error="invalid_request"', (*UNAUTHORIZED[:2], "invalid_request_error")),
        ("unavailable", 503, None, ("server_error", "service_unavailable", "api_error")),
    ],
)
def test_clients_read_their_own_error(
    reason: str, status: int, challenge: str | None, faces: tuple[str, str, str]
) -> None:
    """Clients of each protocol get the error in their form, with the challenge of RFC 6750."""
    kind, code, anthropic_kind = faces
    openai, anthropic, mcp = denial(OPENAI, reason), denial(ANTHROPIC, reason), denial(MCP, reason)
    for answer in (openai, anthropic, mcp):
        assert answer.status == status
        expected = {
            b"content-type": b"application/json",
            b"content-length": str(len(answer.body)).encode(),
            b"cache-control": b"no-store",
        }
        if challenge is None:
            expected[b"retry-after"] = str(RETRY_AFTER).encode()
        else:
            expected[b"www-authenticate"] = f'Bearer realm="{REALM}"{challenge}'.encode()
        assert sorted(answer.headers) == sorted(expected.items())
    content = json.loads(openai.body)
    message = content["error"]["message"]
    assert content == {"error": {"message": message, "type": kind, "param": None, "code": code}}
    assert json.loads(anthropic.body) == {"type": "error", "error": {"type": anthropic_kind, "message": message}}
    error = {"code": -32001, "message": message}
    assert json.loads(mcp.body) == {"jsonrpc": "2.0", "id": None, "error": error}


@pytest.mark.parametrize("client", [OPENAI, ANTHROPIC, MCP])
def test_invalid_has_one_face(client: dict[str, Any]) -> None:
    """Nobody learns from an answer whether a token was once valid."""
    assert denial(client, "unknown") == denial(client, "revoked") == denial(client, "expired")


def test_messages() -> None:
    """A message holds the words by which clients know an authentication error, and says how to send a missing key."""
    reasons = ("missing", "unknown", "prefixed", "quoted")
    missing, unknown, prefixed, quoted = (denial(OPENAI, reason).body.decode() for reason in reasons)
    for message in (missing, unknown, prefixed, quoted):
        assert INVALID in message
        assert "Incorrect API key provided" in message
    assert "Authorization: Bearer YOUR_KEY" in missing
    assert "begins with the word Bearer" in prefixed
    assert "wrapped in quotation marks" in quoted


def test_an_outage_is_soon_over() -> None:
    """A client waits some seconds, not an hour, until it tries again."""
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
