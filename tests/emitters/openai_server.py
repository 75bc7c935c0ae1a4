"""A model service as OpenAI's clients know it: chat completions, responses and embeddings. Its answers are fixed.

The model's name, or a word in a text to embed, says what comes of a request: ``failing`` is a 500, ``crowded`` a 429,
``cut-off`` ends in the middle of a stream, ``waiting`` is never answered, and anything else is a success.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.emitters.servers import serving

TEXT = "Calvin likes dark roast coffee"
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
#: How many numbers an embedding has: as many as one of text-embedding-3-small.
DIMENSIONS = 1536

#: No id comes twice: traceloop keeps what it knows of a response by that.
_numbers = itertools.count(1)


class ModelService(BaseHTTPRequestHandler):
    """Answers as OpenAI's service does."""

    protocol_version = "HTTP/1.1"

    #: Set when a request that is never answered has come in.
    asked = threading.Event()
    #: Set when nobody waits for its answer any more.
    released = threading.Event()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, words = request["model"], {request["model"], *" ".join(_texts(request)).split()}
        if "waiting" in words:
            type(self).asked.set()
            type(self).released.wait()
            self.close_connection = True  # nobody waits for the answer any more
            return
        status = 500 if "failing" in words else 429 if "crowded" in words else 200
        if status != 200:
            kind = "server_error" if status == 500 else "rate_limit_exceeded"
            self._send(status, {"error": {"message": f"can't answer: {TEXT}", "type": kind, "code": kind}})
        elif self.path.endswith("/embeddings"):
            self._send(200, _embeddings(request))
        elif self.path.endswith("/responses"):
            self._send(200, _response(model))
        elif request.get("stream"):
            self._stream(list(_chunks(model)), cut_off=model == "cut-off")
        else:
            self._send(200, _completion(request))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, chunks: list[dict[str, Any]], *, cut_off: bool) -> None:
        lines = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks] + [b"data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        # More is promised than comes, so that the client notices.
        self.send_header("Content-Length", str(sum(map(len, lines))))
        self.end_headers()
        for line in lines[:1] if cut_off else lines:
            self.wfile.write(line)
        self.close_connection = cut_off

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def model_service() -> Iterator[str]:
    """Serve on this machine; give the base URL that OpenAI's clients take."""
    ModelService.asked.clear()
    ModelService.released.clear()
    with serving(ModelService) as address:
        try:
            yield f"{address}/v1"
        finally:
            ModelService.released.set()


def _completion(request: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": TEXT}
    if request.get("tools"):
        call = {"name": request["tools"][0]["function"]["name"], "arguments": json.dumps({"query": "coffee"})}
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call-1", "type": "function", "function": call}],
        }
    reason = "tool_calls" if "tool_calls" in message else "stop"
    return {
        "id": f"chatcmpl-{next(_numbers)}",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": USAGE,
    }


def _chunks(model: str) -> Iterator[dict[str, Any]]:
    common = {"id": f"chatcmpl-{next(_numbers)}", "object": "chat.completion.chunk", "created": 1, "model": model}
    for word in TEXT.split():
        delta = {"role": "assistant", "content": f"{word} "}
        yield {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}


def _response(model: str) -> dict[str, Any]:
    content = {"type": "output_text", "text": TEXT, "annotations": []}
    message = {"type": "message", "id": "msg-1", "status": "completed", "role": "assistant", "content": [content]}
    return {
        "id": f"resp-{next(_numbers)}",
        "object": "response",
        "created_at": 1,
        "model": model,
        "status": "completed",
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 12,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 17,
        },
    }


def _embeddings(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _embedding(request.get("encoding_format"))}
            for index in range(len(_texts(request)))
        ],
        "model": request["model"],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


def _texts(request: dict[str, Any]) -> list[str]:
    texts = request.get("input", [])
    return [texts] if isinstance(texts, str) else texts


def _embedding(encoding: str | None) -> Any:
    numbers = [1.0] + [0.0] * (DIMENSIONS - 1)
    if encoding != "base64":
        return numbers
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *numbers)).decode()
