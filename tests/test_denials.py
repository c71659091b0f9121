"""What a refusal looks like on the wire."""

from __future__ import annotations

import json

import pytest

from freegpt_auth.denials import REALM, RETRY_AFTER, denial

OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
INVALID = "Invalid API key provided"
UNAUTHORIZED = ("invalid_request_error", "invalid_api_key", "authentication_error")


@pytest.mark.parametrize(
    ("reason", "status", "challenge", "faces"),
    [
        ("missing", 401, "", UNAUTHORIZED),
        ("unknown", 401, ', error="invalid_token"', UNAUTHORIZED),
        ("malformed", 400, ', error="invalid_request"', (*UNAUTHORIZED[:2], "invalid_request_error")),
        ("unavailable", 503, None, ("server_error", "service_unavailable", "api_error")),
    ],
)
def test_clients_read_their_own_error(
    reason: str, status: int, challenge: str | None, faces: tuple[str, str, str]
) -> None:
    """OpenAI's and Anthropic's clients each find the error as they know it, and learn by RFC 6750 what was wrong."""
    kind, code, anthropic_kind = faces
    openai, anthropic = denial(OPENAI, reason), denial(ANTHROPIC, reason)
    for answer in (openai, anthropic):
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


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_invalid_has_one_face(path: str) -> None:
    """Nobody learns from an answer whether a token was once valid."""
    assert denial(path, "unknown") == denial(path, "revoked") == denial(path, "expired")


def test_messages() -> None:
    """A message holds the words by which clients know an authentication error, and says how to send a missing key."""
    missing, unknown = (denial(OPENAI, reason).body.decode() for reason in ("missing", "unknown"))
    assert INVALID in missing
    assert INVALID in unknown
    assert "Incorrect API key provided" in unknown
    assert "Authorization: Bearer YOUR_KEY" in missing


def test_an_outage_is_soon_over() -> None:
    """A client waits some seconds, not an hour, until it tries again."""
    assert 1 <= RETRY_AFTER <= 60


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/threads/x/messages"])
def test_the_path_chooses_the_form(path: str) -> None:
    """Anthropic's form is spoken below /v1/messages and nowhere else."""
    assert ("type" in json.loads(denial(path, "unknown").body)) is path.startswith("/v1/messages")
