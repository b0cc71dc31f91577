"""Work that an owner did not allow: other tasks, other columns, other code, other settings."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from agent.clientapp.app import Client
from agent.clientapp.consent import ConsentNeeded, check_unit
from agent.clientapp.inference_jobs import InferenceJobs
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.jobs import Jobs, Result
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores
from agent.data.settings import DataSettings
from agent.home import consent_requests, refusal_log, settings
from agent.home.live_settings import LiveSettings
from agent.home.refusal_log import RefusalLog
from agent.home.settings_schema import AgentSettings
from agent.policy import consent
from agent.setup import consents
from agent.tasks.tabular import Tabular
from agent.tasks.work import Describe, Done, Init
from agent.trainer.process import Terms, TrainerProcess, trainer_program
from protocols.enrollment import identity
from protocols.errors import (
    AwaitingColumns,
    AwaitingConsent,
    CommonweightError,
    NotAllowed,
    Refused,
    SchemaMismatch,
    TrainerFailed,
    UnknownName,
)
from protocols.local import homes
from protocols.messages import refusals
from protocols.messages.jobs import SIGNED_UNIT, Analyze, Private, Scatter, Unit
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model import schema_card
from protocols.tables import preprocessing
from tests.hostile.test_floors import Victim
from tests.support.fleet_harness import AGENT, ROOT, environment, run_program

pytestmark = pytest.mark.attack("20.consent", by="coordinator")

COORDINATOR = identity.new_signing_key()
LINE = f"{ROOT}/docs/examples/line.py:Line"


class NeverTrains(Transport):
    """A trainer and lane that notice every use."""

    trains_ahead = False

    def __init__(self) -> None:
        self.used: list[Any] = []

    def run(self, work: Any) -> Any:
        self.used.append(work)
        raise AssertionError("the trainer was asked")

    def cancel_training(self) -> None:
        raise AssertionError("there is none")

    def fetch(self, work: Work) -> Path:
        raise AssertionError("a version was fetched")

    def send(self, digest: str, path: Path) -> None:
        raise AssertionError("something was sent")


class Machine:
    """A machine whose owner decides by the public commands; the coordinator sends it work."""

    def __init__(self, home: Path) -> None:
        self.home, self.trainer = home, NeverTrains()
        self.owner = LiveSettings(home)
        me = PeerIdentity("P", identity.new_signing_key().sign, identity.public_bytes(COORDINATOR))
        owner = OwnerRules(self.owner)
        self.client = Client(me, self.trainer, self.trainer, Outbox(home / "outbox", me), owner)
        told = ToldScores(settings.scores_file(home))
        self.jobs = InferenceJobs(
            *(self.trainer, owner, lambda model: home, lambda *_: None, home, home, told),
            took_part=lambda digest: True,
        )

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3

    def ask(self, task: str, kind: Any = "train", run: str = "r", **given: Any) -> None:
        work = Work(run=run, round=1, kind=kind, task=task, settings=given)
        payload, signature = SIGNED_WORK.seal(work, COORDINATOR.sign)
        content = RecordDict({"config": ConfigRecord({"work": payload, "signature": signature})})
        action = kind if kind in ("train", "evaluate") else f"query.{kind}"
        self.client.handle(Message(content, 9, action))


@pytest.fixture
def machine(agent_home: Path) -> Machine:
    return Machine(agent_home)


@pytest.mark.parametrize("kind", ["describe", "init", "train", "evaluate", "holdings", "recall"])
def test_a_new_home_does_no_work_of_any_kind(machine: Machine, kind: str) -> None:
    """Attack: ask a machine whose owner has allowed nothing, by each kind of work."""
    with pytest.raises(AwaitingConsent, match="has not allowed the task 'mnist' yet"):
        machine.ask("mnist", kind)
    assert machine.trainer.used == []


@pytest.mark.parametrize(
    "question",
    [Private(min_group=1), Scatter(input="0" * 64, sizes=(1,), rows=(1,), suffix=".csv")],
)
def test_a_job_is_no_way_around_consent(machine: Machine, question: Any) -> None:
    """Attack: train on nothing, and measure or predict by a job instead."""
    settings.change(machine.home, jobs_scatter="on", tasks=["ping"])
    unit = Unit(job="j", unit=1, question=question, task="mnist", models=())
    with pytest.raises(AwaitingConsent):
        (machine.jobs.private if isinstance(question, Private) else machine.jobs.scatter)(unit)


@pytest.mark.parametrize("name", ["Tabular", "tabular.", "TABULAR", "ping:ping", "mnist-1", ""])
def test_a_name_that_looks_like_an_allowed_one_is_another(machine: Machine, name: str) -> None:
    """Attack: name a task in a way that resembles one that is allowed."""
    consents.allow(machine.home, "tabular")
    with pytest.raises(UnknownName):
        machine.ask(name)
    assert consent_requests.read(machine.home) == {}, "only tasks that are here are asked for"


def test_what_an_owner_forbids_stays_forbidden(machine: Machine) -> None:
    """Attack: ask again for a task that the owner forbids while all others are allowed."""
    consents.allow(machine.home, "*")
    consents.forbid(machine.home, "mnist")
    with pytest.raises(NotAllowed, match="forbids the task 'mnist'") as refused:
        machine.ask("mnist")
    assert not isinstance(refused.value, AwaitingConsent), "no run waits for it"
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask("ping", "init")


def test_consent_that_is_withdrawn_holds_for_the_next_message(machine: Machine) -> None:
    """Attack: go on with a run whose task the owner forbids in the middle."""
    consents.allow(machine.home, "ping")
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask("ping", "init")
    consents.forbid(machine.home, "ping")
    with pytest.raises(NotAllowed):
        machine.ask("ping", "init")


@pytest.mark.parametrize("kind", ["describe", "init", "train", "evaluate"])
def test_nothing_leaves_once_consent_is_withdrawn_during_the_work(
    machine: Machine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: have the work begun while the owner allows it, and take the result afterwards."""
    consents.allow(machine.home, "ping")
    (machine.home / "base").write_bytes(b"a version")

    def run(work: Any) -> Done:
        consents.forbid(machine.home, "ping")
        if out := getattr(work, "out", ""):
            Path(out).write_bytes(b"an update")
        return Done(digest="a" * 64, nbytes=9, num_examples=99, description=b"{}")

    monkeypatch.setattr(machine.trainer, "run", run)
    monkeypatch.setattr(machine.trainer, "fetch", lambda work: machine.home / "base")
    with pytest.raises(NotAllowed, match="forbids the task 'ping'"):
        machine.ask("ping", kind)


