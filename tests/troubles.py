"""What can go wrong with one call to an endpoint: behaviours for `bad_server`."""

from __future__ import annotations

import random
import time
from email.utils import formatdate
from typing import Any

from bad_server import Handler


def five_hundred(handler: Handler, body: Any, seen: int) -> None:
    handler.send(500, b'{"error": {"message": "out of memory"}}')


def bad_gateway(handler: Handler, body: Any, seen: int) -> None:
    handler.send(502, b"<html><body>Bad gateway, but safe</body></html>", "text/html")


def too_many(handler: Handler, body: Any, seen: int) -> None:
    handler.send(429, b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}')


def too_many_with_time(handler: Handler, body: Any, seen: int) -> None:
    handler.send(429, b"{}", Retry_After="0.05")


def unavailable_until_a_date(handler: Handler, body: Any, seen: int) -> None:
    handler.send(503, b"", "text/plain", Retry_After=formatdate(time.time() + 0.2, usegmt=True))


def senseless_retry_after(handler: Handler, body: Any, seen: int) -> None:
    handler.send(429, b"{}", Retry_After=random.Random(seen).choice(["soon", "-5", "nan", "", "1e"]))


def stall(handler: Handler, body: Any, seen: int) -> None:
    time.sleep(0.6)
    handler.close()


def stall_in_the_middle(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b'{"choices": [{"message": {"content": "saf', Content_Length="5000")
    time.sleep(0.6)
    handler.close()


def drip(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b'{"choices": [', Content_Length="5000")
    for _ in range(14):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close()


def drip_an_error(handler: Handler, body: Any, seen: int) -> None:
    handler.send(500, b"{", Content_Length="5000")
    for _ in range(14):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close()


def half(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b'{"choices": [{"message": {"content": "safe"}}', Content_Length="900")
    handler.close()


def hang_up(handler: Handler, body: Any, seen: int) -> None:
    handler.close()


def junk(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b"\x00\xff\xfesafe\x1b[31m")


def empty(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b"")


def a_page(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b"<html><title>safe</title>Log in to go on</html>", "text/html")


def a_stream(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b'data: {"choices": [{"delta": {"content": "safe"}}]}\n\ndata: [DONE]\n\n', "text/event-stream")


def other_json(handler: Handler, body: Any, seen: int) -> None:
    shapes = (b"{}", b"[]", b'"safe"', b"null", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": ["safe"]}')
    handler.send(200, random.Random(seen).choice(shapes))


def half_an_object(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b'{"choices": [{"message": {"content": "safe"}')


def endless(handler: Handler, body: Any, seen: int) -> None:
    handler.send(200, b"[", Content_Length=str(10**12))
    piece = b'"safe",' * 10_000
    for _ in range(10_000):
        handler.wfile.write(piece)


# These end with the judge's own patience, so a test that waits for it keeps it short.
SILENT = [stall, stall_in_the_middle, drip, drip_an_error]
LOUD = [
    five_hundred, bad_gateway, too_many, too_many_with_time, unavailable_until_a_date, senseless_retry_after, half,
    hang_up, junk, empty, a_page, a_stream, other_json, half_an_object, endless,
]  # fmt: skip
