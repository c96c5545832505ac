"""No network: while it is blocked, connecting anywhere but this machine is refused and noted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = ("", "localhost", "::1", "0.0.0.0", "::")


class NetworkBlocked(OSError):
    """Someone reached for the network where there must be none."""


@contextmanager
def offline() -> Iterator[list[str]]:
    """Block connections and name look-ups; gives the list of hosts that were asked for, also when it was caught."""
    asked: list[str] = []
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        if name in LOCAL or name.startswith("127.") or name == socket.gethostname():
            return
        asked.append(name)
        raise NetworkBlocked(f"the network was used ({name}); nothing may be fetched here")

    def guarded(real: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple):  # a Unix socket's address is a path
                refuse(address[0])
            return real(self, address)

        return call

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **kwargs)

    socket.socket.connect = guarded(connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = guarded(connect_ex)  # type: ignore[method-assign]
    socket.getaddrinfo = guarded_look_up  # type: ignore[assignment]
    try:
        yield asked
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
        socket.socket.connect_ex = connect_ex  # type: ignore[method-assign]
        socket.getaddrinfo = look_up
