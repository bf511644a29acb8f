"""`lexiseg serve` itself: a socket, a process that answers, and a thread that looks for new versions."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lexiseg.errors import ServingError
from lexiseg.serving.app import ServingApp
from lexiseg.serving.current import Current
from lexiseg.serving.limits import Limits
from lexiseg.serving.source import address_of, finder

# After SIGTERM: for requests to end that are being computed.
GRACE_SECONDS = 5


def serve(root: Path, model: str, *, host: str, port: int, limits: Limits, watch: float) -> None:
    """Serve a registered model until SIGTERM or SIGINT.

    Args:
        root: the working tree, which says where MLflow is.
        model: METHOD@ALIAS, METHOD/VERSION, or an address of MLflow's registry.
        host: to listen on.
        port: to listen on; 0: any that is free, which is printed.
        limits: of a request.
        watch: seconds between looks for a new version; 0: only on SIGHUP.

    Raises:
        ServingError: the address cannot be listened on.
        TrackingError: MLflow is out of reach, or knows no such version.
        ModelError: the version is no model of lexiseg, or cannot be used.
    """
    address = address_of(model)
    with _bound(host, port) as listener:
        logging.basicConfig(format="%(message)s")
        current = Current(finder(address, root))
        looks: queue.SimpleQueue[str] = queue.SimpleQueue()  # the one queue that a signal handler may use
        signal.signal(signal.SIGHUP, lambda *_: looks.put("SIGHUP"))
        threading.Thread(target=_watch, args=(current, looks, watch), daemon=True).start()
        app = ServingApp(current, alias=address.partition("@")[2] or None, limits=limits)
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {current.served.label} on http://{shown}:{listener.getsockname()[1]}, pid {os.getpid()}\n"
            f"kill -HUP {os.getpid()} looks for a new version at once; Ctrl+C ends it",
            flush=True,
        )
        asyncio.run(_answer(app, listener, calls=limits.calls))


async def _answer(app: ServingApp, listener: socket.socket, *, calls: int) -> None:
    """Answer until a signal ends it."""
    import uvicorn

    # Where MLflow calls the model. Torch keeps threads of its own for every thread that it is called from.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(calls, thread_name_prefix="model"))
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    await uvicorn.Server(config).serve(sockets=[listener])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address. It listens once the model is loaded; until then, clients are refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small packets at once where it knows that the protocol is TCP; else an answer takes 40 ms more.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ServingError(
            found=f"{host}:{port} cannot be listened on ({error})",
            allowed="an address of this machine, and a port from 0 to 65535 that is free and that you may use",
            fix="name another one, such as --port 8081",
        ) from error
    return bound


def _watch(current: Current, looks: queue.SimpleQueue[str], seconds: float) -> None:
    """Look for a new version every so often, and whenever somebody asks for it."""
    while True:
        with suppress(queue.Empty):
            looks.get(timeout=seconds or None)
        current.refresh()
