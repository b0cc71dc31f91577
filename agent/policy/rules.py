"""When an agent may work, and how hard: `decide(chosen, sensed)` is Run, Slow or Pause. Pure.

Rule 1. Each rule has a mode. `auto`: its condition pauses, and what is unknown holds nothing up.
        `never`: as auto, read strictly, and what is unknown is taken for the worst. `always`: the
        rule is not asked.
Rule 2. `work` is the mode over all of them: `always` asks no rule, `never` always pauses.
Rule 3. All rules are asked, and every one that pauses is told, in words that do not change while
        it holds.
Rule 4. A rule that pauses lets go later than it took hold: `held` names those in force.

Defaults after BOINC's computing preferences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from agent.policy import schedule

Mode = Literal["always", "auto", "never"]

#: What has a mode, in the order in which reasons are told.
RULES = ("battery", "busy", "user", "schedule", "metered", "hot", "memory", "traffic", "disk")
_BYTES_PER_MB = 1e6
_HOT_HYSTERESIS_C, _HYSTERESIS_PERCENT = 10.0, 3.0


class PolicySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set of the policy; `policy show` shows these descriptions."""

    work: Annotated[
        Mode, Meta(description="over all rules: always asks none, auto asks each, never pauses")
    ] = "auto"
    battery: Annotated[Mode, Meta(description="work on battery; never: at no charge")] = "auto"
    battery_least_percent: Annotated[
        float,
        Meta(ge=0, le=100, description="on battery, work above this charge; 100 is not at all"),
    ] = 100.0
    busy: Annotated[Mode, Meta(description="work while other programs use the CPU")] = "auto"
    busy_percent: Annotated[
        float, Meta(ge=0, le=100, description="so much of all cores, used by others, is busy")
    ] = 25.0
    user: Annotated[
        Mode, Meta(description="work while somebody uses this machine; auto: on the CPU alone")
    ] = "auto"
    user_idle_s: Annotated[
        float, Meta(ge=0, description="seconds without a key or a click after which nobody does")
    ] = 180.0
    schedule: Annotated[Mode, Meta(description="work outside of the hours")] = "auto"
    hours: Annotated[
        str, Meta(description="of the week: mon-fri 18:00-08:00, sat-sun 0:00-24:00; empty is all")
    ] = ""
    metered: Annotated[Mode, Meta(description="work on a network that is paid by volume")] = "auto"
    hot: Annotated[Mode, Meta(description="work while the machine is hot")] = "auto"
    hot_c: Annotated[float, Meta(ge=30, le=120, description="degrees Celsius that are hot")] = 85.0
    memory: Annotated[Mode, Meta(description="work while memory runs short")] = "auto"
    memory_free_percent: Annotated[
        float, Meta(ge=0, le=100, description="less free memory than this is short")
    ] = 5.0
    traffic: Annotated[Mode, Meta(description="work when the day's traffic is used up")] = "auto"
    up_mb_a_day: Annotated[float, Meta(ge=0, description="MB a day sent; 0 is any number")] = 0.0
    down_mb_a_day: Annotated[
        float, Meta(ge=0, description="MB a day received; 0 is any number")
    ] = 0.0
    up_mbit: Annotated[float, Meta(ge=0, description="Mbit/s sent; 0 is any rate")] = 0.0
    down_mbit: Annotated[float, Meta(ge=0, description="Mbit/s received; 0 is any rate")] = 0.0
    disk: Annotated[Mode, Meta(description="work when the agent's folder is at its cap")] = "auto"
    disk_gb: Annotated[float, Meta(ge=0, description="GB for the agent's folder; 0 is any")] = 0.0
    nice: Annotated[
        int, Meta(ge=0, le=19, description="how much others go first: 0 as equals, 19 always")
    ] = 19
    cpu_share: Annotated[
        float, Meta(gt=0, le=1, description="the part of the time in which its threads work")
    ] = 1.0
    cpu_share_in_use: Annotated[
        float, Meta(gt=0, le=1, description="the same while somebody uses this machine")
    ] = 0.5
    gpu_share: Annotated[
        float, Meta(gt=0, le=1, description="the part of the time in which a GPU works")
    ] = 1.0


class SensorReadings(NamedTuple):
    """What the sensors say; None is unknown.

    `minute` of the local week; `others_percent` of all cores in the last moments and
    `others_long_percent` over half a minute; `gpu`: a GPU is what trains here.
    """

    minute: int | None = None
    on_battery: bool | None = None
    battery_percent: float | None = None
    others_percent: float | None = None
    others_long_percent: float | None = None
    user_idle_s: float | None = None
    metered: bool | None = None
    hottest_c: float | None = None
    memory_free_percent: float | None = None
    gpu: bool = False
    up_today_bytes: int = 0
    down_today_bytes: int = 0
    home_bytes: int | None = None


class Run(NamedTuple):
    """Nothing stands against work."""


class Slow(NamedTuple):
    """Work `share` of the time, 0 < share < 1."""

    share: float


class Pause(NamedTuple):
    """No work. `rules` that pause, and `reason` in a person's words."""

    rules: frozenset[str]
    reason: str


Decision = Run | Slow | Pause


def decide(
    chosen: PolicySettings, sensed: SensorReadings, held: frozenset[str] = frozenset()
) -> Decision:
    """What may be done now; `held` are the rules of the last decision, if it was a Pause."""
    if chosen.work == "never":
        return Pause(frozenset({"work"}), "work is set to never")
    if chosen.work == "auto":
        found = list(_reasons(chosen, sensed, held))
        if found:
            return Pause(frozenset(rule for rule, _ in found), ", ".join(why for _, why in found))
    share = chosen.gpu_share if sensed.gpu else chosen.cpu_share
    if chosen.work == "auto" and chosen.user == "auto" and _is_user_active(chosen, sensed):
        share = min(share, chosen.cpu_share_in_use)
    return Slow(share) if share < 1.0 else Run()


