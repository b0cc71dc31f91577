"""Ports on which a server can listen."""

from __future__ import annotations

import errno
import socket

import pytest

from coordinator.transport.ports import listenable

HOST = "127.0.0.1"


def test_a_free_port_can_be_listened_on() -> None:
    port = listenable(HOST)
    assert listenable(HOST, port) == port
    with socket.socket() as server:
        server.bind((HOST, port))
        server.listen()


def test_a_port_that_a_server_has_is_refused() -> None:
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        with pytest.raises(OSError) as refused:  # noqa: PT011
            listenable(HOST, server.getsockname()[1])
    assert refused.value.errno == errno.EADDRINUSE


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError) as refused:  # noqa: PT011
        listenable("192.0.2.254")
    assert refused.value.errno == errno.EADDRNOTAVAIL