@pytest.mark.parametrize("kind", ["describe", "init", "train", "evaluate"])
def test_a_reply_of_a_forbidden_task_answers_no_work_of_another(
    machine: Machine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: have a reply finished but not sent, wait until the owner forbids its task, and take
    it as the answer to the same work of an allowed task, or with other settings."""
    consents.allow(machine.home, "ping")
    consents.allow(machine.home, "mnist")
    (machine.home / "base").write_bytes(b"a version")
    used = []

    def run(work: Any) -> Done:
        used.append((work.task, dict(work.settings).get("lr")))
        if out := getattr(work, "out", ""):
            Path(out).write_bytes(b"an update")
        digest = hashlib.sha256(b"an update").hexdigest() if out else ""
        card = schema_card.encode(schema_card.make_card(work.task, "1", {}, {}))
        return Done(digest=digest, nbytes=9, num_examples=99, description=card)

    monkeypatch.setattr(machine.trainer, "run", run)
    monkeypatch.setattr(machine.trainer, "fetch", lambda work: machine.home / "base")
    sent: list[Any] = []
    monkeypatch.setattr(machine.trainer, "send", lambda *what: sent.append(what))
    machine.ask("mnist", kind)
    machine.ask("mnist", kind)
    assert len(used) == 1, "the same work is done once"
    consents.forbid(machine.home, "mnist")
    machine.ask("ping", kind)
    machine.ask("ping", kind, lr=0.5)
    assert used[1:] == [("ping", None), ("ping", 0.5)]


@pytest.mark.parametrize("kind", ["describe", "train", "evaluate"])
def test_nothing_leaves_of_columns_that_were_taken_back(
    machine: Machine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: train on all columns that an owner allows, and take the result when the owner has
    left some out, during the work or before the result was sent."""
    consents.allow(machine.home, "tabular", columns=["age", "ill", "income"])
    (machine.home / "base").write_bytes(b"a version")
    used, narrows = [], True

    def run(work: Any) -> Done:
        used.append(machine.owner().columns_of("tabular"))
        if narrows:
            consents.allow(machine.home, "tabular", columns=["age", "ill"])
        if out := getattr(work, "out", ""):
            Path(out).write_bytes(b"an update")
        digest = hashlib.sha256(b"an update").hexdigest() if out else ""
        card = schema_card.encode(schema_card.make_card(work.task, "1", {}, {}))
        return Done(digest=digest, nbytes=9, num_examples=99, description=card)

    monkeypatch.setattr(machine.trainer, "run", run)
    monkeypatch.setattr(machine.trainer, "fetch", lambda work: machine.home / "base")
    monkeypatch.setattr(machine.trainer, "send", lambda *what: None)
    with pytest.raises(CommonweightError, match="changed the columns") as failed:
        machine.ask("tabular", kind, target="ill")
    assert not refusals.refusal_of(failed.value).permanent, "the next try uses the new columns"
    narrows = False
    machine.ask("tabular", kind, target="ill")
    machine.ask("tabular", kind, target="ill")
    assert used == [("age", "ill", "income"), ("age", "ill")]
    consents.allow(machine.home, "tabular", columns=["ill"])
    machine.ask("tabular", kind, target="ill")
    assert used[2:] == [("ill",)]


@pytest.mark.parametrize(
    ("question", "forbid"),
    [
        (Private(min_group=1), {"tasks": []}),
        (Scatter(input="0" * 64, sizes=(1,), rows=(1,), suffix=".csv"), {"tasks": []}),
        (
            Scatter(input="0" * 64, sizes=(1,), rows=(1,), suffix=".csv"),
            {"jobs_scatter": "off"},
        ),
        (Analyze(query="{}"), {"analyze": "off"}),
    ],
)
def test_an_answer_of_a_job_is_not_sent_again_after_consent_ended(
    machine: Machine, question: Any, forbid: Any
) -> None:
    """Attack: ask again for an answer that was made while the owner allowed it, and never sent."""
    settings.change(machine.home, jobs_scatter="on", tasks=["ping"], analyze="on")
    sign = identity.new_signing_key().sign
    left = []
    jobs = Jobs(
        PeerIdentity("P", sign, identity.public_bytes(COORDINATOR)),
        machine.home / "answers",
        send=lambda *_: None,
        handlers={type(question): lambda unit: Result(b"{}", 0)},
        check=lambda unit: check_unit(machine.owner(), unit),
        on_leaving=lambda *what: left.append(what),
    )
    unit = Unit(job="j", unit=1, question=question, task="ping")
    payload, signature = SIGNED_UNIT.seal(unit, COORDINATOR.sign)
    content = RecordDict({"unit": ConfigRecord({"unit": payload, "signature": signature})})
    message = Message(content, 9, "query.infer")
    jobs.answer(message)
    jobs.answer(message)
    assert len(left) == 2
    settings.change(machine.home, **forbid)
    with pytest.raises(Refused):
        jobs.answer(message)
    assert len(left) == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"target": "income"},
        {"target": "ill", "features": "age,income"},
        {"target": "ill", "features": " income ,age"},
        {"target": "ill", "features": "Age"},
        {"target": "ill", "features": "ag*"},
        {"target": "ill", "features": "age\x1b[2K"},
    ],
)
def test_a_run_names_no_column_beyond_the_consent(machine: Machine, asked: dict[str, str]) -> None:
    """Attack: name a column that the owner did not allow this task."""
    consents.allow(machine.home, "tabular", columns=["age", "ill"])
    with pytest.raises(NotAllowed, match="does not let the task 'tabular' use the column") as told:
        machine.ask("tabular", "describe", **asked)
    assert "\x1b" not in told.value.message
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask("tabular", "describe", target="ill", features="age")


