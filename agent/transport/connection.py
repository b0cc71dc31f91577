"""TLS connections that another thread can end at any time. Blocking.

They go to the first of several addresses that answers, through a proxy if one is set.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from protocols.errors import Unreachable
from protocols.network import addresses
from protocols.network.error_text import describe_error

#: A new connection is open within this time, if there are other addresses to try.
CONNECTED_WITHIN_S = 5.0


class Connection(http.client.HTTPSConnection):
    """A connection that another thread can end at any time, also while it connects.

    http.client sets its socket only after the TLS handshake. A thread in `connect` could not be
    ended then, and the agent would wait for it before exiting.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s, context=tls)
        self._tls, self.ended = tls, False
        #: True after a response: all that the TLS handshake leaves behind was read with it.
        self.has_answered = False
        self._create_connection = self._create_tracked

    def connect(self) -> None:
        """Connects, through a tunnel if one is set, and does the TLS handshake. Raises OSError."""
        http.client.HTTPConnection.connect(self)
        server = self._tunnel_host or self.host  # type: ignore[attr-defined]
        self.sock = self._tls.wrap_socket(
            self.sock, server_hostname=server, do_handshake_on_connect=False
        )
        if self.ended:
            raise ConnectionAbortedError("the connection was ended")
        self.sock.do_handshake()

    def ends(self) -> tuple[str, str]:
        """Returns the local and the remote IP address."""
        return str(self.sock.getsockname()[0]), str(self.sock.getpeername()[0])

    def end(self) -> None:
        """Shuts the socket down from another thread. Its own thread closes it."""
        self.ended = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                # That of SSLSocket would let its thread read the rest without decryption.
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _create_tracked(
        self, address: tuple[str, int], timeout_s: float, source: object = None
    ) -> socket.socket:
        """Like `socket.create_connection`, but sets `self.sock` before it connects."""
        failure = OSError("the host name has no address")
        for *kind, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            self.sock = socket.socket(*kind)
            try:
                self.sock.settimeout(timeout_s)
                if self.ended:
                    raise ConnectionAbortedError("the connection was ended")
                self.sock.connect(place)
                return self.sock
            except OSError as err:
                failure = err
                self.sock.close()
        raise failure


class CoordinatorConnection(Connection):
    """A connection to the first of several addresses that answers, through a proxy if one is set.

    `place`: the address that was tried last, and `prefix` the path that it begins with.
    """

    def __init__(self, places: Sequence[str], tls: ssl.SSLContext, timeout_s: float) -> None:
        self._places, self.place, self.prefix = tuple(places), places[0], ""
        self._timeout_s = timeout_s
        host, port, _ = addresses.parse(self.place)
        super().__init__(host, port, tls, timeout_s)

    def connect(self) -> None:
        """Connects. Raises the error of the first address.

        A wrong certificate counts more, as the fleet may have a new CA.
        """
        failure: Exception | None = None
        for place in self._places:
            # A stopped process accepts connections, and never ends their handshake.
            limit_s = CONNECTED_WITHIN_S if place != self._places[-1] else self._timeout_s
            self.timeout = min(limit_s, self._timeout_s)
            try:
                self._connect_to(place)
                self.sock.settimeout(self._timeout_s)
                return
            except (OSError, UnicodeError, http.client.InvalidURL) as err:
                # The latter two are of a text that is no name of a host.
                is_wrong = isinstance(err, ssl.SSLCertVerificationError)
                failure = err if failure is None or is_wrong else failure
                self.close()
                if self.ended:
                    break
        assert failure is not None
        raise failure

    def _connect_to(self, place: str) -> None:
        self.place = place
        host, port, self.prefix = addresses.parse(place)
        proxy = proxy_for(host, port)
        self.host, self.port = (proxy.host, proxy.port) if proxy else (host, port)
        self._tunnel_host: str | None = None  # of the address before
        if proxy:
            self.set_tunnel(host, port, proxy.headers)
        super().connect()


class Proxy(NamedTuple):
    """An HTTP proxy that supports CONNECT, and the headers it needs."""

    host: str
    port: int
    headers: dict[str, str]


def proxy_for(host: str, port: int) -> Proxy | None:
    """Returns the proxy that HTTPS_PROXY names, unless NO_PROXY names this host."""
    url = urllib.request.getproxies_environment().get("https", "")
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if not url or bypass(f"{host}:{port}"):
        return None
    proxy = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    headers = {}
    if proxy.username is not None:
        user, password = (urllib.parse.unquote(x or "") for x in (proxy.username, proxy.password))
        login = b64encode(f"{user}:{password}".encode()).decode()
        headers["proxy-authorization"] = f"Basic {login}"
    return Proxy(proxy.hostname or "", proxy.port or 3128, headers)


def is_readable(sock: socket.socket) -> bool:
    """True if something has arrived. On an idle connection that is its end."""
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def map_errors(server: str = "the coordinator") -> Iterator[None]:
    """Maps network and HTTP errors to Unreachable, whose message names the server."""
    try:
        yield
    except (OSError, UnicodeError, http.client.HTTPException) as err:
        raise Unreachable(f"{server} does not answer: {describe_error(err)}") from err
