"""Answers over HTTP while requests crowd, versions change and somebody sends nonsense."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from agent.home import settings
from agent.inference import server as serving
from agent.inference.server import InferenceServer, ServedModel
from protocols.errors import DataError
from protocols.local import homes
from protocols.model import model_card, weights
from protocols.model.weights import Weights
from tests.support.fleet_harness import AGENT, Program, environment
from tests.support.waiting import until, wait_for


class Doubling:
    """Answers a row with its first value times the model's factor. A closed door holds it up."""

    def __init__(self) -> None:
        self.door, self.sizes = threading.Event(), list[int]()
        self.door.set()

    def predict(self, factor: float, source: str) -> Iterator[dict[str, Any]]:
        assert self.door.wait(30)
        with open(source) as file:
            names, *rows = file.read().splitlines()
        if names != "x":
            raise DataError("there is no column x")
        self.sizes.append(len(rows))
        yield {"row": range(len(rows)), "y": [float(row) * factor for row in rows]}


def served(version: str, task: Doubling, factor: float) -> ServedModel:
    return ServedModel(version, "doubling", partial(task.predict, factor))


@asynccontextmanager
async def up(server: InferenceServer) -> AsyncIterator[httpx.AsyncClient]:
    works = [asyncio.create_task(work) for work in (server.work(), server.watch())]
    transport = httpx.ASGITransport(server.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as http:
        yield http
    for work in works:
        work.cancel()
    await asyncio.gather(*works, return_exceptions=True)


async def test_requests_that_crowd_are_answered_together_each_with_its_own() -> None:
    task = Doubling()
    server = InferenceServer(served("one", task, 2.0), lambda old: None)
    async with up(server) as http:
        task.door.clear()
        asking = [
            asyncio.create_task(http.post("/predict", content=f"x\n{number}\n{number + 1}\n"))
            for number in range(20)
        ]
        await until(lambda: server.requests == 20)
        task.door.set()
        for number, answer in enumerate(await asyncio.gather(*asking)):
            expected = {"row": [0, 1], "y": [2.0 * number, 2.0 * number + 2]}
            assert answer.json() == {"version": "one", "answers": expected}
        assert sum(task.sizes) == 40
        assert len(task.sizes) < 20
        told = (await http.get("/healthz")).json()
        assert (told["version"], told["requests"], told["failed"]) == ("one", 20, 0)
        assert 0 < told["p50_ms"] <= told["p99_ms"]


async def test_a_new_version_takes_over_and_no_request_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "CHECK_EVERY_S", 0.02)
    task = Doubling()
    two = served("two", task, 3.0)
    news: list[ServedModel] = []
    server = InferenceServer(served("one", task, 2.0), lambda old: news.pop() if news else None)
    async with up(server) as http:
        seen: list[str] = []
        while "two" not in seen:
            answers = await asyncio.gather(
                *(http.post("/predict", json={"rows": [{"x": 5}]}) for _ in range(8))
            )
            for answer in answers:
                told = answer.json()
                assert told["answers"]["y"] == [{"one": 10.0, "two": 15.0}[told["version"]]]
                seen.append(told["version"])
            if len(seen) == 8:
                news.append(two)
        assert seen == sorted(seen)  # one, one, …, two: never back
        assert (server.swaps, server.failed) == (1, 0)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "text/csv", "no rows"),
        (b"x\n", "text/csv", "no rows"),
        (b"x,y\n1\n", "text/csv", "more or fewer values"),
        (b"\xff\xfe", "text/csv", "cannot read the rows"),
        (b"{", "application/json", "cannot read the rows"),
        (
            b'{"rows": [{"x": 1}, {"y": 1}]}',
            "application/json",
            "all rows must have the same names",
        ),
        (b"z\n1\n", "text/csv", "no column x"),
    ],
)
async def test_nonsense_is_told_and_harms_nobody(body: bytes, kind: str, words: str) -> None:
    server = InferenceServer(served("one", Doubling(), 2.0), lambda old: None)
    async with up(server) as http:
        good = http.post("/predict", content="x\n1\n")
        bad = http.post("/predict", content=body, headers={"content-type": kind})
        fine, refused = await asyncio.gather(good, bad)
        assert fine.json()["answers"]["y"] == [2.0]
        assert refused.status_code == 422
        assert words in refused.json()["message"]


#: Answers each row with a word from its owner's data.
NEEDS_DATA = """
from pathlib import Path

class NeedsData:
    def schema(self, settings): ...
    def init(self, seed, settings): ...
    def train(self, weights, settings, on_step): ...
    def evaluate(self, weights, settings, on_step): ...

    def load(self, data):
        self.word = Path(data.path).read_text()

    def predict(self, weights, settings, source):
        rows = Path(source).read_text().splitlines()[1:]
        yield {"word": [self.word] * len(rows)}
"""


def test_the_command_loads_the_owners_data_for_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "home"))
    (tmp_path / "data.txt").write_text("miaow")
    (tmp_path / "task.py").write_text(NEEDS_DATA)
    settings.change(
        homes.open_home("agent", create=True),
        data=str(tmp_path / "data.txt"),
        task_files={"needs": f"{tmp_path}/task.py:NeedsData"},
    )
    model = Weights({"factor": np.float32([2.0])})
    digest = weights.save(model, tmp_path / "model.safetensors")
    card = model_card.ModelCard(
        sha256=digest, version=digest, run="r", round=1, task="needs", tensors={}
    )
    (tmp_path / "model.json").write_bytes(model_card.encode(card))
    words = ["serve", "--port", "0", "--model", str(tmp_path / "model.safetensors")]
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(tmp_path / "home"))
    program = Program([AGENT, *words], env, tmp_path / "serve.log")
    try:
        found = wait_for(lambda: re.search(r"http://(\S+?),", program.log), "the service is up")
        answer = httpx.post(f"http://{found[1]}/predict", content="x\n1\n2\n")
    finally:
        program.stop()
    assert answer.json() == {"version": "model", "answers": {"word": ["miaow", "miaow"]}}


async def test_a_page_that_reaches_us_by_another_name_is_turned_away() -> None:
    server = InferenceServer(served("one", Doubling(), 2.0), lambda old: None)
    async with up(server) as http:
        answer = await http.post("/predict", content="x\n1\n", headers={"host": "evil.example"})
        assert (answer.status_code, server.batches) == (422, 0)
