"""Refusals that a web page may read, where the guard stands outside the CORS middleware."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.middleware.cors import CORSMiddleware

from freegpt_auth import BearerTokenMiddleware, ConfigurationError, MemoryTokenStore
from freegpt_auth.guard.cors import EXPOSED, checked_origins
from freegpt_auth.guard.denials import denial
from tests.helpers.asgi import ask, plain

PAGE = "https://chat.example"
FROM_PAGE = [(b"origin", PAGE.encode())]
ALLOWED, EXPOSING, VARY = "access-control-allow-origin", "access-control-expose-headers", "vary"

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("origins", "origin", "expected"),
    [
        ([PAGE, "http://localhost:3000"], PAGE, {ALLOWED: PAGE, EXPOSING: EXPOSED, VARY: "Origin"}),
        ([PAGE], "https://evil.example", {VARY: "Origin"}),
        ([PAGE], "https://chat.example.evil", {VARY: "Origin"}),
        ([PAGE], "null", {VARY: "Origin"}),
        ([PAGE], "", {VARY: "Origin"}),
        (["*"], "https://any.example", {ALLOWED: "*", EXPOSING: EXPOSED}),
        ([], PAGE, {}),
    ],
)
async def test_refusals_are_readable(origins: list[str], origin: str, expected: dict[str, str]) -> None:
    """A page of a listed origin may read a refusal and its headers; answers of the application are left alone."""
    store = MemoryTokenStore()
    guarded = BearerTokenMiddleware(plain, store=store, public_paths=["/health"], cors_origins=origins)
    headers = [(b"origin", origin.encode())] if origin else []
    answer = await ask(guarded, headers=headers)
    names = [name.decode() for name, _ in answer.messages[0]["headers"]]
    assert answer.status == 401
    assert {name: answer.headers[name] for name in (ALLOWED, EXPOSING, VARY) if name in names} == expected
    assert len(names) == len({*names})
    assert (await ask(guarded, path="/health", headers=headers)).headers == {}


def test_exposed_headers_are_those_of_refusals() -> None:
    """Each header of a refusal that a browser hides by default is exposed by its whole name."""
    always = {b"content-type", b"content-length", b"cache-control"}
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    sent = {name for reason in ("missing", "unavailable") for name, _ in denial(scope, reason).headers}
    exposed = EXPOSED.lower().encode().split(b", ")
    assert sent - always == {b"www-authenticate", b"retry-after"} <= {*exposed}
    assert not any(b"*" in name for name in exposed)


async def test_cors_middleware_outside_adds_nothing_twice() -> None:
    """With both a CORS middleware outside and origins here, each header is on a refusal once."""
    guarded = BearerTokenMiddleware(plain, store=MemoryTokenStore(), cors_origins=[PAGE])
    outside = CORSMiddleware(guarded, allow_origins=[PAGE], expose_headers=["retry-after"])
    answer = await ask(outside, headers=FROM_PAGE)
    names = [name for name, _ in answer.messages[0]["headers"]]
    assert (answer.status, answer.headers[ALLOWED]) == (401, PAGE)
    assert len(names) == len({*names})


async def test_origins_come_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable lists origins with commas; an argument wins over it."""
    monkeypatch.setenv("FREEGPT_AUTH_CORS_ORIGINS", f" {PAGE} , http://localhost:3000,")
    for origins, allowed in ((None, PAGE), ([], None)):
        guarded = BearerTokenMiddleware(plain, store=MemoryTokenStore(), cors_origins=origins)
        assert (await ask(guarded, headers=FROM_PAGE)).headers.get(ALLOWED) == allowed


ORIGINS = [
    *("chat.example", "https://", "https://chat.example/", "https://chat.example/app", "https://Chat.example"),
    *("HTTPS://chat.example", "https://chat.example:443", "http://chat.example:80", "https://*.example", "null"),
    *("https://chat.example:", "https://chat.example:123456", "https://user@chat.example", "https://münchen.de"),
    *("https://chat.example\n", "https://a b", "", "https://chat.example?x"),
]


@pytest.mark.parametrize(
    ("origins", "message"),
    [
        *[([PAGE, origin], "is none that a browser sends; write scheme://host") for origin in ORIGINS],
        ("*", "not one string"),
        (["*", PAGE], "are \\* and others"),
    ],
)
def test_wrong_origins_stop_the_start(origins: Any, message: str) -> None:
    """A value that no browser sends, one string, and anything but a list is a mistake; the message shows the form."""
    with pytest.raises(ConfigurationError, match=message):
        checked_origins(origins)


def test_origins_as_browsers_send_them() -> None:
    """Ports, addresses, names of containers and the schemes of extensions and desktop applications are origins."""
    origins = ["http://localhost:3000", "http://[::1]:8000", "http://my_ui", "https://xn--mnchen-3ya.de"]
    origins += ["tauri://localhost", "chrome-extension://abcdefghijklmnop", "https://192.0.2.7:8443"]
    origins += ["https://chat.example:80"]
    assert checked_origins(origins) == {*origins}
