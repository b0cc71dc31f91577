"""`commonweight-agent`: what its owner can do with it, beside joining and running."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols import homes, output
from protocols.errors import ExitCode, HomeLocked, NotRunning, UsageFault

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]

service = typer.Typer(help="Start the agent with this machine, without root.", no_args_is_help=True)
policy = typer.Typer(help="What the agent may do here.", no_args_is_help=True)

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LOOK_EVERY_S = 0.3


def add_to(app: typer.Typer) -> None:
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("finish")(finish)
    app.command("id")(show_id)
    app.command("paths")(paths)
    app.command("logs")(show_logs)
    app.command("ledger")(show_ledger)
    app.command("doctor")(doctor)
    app.command("leave")(leave)
    app.add_typer(policy, name="policy")
    app.add_typer(service, name="service")


def say(text: str) -> None:
    """A line for a person (stderr)."""
    sys.stderr.write(text + "\n")


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, `7d` or plain seconds. Raises UsageFault."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise UsageFault(f"{text!r} is no duration", "write 90s, 30m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def is_running(home: Path) -> bool:
    """True if an agent works in this home now."""
    try:
        homes.lock(home, "agent").release()
    except HomeLocked:
        return True
    return False


# --- its work --------------------------------------------------------------------------------


def pause(
    duration: Annotated[str, typer.Option("--for", help="For how long, such as 2h.")] = "",
) -> None:
    """Stop working, keeping what is done; until `resume`, or for a while."""
    _wish("pause", time.time() + seconds(duration) if duration else 0.0)
    say("paused" + (f" for {duration}" if duration else "; commonweight-agent resume goes on"))


def resume() -> None:
    """Work again, as the policy allows it."""
    _wish("run", 0.0)
    say("goes on")


def finish() -> None:
    """End the round in hand, send it, then stop the agent."""
    home = homes.open_home("agent")
    if not is_running(home):
        raise NotRunning("the agent is not running", "there is nothing to finish")
    _wish("finish", 0.0)
    say("will stop after this round")


def _wish(want: Any, until: float) -> None:
    from agent import control

    home = homes.open_home("agent")
    kept = control.read_wish(home).modes
    control.write_wish(home, control.Wish(want=want, until=until, at=time.time(), modes=kept))


# --- what it is ------------------------------------------------------------------------------


def show_id(json: Json = False) -> None:
    """This machine's id, as the coordinator and the monitor show it."""
    from agent import settings

    enrolment = settings.read_enrolment(homes.open_home("agent"))
    if json:
        sys.stdout.write(output.ok({"peer": enrolment.peer, "name": enrolment.name}) + "\n")
    else:
        sys.stdout.write(enrolment.peer + "\n")


def paths(json: Json = False) -> None:
    """Where this agent keeps its files."""
    from agent import logs

    home = homes.locate("agent")
    files = {
        "home": home,
        "settings": home / "settings.toml",
        "log": home / logs.FILE,
        "versions": home / "cache",
        "outbox": home / "outbox",
    }
    if json:
        sys.stdout.write(output.ok(files) + "\n")
        return
    for what, path in files.items():
        sys.stdout.write(f"{what:9} {path}\n")


def show_logs(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many at first.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="As logged: JSON lines.")] = False,
) -> None:
    """What the agent has logged."""
    from agent import logs

    log = logs.Log(homes.open_home("agent"))
    found = log.new_lines()
    if not found and not follow:
        say("nothing is logged yet; commonweight-agent run")
    found = found[max(0, len(found) - lines) :]
    while True:
        for line in found:
            sys.stdout.write((line if json else logs.in_words(line)) + "\n")
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(_LOOK_EVERY_S)
        found = log.new_lines()


def show_ledger(
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last.")] = 50,
    told: Annotated[bool, typer.Option("--told", help="Statistics word for word.")] = False,
    json: Json = False,
) -> None:
    """What has left this machine in its work: statistics, weights, metrics."""
    from agent import departures

    found = departures.read(homes.open_home("agent"))
    found = found[max(0, len(found) - lines) :]
    if json:
        sys.stdout.write(output.ok(found) + "\n")
        return
    for departure in found:
        sys.stdout.write(departures.in_words(departure) + "\n")
        if told and departure.told:
            sys.stdout.write(f"    {departure.told}\n")
    if not found:
        say("nothing has left this machine yet")


def doctor(json: Json = False) -> None:
    """Look for what keeps this agent from working. Exit status 6 when something does."""
    from agent.doctor import examine_agent
    from protocols import entry

    entry.tell_checks(examine_agent(homes.locate("agent")), json=json)


def leave(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Without telling the coordinator.")
    ] = False,
) -> None:
    """Leave the fleet: the key is given up here and refused there. Data and settings stay."""
    from agent import enroll, settings

    home = homes.open_home("agent")
    enrolment = settings.read_enrolment(home)
    try:
        held = homes.lock(home, "agent")
    except HomeLocked as err:
        raise HomeLocked(
            f"the agent of {home} is running",
            "end it first: commonweight-agent finish, or commonweight-agent service stop",
        ) from err
    try:
        if not yes:
            if not sys.stdin.isatty():
                raise UsageFault("leaving asks first, and there is no terminal", "add --yes")
            typer.confirm(f"{enrolment.name} leaves fleet {enrolment.fleet}?", abort=True, err=True)
        enroll.leave(home, enrolment, offline=offline)
    finally:
        held.release()
    say("left the fleet; its keys are deleted, data and settings are where they were")
    if offline:
        say(f"the coordinator was not told: commonweight peers remove {enrolment.name}")
    say("to join again: commonweight-agent join TICKET")


