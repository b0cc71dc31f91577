"""`commonweight-agent task`: register your own tasks and try them on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from agent.cli import prompts, task_template
from agent.cli.common import Json, is_running, parse_pair, print_data, print_json, print_line
from agent.cli.names import TaskName, TaskPattern, complete_tasks, whole_task_name
from agent.cli.task_trial import TrialRun, write_report
from agent.home import consent_requests, offer_log, settings
from agent.home.consent_requests import Request
from agent.home.settings_schema import AgentSettings
from agent.setup import consents, offers, own_data
from agent.tasks import registry
from protocols.errors import DataError, TrainerFailed, UnknownName, UsageError
from protocols.local import homes
from protocols.local.command_line import App

task = App(name="task", help="Allow, write and try tasks; install Flower apps: task app.")
task.command("new")(task_template.new)


@task.command("add")
def add(
    source: Annotated[str, typer.Argument(help="File and class: ./my_task.py:MyTask.")],
    name: Annotated[str, typer.Option(help="Its name in runs; by default my_task.py:MyTask.")] = "",
) -> None:
    """Register a task in a file and allow it here, as the file is now. Runs send no code."""
    home = homes.open_home("agent")
    path, attribute = registry.split_source(source)
    registry.check_source(source)
    known = registry.check_name(name) if name else registry.name_of_source(source)
    if known in registry.names():
        raise UsageError(f"{known} is the name of an installed task", "choose another with --name")
    with settings.locked(home):
        own = settings.read_own(home)
        files = {**own.task_files, known: f"{path}:{attribute}"}
        settings.change(home, task_files=files, **consents.allowing(own, files, [known]))
    print_line(f"registered and allowed {known}")
    if not settings.read(home).data:
        print_line("if it reads data, name them: commonweight-agent policy set data PATH")
    print_line(f"the operator starts it with: commonweight run start {known}")
    print_line(f"after a change of the file, allow it again: commonweight-agent task allow {known}")
    _say_when_applied(home)


@task.command("allow")
def allow(
    name: TaskPattern,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns that it may use, such as age,sex; or all."),
    ] = None,
    purpose: Annotated[str | None, typer.Option(help="What for: a note for yourself.")] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Go on with an approved file that the operator withdrew or replaced."
        ),
    ] = False,
) -> None:
    """Allow a task to train and evaluate on this machine's data. It holds for all later runs."""
    home = homes.open_home("agent")
    asked = consent_requests.read(home)
    patterns = consents.parse_columns(columns)
    if note := own_data.check_columns(settings.read(home).data, patterns or []):
        print_line(note)
    consents.allow(home, name, columns=patterns, purpose=purpose, keep=keep)
    chosen = settings.read(home)
    there = own_data.columns(chosen.data)
    if there and consents.awaiting_columns(chosen, name) and prompts.can_ask():
        patterns = consents.parse_columns(prompts.ask_columns(chosen.data, there))
        consents.allow(home, name, columns=patterns)
        chosen = settings.read(home)
    print_line(f"allowed {consents.describe(chosen, name, name)}")
    _say_overridden(home)
    if awaiting := consents.awaiting_columns(chosen, name):
        command = consents.columns_command(awaiting[0])
        print_line(f"no column of {chosen.data} may be used yet; to name them: {command}")
    elif is_running(home) and (name == consents.EVERY or name in asked):
        print_line("the running agent takes part within seconds")


@task.command("forbid")
def forbid(name: TaskPattern) -> None:
    """Forbid a task. Runs do not wait for this machine then, and do not ask again."""
    home = homes.open_home("agent")
    consents.forbid(home, name)
    print_line(f"forbidden: {name}" if name != consents.EVERY else "each task needs consent now")
    _say_overridden(home)


def _say_overridden(home: Path) -> None:
    for setting in settings.describe(home):
        if setting.name in ("tasks", "forbidden_tasks", "task_files") and (
            setting.source not in (settings.FILE, "default")
        ):
            print_line(f"but {setting.source} is set and overrides {setting.name}")


