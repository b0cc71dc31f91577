"""Messages of Flower apps on an agent: real apps in real processes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec.structs import replace

from agent.clientapp.flower_apps import FlowerApps
from agent.clientapp.interfaces import PeerIdentity
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.home.settings_schema import AgentSettings
from agent.trainer.app_trainer import AppTrainer
from commonweight.flower_apps import flower_names
from protocols.enrollment import identity
from protocols.errors import BadMessage, NotAllowed, TrainerFailed
from protocols.local import flower_apps
from protocols.messages import app_work
from protocols.messages.app_work import (
    RECORD,
    SIGNED_APP_ANSWER,
    SIGNED_APP_WORK,
    AppAnswer,
    AppWork,
    Arrays,
    Values,
)
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support import flower_apps as apps
from tests.support.waiting import wait_for

APPS = apps.FOLDER
COORDINATOR, PEER = identity.new_signing_key(), identity.new_signing_key()


class Machine:
    """An agent's part for apps, with its process; `sent` has the uploads."""

    def __init__(self, folder: Path, name: str, source: Path | None = None) -> None:
        self.owner = AgentSettings(hang_timeout_s=60.0, threads=1)
        self.install(source or APPS / name)
        self.folder, self.sent = folder, list[str]()
        self.left: list[AppAnswer] = []
        self.versions: dict[str, Path] = {}
        self.process = AppTrainer(
            folder / "apps", lambda: self.owner, read=(folder,), on_progress=lambda _: None
        )
        self.restart()

    def install(self, source: Path) -> None:
        self.card, installed = flower_apps.install(source, config={"partition-id": 1})
        self.owner = replace(self.owner, apps={self.card.name: installed})

    def restart(self) -> None:
        me = PeerIdentity("peer-1", PEER.sign, identity.public_bytes(COORDINATOR))
        self.apps = FlowerApps(
            me,
            self.folder / "answers",
            self.process,
            OwnerRules(lambda: self.owner, budget=PrivacyBudget(settings=lambda: self.owner)),
            fetch=lambda digest, nbytes: self.versions[digest],
            send=lambda digest, path: self.sent.append(weights.file_digest(path)),
            on_leaving=lambda work, answer: self.left.append(answer),
        )

    def version(self, model: Weights) -> dict[str, Any]:
        path = self.folder / "version"
        digest = weights.save(model, path)
        self.versions[digest] = path.rename(path.with_name(digest))
        return {"base": digest, "nbytes": self.versions[digest].stat().st_size}

    def work(self, **fields: Any) -> AppWork:
        made = {"run": "r1", "number": 1, "kind": "message", "app": self.card.name}
        return AppWork(**made | {"code": self.card.code, "flower_run": 7, "node": 3} | fields)

    def ask(self, work: AppWork, key: Any = COORDINATOR) -> AppAnswer:
        payload, signature = SIGNED_APP_WORK.seal(work, key.sign)
        flower_names.become(1)
        content = RecordDict({RECORD: ConfigRecord({"work": payload, "signature": signature})})
        reply = self.apps.answer(Message(content, 1, "query.app"))
        config = reply[RECORD]
        signed = SIGNED_APP_ANSWER.signed_bytes(config["answer"])
        assert identity.verify(identity.public_bytes(PEER), config["signature"], signed)
        answer = SIGNED_APP_ANSWER.decode(config["answer"])
        assert answer.key == hashlib.sha256(payload).hexdigest()
        return answer


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    made = Machine(tmp_path, request.param if hasattr(request, "param") else "mean")
    yield made
    made.process.close()


TOLD = app_work.encode_told((Arrays("arrays", ("w", "b")), Values("config", False, {"lr": 0.1})))
MODEL = Weights({"w": np.ones((2, 2), np.float32), "b": np.zeros((), np.float64)})


