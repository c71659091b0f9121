"""What a refusal looks like on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freegpt_auth.denials import REALM, RETRY_AFTER, Denial, denial

OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
REASONS = ["missing", "malformed", "unknown", "revoked", "expired", "unavailable"]
CHALLENGE = f'Bearer realm="{REALM}"'


def headers_of(answer: Denial) -> dict[bytes, bytes]:
    """Return the headers of a denial, each of which it must have once only."""
    headers = dict(answer.headers)
    assert len(headers) == len(answer.headers)
    return headers


def error_of(answer: Denial) -> Any:
    """Return the error object of a denial."""
    return json.loads(answer.body)["error"]


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize(
    ("reason", "status", "challenge"),
    [
        ("missing", 401, CHALLENGE),
        ("unknown", 401, f'{CHALLENGE}, error="invalid_token"'),
        ("revoked", 401, f'{CHALLENGE}, error="invalid_token"'),
        ("expired", 401, f'{CHALLENGE}, error="invalid_token"'),
        ("malformed", 400, f'{CHALLENGE}, error="invalid_request"'),
    ],
)
def test_status_and_challenge(path: str, reason: str, status: int, challenge: str) -> None:
    """A client learns by RFC 6750 what was wrong, and no error attribute where it sent no credentials."""
    answer = denial(path, reason)
    assert answer.status == status
    assert headers_of(answer)[b"www-authenticate"] == challenge.encode()
    assert b"retry-after" not in headers_of(answer)


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_unavailable_asks_to_try_again_soon(path: str) -> None:
    """A client waits some seconds, not an hour, and does not take an outage for a wrong token."""
    answer = denial(path, "unavailable")
    assert answer.status == 503
    assert headers_of(answer)[b"retry-after"] == str(RETRY_AFTER).encode()
    assert 1 <= RETRY_AFTER <= 60
    assert b"www-authenticate" not in headers_of(answer)


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize("reason", REASONS)
def test_common_headers(path: str, reason: str) -> None:
    """Every refusal is JSON of the stated length, is never cached, and never asks a client to repeat itself at once."""
    answer = denial(path, reason)
    headers = headers_of(answer)
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(answer.body)).encode()
    assert headers[b"cache-control"] == b"no-store"
    assert b"x-should-retry" not in headers
    assert answer.status != 403


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_invalid_has_one_face(path: str) -> None:
    """Nobody learns from an answer whether a token was once valid."""
    assert denial(path, "unknown") == denial(path, "revoked") == denial(path, "expired")


@pytest.mark.parametrize("reason", ["missing", "malformed", "unknown"])
def test_openai_clients_read_an_authentication_error(reason: str) -> None:
    """OpenAI's clients find their error object at the top level, with the code they know."""
    content = json.loads(denial(OPENAI, reason).body)
    assert list(content) == ["error"]
    assert sorted(content["error"]) == ["code", "message", "param", "type"]
    assert content["error"]["type"] == "invalid_request_error"
    assert content["error"]["code"] == "invalid_api_key"
    assert content["error"]["param"] is None


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_messages(path: str) -> None:
    """A message holds the words by which clients know an authentication error, and says how to send a missing key."""
    invalid, missing = error_of(denial(path, "unknown"))["message"], error_of(denial(path, "missing"))["message"]
    assert "Invalid API key provided" in invalid
    assert "Incorrect API key provided" in invalid
    assert "Authorization: Bearer YOUR_KEY" in missing
    assert "Invalid API key provided" in missing
    assert invalid != missing


def test_openai_unavailable() -> None:
    """OpenAI's clients read an outage as one and try again."""
    error = error_of(denial(OPENAI, "unavailable"))
    assert error["type"] == "server_error"
    assert error["code"] == "service_unavailable"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("missing", "authentication_error"),
        ("unknown", "authentication_error"),
        ("expired", "authentication_error"),
        ("malformed", "invalid_request_error"),
        ("unavailable", "api_error"),
    ],
)
def test_anthropic_clients_read_their_own_form(reason: str, kind: str) -> None:
    """On /v1/messages, Anthropic's clients find the error as they know it."""
    content = json.loads(denial(ANTHROPIC, reason).body)
    assert content["type"] == "error"
    assert sorted(content["error"]) == ["message", "type"]
    assert content["error"]["type"] == kind


@pytest.mark.parametrize(
    ("path", "anthropic"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches", True),
        ("/v1/chat/completions", False),
        ("/v1/models", False),
        ("/v1/threads/x/messages", False),
        ("/", False),
    ],
)
def test_the_path_chooses_the_form(path: str, anthropic: bool) -> None:  # noqa: FBT001
    """Anthropic's form is spoken below /v1/messages and nowhere else."""
    assert ("type" in json.loads(denial(path, "unknown").body)) is anthropic
