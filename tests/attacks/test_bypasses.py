"""However a request without a credential is spelled, real servers answer it with a refusal, or drop it.

The requests are bytes on a socket, or HTTP/2 frames that nobody checks before they leave: no client mends them. The
application behind the middleware answers REACHED to every path and method but the two public ones: what gets past the
middleware is seen in the raw answer. What is sent in HTTP/2 is the table of HTTP/1 over again, and HTTP/2's own tricks.

Left out, since they are let through by right: spellings that a server decodes to a public path before any application
sees them (``/%68ealth``), a preflight, and each spelling of a valid credential that RFC 9110 allows.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import digest_of, issue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

APPLICATION = """
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from freegpt_auth import BearerTokenMiddleware

class Reached:
    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            await PlainTextResponse("REACHED")(scope, receive, send)
            return
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "REACHED"})

app = FastAPI(redirect_slashes=False)
for path in ("/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/healthsecret", "/health/"):
    app.add_route(path, Reached())
app.mount("/api", Reached())
app.router.default = Reached()
app.add_middleware(BearerTokenMiddleware, public_paths=["/health", "/docs"])

@app.get("/health")
async def health():
    return "PUBLIC"

mounted = Starlette(routes=[Mount("/{tenant}", app)])
"""
TOKEN, VALID = issue("client", now=datetime.now(UTC))
DIGEST = digest_of(VALID)
LEAST = 150
"""Distinct requests, at the least, that each test must have sent and a server answered."""

PROXIED = ("--root-path", "/prefix", "--proxy-headers", "--forwarded-allow-ips", "*")
SERVERS = {
    **{
        f"uvicorn-{http}-{ws}": ("uvicorn", "app:app", "--http", http, "--ws", ws)
        for http, ws in product(("h11", "httptools"), ("websockets", "websockets-sansio", "wsproto"))
    },
    **{
        f"uvicorn-{http}-{kind}": ("uvicorn", app, "--http", http, *arguments)
        for http in ("h11", "httptools")
        for kind, app, arguments in (("mounted", "app:mounted", ()), ("proxied", "app:app", PROXIED))
    },
    "hypercorn": ("hypercorn", "app:app"),
    "hypercorn-mounted": ("hypercorn", "app:mounted"),
    "hypercorn-root": ("hypercorn", "app:app", "--root-path", "/prefix"),
}
SPEAK_HTTP2 = [kind for kind in SERVERS if kind.startswith("hypercorn")]
WAIT = {"uvicorn": ("--timeout-keep-alive", "1"), "hypercorn": ("--keep-alive", "1", "--graceful-timeout", "1")}


# --- how the tables are written


def listed(text: str) -> list[str]:
    """Return what stands in a table, between broken bars or on lines of its own."""
    return [entry for line in text.split("\n") for entry in line.split(" ¦ ") if entry]


def wire(text: str) -> bytes:
    """Return text as it goes over the wire; a bar ends a line."""
    return text.replace("|", "\r\n").encode("latin-1")


def request(
    target: str = "/v1/models", lines: str = "", *, method: str = "GET", host: str = "x", body: str = ""
) -> bytes:
    """Return a request after which the server closes the connection."""
    length = f"Content-Length: {len(body)}|" if body else ""
    lines = lines and f"{lines}|"
    head = f"{method} {target} HTTP/1.1|Host: {host}|Connection: close|{length}{lines}|"
    return wire(head) + body.encode("latin-1")


def upgrade(target: str = "/v1/realtime", lines: str = "") -> bytes:
    """Return a WebSocket's opening handshake."""
    lines = lines and f"{lines}|"
    return wire(
        f"GET {target} HTTP/1.1|Host: x|Connection: Upgrade|Upgrade: websocket|Sec-WebSocket-Version: 13|"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==|{lines}|"
    )


# --- the tables