@pytest.mark.parametrize("kind", ["describe", "init", "train", "evaluate"])
@pytest.mark.parametrize("features", ["", "age"])
def test_no_column_is_used_before_its_owner_names_it(
    machine: Machine, kind: str, features: str
) -> None:
    """Attack: describe every column of an owner who allowed a task and named none."""
    settings.change(machine.home, data="/data/patients.csv")
    for name in ("tabular", "*"):
        consents.allow(machine.home, name)
        with pytest.raises(AwaitingConsent, match="has not said which columns") as asked:
            machine.ask("tabular", kind, target="ill", features=features)
        refusal = refusals.decode(refusals.refusal_of(asked.value).encode())
        assert refusal.kind == AwaitingColumns.code
        assert refusal.permanent, "the same request fails until the owner decides"
        assert "task allow tabular --columns NAME,NAME, or all" in refusal.text
        assert isinstance(asked.value, ConsentNeeded)
        wanted = "ill,age" if features else "NAME,NAME"
        assert asked.value.request.command.endswith(f"task allow tabular --columns {wanted}")
        assert machine.owner().columns_of("tabular") == ()
    assert machine.trainer.used == []
    settings.change(machine.home, data_columns=["ill", "age"])
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask("tabular", "describe", target="ill", features=features)
    with pytest.raises(NotAllowed, match="does not let"):
        machine.ask("tabular", "describe", target="surname", features=features)


