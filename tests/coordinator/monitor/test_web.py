"""The monitor in a browser: which requests are accepted."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx
import pytest

from coordinator.monitor import web
from protocols.errors import UsageError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::1", "example.org"])
def test_only_loopback_addresses_are_accepted(host: str) -> None:
    with pytest.raises(UsageError) as refused:
        web.check_host(host)
    assert host in refused.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_addresses_are_accepted(host: str) -> None:
    assert web.check_host(host) in ("127.0.0.1", "::1")


def test_the_page_needs_the_token_and_its_own_origin() -> None:
    words = [sys.executable, "-m", "coordinator.cli", "monitor", "--serve", "--replay", "demo"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "open:" in line)
            found = re.search(r"(http://(127\.0\.0\.1:\d+))/\?token=(\S+)", line)
            assert found is not None
            base, host, token = found.groups()
            with httpx.Client(base_url=base) as http:
                for path in ("/", "/ws", "/static/js/textual.js", "/?token=x", "/download/x"):
                    assert http.get(path).status_code == 403, path
                evil = {"Origin": "http://evil.example"}
                assert http.get(f"/?token={token}", headers=evil).status_code == 403
                rebound = {"Host": "evil.example"}
                assert http.get(f"/?token={token}", headers=rebound).status_code == 403
                let_in = http.get(f"/?token={token}")
                assert (let_in.status_code, let_in.headers["location"]) == (302, "/")
                page = http.get("/")
                assert page.status_code == 200
                assert host in page.text
                assert token not in page.text
        finally:
            server.terminate()
