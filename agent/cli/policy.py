"""`commonweight-agent policy`: what the agent may do on its owner's machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.control import Json, is_running, parse_duration, say
from protocols.errors import UsageError
from protocols.local import homes, json_output

policy = typer.Typer(help="What the agent may do here.", no_args_is_help=True)

_SENSOR_INTERVAL_S = 0.3


@policy.command("show")
def show_policy(json: Json = False) -> None:
    """Every setting: its value, where that comes from, and what it is for."""
    from agent.home import settings

    found = settings.describe(homes.open_home("agent"))
    if json:
        sys.stdout.write(json_output.ok([setting._asdict() for setting in found]) + "\n")
        return
    for setting in found:
        value = settings.format_value(setting.value) or "(none)"
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
    from agent.home import settings

    home = homes.open_home("agent")
    key = key.replace(".", "_")  # data.columns
    if duration:
        _override(home, key, value, parse_duration(duration))
        say(f"{key} is {value} for {duration}")
        return
    settings.change(home, **{key: settings.parse_value(key, value)})
    source = next(setting.source for setting in settings.describe(home) if setting.name == key)
    say(f"{key} is {value} in {home / settings.FILE}")
    if source != settings.FILE:
        say(f"but {source} is set, and goes before it")
    if is_running(home) and key in settings.RESTART_KEYS:
        say("the running agent takes it up when it is started again")


def _override(home: Path, key: str, value: str, for_s: float) -> None:
    """A mode that holds for a while, over the one in the settings. Raises UsageError."""
    import msgspec

    from agent.home import status_files
    from agent.policy import rules as policy

    if key not in ("work", *policy.RULES):
        raise UsageError(f"{key} has no mode", f"for a while: work, {', '.join(policy.RULES)}")
    try:
        mode = msgspec.convert(
            {"value": value, "until": time.time() + for_s}, status_files.RuleOverride
        )
    except msgspec.ValidationError as err:
        raise UsageError(f"{value!r} is no mode", "always, auto or never") from err
    wish = status_files.read_request(home)
    kept = {name: old for name, old in wish.modes.items() if old.until > time.time()}
    status_files.write_request(home, msgspec.structs.replace(wish, modes=kept | {key: mode}))


@policy.command("now")
def policy_now(json: Json = False) -> None:
    """What the policy says now, and what the sensors say."""
    from agent.daemon.policy_loop import format_decision
    from agent.home import settings
    from agent.policy import rules, sensors

    home = homes.open_home("agent")
    chosen = settings.read(home)
    feeling = sensors.Sensors(home, gpu=sensors.has_gpu(chosen.device))
    feeling.read()
    time.sleep(_SENSOR_INTERVAL_S)  # other programs' use of the CPU is told from two looks
    sensed = feeling.read()
    decided = format_decision(rules.decide(chosen, sensed))
    if json:
        sys.stdout.write(json_output.ok({"decision": decided, "sensed": sensed._asdict()}) + "\n")
        return
    sys.stdout.write(decided + "\n")
    for name, value in sensed._asdict().items():
        sys.stdout.write(f"{name:21} {'unknown' if value is None else value}\n")