@pytest.mark.parametrize("said", ["", '[consents.tabular]\ncolumns = []\nat = 1.0\ncode = ""\n'])
def test_homes_of_older_versions_keep_the_columns_that_they_had(
    machine: Machine, said: str
) -> None:
    """Control: an owner who allowed all columns before they were asked for is not asked again."""
    (machine.home / settings.FILE).write_text(f'data = "x.csv"\ntasks = ["tabular"]\n{said}')
    for _ in range(2):
        assert settings.read(machine.home).columns_of("tabular") == ("*",)
        assert settings.read(machine.home).allows("tabular")
        consents.allow(machine.home, "tabular")  # what is not given stays as it was
    consents.forbid(machine.home, "tabular")
    consents.allow(machine.home, "tabular")
    assert settings.read(machine.home).standing_of("tabular") == "columns"


def test_the_columns_of_a_task_reach_its_trainer_and_never_pass_those_of_the_machine(
    tmp_path: Path,
) -> None:
    """Attack: use columns of another task's consent, or those that data.columns leaves out."""
    owner = AgentSettings(
        data_columns=("age", "lab_*"),
        tasks=("tabular", "mnist"),
        consents={"tabular": consent.Consent(columns=("age", "lab_a", "income", "*", "l*"))},
    )
    assert owner.columns_of("tabular") == ("age", "lab_a"), "no pattern allows more than both"
    assert owner.columns_of("mnist") == ("age", "lab_*")
    trainer = TrainerProcess(
        trainer_program(tmp_path),
        DataSettings(columns=("*",)),
        terms=lambda task: Terms(owner.columns_of(task)),
    )
    work = trainer._with_local_data(Describe(task="tabular", settings={}))
    assert work.data.columns == ("age", "lab_a")
    trainer.close()


@pytest.mark.parametrize("target", ["ill", "income"])
@pytest.mark.parametrize("kind", ["update", "evaluate", "describe"])
def test_the_agreed_preprocessing_is_no_way_to_other_columns(
    tmp_path: Path, kind: str, target: str
) -> None:
    """Attack: skip the handshake, and name columns beyond the consent in the preprocessing."""
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    theirs.mkdir()
    liar = Victim(own)  # a table with the same columns, of which all may be used
    wanted = {"target": target, "kind": "regression" if target == "income" else "auto"}
    task = Tabular()
    task.load(liar.data)
    agreed = preprocessing.derive({"me": task.survey(wanted)}, wanted).preprocessing
    crafted = {**wanted, "target": "ill", "preprocessing": preprocessing.encode(agreed)}
    allowed = ("age", "height", "ill")
    victim = Victim(theirs, data_columns=allowed)
    liar.trainer.run(Init(task="tabular", settings=crafted, seed=0, out=str(victim.base)))
    with pytest.raises(TrainerFailed, match="column income") as refused:
        getattr(victim, kind)(**crafted)
    assert refused.value.kind == SchemaMismatch.code


