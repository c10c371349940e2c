"""Listening sockets, bound before any process starts, so that a port in use is one clear error."""

import errno
import socket
from typing import Any, TypeAlias

from server.errors import GaleError, SettingsError

BACKLOG = 2048

_Address: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]


class ListenError(GaleError):
    """The address cannot be listened on."""


def listen(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """Listen on every address that ``host`` stands for.

    Connections queue in the kernel until an API process takes them.

    Args:
        port: 0 picks a free one, the same for all addresses.
        count: API processes. Where there are several, each gets sockets of its own and the kernel
            spreads connections over them (SO_REUSEPORT).

    Returns:
        The sockets of each API process.

    Raises:
        SettingsError: the host name is unknown.
        ListenError: the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise SettingsError(f"--host: cannot resolve {host!r}: {error.strerror}") from None
    addresses: list[_Address] = list(dict.fromkeys((info[0], info[4]) for info in found))
    groups: list[list[socket.socket]] = [[] for _ in range(count)]
    absent: OSError | None = None
    try:
        for family, address in addresses:
            try:
                port = _listen_once(family, (address[0], port, *address[2:]), groups)
            except OSError as error:
                # "localhost" often names ::1 on hosts without IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
        if absent is not None and not groups[0]:
            raise absent
    except OSError as error:
        for group in groups:
            close_all(group)
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ListenError(f"cannot listen on {host} port {port}: {reason}") from None
    return groups


def close_all(sockets: list[socket.socket]) -> None:
    """Close this process's copies of the sockets."""
    for listener in sockets:
        listener.close()


def base_url(host: str, listener: socket.socket) -> str:
    """Where clients find the server, e.g. ``http://127.0.0.1:8000``."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _listen_once(family: socket.AddressFamily, address: tuple[Any, ...], groups: list[list[socket.socket]]) -> int:
    """Add one listening socket to each group; returns the port."""
    if len(groups) == 1:
        listener = _bind(family, address, shared=False)
        listener.listen(BACKLOG)
        groups[0].append(listener)
        return int(listener.getsockname()[1])
    # SO_REUSEPORT would quietly share the port with another server of the same user: look first.
    with _bind(family, address, shared=False) as probe:
        probe.listen(1)
        port = int(probe.getsockname()[1])
    for group in groups:
        listener = _bind(family, (address[0], port, *address[2:]), shared=True)
        group.append(listener)
        listener.listen(BACKLOG)
    return port


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], *, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