SPELLINGS = f"""
/ // /* /api /api/ /api/health /api/health/ /api//health /api/../health /api/%2e%2e/health /v1/models /v1/models/any
/v1/models/../../health /v1/models?/../health /v1/models?path=/health /v1/models;/health /v1/models%3f/../health
/v1/models%23/health /v1/models%00/health /v1/chat/completions /?/health /?path=/health /healthsecret /healthz
/health/ /health// /health/. /health/.. /health/../v1/models /health/../health /health/v1/models /health/?x=/health
/health%2f /health%2F.. /health%2f..%2fv1%2fmodels /health%252f /health/%2e%2e/v1/models /health/..%2fv1%2fmodels
//health ///health //health/ //health/../v1/models //evil.example/health /http://x/health /./health /.//health
/%2e/health /%2e%2e/health /../health /v1/../health /%2fhealth /%2f%2fhealth /%2568ealth /%25%36%38ealth
/health; /health;v=1 /health;/v1/models /;/health /;x=/health /..;/health /health%3b /health%3bv1 /health%3f
/health%3fx=1 /health%23 /health%23/v1 /health%00 /%00/health /health%00/v1 /health%20 /%20/health /health%2500
/health%09 /health%0a /health%0d /health%0d%0aX:%20y /health%7f /health%85 /health%a0 /health%c0%80 /health%c0%af
/%c0%afhealth /%c0%ae/health /health%ef%bb%bf /%ef%bb%bfhealth /health%e2%80%8b /health%cc%81 /%ef%bd%88ealth
/%ca%b0ealth /%ef%bc%8fhealth /health%e2%80%ae /HEALTH /Health /HeAlTh/ /health. /health.. /health.json /health.html
/health~ /health* /health+ /health, /health:80 /health:/v1 /health@x /health&x=1 /health=1 /health! /health$ /health'
/health% /health%zz /health%u002f /health%5c /health%5c..%5cv1 /%5chealth /health,/v1/models /health/docs /docs/health
/docs/ /docs/oauth2-redirect /docs%2foauth2-redirect /docs/../v1/models /redoc /openapi.json /Docs /health,/docs
/prefix /prefix/ /prefix//health /prefixhealth /prefix/prefix/health /prefix%2f%2fhealth /prefix;/health
/prefix/../health /favicon.ico /static/../../health /.well-known/health /index.php/health /cgi-bin/..%2fhealth
/v1/models?api_key={VALID} /v1/models?access_token={VALID} /v1/models?token={VALID}&key={VALID} /{VALID}/v1/models
/v1/models?Authorization=Bearer%20{VALID} /v1/models?x-api-key={VALID} /v1/models/{VALID} /v1/models;api-key={VALID}
/Bearer%20{VALID} /v1/models?%0d%0aAuthorization:%20Bearer%20{VALID}
""".split()
# What only some servers take for a target, each in its own way.
TARGETS = listed(f"""
http://x/v1/models ¦ http://health/v1/models ¦ http://x/health/ ¦ http://x//health ¦ http://x/health/../v1 ¦ *health
http://u:{VALID}@x/v1/models ¦ http://{VALID}@x/v1/models ¦ https://x/v1/models ¦ http://[::1]/v1/models ¦ x:443 ¦ *
http://x:99999/v1/models ¦ http://x:80/v1/models?/health ¦ HTTP://x/v1/models ¦ http://x?/health ¦ http://x#/health
http://health ¦ http:///health/ ¦ http:/health/ ¦ http:health ¦ http://x/health%2f ¦ ws://x/v1/models ¦ file:///health/
ftp://x/v1/models ¦ health ¦ v1/models ¦ ./health ¦ ../health ¦ @/health/ ¦ :/health ¦ ?/health ¦ #/health ¦ \\health
\\\\health ¦ /health\\ ¦ /\\health ¦ /health\\..\\v1 ¦ health/../v1 ¦ %2fv1/models ¦ %2e%2fhealth ¦ /health|/v1
/health^ ¦ /health`id` ¦ /health{{}} ¦ /v1/models#/health ¦ /health"x" ¦ /health<x> ¦ /h\xe9alth ¦ /health\xa0
/health\x85 ¦ /health\x00 ¦ /health\x7f ¦ /health /v1/models ¦ /health\t/v1
""")
HOSTS = listed(f"""
localhost/health ¦ x/../health ¦ /health ¦ x:80/health? ¦ {VALID}@x ¦ x@health ¦ x\\health ¦ x# ¦ a b ¦ [::1 ¦ x:y ¦ ..
127.0.0.1:0 ¦ %2fhealth ¦ x,localhost ¦ \xe4 ¦ x\x00 ¦ http://x/health?
""")
METHODS = listed("""
HEAD ¦ POST ¦ PUT ¦ PATCH ¦ DELETE ¦ OPTIONS ¦ TRACE ¦ PROPFIND ¦ PROPPATCH ¦ MKCOL ¦ COPY ¦ MOVE ¦ LOCK ¦ UNLOCK
SEARCH ¦ PURGE ¦ REPORT ¦ M-SEARCH ¦ NOTIFY ¦ SUBSCRIBE ¦ MKCALENDAR ¦ LINK ¦ UNLINK ¦ MERGE
""")
NO_METHODS = listed(f"""
get ¦ Get ¦ G ¦ GETGET ¦ FOO ¦ QUERY ¦ PRI ¦ CONNECT ¦ GET,POST ¦ OPTIONS/ ¦ {"G" * 5000} ¦ \xe7
""")
NAMES = {
    "/health": """
        X-Original-URL X-Original-URI X-Original-Path X-Rewrite-URL X-Forwarded-URI X-Forwarded-Path Path Referer
        X-Forwarded-Prefix X-Script-Name Script-Name Path-Info Root-Path X-Envoy-Original-Path X-Accel-Redirect
        X-Sendfile""",
    "/v1/models": "X-Forwarded-Prefix X-Script-Name Script-Name Root-Path Daphne-Root-Path",
    "127.0.0.1": """
        X-Forwarded-For X-Real-IP X-Client-IP True-Client-IP CF-Connecting-IP X-Custom-IP-Authorization
        X-Forwarded-Host X-Host X-Forwarded-Server X-ProxyUser-Ip Client-IP X-Remote-Addr""",
    "OPTIONS": "X-HTTP-Method-Override X-HTTP-Method X-Method-Override Access-Control-Request-Method",
    "client": "X-Forwarded-User X-Remote-User REMOTE_USER X-Authenticated-User X-WebAuth-User From",
    f"Bearer {VALID}": """
        Proxy-Authorization WWW-Authenticate Authentication Authentication-Info X-Authorization HTTP_AUTHORIZATION
        X-Forwarded-Authorization X-Original-Authorization HTTP-Authorization Authorization_ Authorisation X-Api-Key
        api-key Cookie""",
    VALID: """
        X_API_KEY api_key ApiKey X-Auth-Token X-Access-Token X-Goog-Api-Key OpenAI-Insecure-Api-Key X-Api-Keys
        OpenAI-Organization Authorization Proxy-Authorization X-Authorization X-Forwarded-Authorization Authentication
        Cookie""",
}
LINES = [f"{name}: {value}" for value, names in NAMES.items() for name in names.split()] + listed(f"""
Forwarded: for=127.0.0.1;host=localhost;proto=https;path=/health ¦ X-Forwarded-For: ::1, unix: ¦ X-Debug: true
X-Forwarded-Proto: https ¦ X-Forwarded-Proto: lifespan ¦ X-Forwarded-Port: 0 ¦ X-Forwarded-Host: localhost/health
X-User-Id: {TOKEN.id} ¦ X-SSL-Client-Verify: SUCCESS ¦ X-Internal-Request: 1 ¦ X-Middleware-Subrequest: middleware
Via: 1.1 localhost ¦ User-Agent: kube-probe/1.31 ¦ User-Agent: ELB-HealthChecker/2.0 ¦ Origin: http://localhost
Range: bytes=0-0 ¦ If-None-Match: * ¦ Cache-Control: only-if-cached ¦ Max-Forwards: 0 ¦ Sec-Fetch-Mode: cors
Sec-WebSocket-Protocol: openai-insecure-api-key.{VALID} ¦ Cookie: Authorization=Bearer {VALID}; api_key={VALID}
X-Api-Key: "{VALID}" ¦ X-Api-Key: '{VALID}' ¦ X-Api-Key: Bearer {VALID} ¦ api-key: bearer  {VALID} ¦ X-Api-Key: {VALID},{VALID} ¦ X-Api-Key: {VALID}; x ¦ X-Api-Key: key={VALID}
X-Api-Key: {TOKEN.prefix} ¦ api-key: {VALID[:-1]} ¦ api-key: sha256${DIGEST.hex()}
Origin: http://x|Access-Control-Request-Method: GET ¦ MCP-Protocol-Version: 2025-06-18 ¦ Anthropic-Version: 2023-06-01
freegpt_auth: {VALID} ¦ Accept: application/json, text/event-stream
""")
VALUES = listed(f"""
Bearer ¦ Bearer{VALID} ¦ Bearer:{VALID} ¦ Bearer={VALID} ¦ Bearer: {VALID} ¦ Bearer-Token {VALID} ¦ DPoP {VALID}
Bearer token={VALID} ¦ Bearer "{VALID}" ¦ Bearer '{VALID}' ¦ Bearer <{VALID}> ¦ Bearer {VALID},{VALID} ¦ Bearer {VALID},
Bearer {VALID}, Bearer {VALID} ¦ Basic eA==, Bearer {VALID} ¦ Bearer {VALID}, Basic eA== ¦ Bearer ,{VALID} ¦ Bearer {VALID}; ¦ Bearer {VALID} {VALID} ¦ Bearer {VALID} realm="x"
Bearer {VALID}= ¦ Bearer {VALID}A ¦ Bearer {VALID}%00 ¦ Bearer {VALID}\\0 ¦ Bearer {VALID[:-1]} ¦ Bearer {VALID[1:]}
Bearer {VALID[3:]} ¦ Bearer {VALID.upper()} ¦ Bearer {VALID.lower()} ¦ Bearer {VALID[::-1]} ¦ Bearer {TOKEN.prefix}
Bearer {TOKEN.prefix}... ¦ Bearer {VALID[:20]}* ¦ Bearer {VALID.replace("-", "%2d")} ¦ Bearer {VALID.encode().hex()}
Bearer {b64encode(VALID.encode()).decode()} ¦ Bearer {TOKEN.id} ¦ Bearer {TOKEN.name} ¦ Bearer sha256${DIGEST.hex()}
Bearer {DIGEST.hex()} ¦ Bearer {b64encode(DIGEST).decode()} ¦ Bearer environment ¦ Bearer DUMMY_KEY ¦ Bearer null
Bearer undefined ¦ Bearer * ¦ Bearer .* ¦ Bearer % ¦ Bearer ' OR '1'='1 ¦ Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0.
Bearer {"A" * 5000} ¦ Bearer {VALID}{" " * 5000}{VALID} ¦ Basic {b64encode(f"client:{VALID}".encode()).decode()}
Basic {b64encode(f"{VALID}:".encode()).decode()} ¦ Basic {VALID} ¦ Token {VALID} ¦ ApiKey {VALID} ¦ OAuth {VALID}
Digest username="client", response="{VALID}" ¦ Bearer Bearer {VALID} ¦ Negotiate {VALID} ¦ Bearer\xa0{VALID}
Bearer \xa0{VALID} ¦ Bearer {VALID}\x85 ¦ Bearer \xef\xbb\xbf{VALID} ¦ \xa0Bearer {VALID} ¦ Be\xe4rer {VALID}
""")
BEARER = f"Authorization: Bearer {VALID}"
PREFLIGHT = "Origin: http://x|Access-Control-Request-Method: GET"
PAIRS = listed(f"""
{BEARER}|{BEARER} ¦ {BEARER}|authorization: Bearer no ¦ AUTHORIZATION: Basic eDp4|{BEARER} ¦ Authorization:|{BEARER}
X-Api-Key: {VALID}|x-api-key: {VALID} ¦ api-key: no|Api-Key: {VALID} ¦ {BEARER}|X-Api-Key: 1|X-Api-Key: 2
Connection: authorization, x-api-key|X-Api-Key: no
""")
NEARLY_PREFLIGHTS = [
    *(request(lines=PREFLIGHT, method=method) for method in ("POST", "HEAD", "PUT", "TRACE")),
    request(lines="Origin: http://x", method="OPTIONS"),
    request(lines="Access-Control-Request-Method: GET", method="OPTIONS"),
    request(lines="Origin: http://x|Access-Control-Request-Headers: authorization", method="OPTIONS"),
    request(lines="Origin: http://x|Access_Control_Request_Method: GET", method="OPTIONS"),
    request(lines=f"{PREFLIGHT}|X-HTTP-Method-Override: OPTIONS", method="POST"),
    request("/v1/models?_method=OPTIONS", PREFLIGHT, method="POST", body="_method=OPTIONS"),
]
INNER = "GET /v1/models HTTP/1.1|Host: x|Connection: close||"
NEXT = "GET /v1/models HTTP/1.1|Host: x||"
POST = "POST /v1/models HTTP/1.1|Host: x|"
CHUNKED = "Transfer-Encoding: chunked"
FIXED = f"{len(wire(INNER)):x}|{INNER}|0||"
BODIES = {
    "application/json": f'{{"api_key": "{VALID}", "authorization": "Bearer {VALID}"}}',
    "application/x-www-form-urlencoded": f"access_token={VALID}&api_key={VALID}",
    "multipart/form-data; boundary=b": f'--b\r\nContent-Disposition: form-data; name="token"\r\n\r\n{VALID}\r\n--b--',
    "message/http": f"{BEARER}\r\n\r\n",
    "text/plain": wire(INNER.replace("|", f"|{BEARER}|", 1)).decode(),
}
PIPELINED = [
    wire(text)
    for text in (
        "GET /v1/models HTTP/1.0||",
        "GET /v1/models HTTP/1.0|Host: x||",
        "HEAD /v1/models HTTP/1.0||",
        "GET /v1/models HTTP/1.0|Connection: keep-alive|Host: x||",
        NEXT * 20 + INNER,
        f"HEAD /v1/models HTTP/1.1|Host: x||{INNER}",
        f"OPTIONS /v1/models HTTP/1.1|Host: x||{INNER}",
        f"{POST}Content-Length: 2||hi{INNER}",
        f"{POST}{CHUNKED}||2|hi|0||{INNER}",
        f"{POST}{CHUNKED}|Connection: close||{FIXED}",
        f"{POST}Expect: 100-continue|Content-Length: 2||hi{INNER}",
        f"{POST}Upgrade: h2c|HTTP2-Settings: AAMAAABkAAQAAP__|Content-Length: 2||hi{INNER}",
    )
]
# The middleware answers each of these, behind every server.
REFUSED = [
    *(request(spelling) for spelling in SPELLINGS),
    *(request(method=method) for method in METHODS),
    *(request(lines=line) for line in LINES + PAIRS),
    *(request(lines=f"Authorization: {value}") for value in VALUES),
    *NEARLY_PREFLIGHTS,
    *(
        request("/v1/chat/completions", f"Content-Type: {kind}", method="POST", body=body)
        for kind, body in BODIES.items()
    ),
    *PIPELINED,
    *(request(lines=line) for line in ("Upgrade: websocket", "Upgrade: h2", "Upgrade: TLS/1.0", "Connection: Upgrade")),
    request("/v1/models/health", "Daphne-Root-Path: /v1/models"),
]
BROKEN_LINES = listed(f"""
Authorization: Bearer {VALID}\x00 ¦ Authorization: \x0bBearer {VALID} ¦ Authorization: Bearer\x0b{VALID}
Authorization: Bearer\x1f{VALID} ¦ Authorization: Bearer {VALID}\x0c ¦ Authorization: Bearer {VALID}\x7f
Authorization: Bearer {VALID[:9]}| {VALID[9:]} ¦ Authorization: {"A" * 70000} ¦ X-Note: a| {BEARER}
Authorization : Bearer {VALID} ¦ Authorization\x00: Bearer {VALID} ¦ :{BEARER} ¦ X: a\r{BEARER} ¦ \xa0{BEARER}
X-Api-Key: {VALID}\x0c ¦ X-Api-Key: \x0b{VALID} ¦ X-Api-Key: {VALID}\x1f ¦ api-key: \x1c{VALID} ¦ api-key: {VALID}\x0b
Authorization Bearer {VALID} ¦ X-Api-Key\x0b: {VALID} ¦ :path: /health ¦ :method: OPTIONS ¦ Host: x ¦ Host: localhost
Content-Length: 0|Content-Length: 5 ¦ Content-Length: -1 ¦ Content-Length: +1 ¦ Content-Length: 1e1
Transfer-Encoding: xchunked ¦ Transfer-Encoding: identity ¦ Connection: Upgrade|Upgrade: websocket
Connection: Upgrade|Upgrade: websocket|Sec-WebSocket-Version: 12|{PREFLIGHT}
""")
SMUGGLED = [
    wire(text)
    for text in (
        f"GET /v1/models|{INNER}",
        f"|{INNER}",
        f"||{INNER}",
        f"GET /v1/models HTTP/1.0|Connection: keep-alive|Host: x||{INNER}",
        f"GET /health/||{INNER}",
        "GET  /v1/models HTTP/1.1|Host: x|Connection: close||",
        "GET\t/v1/models\tHTTP/1.1|Host: x|Connection: close||",
        f" {INNER}",
        *(
            INNER.replace("HTTP/1.1", version)
            for version in ("HTTP/1.2", "HTTP/2.0", "HTTP/9.9", "http/1.1", "HTTP/1", "HTTQ/1.1", "ICY")
        ),
        "GET /v1/models HTTP/1.1|Connection: close||",
        f"GET /v1/models HTTP/1.1| {BEARER}|Host: x|Connection: close||",
        f"{POST}Content-Length: {len(wire(INNER)) + 5}|{CHUNKED}||0||{INNER}{INNER}",
        f"{POST}Content-Length: 4|{CHUNKED}||{FIXED}{INNER}",
        f"{POST}{CHUNKED}|Content-Length: 0||{FIXED}{INNER}",
        f"{POST}{CHUNKED}|Transfer-Encoding: x||{FIXED}{INNER}",
        f"{POST}Transfer-Encoding: x, chunked||{FIXED}{INNER}",
        f"{POST}Transfer-Encoding:\x0bchunked||{FIXED}{INNER}",
        f"{POST}Transfer-Encoding : chunked||{FIXED}{INNER}",
        f"{POST}Transfer-Encoding: chunked, identity||{FIXED}{INNER}",
        f"{POST}Content-Length: 0, 5||{INNER}",
        f"{POST}Content-Length: 0|Content-Length: 5||{INNER}",
        f"{POST}{CHUNKED}||0x2|hi|0||{INNER}",
        f"{POST}{CHUNKED}||-1|hi|0||{INNER}",
        f"{POST}{CHUNKED}||2;{BEARER}|hi|0||{INNER}",
        f"{POST}{CHUNKED}||2|hi0||{INNER}",
        f"{POST}Transfer-Encoding: gzip, chunked||{FIXED}{INNER}",
        f"{POST}Authorization: Bearer no|{CHUNKED}||2|hi|0|{BEARER}||{INNER}",
        f"POST /v1/models HTTP/1.0|{CHUNKED}||{FIXED}{INNER}",
        f"GET /v1/models HTTP/1.1|{'X: y|' * 20000}|",
    )
]
# A server may refuse these itself, or close the connection.
MALFORMED = [
    *(request(target) for target in ["", *TARGETS]),
    *(request(method=method) for method in ["", *NO_METHODS]),
    *(request(host=host) for host in ["", *HOSTS]),
    *(request(lines=line) for line in BROKEN_LINES),
    request("*", method="OPTIONS"),
    request("*", "Origin: http://x", method="OPTIONS"),
    request("x:443", f"Proxy-{BEARER}", method="CONNECT"),
    *SMUGGLED,
]
SECRET = "openai-insecure-api-key."
ENDPOINTS = listed(f"""
/v1/realtime ¦ / ¦ //health ¦ /health/ ¦ /HEALTH ¦ /health%2f ¦ /health%00 ¦ /health/../v1 ¦ /./health ¦ /health;
/healthsecret ¦ /api/health ¦ /health%20 ¦ /%2568ealth ¦ /docs/ ¦ /v1/realtime?/health ¦ /prefix//health ¦ /prefixhealth
/v1/realtime?api_key={VALID} ¦ /{SECRET}{VALID} ¦ /v1/realtime?Authorization=Bearer%20{VALID}
/v1/realtime?{SECRET}{VALID}
""")
OFFERS = listed(f"""
chat ¦ {SECRET} ¦ {SECRET}, {VALID} ¦ realtime, {SECRET}no ¦ OpenAI-Insecure-Api-Key.{VALID} ¦ realtime, {VALID}
openai-insecure-api-key-{VALID} ¦ openai-insecure-api-key, {VALID} ¦ bearer, {VALID} ¦ access_token, {VALID}
Authorization.{VALID} ¦ Bearer.{VALID} ¦ base64url.bearer.authorization.k8s.io.{VALID} ¦ x-{SECRET}{VALID}
{SECRET}.{VALID} ¦ {SECRET}{VALID}. ¦ {SECRET}{VALID[:-1]} ¦ {SECRET}{VALID}A ¦ {SECRET}{VALID.lower()}
{SECRET}{DIGEST.hex()} ¦ {SECRET}{TOKEN.id} ¦ {SECRET}{VALID}, {SECRET}no ¦ {SECRET}no, {SECRET}{VALID}
{SECRET}{VALID}, {SECRET}{VALID} ¦ {SECRET}{SECRET}{VALID}
""")
BROKEN_OFFERS = listed(f"""
{SECRET}\xa0{VALID} ¦ {SECRET}{VALID}\xa0, ¦ \x85{SECRET}{VALID}x ¦ {SECRET} {VALID} ¦ , ¦ {SECRET}"{VALID}"
{SECRET}Bearer {VALID}
""")
UPGRADE_LINES = listed(f"""
{PREFLIGHT} ¦ Cookie: {SECRET}{VALID} ¦ Authorization: Basic {VALID} ¦ {BEARER}A ¦ {BEARER}|{BEARER} ¦ Proxy-{BEARER}
X-Forwarded-Proto: https ¦ X-Original-URL: /health ¦ Sec-WebSocket-Extensions: permessage-deflate
Sec-WebSocket-Protocol: {SECRET}{VALID}|Sec-WebSocket-Protocol: {SECRET}no ¦ Sec-WebSocket-Protocols: {SECRET}{VALID}
Origin: http://localhost
""")
WEBSOCKETS = [
    *(upgrade(target) for target in ENDPOINTS),
    *(upgrade(lines=f"Sec-WebSocket-Protocol: {offer}") for offer in OFFERS),
    *(upgrade(lines=line) for line in UPGRADE_LINES),
    upgrade().replace(b"websocket", b"WebSocket"),
    upgrade().replace(b": Upgrade", b": keep-alive, upgrade"),
]
BROKEN_WEBSOCKETS = [
    *(
        upgrade().replace(*change.encode().split(b" -> "))
        for change in listed("""
HTTP/1.1 -> HTTP/1.0 ¦ 13 -> 12 ¦ 13 -> 8 ¦ dGhlIHNhbXBsZSBub25jZQ== -> x ¦ Sec-WebSocket-Key -> X ¦ GET -> POST
Sec-WebSocket-Version -> X ¦ websocket -> websocket, h2c ¦ websocket -> h2c, websocket ¦ GET -> CONNECT ¦ GET -> get
GET -> PUT ¦ /v1/realtime -> http://x/v1/realtime ¦ /v1/realtime -> http://x/health/ ¦ /v1/realtime -> *
/v1/realtime -> realtime
""")
    ),
    *(upgrade(lines=f"Sec-WebSocket-Protocol: {offer}") for offer in BROKEN_OFFERS),
    upgrade() + b"\x81\x85\0\0\0\0hello",
]
ADMITTED = {
    request(lines=BEARER): b"REACHED",
    request("/v1/chat/completions", f"authorization: bEARER   {VALID}\t", method="POST", body="{}"): b"REACHED",
    request("//health/../v1", f"X-Api-Key: {VALID}"): b"REACHED",
    request("/api/health", f"Api-Key:{VALID}|{BEARER[:-1]}"): b"REACHED",
    request(lines=PREFLIGHT, method="OPTIONS"): b"REACHED",
    upgrade(lines=f"Sec-WebSocket-Protocol: realtime, {SECRET}{VALID}"): b"REACHED",
    upgrade(lines=BEARER): b"REACHED",
    request("/health"): b"PUBLIC",
    request("/%68ealth?x"): b"PUBLIC",
    request("/docs"): b"swagger",
}
CARRIERS = [BEARER, f"X-Api-Key: {VALID}", f"Api-Key: {VALID}"]


