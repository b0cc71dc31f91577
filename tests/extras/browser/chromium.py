"""Finds a Chromium for the tests: one of this machine, or else one that can be installed.

`python -m tests.extras.browser.chromium` prints its path, or on stderr why there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
DOWNLOADED_WITHIN_S, INSTALLED_WITHIN_S = 180, 540
#: It may ask no host but this machine, not even for updates.
FLAGS = (
    "--no-sandbox",  # it refuses to run as root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class NoBrowser(Exception):
    """There is no Chromium that starts, and none can be installed."""


def find() -> str | None:
    """The path of a Chromium that starts."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        for path in _paths(playwright.chromium.executable_path):
            try:
                playwright.chromium.launch(executable_path=path, args=FLAGS).close()
            except Error:
                continue  # it may lack a library
            return path
    return None


def _paths(downloaded: str) -> Iterator[str]:
    for name in (*NAMES, MACOS, downloaded):
        if path := shutil.which(name):
            yield path


def find_or_install() -> str:
    """Like `find`, but tries Playwright's download and then apt. Raises NoBrowser."""
    if path := find():
        return path
    why = [_try(DOWNLOADED_WITHIN_S, sys.executable, "-m", "playwright", "install", "chromium")]
    if path := find():
        return path
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        apt = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
        why.append(_try(INSTALLED_WITHIN_S, "sh", "-c", apt))
        if path := find():
            return path
    else:
        why.append("apt: needs Debian or Ubuntu, and root")
    raise NoBrowser("; ".join(["no Chromium that starts", *why]))


def _try(within_s: float, *words: str) -> str:
    """Run an installer; what came of it."""
    name = "apt" if words[0] == "sh" else "playwright install"
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            words, timeout=within_s, capture_output=True, text=True, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{name}: no end after {within_s:.0f} s"
    if done.returncode == 0:
        return f"{name}: what it installed does not start"
    lines = [line.strip() for line in done.stderr.splitlines()]
    reasons = [line for line in lines if line.startswith(("Error:", "E:"))]
    return f"{name}: {reasons[0] if reasons else f'exit status {done.returncode}'}"


if __name__ == "__main__":
    try:
        print(find_or_install())
    except NoBrowser as error:
        raise SystemExit(str(error)) from None