def test_an_app_trains_and_keeps_its_context_with_its_answer(machine: Machine) -> None:
    first = machine.version(MODEL)
    asked = machine.work(message_type="train", told=TOLD, **first)
    one = machine.ask(asked)
    assert machine.sent == [one.digest]
    assert machine.left == [one]
    made = weights.load(machine.process.folder_of("mean") / "runs/r1" / f"{one.key}.safetensors")
    assert np.array_equal(made["w"], np.full((2, 2), 3, np.float32))
    assert made["b"].shape == ()
    assert app_work.metrics_of(app_work.decode_records(one.told)) == (
        10,
        {"rounds": 1.0, "train_loss": 1.0},
    )
    # The same message again, also after a restart: the same answer, and no work.
    machine.process.stop()
    machine.restart()
    assert machine.ask(asked) == one
    assert not machine.process.running
    # The next message finds the context that the last answer left, in a new process.
    two = machine.ask(replace(asked, number=2))
    assert app_work.metrics_of(app_work.decode_records(two.told))[1]["rounds"] == 2
    # An answer that was lost with the process counts no round.
    (machine.folder / "answers" / "r1.json").write_bytes(b"{")
    assert app_work.metrics_of(app_work.decode_records(machine.ask(asked).told))[1]["rounds"] == 1


def test_a_failed_message_leaves_no_arrays(tmp_path: Path) -> None:
    copy = tmp_path / "mean"
    shutil.copytree(APPS / "mean", copy)
    file = copy / "mean_app/client_app.py"
    kept = 'context.state["kept"] = '  # larger than a context may be: the answer is written before
    many = "MetricRecord({str(i): [1.0] * 16000 for i in range(5)})"
    file.write_text(file.read_text().replace(kept, f'context.state["many"] = {many}\n    {kept}'))
    machine = Machine(tmp_path, "mean", source=copy)
    first = machine.version(Weights({**MODEL, "w": np.ones((500, 500), np.float32)}))
    with pytest.raises(TrainerFailed, match="at most 524,288 are sent"):
        machine.ask(machine.work(message_type="train", told=TOLD, **first))
    machine.process.close()
    assert list((machine.process.folder_of("mean") / "runs/r1").iterdir()) == []


def test_a_check_runs_nothing(machine: Machine) -> None:
    assert machine.ask(machine.work(kind="check")).told == b""
    assert not machine.process.running
    assert machine.left == []


@pytest.mark.long
def test_a_killed_process_starts_again(machine: Machine) -> None:
    machine.ask(machine.work(message_type="train", told=TOLD, **machine.version(MODEL)))
    assert machine.process.pid is not None
    psutil.Process(machine.process.pid).kill()
    answer = machine.ask(
        machine.work(number=2, message_type="train", told=TOLD, **machine.version(MODEL))
    )
    assert app_work.metrics_of(app_work.decode_records(answer.told))[1]["rounds"] == 2


def test_work_of_another_app_or_owner_is_refused(machine: Machine) -> None:
    with pytest.raises(NotAllowed, match="not installed the Flower app 'other'"):
        machine.ask(machine.work(app="other"))
    machine.owner = replace(machine.owner, secure_min=3)
    with pytest.raises(NotAllowed, match="secure runs alone"):
        machine.ask(machine.work())
    machine.owner = replace(machine.owner, secure_min=0, privacy_max_epsilon=1.0)
    with pytest.raises(NotAllowed, match="privacy budget"):
        machine.ask(machine.work())
    machine.owner = replace(machine.owner, privacy_max_epsilon=0.0)
    for key, value in (("min_cohort", 2), ("min_witnesses", 1), ("data_min_rows", 21)):
        own, machine.owner = machine.owner, replace(machine.owner, **{key: value})
        with pytest.raises(NotAllowed, match=f"its owner has set {key}, and a Flower app does"):
            machine.ask(machine.work())
        machine.owner = own
    machine.owner = replace(machine.owner, forbidden_tasks=("flower:mean",))
    with pytest.raises(NotAllowed, match="not installed"):
        machine.ask(machine.work())
    assert not machine.process.running


@pytest.mark.attack("20.consent")
def test_a_coordinator_that_names_other_code_runs_nothing(machine: Machine) -> None:
    """Attack: a coordinator names an app by another digest, so that other code would run."""
    with pytest.raises(NotAllowed, match="has other files: code"):
        machine.ask(machine.work(code="0" * 64))
    with pytest.raises(BadMessage, match="not signed by this fleet's coordinator"):
        machine.ask(machine.work(), PEER)
    assert not machine.process.running


