"""A small chat-completions server behind bearer tokens. It repeats the last message of each request.

Run it with ``python examples/chat_server.py``. It reads ``.env`` and ``api_tokens.json`` in the working directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn
from dotenv import load_dotenv
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from freegpt_auth import BearerTokenMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

MODEL = "freegpt-4"


async def health(_request: Request) -> Response:
    """Answer the health check of a load balancer."""
    return _json({"status": "ok"})


async def models(_request: Request) -> Response:
    """List the one model."""
    return _json({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "freegpt"}]})


async def chat_completions(request: Request) -> Response:
    """Repeat the last message of the user, at once or word by word."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        return _error(400, "The body of the request is not valid JSON.")
    match body:
        case {"model": str(model), "messages": [*messages]}:
            said = _last_user_message(messages)
        case _:
            return _error(400, "The body must be a JSON object with a model and a list of messages.")
    if model != MODEL:
        return _error(404, f"The model {model!r} does not exist. Use {MODEL!r}.", "model_not_found")
    if said is None:
        return _error(400, "The messages must hold one whose role is user and whose content is text.")
    reply = f"You said: {said}"
    # json.dumps escapes text that UTF-8 cannot hold, so every reply has a digest; equal replies have equal ids.
    digest = hashlib.sha256(json.dumps(reply).encode()).hexdigest()
    common = {"id": f"chatcmpl-{digest[:24]}", "created": int(time.time()), "model": MODEL}
    usage = _usage(said, reply)
    if body.get("stream") is True:
        events = _events(common, reply, usage if _asks_for_usage(body) else None)
        return StreamingResponse(events, media_type="text/event-stream")
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _json({**common, "object": "chat.completion", "choices": [choice], "usage": usage})


async def realtime(websocket: WebSocket) -> None:
    """Send every message back."""
    await websocket.accept("realtime" if "realtime" in websocket.scope["subprotocols"] else None)
    with suppress(WebSocketDisconnect):  # the client left while its message was on the way back
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await websocket.send({**message, "type": "websocket.send"})


def _last_user_message(messages: list[Any]) -> str | None:
    for message in reversed(messages):
        match message:
            case {"role": "user", "content": str(text)}:
                return text
            case {"role": "user", "content": [*parts]}:
                return " ".join(part["text"] for part in parts if _is_text(part))
    return None


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _usage(prompt: str, reply: str) -> dict[str, int]:
    """Count tokens; each word is one here."""
    counts = len(prompt.split()), len(reply.split())
    return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}


def _asks_for_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


async def _events(common: dict[str, Any], reply: str, usage: dict[str, int] | None) -> AsyncIterator[str]:
    first, *others = reply.split(" ")
    contents = [first, *(f" {word}" for word in others)]
    deltas = [{"role": "assistant", "content": ""}, *({"content": content} for content in contents), {}]
    # As OpenAI's reference has it: a client that asks for usage gets the field in every chunk, and the counts in one
    # more.
    chunk: dict[str, Any] = {**common, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        yield f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"
    if usage:
        yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def _json(content: object, status: int = 200) -> Response:
    # Not JSONResponse: a client can send half a surrogate pair, which UTF-8 cannot hold unescaped.
    return Response(json.dumps(content), status, media_type="application/json")


def _error(status: int, message: str, code: str | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return _json({"error": error}, status)


load_dotenv(".env")

app = Starlette(
    routes=[
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        WebSocketRoute("/v1/realtime", realtime),
    ]
)
app.add_middleware(BearerTokenMiddleware, public_paths=["/health"])


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="A chat-completions server that repeats the last message.")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", default=8000, type=int, help="default: %(default)s")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