@pytest.fixture
def own_task(agent_home: Path, tmp_path: Path) -> Path:
    """A task of the owner's own with a module beside it, registered and allowed."""
    folder = tmp_path / "own"
    folder.mkdir()
    text = (ROOT / "docs" / "examples" / "line.py").read_text()
    (folder / "line.py").write_text(f"import beside\n{text}")
    (folder / "beside.py").write_text("import further\n")
    (folder / "further.py").write_text("WORD = 1\n")
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(agent_home))
    done = run_program([AGENT, "task", "add", str(folder / "line.py") + ":Line"], env)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("changed", ["line.py", "beside.py", "further.py"])
def test_code_that_changed_after_the_consent_does_not_run(
    machine: Machine, own_task: Path, changed: str
) -> None:
    """Attack: change the file of an allowed task, or a module that it imports."""
    task = "line.py:Line"
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask(task, "init")
    with (own_task / changed).open("a") as file:
        file.write("import socket\n")
    with pytest.raises(AwaitingConsent, match="as its file is now"):
        machine.ask(task, "init")
    consents.allow(machine.home, task)
    with pytest.raises(AssertionError, match="the trainer was asked"):
        machine.ask(task, "init")
    (own_task / "line.py").unlink()
    with pytest.raises(AwaitingConsent):
        machine.ask(task, "init")


def test_code_is_compared_again_where_it_is_loaded(machine: Machine, own_task: Path) -> None:
    """Attack: change the file between the agent's check and the trainer's start, or later."""
    source, name = f"{own_task / 'line.py'}:Line", "line.py:Line"
    np_points = own_task / "points.txt"
    np_points.write_text("".join(f"{n / 40} {n / 20}\n" for n in range(40)))
    trainer = TrainerProcess(
        trainer_program(own_task / "work", threads=1),
        DataSettings(path=str(np_points)),
        sources={name: source},
        terms=lambda task: Terms(("*",), machine.owner().consent_to(task).code),
    )
    (own_task / "work").mkdir()
    try:
        assert trainer.run(Describe(task=name, settings={})).description
        (own_task / "further.py").write_text("raise SystemExit(3)\n")
        # Another consent makes it load the task again, and the file is not of that one.
        trainer._terms = lambda task: Terms(("*",), "0" * 64)
        with pytest.raises(TrainerFailed) as refused:
            trainer.run(Describe(task=name, settings={}))
        assert refused.value.kind == NotAllowed.code
        assert trainer.running, "the changed module did not run"
        consents.allow(machine.home, name)
        trainer._terms = lambda task: Terms(("*",), machine.owner().consent_to(task).code)
        with pytest.raises(TrainerFailed) as ended:
            trainer.run(Describe(task=name, settings={}))
        assert ended.value.kind == "died", "with a new consent the new modules run"
    finally:
        trainer.close()


def test_a_file_does_not_take_the_consent_of_an_installed_task(machine: Machine) -> None:
    """Attack: have a file run under the name of an allowed task, or the reverse."""
    settings.change(machine.home, tasks=["mine"], task_files={"mine": LINE})
    with pytest.raises(AwaitingConsent, match="as its file is now"):
        machine.ask("mine")
    consents.allow(machine.home, "mine")
    assert settings.read(machine.home).allows("mine")
    settings.change(machine.home, task_files={})
    assert settings.read(machine.home).standing_of("mine") == "changed"


@pytest.mark.parametrize(
    "column",
    ["$(touch PWNED)", "a;touch PWNED", "`touch PWNED`", "a\ntouch PWNED", "'|touch PWNED'"],
)
def test_the_command_that_an_owner_is_shown_is_safe_to_paste(
    machine: Machine, tmp_path: Path, column: str
) -> None:
    """Attack: name a column that a shell runs when the owner pastes the command."""
    with pytest.raises(ConsentNeeded) as asked:
        machine.ask("tabular", "describe", target="ill", features=f"age,{column},*")
    command = asked.value.request.command
    assert shlex.split(command)[:4] == ["commonweight-agent", "task", "allow", "tabular"]
    assert "*" not in command, "no pattern that allows more is suggested"
    subprocess.run(["sh", "-c", f"commonweight-agent() {{ :; }}; {command}"], cwd=tmp_path)
    assert not (tmp_path / "PWNED").exists()
    assert asked.value.request.about.isprintable()


