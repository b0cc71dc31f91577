"""Which way out the agent's link takes."""

from __future__ import annotations

import pytest

from agent.transport.http_client import Proxy, proxy_for


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxy"),
    [
        ("", "", None),
        ("http://gate:8080", "", Proxy("gate", 8080, {})),
        ("gate:8080", "", Proxy("gate", 8080, {})),
        ("http://gate", "", Proxy("gate", 3128, {})),
        ("http://gate:8080", "train.example.org", None),
        ("http://gate:8080", "other.example.org", Proxy("gate", 8080, {})),
        (
            "http://ann:a%40b@gate:8080",
            "",
            Proxy("gate", 8080, {"proxy-authorization": "Basic YW5uOmFAYg=="}),
        ),
    ],
)
def test_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, proxy: Proxy | None
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if url:
        monkeypatch.setenv("HTTPS_PROXY", url)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for("train.example.org", 9092) == proxy
