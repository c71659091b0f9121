"""The floor: the work of the middleware in the least code, written by hand.

Every header is looked at, the secret is digested and looked up, the token file is looked at every 10 ms, expiry is
checked, the use is noted, user and auth are put into the scope. What it leaves out is what makes a library of a sketch:
other carriers and their rules, WebSockets, modes, faults, reading the file again, and refusals that say why.
"""

from __future__ import annotations

import os
from collections import deque
from hashlib import sha256
from time import monotonic, time
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.authentication import AuthCredentials, BaseUser, SimpleUser

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

FRESHNESS = 0.010
CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
BODY = b'{"error":{"message":"Invalid API key provided","type":"invalid_request_error","code":"invalid_api_key"}}'
START: dict[str, Any] = {
    "type": "http.response.start",
    "status": 401,
    "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())],
}
END = {"type": "http.response.body", "body": BODY}


class Entry(NamedTuple):
    """The prepared data of a token."""

    token_id: str
    user: BaseUser
    auth: AuthCredentials
    expires: float


class Floor:
    """Guards *app* with the tokens whose secrets are given.

    Args:
        app: the application.
        secrets: of the tokens.
        path: of the token file.
        one_carrier: compare each header with ``Authorization`` only: the least scan of all, which does not notice a
            second credential.
    """

    def __init__(self, app: ASGIApp, secrets: list[str], path: str, *, one_carrier: bool = False) -> None:
        self.app = app
        self.one_carrier = one_carrier
        self.path = path
        self.used: deque[tuple[str, float]] = deque()
        self.looked_at = 0.0
        self.signature = self.look()
        auth = AuthCredentials(["authenticated"])
        self.entries = {
            sha256(secret.encode()).digest(): Entry(str(number), SimpleUser(str(number)), auth, float("inf"))
            for number, secret in enumerate(secrets)
        }

    def look(self) -> tuple[int, ...]:
        """Return the state of the token file."""
        status = os.stat(self.path)  # noqa: PTH116  a Path costs 1 us more
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a valid token through, refuse everything else."""
        if scope["type"] == "http":
            secret = b""
            if self.one_carrier:
                for name, value in scope["headers"]:
                    if name == b"authorization":
                        secret = value[7:]
            else:
                for name, value in scope["headers"]:
                    if name in CARRIERS:
                        secret = value[7:]
            now = monotonic()
            if now - self.looked_at >= FRESHNESS:
                if self.look() != self.signature:
                    raise NotImplementedError
                self.looked_at = now
            entry = self.entries.get(sha256(secret).digest())
            if entry is None or entry.expires <= (instant := time()):
                await send(START)
                await send(END)
                return
            self.used.append((entry.token_id, instant))
            scope["user"] = entry.user
            scope["auth"] = entry.auth
        await self.app(scope, receive, send)
