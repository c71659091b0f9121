"""What a refusal looks like on the wire: statuses, challenges (RFC 6750, section 3) and error bodies. Pure.

The bodies are the ones that OpenAI's clients turn into their own exceptions, and on ``/v1/messages`` Anthropic's. Nothing
that was presented is ever echoed, not even in part.
"""

from __future__ import annotations

import json
from typing import NamedTuple

REALM = "freegpt_auth"

RETRY_AFTER = 5
"""Seconds after which to try again while the tokens cannot be read. An hour would make some clients sleep an hour."""

# Both wordings are needed: "Invalid API key provided" is what our guide promises, and by "Incorrect API key provided"
# LiteLLM, and aider through it, know an authentication error; without it their users read "bad request".
_INVALID = (
    "Invalid API key provided: it is unknown, revoked or expired. Ask whoever runs this server for a valid one. "
    "(Incorrect API key provided.)"
)
_MISSING = (
    "You didn't provide an API key. Send yours in an Authorization header with Bearer auth: "
    "'Authorization: Bearer YOUR_KEY'. (Invalid API key provided: none. Incorrect API key provided: none.)"
)
_UNAVAILABLE = "The server cannot check API keys at the moment. Try again later."


class Denial(NamedTuple):
    """One refusing response, ready to be sent.

    Attributes:
        status: the HTTP status code.
        headers: its headers, as ASGI wants them.
        body: its JSON body.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def denial(path: str, reason: str) -> Denial:
    """Return the refusal for a *reason* in the form that clients of *path* read.

    ``missing``, ``malformed`` and ``unavailable`` have answers of their own; every other reason has the face of an
    invalid token, so that nobody learns which tokens once were valid.
    """
    answers = _ANTHROPIC if path.startswith("/v1/messages") else _OPENAI
    return answers.get(reason, answers["unknown"])


def _denial(status: int, content: object, *headers: tuple[bytes, bytes]) -> Denial:
    body = json.dumps(content, separators=(",", ":")).encode()
    common = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    return Denial(status, [*common, *headers], body)


def _challenge(error: str = "") -> tuple[bytes, bytes]:
    # RFC 6750, 3.1: no error attribute where no credentials came
    attribute = f', error="{error}"' if error else ""
    return b"www-authenticate", f'Bearer realm="{REALM}"{attribute}'.encode()


def _openai(message: str, kind: str, code: str) -> object:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _anthropic(message: str, kind: str) -> object:
    return {"type": "error", "error": {"type": kind, "message": message}}


_MALFORMED = "Invalid API key provided: the request sends its credentials more than once. Send them once."
_RETRY = (b"retry-after", str(RETRY_AFTER).encode())

_OPENAI = {
    "missing": _denial(401, _openai(_MISSING, "invalid_request_error", "invalid_api_key"), _challenge()),
    "unknown": _denial(401, _openai(_INVALID, "invalid_request_error", "invalid_api_key"), _challenge("invalid_token")),
    "malformed": _denial(
        400, _openai(_MALFORMED, "invalid_request_error", "invalid_api_key"), _challenge("invalid_request")
    ),
    "unavailable": _denial(503, _openai(_UNAVAILABLE, "server_error", "service_unavailable"), _RETRY),
}
_ANTHROPIC = {
    "missing": _denial(401, _anthropic(_MISSING, "authentication_error"), _challenge()),
    "unknown": _denial(401, _anthropic(_INVALID, "authentication_error"), _challenge("invalid_token")),
    "malformed": _denial(400, _anthropic(_MALFORMED, "invalid_request_error"), _challenge("invalid_request")),
    "unavailable": _denial(503, _anthropic(_UNAVAILABLE, "api_error"), _RETRY),
}