@task.command("list")
def list_tasks(json: Json = False) -> None:
    """List the tasks: allowed, forbidden, or awaiting consent."""
    home = homes.open_home("agent")
    chosen = settings.read(home)
    asked = {request.task: request for request in consents.requests(home, chosen)}
    known = consents.known_tasks(chosen)
    known |= {name: "offered" for name in chosen.consents.keys() - known.keys() if name in asked}
    rows = [
        {
            "task": name,
            "source": source or "installed",
            "allowed": chosen.allows(name),
            "standing": chosen.standing_of(name),
            "columns": list(chosen.columns_of(name)),
            "purpose": chosen.consent_to(name).purpose,
            "run": asked[name].run if name in asked else "",
            "next": asked[name].command if name in asked else "",
            "missing": "" if source else registry.missing_package(name, chosen.framework),
        }
        for name, source in sorted(known.items())
    ]
    lines = (
        f"{row['task']:24} {row['source']}  {_mark(chosen, str(row['task']), asked)}"
        + (f"; ✗ {row['missing']}" if row["missing"] else "")
        for row in rows
    )
    print_data(rows, lines, json=json)


def _mark(chosen: AgentSettings, name: str, asked: dict[str, Request]) -> str:
    """Glyph and word of what the owner has decided about a task."""
    match chosen.standing_of(name):
        case "allowed":
            return consents.describe(chosen, name, "✓ allowed")
        case "forbidden":
            return "✗ forbidden"
        case standing:
            word = "file has changed, " if standing == "changed" else ""
            if name in asked:
                return f"? {word}{asked[name].line}"
            if standing == "columns":
                return f"? allowed, awaiting columns: {consents.columns_command(name)}"
            return f"? {word}asks you first: commonweight-agent task allow {name}"


@task.command("remove")
def remove(name: TaskName) -> None:
    """Unregister a task; its file stays. Of an offered one, the approval ends."""

    home = homes.open_home("agent")
    with settings.locked(home):
        own = settings.read_own(home)
        if name not in own.task_files:
            raise UnknownName(f"no registered task {name!r}", "commonweight-agent task list")
        settings.change(
            home,
            task_files={known: file for known, file in own.task_files.items() if known != name},
            tasks=[known for known in own.tasks if known != name],
            consents={known: said for known, said in own.consents.items() if known != name},
        )
    consent_requests.drop(home, name)
    if digest := own.consent_to(name).offer:
        offer_log.write(home, "task removed", name, digest)
    offers.delete_copy(home, own.task_files[name])
    print_line(f"unregistered {name}")
    _say_when_applied(home)


def _say_when_applied(home: Path) -> None:
    if is_running(home):
        print_line("the running agent applies it after its current work")


@task.command("check")
def check(
    name: Annotated[
        str,
        typer.Argument(
            help="A task's name, or ./my_task.py:MyTask.", autocompletion=complete_tasks
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Data to try it on; by default the agent's own.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task: key=value.")
    ] = None,
    json: Json = False,
) -> None:
    """Train one step here; show the schema, the memory and the time. Nothing is sent."""
    from agent.cli.local_trainer import LocalTrainer, without_log

    chosen = settings.read(homes.home_path("agent"), data=settings.data_path(data))
    if "/" not in name:  # else it is that file
        name = whole_task_name(name)
    if data:
        own_data.check_path(chosen)
    if name not in chosen.task_files and name.partition(":")[0].endswith(".py"):
        path, attribute = registry.split_source(name)
        name = registry.name_of_source(name)
        chosen = replace(chosen, task_files={**chosen.task_files, name: f"{path}:{attribute}"})
    # A task parses the text by the types of its own defaults.
    trial, task_settings = TrialRun(), dict(parse_pair(text) for text in set_ or [])
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-") as folder,
        LocalTrainer(chosen, Path(folder), (), trial.on_progress) as trainer,
    ):
        try:
            report = trial.run(trainer.process, name, task_settings, trainer.work)
        except TrainerFailed as err:
            if err.kind == DataError.code and not chosen.data:
                raise UsageError(err.message, f"--data PATH, or once: {err.hint}") from err
            log = trainer.work / "trainer.log"
            if log.exists() and (trace := log.read_text(errors="replace").strip()):
                print_line(trace)
            raise TrainerFailed(err.kind, err.message, without_log(err.hint)) from err
    if json:
        print_json(report)
    else:
        write_report(report)
