"""`commonweight-agent`: the program on each machine that has data.

Flower and torch are imported inside the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import (
    apps,
    audit,
    budget,
    control,
    data,
    export,
    join,
    offers,
    policy,
    predict,
    questions,
    serve,
    service,
    task,
    trust,
)
from agent.cli.common import Json, Part, Split, is_running, parse_part, print_line
from agent.cli.monitor.command import monitor
from agent.home import enrollment_file, logs, settings
from agent.setup import sharing_text
from protocols.errors import NotRunning
from protocols.local import cli_entry, crash_reports, exits, homes, json_output
from protocols.local.command_line import App, add_version

if TYPE_CHECKING:
    from agent.home.settings_schema import AgentSettings
    from agent.home.status_files import Status

#: After a command only threads are left: an aborted upload, the fsync of a file.
EXIT_TIMEOUT_S = 10.0
#: Named in the status.
_MAX_TRUSTED = 8

app = App(
    name="commonweight-agent",
    help="Train together, keep your data: the agent on a machine that has data.",
    sections={
        "First steps": ("join", "up", "status", "task", "policy"),
        "Watch and pause": ("monitor", "pause"),
        "What it did": ("ledger", "logs"),
        "Use the model": ("predict", "models"),
        "This machine": ("doctor", "service", "leave"),
    },
    folded={"status": "about", "ledger": "proofs"},
    moved={
        "discover": "commonweight-agent join --discover",
        "id": "commonweight-agent status id",
        "paths": "commonweight-agent status paths",
        "audit": "commonweight-agent ledger audit",
        "questions": "commonweight-agent policy questions",
        "serve": "commonweight-agent models serve",
        "export": "commonweight-agent models export",
    },
)


add_version(app)


def run(part: Part = None, split: Split = None) -> None:
    """Wait for runs, train and send updates, until Ctrl-C."""
    import asyncio

    os.umask(0o077)
    home = homes.open_home("agent")
    # Lock first: without the lock, `join --replace` may change the enrollment at the same time.
    lock = homes.lock_home(home, "agent")
    joined = enrollment_file.read_enrollment(home)
    chosen = settings.read(home, **parse_part(part), split=split)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logs.configure(home, chosen.log_level, console)

    from agent.daemon.agent import Agent

    # Modules never become garbage. Frozen, they do not delay the collection of other objects.
    gc.collect()
    gc.freeze()
    print_line(f"agent {joined.name} ({joined.peer}) of fleet {joined.fleet}; Ctrl-C stops it")
    if line := sharing_text.describe(chosen, home):
        print_line(line)
    try:
        agent = Agent(home, joined, chosen)
        asyncio.run(agent.serve())
        while agent.must_restart:
            chosen = settings.read(home, **parse_part(part), split=split)
            agent = Agent(home, enrollment_file.read_enrollment(home), chosen)
            asyncio.run(agent.serve())
    except Exception as err:
        crash_reports.save(home, err)
        raise
    finally:
        lock.release()
    print_line("agent stopped")


def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat each second, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what the agent on this machine is doing.

    More: commonweight-agent status id, status paths.
    """
    home = homes.open_home("agent")
    if not watch:
        sys.stdout.write(_format_status(home, json=json))
        return
    redraws = sys.stdout.isatty() and not json
    last = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                text = _format_status(home, json=json)
            except NotRunning as err:
                text = (json_output.error(err) if json else json_output.format_error(err)) + "\n"
            if redraws:  # from the top: clear each line to its end, then everything below
                lines = "".join(f"{line}\x1b[K\n" for line in text.splitlines())
                sys.stdout.write(f"\x1b[H{lines}\x1b[J" if last else f"\x1b[2J\x1b[H{lines}")
            elif text != last:
                sys.stdout.write(text)
            sys.stdout.flush()
            last = text
            time.sleep(1.0)