# --- policy ----------------------------------------------------------------------------------


@policy.command("show")
def show_policy(json: Json = False) -> None:
    """Every setting: its value, where that comes from, and what it is for."""
    from agent import settings

    found = settings.shown(homes.open_home("agent"))
    if json:
        sys.stdout.write(output.ok([setting._asdict() for setting in found]) + "\n")
        return
    for setting in found:
        value = settings.in_words(setting.value) or "(none)"
        sys.stdout.write(f"{setting.name:21} {value:12} {setting.source}\n    {setting.about}\n")


@policy.command("set")
def set_policy(
    key: Annotated[str, typer.Argument(help="Which; commonweight-agent policy show.")],
    value: Annotated[str, typer.Argument(help="Several, as of tasks, are parted by commas.")],
    duration: Annotated[
        str, typer.Option("--for", help="A rule's mode for a while, such as 2h.")
    ] = "",
) -> None:
    """Change a setting of this machine: always, auto, never, or whatever it takes."""
    from agent import settings

    home = homes.open_home("agent")
    key = key.replace(".", "_")  # data.columns
    if duration:
        _set_for(home, key, value, seconds(duration))
        say(f"{key} is {value} for {duration}")
        return
    settings.change(home, **{key: settings.parsed(key, value)})
    source = next(setting.source for setting in settings.shown(home) if setting.name == key)
    say(f"{key} is {value} in {home / settings.FILE}")
    if source != settings.FILE:
        say(f"but {source} is set, and goes before it")
    if is_running(home) and key in settings.AT_START:
        say("the running agent takes it up when it is started again")


def _set_for(home: Path, key: str, value: str, for_s: float) -> None:
    """A mode that holds for a while, over the one in the settings. Raises UsageFault."""
    import msgspec

    from agent import control, policy

    if key not in ("work", *policy.RULES):
        raise UsageFault(f"{key} has no mode", f"for a while: work, {', '.join(policy.RULES)}")
    try:
        mode = msgspec.convert({"value": value, "until": time.time() + for_s}, control.Mode)
    except msgspec.ValidationError as err:
        raise UsageFault(f"{value!r} is no mode", "always, auto or never") from err
    wish = control.read_wish(home)
    kept = {name: old for name, old in wish.modes.items() if old.until > time.time()}
    control.write_wish(home, msgspec.structs.replace(wish, modes=kept | {key: mode}))


@policy.command("now")
def policy_now(json: Json = False) -> None:
    """What the policy says now, and what the sensors say."""
    from agent import policy as rules
    from agent import sensors, settings
    from agent.polite import in_words

    home = homes.open_home("agent")
    chosen = settings.read(home)
    feeling = sensors.Sensors(home, gpu=sensors.has_gpu(chosen.device))
    feeling.sense()
    time.sleep(_LOOK_EVERY_S)  # other programs' use of the CPU is told from two looks
    sensed = feeling.sense()
    decided = in_words(rules.decide(chosen, sensed))
    if json:
        sys.stdout.write(output.ok({"decision": decided, "sensed": sensed._asdict()}) + "\n")
        return
    sys.stdout.write(decided + "\n")
    for name, value in sensed._asdict().items():
        sys.stdout.write(f"{name:21} {'unknown' if value is None else value}\n")


# --- service ---------------------------------------------------------------------------------


def _system() -> Any:
    from agent import autostart

    return autostart.choose(autostart.plan())


@service.command("install")
def install_service() -> None:
    """Run the agent from now on, and whenever this machine starts."""
    from agent import autostart, settings
    from protocols.checks import Advice

    home = homes.open_home("agent")
    settings.read_enrolment(home)
    system, running = _system(), is_running(home)
    system.install(start=not running)
    say(f"installed {system.file}")
    if running:
        say("an agent runs here by hand: end it, then commonweight-agent service start")
    advice = autostart.advice()
    if isinstance(advice, Advice):
        say(f"{advice.detail}: {advice.fix}")


@service.command("uninstall")
def uninstall_service() -> None:
    """End the service and take it away; the agent's home stays."""
    system = _system()
    system.uninstall()
    say(f"removed {system.file}")


@service.command("start")
def start_service() -> None:
    """Start the installed service."""
    _system().start()
    say("started; commonweight-agent status")


@service.command("stop")
def stop_service() -> None:
    """Stop the service until the next start; work in hand is given up."""
    _system().stop()
    say("stopped")


@service.command("status")
def service_status(json: Json = False) -> None:
    """Whether the service is installed and runs (exit status 5: it does not)."""
    system = _system()
    state = system.status()
    if json:
        sys.stdout.write(output.ok({"state": state, "file": system.file}) + "\n")
    else:
        sys.stdout.write(f"{state}  {system.file}\n")
    if state != "active":
        raise typer.Exit(ExitCode.NOT_RUNNING)