# --- the tables of HTTP/2

Fields = tuple[tuple[bytes, bytes], ...]


class Stream(NamedTuple):
    """A request as HTTP/2 sends it."""

    headers: Fields
    body: bytes = b""
    trailers: Fields = ()


OF_HTTP1 = {b"host", b"connection", b"upgrade", b"sec-websocket-key", b"transfer-encoding"}
DEFAULTS = ":method: GET|:scheme: http|:authority: x|:path: /v1/models"
EXTENDED = ":method: CONNECT|:protocol: websocket|:path: /v1/realtime|sec-websocket-version: 13"
LOWER_BEARER = f"authorization: Bearer {VALID}"
ONE_REQUEST = re.compile(rb"[^\r\n]* [^\r\n]* HTTP/1\.[01]\r\n(?!.* HTTP/1\.)", re.DOTALL)


def fields(text: str) -> Fields:
    """Return the header fields that stand in *text*, between bars; a pseudo header's name begins with a colon."""
    pairs = [line.encode("latin-1").partition(b": ") for line in text.split("|") if line]
    return tuple((name, value) for name, _, value in pairs)


def stream(text: str, body: bytes = b"", trailers: str = "") -> Stream:
    """Return a request with these header fields, and with those pseudo headers that are not among them."""
    own = fields(text)
    return Stream((*(pair for pair in fields(DEFAULTS) if pair[0] not in dict(own)), *own), body, fields(trailers))


