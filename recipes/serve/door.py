"""Who may speak to the server: a token, the names it is called by, and the number of connections."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from recipes.serve.sampling import RequestError
from rollout.keys import at_least

TOKEN_VARIABLE = "RSGRPO_SERVE_TOKEN"
KEEP_ALIVE_S = 15.0  # also for the first request of a connection
_BACKLOG = 32  # of these, all are accepted before the first is refused
_RESERVED_FILES = 64 + _BACKLOG  # for everything that is not a connection
_OPEN_TO_ALL = ("/health",)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Door:
    """What a client needs to be heard.

    token: of `Authorization: Bearer`; "" asks for none. hosts: names by which clients may call the server, besides its
    addresses; not checked with a token. max_connections: open at once, idle ones included; further ones are closed.
    """

    token: str = ""
    hosts: tuple[str, ...] = ()
    max_connections: int = 256

    def __post_init__(self) -> None:
        at_least(1, **{"--max-connections": self.max_connections})

    @property
    def admit(self) -> Any:
        """The check as a middleware of aiohttp."""

        @web.middleware
        async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.path not in _OPEN_TO_ALL:
                self.check(request.headers.get("Host", ""), request.headers.get("Authorization", ""))
            return await handler(request)

        return admit

    def check(self, host: str, authorization: str) -> None:
        """Let a request in.

        The page of a stranger can make a browser call this machine under a name of its own, which then leads here.

        Raises:
            RequestError: 401 without the token, 403 under a name that is not ours.
        """
        if self.token:
            kind, _, given = authorization.partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                raise RequestError(401, "this server needs a token: send Authorization: Bearer TOKEN")
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").rstrip(".").lower()
        if not _is_address(name) and name not in {
            "",
            "localhost",
            _own_name(),
            *(known.lower() for known in self.hosts),
        }:
            raise RequestError(403, f"this server is not called {name!r:.80}; start it with --allow-host to allow that")

    def connection_limit(self) -> int:
        """Return how many connections are kept: as many as asked for, within what the process may open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(1, min(self.max_connections, soft - _RESERVED_FILES))


class _Refused(asyncio.Protocol):
    """Closes a connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def listen(
    make_app: Callable[[], web.Application],
    host: str,
    port: int,
    *,
    door: Door,
    shutdown_timeout_s: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve an app until SIGINT or SIGTERM; then finish what is being answered.

    Raises:
        OSError: the address cannot be listened on.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        make_app(),
        handler_cancellation=True,  # a client that disconnects is not answered
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=shutdown_timeout_s,
    )
    await runner.setup()
    listener = await _opened(runner, host, port, door.connection_limit())
    try:
        on_ready()
        await stop.wait()
    finally:
        listener.close()
        await runner.cleanup()


async def _opened(runner: web.AppRunner, host: str, port: int, limit: int) -> asyncio.Server:
    server = runner.server
    assert server is not None

    def protocol() -> asyncio.Protocol:
        handler: asyncio.Protocol = server() if len(server.connections) < limit else _Refused()
        return handler

    try:
        return await asyncio.get_running_loop().create_server(protocol, host, port, backlog=_BACKLOG)
    except OSError:
        await runner.cleanup()
        raise


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches a server on this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_name() -> str:
    return socket.gethostname().lower()
