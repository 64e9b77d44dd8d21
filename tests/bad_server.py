"""A real HTTP server on this machine that speaks the chat-completions protocol, and misbehaves when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the server does about one call: given the handler, the body, and how often this very request was seen before.
Behaviour = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """One call."""

    protocol_version = "HTTP/1.1"
    server: BadServer

    def do_GET(self) -> None:
        self.send(404, b"{}") if self.server.alive else self.close()

    def do_POST(self) -> None:
        if not self.server.alive:
            self.close()  # a connection that was kept open outlives the server
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        with self.server.lock:
            seen = self.server.seen.setdefault(key, 0)
            self.server.seen[key] += 1
            self.server.calls.append((time.monotonic(), key, body, self.headers))
            self.server.working += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.working)
        try:
            self.server.behaviour(self, body, seen)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has had enough
        finally:
            with self.server.lock:
                self.server.working -= 1

    def send(self, status: int, payload: bytes, kind: str = "application/json", **headers: str) -> None:
        """Send a whole reply; a keyword retry_after is the header Retry-After."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def answer(self, text: Any, **changes: Any) -> None:
        """Send a completion and count it as an answer to this request."""
        with self.server.lock:
            key = self.headers["Idempotency-Key"]
            self.server.answered[key] = self.server.answered.get(key, 0) + 1
        self.send(200, json.dumps(completion(text, **changes)).encode())

    def close(self) -> None:
        """Break the connection off."""
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class BadServer(ThreadingHTTPServer):
    """The server; `calls` holds (time, key of the request, body, headers) of each call."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.lock = threading.Lock()
        self.alive = True
        self.calls: list[tuple[float, str, dict[str, Any], Any]] = []
        self.seen: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self.working = self.most_at_once = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[BadServer]:
    """Run a server while the block runs."""
    server = BadServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.alive = False
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: Any, finish: Any = "stop", logprobs: Any = None, **changes: Any) -> dict[str, Any]:
    """A chat completion with one choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if logprobs is not None:
        choice["logprobs"] = logprobs
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage, **changes}


def in_json(label: str, category: str = "none", reason: str = "so it is") -> str:
    """The structured reply that the judge asks for."""
    return json.dumps({"verdict": label, "category": category, "reason": reason})


def number_in(body: dict[str, Any]) -> int:
    """The number in the prompt of `judging.request(number)`."""
    text = body["messages"][-1]["content"][-1]["text"]
    found = re.search(r"number (\d+)\?", text)
    assert found is not None, text
    return int(found.group(1))


def truth(number: int) -> str:
    """What the server says about a request when it behaves."""
    return "unsafe" if number % 3 == 0 else "safe"


def honest(handler: Handler, body: dict[str, Any], _: int = 0) -> None:
    """Answer as asked: in JSON or in a word."""
    label = truth(number_in(body))
    handler.answer(in_json(label, "injury" if label == "unsafe" else "none") if "response_format" in body else label)