def translated(row: bytes) -> Stream:
    """Return an HTTP/1.1 request as HTTP/2 says it; a WebSocket's handshake is an extended CONNECT (RFC 8441)."""
    head, _, body = row.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, _, target = first.rpartition(b" ")[0].partition(b" ")
    pairs = [line.partition(b":") for line in lines]
    own = [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
    websocket = b"sec-websocket-key" in dict(own)
    pseudo = [(b":method", b"CONNECT" if websocket else method), (b":scheme", b"http"), (b":path", target)]
    pseudo += [(b":authority", dict(own).get(b"host", b"")), *([(b":protocol", b"websocket")] if websocket else [])]
    return Stream((*pseudo, *(pair for pair in own if pair[0] not in OF_HTTP1)), body)


def all_translated(rows: Iterable[bytes]) -> list[Stream]:
    """Return those rows that are one request each, as HTTP/2 says them, and once what it says in one way."""
    return [*dict.fromkeys(translated(row) for row in rows if ONE_REQUEST.match(row))]


# The middleware answers each of these.
REFUSED_STREAMS = [
    *(
        stream(entry)
        for entry in listed(f"""
:path: * ¦ :path: health ¦ :path: http://x/health ¦ :path: ?/health ¦ :path: #/health ¦ :path: \\health ¦ :path: x:443
:path: *|:method: OPTIONS ¦ :path: *|:method: OPTIONS|origin: http://x ¦ :method: options|origin: http://x
:authority: localhost/health ¦ :authority: x/../health ¦ :authority: {VALID}@x ¦ :authority: /health? ¦ :authority: #
:authority: 127.0.0.1 ¦ :authority: http://x/health ¦ :authority: [::1 ¦ :authority: a b ¦ :authority: x|host: x
:scheme: https ¦ :scheme: ws ¦ :scheme: file ¦ :scheme: health ¦ :scheme: http://x/health? ¦ :scheme: {VALID}
{LOWER_BEARER}|{LOWER_BEARER} ¦ authorization: Bearer|authorization: {VALID} ¦ {LOWER_BEARER}|authorization: Bearer no
authorization: Bearer {VALID[:9]}|authorization: {VALID[9:]} ¦ authorization: Bearer no|x: y|{LOWER_BEARER}
x-api-key: {VALID}|x-api-key: {VALID} ¦ x-api-key: {VALID[:9]}|x-api-key: {VALID[9:]} ¦ api-key: no|api-key: {VALID}
cookie: authorization=Bearer {VALID} ¦ cookie: authorization=Bearer|cookie: {VALID} ¦ cookie: a=b|cookie: {VALID}
cookie: a=b|cookie: x-api-key={VALID}|cookie: c=d ¦ cookie: {LOWER_BEARER} ¦ te: trailers|trailer: authorization
x-filler: {"A" * 40000} ¦ x-filler: {"A" * 40000}|proxy-{LOWER_BEARER} ¦ priority: u=0 ¦ alt-used: x/health
{EXTENDED} ¦ {EXTENDED}|cookie: {SECRET}{VALID} ¦ {EXTENDED}|{LOWER_BEARER}|{LOWER_BEARER} ¦ {EXTENDED}|origin: http://x
{EXTENDED}|sec-websocket-protocol: {SECRET}no ¦ :authority: x/health|{EXTENDED} ¦ :scheme: https|{EXTENDED}
""")
    ),
    *(
        stream(":method: POST", b"hi", trailers)
        for trailers in listed(
            f"{LOWER_BEARER} ¦ x-api-key: {VALID} ¦ api-key: {VALID} ¦ {LOWER_BEARER}|{LOWER_BEARER}"
        )
    ),
    stream("te: trailers|trailer: authorization", b"", LOWER_BEARER),
    stream(":method: POST|authorization: Bearer no", b"hi", LOWER_BEARER),
    stream(":method: POST", f"{LOWER_BEARER}\r\n\r\n".encode()),
]
# The server may refuse these itself, or close the connection.
MALFORMED_STREAMS = [
    *(
        stream(entry)
        for entry in listed(f"""
:path: /health|:path: /v1/models ¦ :path: /v1/models|:path: /health ¦ :method: OPTIONS|:method: GET ¦ :method:\x20
:method: GET|:method: OPTIONS|origin: http://x|access-control-request-method: GET ¦ :scheme: http|:scheme: https
:authority: x|:authority: localhost ¦ :authority: x|host: localhost ¦ host: x|host: x ¦ :path:\x20 ¦ :authority:\x20
:status: 200 ¦ :health: /health ¦ :Path: /health ¦ :path : /health ¦ :: /health ¦ :{LOWER_BEARER} ¦ :protocol: websocket
x: y|:path: /health ¦ x: y|:method: OPTIONS ¦ {BEARER} ¦ AUTHORIZATION: Bearer {VALID} ¦ X-API-KEY: {VALID}
authorization : Bearer {VALID} ¦ \x00{LOWER_BEARER} ¦ authorization\x00: Bearer {VALID} ¦ x:{LOWER_BEARER} ¦ : {VALID}
authorization:  Bearer {VALID} ¦ {LOWER_BEARER}\x20 ¦ {LOWER_BEARER}\x00 ¦ {LOWER_BEARER}\t ¦ x: y\r{LOWER_BEARER}
connection: authorization ¦ connection: keep-alive ¦ proxy-connection: keep-alive ¦ keep-alive: 1 ¦ te: gzip
upgrade: h2c ¦ upgrade: websocket ¦ transfer-encoding: chunked ¦ content-length: 5 ¦ content-length: -1
content-length: x ¦ x-filler: {"A" * 70000} ¦ :method: CONNECT ¦ :path: /h\xe9alth ¦ :path: /v1\x00
:method: connect|:protocol: websocket ¦ {EXTENDED}|sec-websocket-version: 12
:method: CONNECT|:protocol: websocket ¦ :method: CONNECT|:protocol: connect-udp
:method: CONNECT|:protocol: connect-ip|:path: /health/ ¦ {EXTENDED}|connection: upgrade|upgrade: websocket
:method: CONNECT|:protocol: websocket|sec-websocket-version: 13|x: y|:path: /health ¦ {EXTENDED}|:protocol: websocket
""")
    ),
    *(
        Stream(tuple(pair for pair in fields(DEFAULTS) if pair[0] != name))
        for name in (b":method", b":scheme", b":authority", b":path")
    ),
    Stream(fields(":method: CONNECT|:authority: x:443")),
    Stream(fields(f":method: CONNECT|:authority: x:443|proxy-{LOWER_BEARER}")),
    Stream(fields(LOWER_BEARER)),
    stream(f"x: y\r\n{LOWER_BEARER}"),
    stream(f"x: y\n{LOWER_BEARER}"),
    *(
        stream(":method: POST", b"hi", trailers)
        for trailers in listed(f":path: /health ¦ :method: OPTIONS ¦ {BEARER} ¦ {LOWER_BEARER}|:path: /health")
    ),
    stream(":method: POST|content-length: 9", b"hi", LOWER_BEARER),
    stream(EXTENDED, b"\x81\x85\0\0\0\0hello"),
]
SETTINGS = b"AAMAAABkAAQAAP__"
BROKEN_SETTINGS = [b"", b"!", b"A", SETTINGS + b"\r\nHTTP2-Settings: " + SETTINGS, b"\xff", b"A" * 9000]


def to_http2(row: bytes, settings: bytes = SETTINGS) -> bytes:
    """Return the request with the wish to go on in HTTP/2 (RFC 7540, section 3.2)."""
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: " + settings
    return row.replace(b"Connection: close", wish)


def all_to_http2(rows: Iterable[bytes]) -> list[bytes]:
    """Return those rows that a server can go on from, with the wish to.

    That is none with a body or another wish. After a HEAD the client does not know that its answer has no body, and
    hypercorn waits for itself after a CONNECT.
    """
    unfit = re.compile(rb"(?:HEAD|CONNECT) |.*\r\n(?:Content-Length|Upgrade): ", re.DOTALL)
    fit = (row for row in rows if ONE_REQUEST.match(row) and not unfit.match(row))
    return [to_http2(row) for row in fit if b"Connection: close" in row]


# --- how it is sent, and what an answer says

# hypercorn says "connection: close" and an empty body, and does not always close.
ENDED = re.compile(rb"REACHED|content-length: 0\r\n(?:[^\r\n]+\r\n)*connection: close\r\n", re.IGNORECASE)
ORIGIN_FORM = re.compile(rb"^([A-Z-]+ )(?=/)", re.MULTILINE)
SWITCHED = re.compile(rb"HTTP/1\.1 101 .*?\r\n\r\n", re.DOTALL)
NEVER = re.compile(rb"(?!)")
STATUS = re.compile(rb"HTTP/(?:1\.[01]|2) (?!100)(\d+)")  # 100 goes before the answer: hypercorn's own
CHALLENGE = b'www-authenticate: bearer realm="freegpt_auth"'
OWN_REFUSALS = {b"400", b"401", b"405", b"426", b"431", b"501"}
# uvicorn, when it cannot hand on a handshake that is not ASCII
NOT_HANDED_ON = re.compile(rb"HTTP/1\.1 500 .*\r\n\r\nFailed to open a WebSocket connection\.", re.DOTALL)
STREAMS = 100  # of one connection, as many as hypercorn allows


@dataclass
class Target:
    """A server, and where the application is mounted in it."""

    url: str
    prefix: bytes

    def below(self, rows: Iterable[bytes]) -> list[bytes]:
        """Return those rows that can be sent below the mount point, as they are to be sent there."""
        if not self.prefix:
            return [*rows]
        return [
            ORIGIN_FORM.sub(rb"\1" + self.prefix, row)
            for row in rows
            # A path with a line break belongs to no mount point of Starlette's.
            if ORIGIN_FORM.match(row) and len(ORIGIN_FORM.findall(row)) == 1 and b"%0d%0a" not in row
        ]

    def exchange(self, row: bytes, ended: re.Pattern[bytes] = ENDED) -> bytes:
        """Send *row* on a connection of its own; return all that comes until the server closes, or has *ended*."""
        with self.connect() as connection:
            return exchange(connection, row, ended)

    def converse(self, requests: Iterable[Stream]) -> list[bytes]:
        """Send all *requests* at once, each on a stream of one HTTP/2 connection; return the answers, in order."""
        client = Http2()
        client.connection.initiate_connection()
        with self.connect() as connection:
            return client.converse(connection, requests)

    def go_on(self, opening: bytes, requests: Iterable[Stream] = ()) -> list[bytes]:
        """Send *opening*, an HTTP/1.1 request, then go on in HTTP/2; return the answers, that to *opening* first."""
        client = Http2()
        client.connection.initiate_upgrade_connection()
        with self.connect() as connection:
            received = exchange(connection, opening, SWITCHED)
            switched = SWITCHED.match(received)
            if not switched:
                return [received]
            client.answers[1] = b""
            client.waiting.add(1)
            return client.converse(connection, requests, received[switched.end() :])

    def connect(self) -> socket.socket:
        """Return a new connection."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=30)


class Http2:
    """A client that mends nothing, neither what it sends nor what it gets. A dropped request has an empty answer."""

    def __init__(self) -> None:
        self.connection = H2Connection(
            H2Configuration(
                validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
            )
        )
        self.answers: dict[int, bytes] = {}
        self.waiting: set[int] = set()

    def converse(self, connection: socket.socket, requests: Iterable[Stream], received: bytes = b"") -> list[bytes]:
        """Send all *requests* and take the answers, which are written as HTTP/1.1 writes them."""
        for request in requests:
            self._request(request)
        self._take(received)
        with contextlib.suppress(ConnectionError):
            connection.sendall(self.connection.data_to_send())
            while self.waiting and (block := connection.recv(65536)):
                self._take(block)
                connection.sendall(self.connection.data_to_send())
        return [*self.answers.values()]

    def _request(self, request: Stream) -> None:
        number = self.connection.get_next_available_stream_id()
        self.answers[number] = b""
        self.waiting.add(number)
        more = bool(request.body or request.trailers)
        is_open = (b":protocol", b"websocket") in request.headers
        self.connection.send_headers(number, request.headers, end_stream=not more and not is_open)
        if more:
            self.connection.send_data(number, request.body, end_stream=not request.trailers)
        if request.trailers:
            self.connection.send_headers(number, request.trailers, end_stream=True)

    def _take(self, block: bytes) -> None:
        for event in self.connection.receive_data(block):
            match event:
                case ResponseReceived(stream_id=int(number), headers=[(_, status), *headers]):
                    lines = [b"HTTP/2 " + status, *(name + b": " + value for name, value in headers), b"\r\n"]
                    self.answers[number] += b"\r\n".join(lines)
                case DataReceived(stream_id=int(number), data=bytes(data), flow_controlled_length=length):
                    self.connection.acknowledge_received_data(length or 0, number)
                    self.answers[number] += data
                    if b"REACHED" in self.answers[number]:
                        self.waiting.discard(number)
                case StreamEnded(stream_id=int(number)) | StreamReset(stream_id=int(number)):
                    self.waiting.discard(number)


def exchange(connection: socket.socket, row: bytes, ended: re.Pattern[bytes]) -> bytes:
    """Send *row*; return all that comes until the server closes, or has *ended*."""
    received = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(row)
    with contextlib.suppress(ConnectionError):
        while not ended.search(received) and (block := connection.recv(65536)):
            received += block
    return received


def is_refused(received: bytes) -> bool:
    """Tell whether the middleware gave every answer."""
    statuses = STATUS.findall(received)
    challenges = received.lower().count(CHALLENGE)
    silent = b"REACHED" not in received and VALID.encode() not in received
    return silent and {*statuses} <= {b"400", b"401"} and len(statuses) == challenges > 0


def is_dropped(received: bytes) -> bool:
    """Tell whether every answer is a refusal, whoever gave it, or nothing was answered at all."""
    statuses = {*STATUS.findall(received)} - ({b"500"} if NOT_HANDED_ON.match(received) else set())
    understood = bool(STATUS.search(received)) == bool(received)
    return understood and b"REACHED" not in received and statuses <= OWN_REFUSALS


@dataclass
class Attack:
    """The distinct requests that were sent to one server, and those among them that were answered."""

    record: Callable[[str, object], None]
    sent: set[Any] = field(default_factory=set)
    answered: set[Any] = field(default_factory=set)

    def look(self, rows: Sequence[Any], received: Sequence[bytes], verdict: Callable[[bytes], bool]) -> None:
        """Look at every single answer."""
        assert [pair for pair in zip(rows, received, strict=True) if not verdict(pair[1])] == []
        self.sent |= {*rows}
        self.answered |= {row for row, answer in zip(rows, received, strict=True) if answer}

    def end(self) -> None:
        """Tell how many there were. An attack of few requests, or with few answers, proves little."""
        self.record("answered", len(self.answered))
        self.record("dropped", len(self.sent - self.answered))
        assert len(self.answered) >= LEAST


@pytest.fixture
def attack(record_property: Callable[[str, object], None]) -> Attack:
    """Return an attack in which nothing was sent yet."""
    return Attack(record_property)


@pytest.fixture(scope="module")
def start(serve_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    """Return a function that starts a server of one kind."""
    folder = tmp_path_factory.mktemp("application")
    (folder / "app.py").write_text(APPLICATION)
    FileTokenStore(folder / "api_tokens.json").add(DIGEST, TOKEN)
    environment = {
        "FREEGPT_AUTH_STORE": str(folder / "api_tokens.json"),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }

    def one(kind: str) -> Target:
        module, app, *arguments = SERVERS[kind]
        server = serve_once(app, *arguments, *WAIT[module], module=module, **environment)
        return Target(server.url, b"/health" if app == "app:mounted" else b"")

    return one


@pytest.fixture(scope="module", params=SERVERS)
def target(request: pytest.FixtureRequest, start: Callable[[str], Target]) -> Target:
    """Return a server of each kind."""
    return start(request.param)


def at_once(function: Callable[[Any], Any], rows: Iterable[Any]) -> list[Any]:
    """Return what the function returns for each row; many are under way at once."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(function, rows))


def test_nothing_gets_through(target: Target, attack: Attack) -> None:
    """No HTTP/1 request and no WebSocket without a credential reaches the application, however it is spelled."""
    for rows, verdict in ((REFUSED + WEBSOCKETS, is_refused), (MALFORMED + BROKEN_WEBSOCKETS, is_dropped)):
        sent = target.below(rows)
        attack.look(sent, at_once(target.exchange, sent), verdict)
    attack.end()


@pytest.mark.parametrize("target", SPEAK_HTTP2, indirect=True, scope="module")
def test_nothing_gets_through_in_http2(target: Target, attack: Attack) -> None:
    """The same holds in HTTP/2, with a hundred streams at once on a connection, and for HTTP/2's own tricks."""
    sent = all_translated(target.below(REFUSED + WEBSOCKETS)) + ([] if target.prefix else REFUSED_STREAMS)
    for begin in range(0, len(sent), STREAMS):
        some = sent[begin : begin + STREAMS]
        attack.look(some, target.converse(some), is_refused)
    sent = all_translated(target.below(MALFORMED + BROKEN_WEBSOCKETS)) + ([] if target.prefix else MALFORMED_STREAMS)
    attack.look(sent, at_once(lambda row: target.converse([row])[0], sent), is_dropped)
    attack.end()


@pytest.mark.parametrize("target", SPEAK_HTTP2, indirect=True, scope="module")
def test_nothing_gets_through_on_the_way_to_http2(target: Target, attack: Attack) -> None:
    """A connection that goes on from HTTP/1.1 to HTTP/2 is refused before and after."""
    later = all_translated(target.below([request()]))
    sent = all_to_http2(target.below(REFUSED))
    answers = at_once(lambda row: target.go_on(row, later), sent)
    assert {len(answer) for answer in answers} == {1 + len(later)}
    for answer in zip(*answers, strict=True):
        attack.look(sent, answer, is_refused)
    sent = all_to_http2(target.below(MALFORMED))
    sent += target.below(to_http2(request(), settings) for settings in BROKEN_SETTINGS)
    attack.look(sent, at_once(lambda row: b"".join(target.go_on(row, later)), sent), is_dropped)
    attack.end()


def test_a_credential_counts_for_one_request(target: Target) -> None:
    """What follows a request with a credential on the same connection is refused without one of its own."""
    plain, *carriers = target.below(request(lines=line) for line in ["", *CARRIERS])
    for carrier in carriers:
        received = target.exchange(carrier.replace(b"Connection: close\r\n", b"") + plain, NEVER)
        assert STATUS.findall(received) == [b"200", b"401"]
        assert received.count(b"REACHED") == received.lower().count(CHALLENGE) == 1


@pytest.mark.parametrize("target", SPEAK_HTTP2, indirect=True, scope="module")
def test_a_credential_counts_for_one_stream(target: Target) -> None:
    """Streams with and without a credential take turns on one connection, and only those with one get through."""
    plain, *carriers = target.below(request(lines=line) for line in ["", *CARRIERS])
    rounds = STREAMS // 2 // len(carriers)
    turns = [translated(row) for carrier in carriers for row in (carrier, plain)] * rounds
    for answers in (target.converse(turns), target.go_on(to_http2(plain), turns)[1:]):
        assert [b"REACHED" in answer for answer in answers] == [True, False] * (len(turns) // 2)
        assert all(map(is_refused, answers[1::2]))
    admitted, *later = target.go_on(to_http2(carriers[0]), [translated(plain)])
    assert b"REACHED" in admitted
    assert [*map(is_refused, later)] == [True]


def test_a_valid_credential_is_let_in(target: Target) -> None:
    """Whoever has a credential is answered by the application, even after all these attacks."""
    received = [target.exchange(row) for row in target.below(ADMITTED)]
    assert [pair for pair in zip(ADMITTED.values(), received, strict=True) if pair[0] not in pair[1]] == []


@pytest.mark.parametrize("target", SPEAK_HTTP2, indirect=True, scope="module")
def test_a_valid_credential_is_let_in_by_http2(target: Target) -> None:
    """The same holds in HTTP/2."""
    received = target.converse(all_translated(target.below(ADMITTED)))
    assert [pair for pair in zip(ADMITTED.values(), received, strict=True) if pair[0] not in pair[1]] == []
