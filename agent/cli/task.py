"""`commonweight-agent task …`: tasks of one's own, registered and tried out on this machine."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli.control import Json, is_running, say
from protocols.errors import TrainerFailed, UnknownName, UsageError
from protocols.local import homes, json_output

task = typer.Typer(help="Tasks of your own on this machine.", no_args_is_help=True)


@task.command("add")
def add(
    source: Annotated[str, typer.Argument(help="File and class: ./my_task.py:MyTask.")],
    name: Annotated[str, typer.Option(help="What runs call it; my_task.py:MyTask.")] = "",
) -> None:
    """Register a task in a file and allow it here. A run can name it, but never bring it."""
    from agent.home import settings
    from agent.tasks import registry

    home = homes.open_home("agent")
    path, attribute = registry.split_source(source)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    known = registry.check_name(name) if name else registry.name_of_source(source)
    if known in registry.names():
        raise UsageError(f"{known} is the name of an installed task", "choose another: --name")
    chosen = settings.read(home)
    files = {**chosen.task_files, known: f"{path}:{attribute}"}
    allowed = None if chosen.allows(known) else [*chosen.tasks, known]
    settings.change(home, task_files=files, tasks=allowed)
    say(f"registered {known}; try it: commonweight-agent task check {known}")
    say(f"the operator starts it with: commonweight run start {known}")
    _say_restart_needed(home)


@task.command("list")
def list_tasks(json: Json = False) -> None:
    """Every task that this machine knows, and whether its owner lets it run."""
    from agent.home import settings
    from agent.tasks import registry

    chosen = settings.read(homes.open_home("agent"))
    sources = dict.fromkeys(registry.names(), "installed") | chosen.task_files
    found = [
        {"task": name, "source": source, "allowed": chosen.allows(name)}
        for name, source in sorted(sources.items())
    ]
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    for line in found:
        mark = "✓" if line["allowed"] else "✗ not allowed by policy tasks"
        sys.stdout.write(f"{line['task']:24} {line['source']}  {mark}\n")


@task.command("remove")
def remove(name: Annotated[str, typer.Argument(help="As `task list` shows it.")]) -> None:
    """Forget a registered task; its file stays."""
    from agent.home import settings

    home = homes.open_home("agent")
    chosen = settings.read(home)
    if name not in chosen.task_files:
        raise UnknownName(f"no registered task {name!r}", "commonweight-agent task list")
    files = {known: source for known, source in chosen.task_files.items() if known != name}
    settings.change(home, task_files=files)
    say(f"forgot {name}")
    _say_restart_needed(home)


def _say_restart_needed(home: Path) -> None:
    if is_running(home):
        say("the running agent takes it up when it is started again")


@task.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A task's name, or ./my_task.py:MyTask.")],
    data: Annotated[str | None, typer.Option(help="Data to try it on; the agent's own.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task: key=value.")
    ] = None,
    json: Json = False,
) -> None:
    """Train one step of it here, and show its schema, its memory and its time. Nothing is sent."""
    from agent.home import settings
    from agent.tasks import registry
    from agent.trainer.process import TrainerProcess

    with contextlib.ExitStack() as stack:
        chosen = settings.read(homes.home_path("agent"), data=settings.data_path(data))
        source = chosen.task_files.get(name, "")
        if not source and name.partition(":")[0].endswith(".py"):
            path, attribute = registry.split_source(name)
            name, source = registry.name_of_source(name), f"{path}:{attribute}"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="commonweight-")))
        trial = _TrialRun()
        trainer = TrainerProcess(
            folder,
            settings.data_settings(chosen, folder),
            threads=chosen.threads,
            on_progress=trial.on_progress,
            sources={name: source} if source else {},
        )
        stack.callback(trainer.stop)
        wanted = dict(_parse_setting(text) for text in set_ or [])
        try:
            told = trial.run(trainer, name, wanted, folder)
        except TrainerFailed as err:
            log = folder / "trainer.log"
            if log.exists() and (trace := log.read_text(errors="replace").strip()):
                say(trace)
            raise TrainerFailed(err.kind, err.message, _without_log(err.hint)) from err
    if json:
        sys.stdout.write(json_output.ok(told) + "\n")
    else:
        _write_report(told)


class _TrialRun:
    """One step of training and of evaluation; what they took."""

    def __init__(self) -> None:
        self._first = threading.Event()
        self._progress: Any = None

    def on_progress(self, progress: Any) -> None:
        if not self._first.is_set():
            self._progress = progress
            self._first.set()

    def run(self, trainer: Any, name: str, settings: Any, folder: Path) -> dict[str, Any]:
        """Raises TrainerFailed."""
        import msgspec

        from agent.tasks.work import Describe, Evaluate, Init, Train
        from protocols.model import schema_card
        from protocols.tables import preprocessing

        def described() -> Any:
            done = trainer.run(Describe(task=name, settings=dict(settings)))
            return schema_card.decode(done.description)

        began = time.monotonic()
        told = described()
        ready_s = time.monotonic() - began
        found: dict[str, Any] = {"task": name, "schema": msgspec.to_builtins(told)}
        found |= {"load_s": ready_s, "memory_bytes": trainer.rss_bytes}
        if not isinstance(told, schema_card.SchemaCard):
            # In a run it follows from all peers' tables; here from this one.
            derived = preprocessing.derive({"here": told}, settings)
            found["notes"] = [words for _, words in derived.notes]
            settings = {**settings, "preprocessing": preprocessing.encode(derived.preprocessing)}
            told = described()
            found |= {"schema": msgspec.to_builtins(told), "load_s": time.monotonic() - began}
        base = folder / "first.safetensors"
        first = trainer.run(Init(task=name, settings=dict(settings), seed=0, out=str(base)))
        found["weights_bytes"] = first.nbytes
        out = folder / "out.safetensors"
        common: dict[str, Any] = {
            "task": name,
            "settings": {**settings, "round": 1},
            "base": str(base),
        }
        for kind, work in (
            ("train", Train(**common, out=str(out))),
            ("evaluate", Evaluate(**common)),
        ):
            found[kind] = self._step(trainer, work)
            found["memory_bytes"] = max(found["memory_bytes"], found[kind].pop("memory_bytes"))
        return found

    def _step(self, trainer: Any, work: Any) -> dict[str, Any]:
        self._progress = None
        self._first.clear()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            doing = pool.submit(trainer.run, work)
            while not doing.done() and not self._first.wait(0.01):
                pass
            step_s, memory = time.monotonic() - began, trainer.rss_bytes
            trainer.cancel()
            try:
                doing.result()
            except TrainerFailed as err:
                if err.kind != "cancelled":
                    raise
        if self._progress is None:
            return {"first_step_s": step_s, "memory_bytes": memory}
        told = {"steps": self._progress.steps, "loss": self._progress.loss}
        return told | {"first_step_s": step_s, "memory_bytes": memory}


def _write_report(told: dict[str, Any]) -> None:
    write = sys.stdout.write
    schema = told["schema"]
    write(f"task {told['task']}")
    write(f" version {schema['version']}\n" if schema.get("version") else "\n")
    for name, words in schema.get("traits", {}).items():
        shown = ", ".join(words[:12]) + (f" … {len(words)} in all" if len(words) > 12 else "")
        write(f"{name}: {shown}\n")
    for name, (dtype, shape) in schema.get("tensors", {}).items():
        write(f"  {name:32} {dtype:5} {shape}\n")
    for words in told.get("notes", ()):
        write(f"{words}\n")
    if "weights_bytes" in told:
        write(f"weights {told['weights_bytes'] / 1e6:,.2f} MB, sent up each round as fp32\n")
    write(f"data and model ready in {told['load_s']:.1f} s\n")
    for kind in ("train", "evaluate"):
        if kind in told:
            steps = f" of {told[kind]['steps']}" if "steps" in told[kind] else ""
            loss = told[kind].get("loss")
            write(f"{kind}: first step{steps} in {told[kind]['first_step_s']:.2f} s")
            write(f", loss {loss:.4f}\n" if loss is not None else "\n")
    write(f"memory {told['memory_bytes'] / 1e6:,.0f} MB\n")


def _without_log(hint: str) -> str:
    """The log is shown and gone: no word of where it was."""
    return "" if hint.startswith("the trainer's log") else hint


def _parse_setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not key=value")
    return key, value  # a task parses text by its own defaults