@pytest.mark.attack("20.consent", by="thief")
def test_an_app_whose_files_changed_is_refused(tmp_path: Path) -> None:
    """Attack: the files of an installed app are changed after its owner allowed it."""
    shutil.copytree(APPS / "mean", tmp_path / "copy")
    machine = Machine(tmp_path, "mean")
    installed = replace(machine.owner.apps["mean"], folder=str(tmp_path / "copy"))
    machine.owner = replace(machine.owner, apps={"mean": installed})
    machine.ask(machine.work(kind="check"))
    with (tmp_path / "copy/mean_app/client_app.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(NotAllowed, match="not those that its owner allowed"):
        machine.ask(machine.work(kind="check"))


@pytest.mark.long
@pytest.mark.attack("20.sandbox")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_an_app_that_prints_without_end_fills_no_log(machine: Machine) -> None:
    """Attack: a ClientApp prints without end, also what looks like an answer."""
    answer = machine.ask(machine.work(config={"act": "print"}))
    assert app_work.metrics_of(app_work.decode_records(answer.told))[1] == {"done": 1.0}
    machine.process.stop()
    log = machine.process.folder_of("hostile") / "trainer.log"
    assert log.stat().st_size < 3 << 20
    assert "further output is dropped" in log.read_text(errors="replace")


@pytest.mark.long
@pytest.mark.attack("20.sandbox")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_an_app_that_never_answers_ends_with_its_processes(machine: Machine) -> None:
    """Attack: a ClientApp starts processes and never answers."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(TrainerFailed, match="did not answer within") as caught:
        machine.ask(machine.work(config={"act": "fork"}, deadline_s=1.5))
    assert caught.value.kind == "hung"
    machine.process.stop()
    wait_for(lambda: {c.pid for c in psutil.Process().children(recursive=True)} <= before)
    ours = [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in str(p.info)]
    assert [p for p in ours if p.ppid() in (1, os.getpid())] == []


def _given(machine: Machine, path: Path, **owner: Any) -> None:
    """Name a path to the app, and change its owner's settings."""
    app = machine.owner.apps["hostile"]
    app = replace(app, config={**app.config, "secret": str(path)})
    machine.owner = replace(machine.owner, apps={"hostile": app}, **owner)


@pytest.mark.attack("20.sandbox")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_an_app_reads_no_file_that_its_owner_has_not_named(machine: Machine) -> None:
    """Attack: a ClientApp reads a file of its owner that is not among those it may read."""
    secret = machine.folder.parent / f"{machine.folder.name}-secret"
    secret.write_text("secret")
    _given(machine, secret)
    with pytest.raises(TrainerFailed) as caught:
        machine.ask(machine.work(config={"act": "read"}))
    assert caught.value.kind == "sandbox"
    app = replace(machine.owner.apps["hostile"], read=(str(secret),))
    machine.owner = replace(machine.owner, apps={"hostile": app})
    answer = machine.ask(machine.work(config={"act": "read"}))
    assert app_work.metrics_of(app_work.decode_records(answer.told))[1] == {"found": 6.0}


@pytest.mark.long
@pytest.mark.attack("23.4")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_code_that_an_app_writes_has_no_other_rights(machine: Machine) -> None:
    """Attack: a ClientApp writes code and a program into its work folder, and runs them."""
    secret = machine.folder.parent / f"{machine.folder.name}-secret"
    secret.touch()
    _given(machine, secret)
    answer = machine.ask(machine.work(config={"act": "own"}))
    found = app_work.metrics_of(app_work.decode_records(answer.told))[1]
    assert found == {"ran": 1.0, "read": 1.0, "program": -1.0}


@pytest.mark.attack("23.4")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_a_link_of_an_app_deletes_no_file_elsewhere(machine: Machine, tmp_path: Path) -> None:
    """Attack: without a sandbox, a ClientApp puts a link in place of the folder of its runs, so
    that the agent deletes what lies in another folder with the name of the run."""
    precious = tmp_path / "home" / "r1" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    _given(machine, tmp_path / "home", sandbox="off")
    machine.ask(machine.work(config={"act": "link"}))
    assert precious.exists()


@pytest.mark.attack("23.4")
def test_a_link_in_place_of_an_answer_is_not_sent(machine: Machine, tmp_path: Path) -> None:
    """Attack: a ClientApp puts a link to a file of its owner in place of its answer."""
    asked = machine.work(message_type="train", told=TOLD, **machine.version(MODEL))
    answer = machine.ask(asked)
    file = machine.process.folder_of("mean") / "runs/r1" / f"{answer.key}.safetensors"
    file.rename(tmp_path / "private")
    file.symlink_to(tmp_path / "private")
    machine.sent.clear()
    with pytest.raises(TrainerFailed, match="no plain file: it is not sent"):
        machine.ask(asked)
    assert machine.sent == []
    file.unlink()
    os.mkfifo(file)  # which would be read for ever
    machine.restart()
    assert machine.ask(asked).digest == answer.digest, "the message is done again"


@pytest.mark.long
@pytest.mark.attack("20.sandbox")
@pytest.mark.parametrize("machine", ["hostile"], indirect=True)
def test_an_answer_that_is_too_large_is_refused_here(machine: Machine) -> None:
    """Attack: a ClientApp answers with more records than a message may have."""
    with pytest.raises(TrainerFailed, match="at most 524,288 are sent"):
        machine.ask(machine.work(config={"act": "many"}))
    with pytest.raises(TrainerFailed) as caught:
        machine.ask(machine.work(config={"act": "raise"}))
    assert caught.value.kind == "task"


def test_the_audit_log_has_what_an_app_says(machine: Machine, tmp_path: Path) -> None:
    from agent.home import audit_log

    work = machine.work(message_type="train", told=TOLD, **machine.version(MODEL))
    audit_log.write_app_answer(tmp_path, work, machine.ask(work))
    (entry,) = audit_log.read(tmp_path)
    assert (entry.task, entry.what, entry.metrics["rounds"]) == ("flower:mean", "answer", 1.0)
    assert json.loads(entry.told)[0][1] == "arrays"
    assert entry.digest == machine.sent[0]


@pytest.mark.attack("20.audit")
def test_answers_of_apps_push_nothing_out_of_the_audit_log(tmp_path: Path) -> None:
    """Attack: a coordinator fills the owner's audit log: it has large answers of an app sent, also
    the same one again."""
    from agent.home import audit_log

    work = AppWork(run="r1", number=1, kind="message", app="mean", code="0" * 64)

    def send(nonce: str, told: bytes, **fields: Any) -> None:
        answer = AppAnswer(
            run="r1", number=1, key="a" * 64, peer="p", told=told, nonce=nonce, **fields
        )
        audit_log.write_app_answer(tmp_path, work, answer)

    send("first", app_work.encode_told((Values("m", True, {"loss": 1.0}),)))
    names = tuple(f"layer{number}.weight" for number in range(20_000))
    large = (Arrays("a", names), Values("c", False, {"kept": 1, "x": "\x01" * 100_000}))
    for number in range(60):
        send(str(number), app_work.encode_told(large))
        send("first", app_work.encode_told((Values("m", True, {"loss": 1.0}),)))
    first, *others = audit_log.read(tmp_path)
    assert (first.metrics, len(others)) == ({"loss": 1.0}, 60)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1 << 20
    told = json.loads(others[0].told)
    assert told["sha256"] == hashlib.sha256(app_work.encode_told(large)).hexdigest()
    assert told["begins"].startswith('[["v","c",false,{"kept":1,"x":"')
    # Other words with the same arrays are told.
    for loss in (2.0, 3.0):
        told = app_work.encode_told((Values("m", True, {"loss": loss}),))
        send(f"loss {loss}", told, digest="d" * 64)
    assert [json.loads(e.told)[0][3]["loss"] for e in audit_log.read(tmp_path)[-2:]] == [2.0, 3.0]


def test_told_records_are_bounded() -> None:
    twice = app_work.encode_told((Values("a", True, {}), Values("a", True, {})))
    with pytest.raises(BadMessage, match="one name"):
        app_work.decode_records(twice)
    with pytest.raises(BadMessage):
        app_work.decode_records(b"\x00" * (app_work.MAX_RECORD_BYTES + 1))
    with pytest.raises(BadMessage):
        app_work.decode_records(msgspec.msgpack.encode([["a", "n", ["k"] * 70_000]]))
    values = Values("m", True, {"num-examples": -80, "x": float("nan"), "y": 2, "z": [1]})
    assert app_work.metrics_of((values,)) == (1, {"y": 2.0})