def test_the_list_of_requests_stays_small(machine: Machine) -> None:
    """Attack: ask with many runs, long names and thousands of columns, to fill disk and log."""
    log = RefusalLog(machine.home)
    for number in range(300):
        names = ",".join(f"c{number}x{n}" * 20 for n in range(500))
        with pytest.raises(ConsentNeeded) as asked:
            machine.ask("tabular", run=f"r{number}", target="t" * 9000, features=names)
        request = asked.value.request
        consent_requests.add(machine.home, request)
        log.note(request.run, "tabular", f"{request.about}; {request.command}" * 9)
    assert len(consent_requests.read(machine.home)) == 1
    assert (machine.home / consent_requests.FILE).stat().st_size < 8000
    refused = [machine.home / refusal_log.FILE, machine.home / f"1.{refusal_log.FILE}"]
    assert sum(file.stat().st_size for file in refused if file.exists()) < 3 << 20
    assert not (machine.home / "left.jsonl").exists(), "no entry of an answer is pushed out"


def test_a_home_of_an_older_version_keeps_what_it_has_trained_and_nothing_else(
    agent_home: Path, tmp_path: Path
) -> None:
    """Attack: ask an upgraded machine, on which every task was allowed, for a task that is new."""
    (agent_home / "home.json").write_text('{"format": 1, "kind": "agent", "written_by": "0.1.0"}')
    (agent_home / "settings.toml").write_text(f'[task_files]\n"line.py:Line" = "{LINE}"\n')
    entries = [
        {"task": "tabular", "what": "weights"},
        {"task": "mnist", "what": "description"},
        {"task": "", "what": "answer"},
    ]
    lines = "\n".join(json.dumps(entry) for entry in entries)
    (agent_home / "left.jsonl").write_text(f'{lines}\n{{"task": "torn')
    (agent_home / "1.left.jsonl").write_text('{"task": "images", "what": "weights"}\n')
    homes.open_home("agent")
    machine = Machine(agent_home)
    assert set(machine.owner().tasks) == {"images", "line.py:Line", "tabular"}
    assert machine.owner().allows("line.py:Line"), "its owner registered it"
    for task in ("mnist", "motion", "ping"):
        with pytest.raises(AwaitingConsent):
            machine.ask(task)
    # An older program would allow everything again: it refuses the home.
    assert json.loads((agent_home / "home.json").read_text())["format"] == 2
    shutil.copy(agent_home / "settings.toml", tmp_path)
    homes.open_home("agent")
    assert (agent_home / "settings.toml").read_bytes() == (tmp_path / "settings.toml").read_bytes()


def test_a_list_that_the_owner_wrote_survives_the_upgrade(agent_home: Path) -> None:
    """Control: an older home with tasks of its owner's choice allows the same ones."""
    (agent_home / "home.json").write_text('{"format": 1, "kind": "agent"}')
    (agent_home / "settings.toml").write_text('tasks = ["mnist"]\n')
    (agent_home / "left.jsonl").write_text('{"task": "tabular", "what": "weights"}\n')
    homes.open_home("agent")
    assert settings.read(agent_home).tasks == ("mnist",)


def test_wrong_settings_do_not_widen_a_consent(machine: Machine) -> None:
    """Attack: spoil the settings while the agent runs, for example by a full disk."""
    consents.allow(machine.home, "tabular")
    machine.owner()
    for text in ("tasks = [", 'tasks = "*"', "", 'tasks = ["*"]\nunknown = 1'):
        (machine.home / "settings.toml").write_text(text)
        with pytest.raises(AwaitingConsent):
            machine.ask("mnist")


@pytest.mark.parametrize(
    "reason",
    [
        "not_allowed: awaits consent: its owner has not allowed the task 'x' yet",
        "not_allowed: the owner of this machine does not allow the task 'x' (policy set tasks x)",
    ],
)
def test_both_forms_of_a_refusal_for_want_of_consent_are_known(reason: str) -> None:
    """Control: a run also waits for the owner of an older agent."""
    told = refusals.decode(reason)
    assert told.kind == AwaitingConsent.code
    assert told.permanent
    assert refusals.decode(told.encode()) == told
