"""The pages on FastAPI and on CORS: their applications keep the promises of the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from freegpt_auth import FileTokenStore
from tests.helpers.pages import only

if TYPE_CHECKING:
    from collections.abc import Callable


def application(heading: str, page: str = "docs/guide/fastapi.md") -> Any:
    """Return the application of the block under a heading."""
    names: dict[str, Any] = {}
    exec(only(page, heading, "python"), names)
    return names["app"]


@pytest.fixture
def bearer(keep: Callable[..., Any]) -> dict[str, str]:
    """Return the header of a token in the default file."""
    return {"Authorization": f"Bearer {keep(FileTokenStore('api_tokens.json'))[1]}"}


def test_fastapi_authorize_button(bearer: dict[str, str]) -> None:
    """The schema declares a bearer scheme for the button; refusals stay ours, and a valid token reaches the handler."""
    client = TestClient(application("The Authorize button of /docs"))
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"HTTPBearer": []}]
    refused = client.get("/v1/models")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="freegpt_auth"')
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers=bearer).status_code == 200


def test_fastapi_caller(bearer: dict[str, str]) -> None:
    """The handler sees the token's name, of a request and of a WebSocket."""
    client = TestClient(application("The caller in a handler"))
    assert client.get("/v1/models", headers=bearer).json()["caller"] == "a-token"
    client = TestClient(application("WebSockets"))
    with client.websocket_connect("/v1/realtime", headers=bearer) as websocket:
        assert websocket.receive_text() == "Hello a-token"


def test_fastapi_token_files_are_apart(bearer: dict[str, str], keep: Callable[..., Any]) -> None:
    """A token of one file opens its own part of the application and no other."""
    other = {"Authorization": f"Bearer {keep(FileTokenStore('admin_tokens.json'))[1]}"}
    client = TestClient(application("Several token files"))
    statuses = [client.get(path, headers=each).status_code for path in ("/v1/", "/admin/") for each in (bearer, other)]
    assert statuses == [404, 401, 401, 404]


def test_fastapi_mounted_part(bearer: dict[str, str]) -> None:
    """Only the mounted part asks for a token."""
    client = TestClient(application("Guard a part of the application"))
    assert [client.get(path).status_code for path in ("/docs", "/v1/docs")] == [200, 401]
    assert client.get("/v1/docs", headers=bearer).status_code == 200


# --- CORS: headers that the npm packages openai 6.49, @anthropic-ai/sdk 1.14 and 0.137 (x-api-key) send in Chromium 156

STAINLESS = "arch lang os package-version retry-count runtime runtime-version"
COMMON = [f"x-stainless-{name}" for name in STAINLESS.split()]
ANTHROPIC = ["anthropic-dangerous-direct-browser-access", "anthropic-version", "content-type", *COMMON]
ANTHROPIC += ["x-stainless-timeout"]
PREFLIGHTS = [
    ("/v1/chat/completions", "POST", ["authorization", "content-type", *COMMON]),
    ("/v1/models", "GET", ["authorization", *COMMON]),
    ("/v1/models/ft-1", "DELETE", ["authorization", *COMMON]),
    ("/v1/messages", "POST", [*ANTHROPIC, "authorization"]),
    ("/v1/messages", "POST", [*ANTHROPIC, "x-api-key"]),
]


@pytest.mark.parametrize(("path", "method", "asked"), PREFLIGHTS)
def test_pages_with_usual_clients_read_refusals(
    monkeypatch: pytest.MonkeyPatch, path: str, method: str, asked: list[str]
) -> None:
    """In the order of docs/guide/cors.md the clients' preflights pass, and a refusal and its challenge are readable."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    app = application("Web pages and CORS", "docs/guide/cors.md")
    client = TestClient(app, headers={"Origin": "https://chat.example"})
    preflight = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": ",".join(sorted(asked))}
    answer = client.options(path, headers=preflight)
    assert answer.status_code == 200
    assert {*asked} <= {*answer.headers["access-control-allow-headers"].split(",")}
    assert method in answer.headers["access-control-allow-methods"]
    refused = client.request(method, path)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert "WWW-Authenticate" in refused.headers["access-control-expose-headers"]
