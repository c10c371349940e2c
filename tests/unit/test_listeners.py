"""Binding the port."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from server.errors import SettingsError
from server.listeners import ListenError, base_url, close_all, listen


@contextlib.contextmanager
def listening(host: str, port: int, count: int) -> Iterator[list[list[socket.socket]]]:
    groups = listen(host, port, count)
    try:
        yield groups
    finally:
        for group in groups:
            close_all(group)


def port_of(listener: socket.socket) -> int:
    return listener.getsockname()[1]


def test_free_port_accepts_at_once() -> None:
    with listening("127.0.0.1", 0, 1) as [[listener]]:
        assert base_url("127.0.0.1", listener) == f"http://127.0.0.1:{port_of(listener)}"
        socket.create_connection(("127.0.0.1", port_of(listener)), timeout=5).close()


def test_several_processes_share_one_port() -> None:
    with listening("127.0.0.1", 0, 3) as groups:
        assert [len(group) for group in groups] == [1, 1, 1]
        assert len({port_of(group[0]) for group in groups}) == 1


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("other_count", [1, 2])
def test_port_in_use_is_found(count: int, other_count: int) -> None:
    with listening("127.0.0.1", 0, other_count) as groups:
        port = port_of(groups[0][0])
        with pytest.raises(ListenError, match=f"127.0.0.1 port {port}: the port is in use"):
            listen("127.0.0.1", port, count)


def test_localhost_listens_on_ipv4_whatever_else() -> None:
    with listening("localhost", 0, 1) as [group]:
        assert len({port_of(listener) for listener in group}) == 1
        socket.create_connection(("127.0.0.1", port_of(group[0])), timeout=5).close()


def test_address_of_another_machine() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0, 1)


def test_unknown_name() -> None:
    with pytest.raises(SettingsError, match="--host"):
        listen("no such host", 0, 1)


def test_ipv6_address_in_the_url() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert base_url("::1", listener) == f"http://[::1]:{port_of(listener)}"