def _format_status(home: Path, *, json: bool) -> str:
    import msgspec

    from agent.home import own_results, status_files
    from agent.setup import consents, own_data

    status = status_files.read_status(home)
    if status is None or not is_running(home):
        raise NotRunning("the agent is not running", "start it: commonweight-agent up")
    if json:
        data = msgspec.to_builtins(status) | {"compared": own_results.newest(home)}
        return json_output.ok(data) + "\n"
    from protocols.messages.states import PeerState, label

    work = f"  run {status.run} round {status.round}" if status.run else ""
    links = {"coordinator": status.session, "mqtt": status.mqtt}
    marks = [f"{name} {'●' if up else '○'}" for name, up in links.items()]
    lines = [label(PeerState(status.state), status.reason) + work, "  ".join(marks)]
    if status.mqtt_why:
        lines.append(f"MQTT: {status.mqtt_why} (training does not need it)")
    if status.free_at > time.time():
        at = time.strftime("%a %H:%M", time.localtime(status.free_at))
        lines.append(f"expects to work again {at}")
    for rule in status.paused_by:
        mode = "auto" if rule == "work" else "always"
        lines.append(f"to work anyway: commonweight-agent policy set {rule} {mode}")
    if waiting := own_data.waiting_rows(home):
        lines.append(f"data: {waiting}")
    for request in consents.requests(home, settings.read(home)):
        lines.append(f"? {request.line}")
    lines += _format_version(status)
    found = own_results.newest(home)
    if told := own_results.text_of_model(status.choice_run, status.choice, found):
        lines.append(f"the model of run {status.choice_run}: {told}")
    if found is not None:
        lines += own_results.lines_of(found)
    if status.shares_at:
        lines.append(f"other peers fetch shared versions at {status.shares_at}")
    lines += _format_trust(settings.read(home))
    if status.share < 1:
        lines.append(f"works {status.share:.0%} of the time")
    uptime = _format_uptime(status.since)
    lines.append(f"{status.name} {status.peer}, up {uptime}, pid {status.pid}")
    if status.last_error:
        word = "before" if status.error_until else "last error"
        lines.append(f"{word}: {status.error_text}")
    return cli_entry.printable("".join(f"{line}\n" for line in lines))


def _format_version(status: Status) -> list[str]:
    """The version held here, and how many peers hold it while the coordinator is away."""
    if status.head is None:
        return []
    head = status.head
    text = f"holds version {head.version} of {head.run} ({head.digest[:12]})"
    if not status.session and status.heard:
        text += f"; {status.alike} of {status.heard} other peers hold the same"
    return [text]


def _format_trust(chosen: AgentSettings) -> list[str]:
    """Whom the owner trusts in secure sums, if the owner has chosen anybody or a minimum."""
    if not (chosen.trust or chosen.secure_min):
        return []
    names = ", ".join(name or peer for peer, name in list(chosen.trust.items())[:_MAX_TRUSTED])
    more = ", …" if len(chosen.trust) > _MAX_TRUSTED else ""
    text = f"trusts {trust.count(len(chosen.trust))} in secure sums"
    lines = [f"{text}: {names}{more}" if names else text]
    if chosen.secure_min:
        lines.append(f"works only in secure runs, with {chosen.secure_min} trusted peers or more")
    return lines


def _format_uptime(since: float) -> str:
    hours, minutes = divmod(int(time.time() - since) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


about, proofs, models = (
    App(),
    App(),
    App(help="List, serve and export the models on this machine."),
)
_COMMANDS: dict[App, dict[str, Callable[..., None]]] = {
    app: {
        "join": join.join,
        "up": run,
        "status": status,
        "monitor": monitor,
        **control.COMMANDS,
        "budget": budget.budget,
        "predict": predict.predict,
        "restart": control.restart,
        # Spellings of older versions.
        "run": run,
        "finish": control.finish,
        "discover": join.discover,
        "id": control.show_id,
        "paths": control.paths,
        "serve": serve.serve,
        "export": export.export,
    },
    about: {"id": control.show_id, "paths": control.paths},
    models: {
        "list": export.list_models,
        "predict": predict.predict,
        "serve": serve.serve,
        "export": export.export,
    },
    service.service: {"restart": control.restart, "finish": control.finish},
    task.task: offers.COMMANDS,
}
task.task.add_typer(apps.apps)
for place, commands in _COMMANDS.items():
    for name, command in commands.items():
        place.command(name)(command)
proofs.add_typer(audit.audit)
policy.policy.add_typer(questions.questions)
policy.policy.add_typer(trust.trust)
app.add_typer(models, name="models")
app.add_typer(about, name="about")
app.add_typer(proofs, name="proofs")
for group in (
    *(apps.apps, audit.audit, data.data, policy.policy, questions.questions),
    *(service.service, task.task, trust.trust),
):
    app.add_typer(group)


def main() -> None:
    """The entry point: errors become a message, a hint and an exit code."""
    code = 1  # after an unexpected exception
    try:
        code = cli_entry.run(app)
    finally:
        exits.exit_within(EXIT_TIMEOUT_S, code)
    raise SystemExit(code)