def _reasons(
    chosen: PolicySettings, sensed: SensorReadings, held: frozenset[str]
) -> Iterator[tuple[str, str]]:
    for rule in RULES:
        mode: Mode = getattr(chosen, rule)
        if mode == "always":
            continue
        strict = mode == "never"
        why = _CHECKS[rule](chosen, sensed, strict, rule in held)
        if why:
            yield rule, why
        elif why is None and strict:
            yield rule, f"{rule}: unknown here"


# --- the rules: words for why not, "" for nothing against it, None for unknown -----------------

_Rule = Callable[[PolicySettings, SensorReadings, bool, bool], str | None]


def _battery(
    chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool
) -> str | None:
    if sensed.on_battery is None:
        return None
    least = 100.0 if strict else chosen.battery_least_percent
    if not sensed.on_battery:
        return ""
    if least >= 100.0:
        return "on battery"
    if sensed.battery_percent is None:
        return None
    below = sensed.battery_percent < least + (_HYSTERESIS_PERCENT if held else 0.0)
    return f"battery below {least:g} %" if below else ""


def _busy(chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool) -> str | None:
    if sensed.others_percent is None:
        return None
    percent = sensed.others_percent
    if held:
        percent = max(percent, sensed.others_long_percent or 0.0)
    busy = percent > chosen.busy_percent
    return f"other programs use more than {chosen.busy_percent:g} % of the CPU" if busy else ""


def _user(chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool) -> str | None:
    if not sensed.gpu and not strict:
        return ""
    if sensed.user_idle_s is None:
        return None
    return "somebody uses this machine" if sensed.user_idle_s < chosen.user_idle_s else ""


def _schedule(
    chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool
) -> str | None:
    if not chosen.hours:
        return ""
    if sensed.minute is None:
        return None
    week = schedule.parse(chosen.hours)
    if week.is_open(sensed.minute):
        return ""
    opens = sensed.minute + week.minutes_until_change(sensed.minute)
    return f"schedule, until {schedule.format_minute(opens)}"


def _metered(
    chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool
) -> str | None:
    if sensed.metered is None:
        return None
    return "metered network" if sensed.metered else ""


def _hot(chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool) -> str | None:
    if sensed.hottest_c is None:
        return None
    limit = chosen.hot_c - (_HOT_HYSTERESIS_C if held else 0.0)
    return f"hotter than {chosen.hot_c:g} °C" if sensed.hottest_c > limit else ""


def _memory(chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool) -> str | None:
    if sensed.memory_free_percent is None:
        return None
    least = chosen.memory_free_percent + (_HYSTERESIS_PERCENT if held else 0.0)
    words = f"less than {chosen.memory_free_percent:g} % of memory free"
    return words if sensed.memory_free_percent < least else ""


def _traffic(
    chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool
) -> str | None:
    for cap_mb, used, word in (
        (chosen.up_mb_a_day, sensed.up_today_bytes, "sent"),
        (chosen.down_mb_a_day, sensed.down_today_bytes, "received"),
    ):
        if cap_mb and used >= cap_mb * _BYTES_PER_MB:
            return f"{cap_mb:g} MB {word} today"
    return ""


def _disk(chosen: PolicySettings, sensed: SensorReadings, strict: bool, held: bool) -> str | None:
    if not chosen.disk_gb:
        return ""
    if sensed.home_bytes is None:
        return None
    over = bytes_over_cap(chosen, sensed) > 0
    return f"more than {chosen.disk_gb:g} GB in the agent's folder" if over else ""


def bytes_over_cap(chosen: PolicySettings, sensed: SensorReadings) -> int:
    """Bytes in the agent's folder beyond its cap; 0 without a cap, or where that is unknown."""
    if not chosen.disk_gb or chosen.disk == "always" or sensed.home_bytes is None:
        return 0
    return max(0, sensed.home_bytes - int(chosen.disk_gb * 1e9))


_CHECKS: dict[str, _Rule] = {
    "battery": _battery,
    "busy": _busy,
    "user": _user,
    "schedule": _schedule,
    "metered": _metered,
    "hot": _hot,
    "memory": _memory,
    "traffic": _traffic,
    "disk": _disk,
}


def _is_user_active(chosen: PolicySettings, sensed: SensorReadings) -> bool:
    return sensed.user_idle_s is not None and sensed.user_idle_s < chosen.user_idle_s


# --- what a peer can say of its next hours -----------------------------------------------------


class Forecast(NamedTuple):
    """Seconds until the agent expects to be free, and from now until it is no more; 0: not known.

    `free_for_s` 0 while free means: for as long as one can see.
    """

    free_in_s: float = 0.0
    free_for_s: float = 0.0


def forecast(chosen: PolicySettings, sensed: SensorReadings, decision: Decision) -> Forecast:
    """When this will change by the clock alone."""
    by_hours = bool(chosen.hours) and chosen.schedule != "always" and chosen.work == "auto"
    change_s = 0.0
    if by_hours and sensed.minute is not None:
        change_s = 60.0 * schedule.parse(chosen.hours).minutes_until_change(sensed.minute)
    if not isinstance(decision, Pause):
        return Forecast(0.0, change_s)
    if decision.rules == {"schedule"}:
        return Forecast(change_s, 0.0)
    if decision.rules == {"traffic"} and sensed.minute is not None:
        return Forecast(60.0 * (schedule.DAY_MINUTES - sensed.minute % schedule.DAY_MINUTES), 0.0)
    return Forecast()
