"""Denials, the responses for refusals: statuses, challenges (RFC 6750, section 3) and error bodies. Pure.

Clients of OpenAI, Anthropic and MCP parse the bodies into their own errors. No part of a credential is echoed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

REALM = "freegpt_auth"

RETRY_AFTER = 5
"""Seconds to wait before a retry while the store cannot be read. Some clients sleep for this long."""

JSON_RPC_CODE = -32001
"""Error code for MCP clients, in the range that MCP leaves to implementations (-32000 to -32019)."""

_VERSIONS = {b"mcp-protocol-version": "mcp", b"anthropic-version": "anthropic"}
_DIALECT_HEADERS = frozenset({*_VERSIONS, b"accept"})
_OPENAI_OWNERS = frozenset({"threads", "completions"})

# Both wordings are needed. The user's guide quotes "Invalid API key provided". LiteLLM, and aider through it, recognise
# an authentication error by "Incorrect API key provided"; without it their users read "bad request".
_INVALID = (
    "Invalid API key provided: it is unknown, revoked or expired. Ask whoever runs this server for a valid one. "
    "(Incorrect API key provided.)"
)
_MISSING = (
    "You didn't provide an API key. Send yours in an Authorization header with Bearer auth: "
    "'Authorization: Bearer YOUR_KEY'. (Invalid API key provided: none. Incorrect API key provided: none.)"
)
_PREFIXED = (
    "Invalid API key provided: it begins with the word Bearer. Send that word once in an Authorization header, "
    "'Authorization: Bearer YOUR_KEY', and not at all elsewhere, 'x-api-key: YOUR_KEY'. (Incorrect API key provided.)"
)
_QUOTED = (
    "Invalid API key provided: it is wrapped in quotation marks. Send it without them. (Incorrect API key provided.)"
)
_MALFORMED = "Invalid API key provided: the request sends its credentials more than once. Send them once."
_UNAVAILABLE = "The server cannot check API keys at the moment. Try again later."


class Denial(NamedTuple):
    """One response that denies a request, ready to be sent.

    Attributes:
        status: HTTP status code.
        headers: as ASGI defines them.
        body: JSON.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Answer(NamedTuple):
    """The content of a denial, before it is put into the form of a protocol.

    Attributes:
        status: HTTP status code.
        message: for the user of the client.
        kind: error type of OpenAI.
        code: error code of OpenAI.
        anthropic_kind: error type of Anthropic.
        header: the one header that this content adds.
    """

    status: int
    message: str
    kind: str
    code: str
    anthropic_kind: str
    header: tuple[bytes, bytes]


def denial(scope: Any, reason: str) -> Denial:
    """Return the denial for a *reason* of refusal, in the protocol of the client of *scope*.

    ``missing``, ``malformed``, ``prefixed``, ``quoted`` and ``unavailable`` have denials of their own. All other
    reasons share the one of an unknown token: a denial must not reveal formerly valid tokens.
    """
    answers = _DENIALS[_dialect(scope)]
    return answers.get(reason, answers["unknown"])


def _dialect(scope: Any) -> str:
    """Return the protocol of a client, by its version header, else by the path, else by ``Accept``."""
    accept = b""
    for header in scope["headers"]:
        if header[0] in _DIALECT_HEADERS:
            if header[0] != b"accept":
                return _VERSIONS[header[0]]
            accept = header[1]
    if "messages" in scope["path"] and _is_messages(scope["path"]):
        return "anthropic"
    # MCP, "Streamable HTTP": the first POST has no version yet, and every POST accepts both types.
    is_mcp = b"text/event-stream" in accept and b"application/json" in accept and scope.get("method") == "POST"
    return "mcp" if is_mcp else "openai"


def _is_messages(path: str) -> bool:
    """Return whether *path* is Anthropic's ``…/messages`` or below it.

    OpenAI's ``/v1/threads/{id}/messages`` and ``/v1/chat/completions/{id}/messages`` are not.
    """
    segments = path.split("/")
    if "messages" not in segments:
        return False
    place = segments.index("messages")
    return segments[place - 1] == "v1" or segments[max(place - 2, 0)] not in _OPENAI_OWNERS


def _openai(answer: _Answer) -> object:
    return {"error": {"message": answer.message, "type": answer.kind, "param": None, "code": answer.code}}


def _anthropic(answer: _Answer) -> object:
    return {"type": "error", "error": {"type": answer.anthropic_kind, "message": answer.message}}


def _mcp(answer: _Answer) -> object:
    return {"jsonrpc": "2.0", "id": None, "error": {"code": JSON_RPC_CODE, "message": answer.message}}


def _denial(answer: _Answer, form: Callable[[_Answer], object]) -> Denial:
    body = json.dumps(form(answer), separators=(",", ":")).encode()
    common = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    return Denial(answer.status, [*common, answer.header], body)


def _refused(status: int, message: str, error: str, anthropic_kind: str = "authentication_error") -> _Answer:
    # RFC 6750, 3.1: no error attribute for a request without credentials
    attribute = f', error="{error}"' if error else ""
    challenge = (b"www-authenticate", f'Bearer realm="{REALM}"{attribute}'.encode())
    return _Answer(status, message, "invalid_request_error", "invalid_api_key", anthropic_kind, challenge)


_RETRY = (b"retry-after", str(RETRY_AFTER).encode())
_ANSWERS = {
    "missing": _refused(401, _MISSING, ""),
    "unknown": _refused(401, _INVALID, "invalid_token"),
    "prefixed": _refused(401, _PREFIXED, "invalid_token"),
    "quoted": _refused(401, _QUOTED, "invalid_token"),
    "malformed": _refused(400, _MALFORMED, "invalid_request", "invalid_request_error"),
    "unavailable": _Answer(503, _UNAVAILABLE, "server_error", "service_unavailable", "api_error", _RETRY),
}
_DENIALS = {
    dialect: {reason: _denial(answer, form) for reason, answer in _ANSWERS.items()}
    for dialect, form in (("openai", _openai), ("anthropic", _anthropic), ("mcp", _mcp))
}
