"""What a client talks to: limits before MLflow's scoring server, a queue, and errors in one form."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lexiseg.phases import Phases, collect, phase
from lexiseg.serving.check import check_body, check_type
from lexiseg.serving.current import Current, Served
from lexiseg.serving.limits import Limits
from lexiseg.serving.refusals import (
    RETRY_SECONDS,
    AddressError,
    MethodError,
    OverloadError,
    RequestError,
    SizeError,
    SlowError,
)

PHASES = ("wait", "decode", "preprocess", "text", "vision", "head", "write")
# Path -> method.
ENDPOINTS = {"/invocations": "POST", **dict.fromkeys(("/health", "/ping", "/version"), "GET")}
_logger = logging.getLogger(__name__)


class ServingApp:
    """An ASGI application around the scoring server of the current version.

    Every answer names the version in `X-Lexiseg-Model`. An error is {"error_code", "message"}, whose message has the
    three parts of a LexisegError, and nothing of this machine.

    Args:
        current: the version.
        alias: under which it is served, or None.
        limits: of a request.
    """

    def __init__(self, current: Current, *, alias: str | None, limits: Limits) -> None:
        self._current, self._alias, self._limits = current, alias, limits
        self._slots = asyncio.Semaphore(limits.calls)
        self._taken = self._running = 0
        self._counts: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request of HTTP."""
        served = self._current.served
        try:
            response = await self._answer(Request(scope, receive), served)
        except RequestError as refusal:
            response = _refused(refusal)
        except ClientDisconnect:
            return  # nobody is there to be told
        except Exception:
            _logger.exception("a request failed")
            response = _failed()
        if scope["path"] == "/invocations":
            self._counts["refused" if 400 <= response.status_code < 500 else str(response.status_code)] += 1
        if response.status_code == MethodError.status:
            response.headers["Allow"] = ENDPOINTS[scope["path"]]
        response.headers["X-Lexiseg-Model"] = served.label
        await response(scope, receive, send)

    async def _answer(self, request: Request, served: Served) -> Response:
        path = request.scope["path"]  # `url` fails on a Host that is none
        if path not in ENDPOINTS:
            raise AddressError(
                found="an address that is not served",
                allowed=", ".join(ENDPOINTS),
                fix="POST pictures and labels to /invocations",
            )
        if request.method != ENDPOINTS[path]:
            raise MethodError(
                found=f"{request.method} {path}",
                allowed=f"{ENDPOINTS[path]} {path}",
                fix="send it with this method; docs/serving.md has examples",
            )
        if path == "/health":
            return _json(200, self._health(served))
        if path != "/invocations":
            return await _ask(served, request, b"")
        async with self._admitted():
            body = await self._body(request)
            with collect() as phases:
                response = await self._predict(request, body, served)
            response.headers["Server-Timing"] = timing(phases)
            return response

    async def _predict(self, request: Request, body: bytes, served: Served) -> Response:
        with phase("wait"):
            await self._slots.acquire()
        self._running += 1
        try:
            if await request.is_disconnected():
                raise ClientDisconnect  # computed for nobody, it would keep others waiting
            with phase("decode"):
                try:
                    await asyncio.to_thread(check_body, body, self._limits)
                except RequestError as refusal:
                    return _refused(refusal)
                return _in_our_form(await _ask(served, request, body))
        finally:
            self._running -= 1
            self._slots.release()

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """A place among the requests that are computed or wait; taken before a body is read, which needs memory."""
        if self._taken >= self._limits.calls + self._limits.queue:
            raise OverloadError(
                found=f"{self._taken} requests that are being answered or wait",
                allowed=f"{self._limits.calls} being answered and {self._limits.queue} waiting",
                fix=f"try again in {RETRY_SECONDS} s or later, or start more servers",
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def _body(self, request: Request) -> bytes:
        """The body, which is never held beyond its limit."""
        check_type(request.headers.get("content-type", ""))
        limit = self._limits.body_bytes
        if int(request.headers.get("content-length", 0)) > limit:
            raise _too_large(f"a body of {request.headers['content-length']} bytes", limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(f"a body of more than {limit} bytes", limit)
        except TimeoutError as error:
            raise SlowError(
                found=f"{len(body)} bytes of a body after {self._limits.body_seconds:g} s",
                allowed=f"a whole body within {self._limits.body_seconds:g} s",
                fix="send smaller pictures, or send them faster",
            ) from error
        return bytes(body)

    def _health(self, served: Served) -> dict[str, Any]:
        error = self._current.last_error
        return {
            "status": "ok" if error is None else "degraded",
            "model": served.name,
            "version": served.number,
            "alias": self._alias,
            "loaded_at": served.loaded_at.isoformat(timespec="seconds"),
            "limits": asdict(self._limits),
            "last_error": error,
            "requests": {
                "answered": self._counts["200"],
                "refused": self._counts["refused"],
                "overloaded": self._counts["503"],
                "failed": sum(self._counts.values()) - sum(self._counts[key] for key in ("200", "refused", "503")),
                "running": self._running,
                "waiting": self._taken - self._running,
            },
        }


def timing(phases: Phases) -> str:
    """The header Server-Timing: milliseconds by phase, as far as there were any, and in total."""
    spent = [(name, phases.seconds[name]) for name in PHASES if name in phases.seconds]
    spent.append(("total", sum(phases.seconds.values())))
    return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in spent)


async def _ask(served: Served, request: Request, body: bytes) -> Response:
    """What the scoring server of MLflow answers to a request whose body was read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, content = 500, {}, bytearray()

    async def receive() -> Mapping[str, Any]:
        # A client that goes away is not told of: the thread would go on, and others begin beside it.
        return waiting.pop() if waiting else await asyncio.get_running_loop().create_future()

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            content.extend(message.get("body", b""))

    scope = dict(request.scope)
    scope["headers"] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    app: Callable[[Any, Any, Any], Awaitable[None]] = served.app
    await app(scope, receive, send)
    return Response(bytes(content), status_code=status, media_type=headers.get("content-type"))


def _in_our_form(response: Response) -> Response:
    """MLflow's answer; its errors repeat the data and the stack, of which only the reason is left."""
    if response.status_code == 200:
        return response
    said = json.loads(bytes(response.body))
    # Of the data there is base64 and no more, so this is where the reason begins.
    reason = said["message"].partition("\nError: ")[2]
    if all(part in f"\n{reason}" for part in ("\nfound: ", "\nallowed: ", "\nto do: ")):
        return _json(response.status_code, _error(said["error_code"], reason))
    _logger.error("MLflow answered %s: %s\n%s", response.status_code, said["message"], said.get("stack_trace", ""))
    return _failed()  # MLflow gives 400 to errors of the model, too


def _too_large(found: str, limit: int) -> SizeError:
    return SizeError(
        found=found,
        allowed=f"at most {limit} bytes",
        fix="send fewer or smaller pictures; `lexiseg serve --max-body` sets the limit",
    )


def _refused(refusal: RequestError) -> Response:
    return _json(refusal.status, _error(refusal.code, str(refusal)), refusal.headers)


def _failed() -> Response:
    return _json(
        500,
        _error(
            "INTERNAL_ERROR",
            "found: a fault of the server while it answered",
            "allowed: requests as docs/serving.md describes them",
            "to do: look into what the server printed, and tell its operator; other requests are answered",
        ),
    )


def _error(code: str, *lines: str) -> dict[str, str]:
    return {"error_code": code, "message": "\n".join(lines)}


def _json(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII: what a client sent may hold what UTF-8 cannot express.
    return Response(json.dumps(content), status_code=status, media_type="application/json", headers=headers)
