"""The public names as users write them. It is checked by type checkers and never run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

from starlette.applications import Starlette
from starlette.middleware import Middleware

from freegpt_auth import (
    UNRESOLVED,
    AuthMode,
    BearerTokenMiddleware,
    ConfigurationError,
    FileTokenStore,
    FreeGPTAuthError,
    MemoryTokenStore,
    Settings,
    StoreError,
    StoreUnavailableError,
    Survey,
    Token,
    TokenSource,
    TokenStore,
    TokenUser,
)

if TYPE_CHECKING:
    from starlette.requests import Request

app = Starlette(middleware=[Middleware(BearerTokenMiddleware)])
app.add_middleware(BearerTokenMiddleware)
app.add_middleware(BearerTokenMiddleware, store="api_tokens.json", public_paths=["/health"], required=True, usage="off")
by_path = BearerTokenMiddleware(app, store=Path("api_tokens.json"))
wrapped = BearerTokenMiddleware(app, store=FileTokenStore("api_tokens.json"))
in_memory = BearerTokenMiddleware(app, store=MemoryTokenStore())


class OneToken:
    """A token source of one's own."""

    def __init__(self, digest: bytes) -> None:
        self.token = Token(id="1", name="the one", prefix="sk-", created_at=datetime.now(UTC))
        self.digest = digest

    def peek(self, digest: bytes) -> Token | None:
        """Answer from memory."""
        if digest == b"":
            raise StoreUnavailableError("not now")
        return self.token if digest == self.digest else None

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from the source."""
        return self.peek(digest)

    def survey(self) -> Survey:
        """Return the survey."""
        return Survey(configured=True, active=1, source="this script")


own_source = BearerTokenMiddleware(app, store=OneToken(b""))
source: TokenSource = OneToken(b"")
store: TokenStore = MemoryTokenStore()
store = FileTokenStore("api_tokens.json")
answer = store.peek(b"")
if answer is not UNRESOLVED and answer is not None:
    assert_type(answer, Token)
    assert_type(answer.name, str)
    assert_type(answer.revoked_at, datetime | None)
assert_type(Settings.from_env(required=True).required, bool)
mode: AuthMode = AuthMode("open")
errors: list[type[FreeGPTAuthError]] = [ConfigurationError, StoreError, StoreUnavailableError]


def who(request: Request) -> str:
    """Name the caller."""
    user = request.user
    if isinstance(user, TokenUser):
        assert_type(user.identity, str)
        assert_type(user.is_authenticated, bool)
    return str(user.display_name)
