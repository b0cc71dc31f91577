"""A server of the monitor, and a browser that shows its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.extras.browser import chromium
from tests.extras.browser.page import SIZE, Served
from tests.support.fleet_harness import COORDINATOR, Program, environment

expect.set_options(timeout=60_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    assert path is not None, "there is no Chromium; make test-extras EXTRAS=browser looks for one"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=chromium.FLAGS)


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Makes contexts; at the end, none may have asked another host or logged a violation."""
    contexts: list[BrowserContext] = []
    asked: list[tuple[str, str]] = []
    logged: list[str] = []

    def make(base: str, **options: Any) -> BrowserContext:
        context = browser.new_context(**{"viewport": SIZE} | options)
        contexts.append(context)
        context.on("request", lambda request: asked.append((base, request.url)))
        context.on("console", lambda message: logged.append(message.text))
        context.on("weberror", lambda error: logged.append(f"uncaught: {error.error}"))
        return context

    yield make
    for context in contexts:
        context.close()
    assert asked or not contexts
    others = [url for base, url in asked if not url.startswith((f"{base}/", "data:"))]
    assert not others
    wrong = [text for text in logged if "uncaught" in text or "Content Security Policy" in text]
    assert not wrong


@pytest.fixture
def serve(
    tmp_path: Path, new_context: Callable[..., BrowserContext]
) -> Iterator[Callable[..., Served]]:
    """Starts servers: `serve("--replay", "demo")`."""
    started: list[Served] = []

    def start(*options: str, env: dict[str, str] | None = None) -> Served:
        words = [COORDINATOR, "monitor", "--serve", *options]
        output = tmp_path / f"serve{len(started)}.log"
        env = dict(env or environment(tmp_path))
        del env["NO_COLOR"]
        program = Program(words, env, output)
        started.append(Served(program, new_context))
        return started[-1]

    yield start
    for served in started:
        if served.program.process.poll() is None:
            served.program.stop()
