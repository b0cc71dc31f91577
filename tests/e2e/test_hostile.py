"""What hostile or broken members of the fleet can do: nothing but be refused and counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.data.settings import Floors
from agent.home import enrollment_file
from agent.home.credentials import Credentials
from agent.home.settings_schema import AgentSettings
from agent.tasks import Settings
from agent.tasks.demo.mnist import Mnist
from agent.tasks.work import Done
from agent.transport.coordinator_client import CoordinatorClient
from protocols.errors import TrainerFailed
from protocols.messages import topics
from protocols.messages.refusals import refusal_of
from protocols.messages.work import Work
from protocols.model import schema_card, weights
from protocols.model.weights import Weights
from tests.support.fleet_harness import Fleet, fleet
from tests.support.in_process_trainer import ByKind
from tests.support.mqtt_fleet import rogue as with_login_only
from tests.support.waiting import wait_for

SHORT = ["--set", "epochs=1", "--set", "max_steps=20"]

Fault = Callable[[dict[str, np.ndarray]], tuple[dict[str, np.ndarray], int]]


def a_nan(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    model["output.bias"][3] = np.nan
    return model, 100


def an_infinity(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    model["hidden1.weight"][0, 0] = np.inf
    return model, 100


def another_shape(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    return model | {"output.weight": model["output.weight"].T.copy()}, 100


def another_dtype(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    return model | {"output.bias": model["output.bias"].astype(np.float16)}, 100


def a_missing_key(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    del model["output.bias"]
    return model, 100


def one_key_more(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    return model | {"back.door": np.zeros(3, np.float32)}, 100


def no_examples(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    return model, 0


def fewer_than_none(model: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    return model, -1000


def all_the_examples_in_the_world(
    model: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], int]:
    return model, 10**12


#: What the rogue does in each round, and the word with which it is refused.
FAULTS: list[tuple[Fault, str]] = [
    (a_nan, "not finite"),
    (an_infinity, "not finite"),
    (another_shape, "bad weights"),
    (another_dtype, "bad weights"),
    (a_missing_key, "bad weights"),
    (one_key_more, "bad weights"),
    (no_examples, "bad example count"),
    (fewer_than_none, "bad example count"),
    (all_the_examples_in_the_world, "bad example count"),
]


_NO_FIRST_WEIGHTS = refusal_of(TrainerFailed("task", "")).text.partition(": ")[0]


class RogueTrainer(ByKind):
    """Says what it likes: a fault a round, and lies about its evaluation."""

    def describe(self, task: str, settings: Settings) -> bytes:
        return schema_card.encode(schema_card.make_card(task, "", Mnist().schema({})))

    def init(self, task: str, settings: Settings, seed: int, out: Path) -> Done:
        raise TrainerFailed("task", "a rogue makes no first weights")

    def train(self, task: str, settings: Settings, base: Path, out: Path) -> Done:
        fault, _ = FAULTS[int(settings["round"]) - 1]
        loaded = weights.load(base)
        model, num_examples = fault({name: array.copy() for name, array in loaded.items()})
        digest = weights.save(Weights(model), out)
        return Done(digest=digest, nbytes=out.stat().st_size, num_examples=num_examples)

    def evaluate(self, task: str, settings: Settings, base: Path) -> Done:
        return Done(num_examples=10**12, metrics={"accuracy": 1.0, "loss": 0.0})


@dataclass(frozen=True)
class OverLink(Transport):
    """Moves weights over a link."""

    home: Path
    link: CoordinatorClient

    def fetch(self, work: Work) -> Path:
        path = self.home / f"{work.base}.safetensors"
        if not path.exists():
            self.link.download(work.base, work.nbytes, path)
        return path

    def send(self, digest: str, path: Path) -> None:
        self.link.upload(digest, path)


@contextmanager
def rogue_agent(home: Path) -> Iterator[None]:
    """An enrolled agent, all real but its trainer, at work in a thread of this process."""
    enrollment = enrollment_file.read_enrollment(home)
    mine = Credentials.load(home, enrollment)
    link = CoordinatorClient(mine)
    outbox = home / "outbox"
    outbox.mkdir()

    me = PeerIdentity(
        mine.peer, mine.sign_key.sign, enrollment.coordinator_public, enrollment.fleet
    )
    client = Client(
        me,
        RogueTrainer(),
        OverLink(home, link),
        Outbox(outbox, me),
        # Its own agent stops none of its faults.
        OwnerRules(lambda: AgentSettings(tasks=("*",)), Floors(min_examples=-(10**6))),
    )
    over, opened = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        link.open()
        opened.set()
        while not over.wait(0.02):
            if (message := link.pull()) is None:
                continue
            try:
                reply = client.handle(message)
            except TrainerFailed as err:
                # With a code that Flower uses for a node that is gone.
                reply = Message(Error(5, refusal_of(err).encode()), reply_to=message)
            link.push(reply)

    def watched() -> None:
        try:
            work()
        except BaseException as err:
            failed.append(err)

    working = threading.Thread(target=watched, name="rogue")
    working.start()
    try:
        assert opened.wait(30), "the rogue has a session"
        yield
    finally:
        over.set()
        working.join(60)
        assert not working.is_alive(), "the rogue is stuck"
        link.close()
    assert not failed, failed


def start_honest(site: Fleet) -> None:
    site.up()
    site.join("ada", "bob")
    site.start("ada", "bob")


@pytest.mark.long
@pytest.mark.attack("20.5")
def test_each_bad_update_is_refused_and_the_model_is_that_of_the_honest(tmp_path: Path) -> None:
    """Attack: an enrolled agent sends NaN, other shapes and false counts in a real fleet."""
    with fleet(tmp_path) as site:
        start_honest(site)
        rounds = str(len(FAULTS))
        words = ["mnist", "--rounds", rounds, "--quorum", "2", "--deadline", "20s", *SHORT]
        honest = site.ended_run(site.start_run(*words))
        assert honest["state"] == "finished"

        ticket = site.ticket()
        assert site.ask_agent("eve", "join", "-", "--name", "eve", given=ticket).returncode == 0
        with rogue_agent(tmp_path / "eve"):
            harmed = site.ended_run(site.start_run(*words))
        assert harmed["state"] == "finished"
        for with_eve, without in zip(harmed["history"], honest["history"], strict=True):
            assert with_eve["digest"] == without["digest"]
            assert with_eve["contributors"] == without["contributors"]
            assert with_eve["metrics"] == without["metrics"]
            assert with_eve["refused"] == 2, "the update and the evaluation"
        refused = [text.split(": ") for text in site.events() if text.startswith("refused eve")]
        found = [why for _, why, *_ in refused if why != _NO_FIRST_WEIGHTS]
        expected = [why for _, reason in FAULTS for why in (reason, "bad example count")]
        assert found == expected


@pytest.mark.long
@pytest.mark.attack("20.7")
async def test_a_malformed_mqtt_payload_is_ignored_counted_and_shown(tmp_path: Path) -> None:
    """Attack: a member publishes malformed messages in a real fleet."""
    with fleet(tmp_path) as site:
        start_honest(site)
        enrollment = enrollment_file.read_enrollment(tmp_path / "ada")
        run = site.start_run("ping", "--rounds", "20", "--quorum", "2")
        payloads = [b"\x00\xff" * 40, b"A" * 88 + b".{}", b"x" * 16_000, b"{}"]
        async with with_login_only(enrollment.mqtt) as client:
            for payload in payloads:
                for topic in (topics.telemetry, topics.presence):
                    where = topic(enrollment.fleet, enrollment.peer)
                    await client.publish(where, payload, qos=1)
        assert site.ended_run(run)["state"] == "finished"
        expected = 2 * len(payloads)
        wait_for(lambda: site.data("status")["links"]["rejected"] == expected, "all are counted")
        assert "ignored 8 malformed or forged MQTT messages so far" in site.events()
        fleet_now = site.data("status")
        assert {peer["state"] for peer in fleet_now["peers"].values()} == {"idle"}
