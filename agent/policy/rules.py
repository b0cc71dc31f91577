"""Decides when the agent may work and how hard: `decide` returns Run, Slow or Pause. Pure.

Rule 1. Each rule has a mode. `auto` pauses on its condition, and works while that is unknown.
        `never` reads the condition strictly, and pauses while it is unknown. `always` skips the
        rule.
Rule 2. `work` is the mode of all rules together: `always` skips them, `never` always pauses.
Rule 3. Every rule that pauses gives a reason, whose text stays the same during the pause.
Rule 4. An active rule ends at a lower limit than the one that starts it (hysteresis).

The defaults follow BOINC's computing preferences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from agent.policy import schedule

Mode = Literal["always", "auto", "never"]

_BYTES_PER_MB, _BYTES_PER_GB = 1e6, 1e9
#: The distance below its limit at which an active rule ends.
_HOT_HYSTERESIS_C, _HYSTERESIS_PERCENT = 10.0, 3.0


class PolicySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of the policy; `policy show` shows these descriptions."""

    work: Annotated[Mode, Meta(description="for all rules: always skips, never pauses")] = "auto"
    battery: Annotated[Mode, Meta(description="work on battery; never: at no charge")] = "auto"
    battery_least_percent: Annotated[
        float, Meta(ge=0, le=100, description="minimum charge to work on battery; 100: not at all")
    ] = 100.0
    busy: Annotated[Mode, Meta(description="work while other programs use the CPU")] = "auto"
    busy_percent: Annotated[
        float, Meta(ge=0, le=100, description="use of all cores by others that counts as busy")
    ] = 25.0
    user: Annotated[
        Mode, Meta(description="work while somebody uses this machine; auto: not on its GPU")
    ] = "auto"
    user_idle_s: Annotated[
        float, Meta(ge=0, description="seconds without input after which nobody uses it")
    ] = 180.0
    schedule: Annotated[Mode, Meta(description="work outside of the hours")] = "auto"
    hours: Annotated[
        str, Meta(description="work hours: mon-fri 18:00-08:00, sat-sun 0:00-24:00; empty is all")
    ] = ""
    metered: Annotated[Mode, Meta(description="work on a network that bills by volume")] = "auto"
    hot: Annotated[Mode, Meta(description="work while the machine is hot")] = "auto"
    hot_c: Annotated[float, Meta(ge=30, le=120, description="limit in degrees Celsius")] = 85.0
    memory: Annotated[Mode, Meta(description="work while memory is short")] = "auto"
    memory_free_percent: Annotated[
        float, Meta(ge=0, le=100, description="minimum free memory in percent")
    ] = 5.0
    traffic: Annotated[Mode, Meta(description="work beyond the day's traffic")] = "auto"
    up_mb_a_day: Annotated[float, Meta(ge=0, description="MB a day to send; 0: no limit")] = 0.0
    down_mb_a_day: Annotated[float, Meta(ge=0, description="MB a day to receive; 0: no limit")] = (
        0.0
    )
    up_mbit: Annotated[float, Meta(ge=0, description="Mbit/s to send; 0: no limit")] = 0.0
    down_mbit: Annotated[float, Meta(ge=0, description="Mbit/s to receive; 0: no limit")] = 0.0
    disk: Annotated[Mode, Meta(description="work when the agent's folder is full")] = "auto"
    disk_gb: Annotated[float, Meta(ge=0, description="GB for that folder; 0: no limit")] = 0.0
    nice: Annotated[
        int, Meta(ge=0, le=19, description="priority: 0 as other programs, 19 the lowest")
    ] = 19
    cpu_share: Annotated[
        float, Meta(gt=0, le=1, description="share of the time in which the CPU works")
    ] = 1.0
    cpu_share_in_use: Annotated[
        float, Meta(gt=0, le=1, description="the same while somebody uses this machine")
    ] = 0.5
    gpu_share: Annotated[
        float, Meta(gt=0, le=1, description="share of the time in which the GPU works")
    ] = 1.0


class SensorReadings(NamedTuple):
    """Sensor readings; None is unknown.

    `minute` of the local week. `others_percent` is the use of all cores by other programs in the
    last moments, `others_long_percent` over half a minute. `gpu`: training runs on a GPU.
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
    """Work without limits."""


class Slow(NamedTuple):
    """Work `share` of the time, 0 < share < 1."""

    share: float


class Pause(NamedTuple):
    """Do not work. `rules` pause; `reason` is for a person."""

    rules: frozenset[str]
    reason: str


Decision = Run | Slow | Pause


def decide(
    chosen: PolicySettings, readings: SensorReadings, active: frozenset[str] = frozenset()
) -> Decision:
    """What the agent may do now. `active` are the rules of the last decision, if it was a Pause."""
    if chosen.work == "never":
        return Pause(frozenset({"work"}), "work is set to never")
    if chosen.work == "auto":
        reasons = dict(_reasons(chosen, readings, active))
        if reasons:
            return Pause(frozenset(reasons), ", ".join(reasons.values()))
    share = chosen.gpu_share if readings.gpu else chosen.cpu_share
    if chosen.work == "auto" and chosen.user == "auto" and _is_user_active(chosen, readings):
        share = min(share, chosen.cpu_share_in_use)
    return Slow(share) if share < 1.0 else Run()


def _reasons(
    chosen: PolicySettings, readings: SensorReadings, active: frozenset[str]
) -> Iterator[tuple[str, str]]:
    for rule, check in _CHECKS.items():
        mode: Mode = getattr(chosen, rule)
        if mode == "always":
            continue
        why = check(_Question(chosen, readings, mode == "never", rule in active))
        if why:
            yield rule, why
        elif why is None and mode == "never":
            yield rule, f"{rule}: unknown here"


class _Question(NamedTuple):
    """The input of a rule: `strict` in mode `never`, `active` if it pauses already."""

    chosen: PolicySettings
    readings: SensorReadings
    strict: bool
    active: bool


# --- the rules: each returns its reason to pause, "" for none, or None if that is unknown --------


def _battery(q: _Question) -> str | None:
    minimum = 100.0 if q.strict else q.chosen.battery_least_percent
    if not q.readings.on_battery:
        return None if q.readings.on_battery is None else ""
    if minimum >= 100.0:
        return "on battery"
    if q.readings.battery_percent is None:
        return None
    below = q.readings.battery_percent < minimum + (_HYSTERESIS_PERCENT if q.active else 0.0)
    return f"battery below {minimum:g} %" if below else ""


def _busy(q: _Question) -> str | None:
    percent = q.readings.others_percent
    if percent is None:
        return None
    if q.active:
        percent = max(percent, q.readings.others_long_percent or 0.0)
    busy = percent > q.chosen.busy_percent
    return f"other programs use more than {q.chosen.busy_percent:g} % of the CPU" if busy else ""


def _user(q: _Question) -> str | None:
    if not q.readings.gpu and not q.strict:
        return ""
    if q.readings.user_idle_s is None:
        return None
    return "somebody uses this machine" if _is_user_active(q.chosen, q.readings) else ""


def _schedule(q: _Question) -> str | None:
    if not q.chosen.hours:
        return ""
    if q.readings.minute is None:
        return None
    week = schedule.parse(q.chosen.hours)
    if week.is_open(q.readings.minute):
        return ""
    opens = q.readings.minute + week.minutes_until_change(q.readings.minute)
    return f"schedule, until {schedule.format_minute(opens)}"


def _metered(q: _Question) -> str | None:
    if q.readings.metered is None:
        return None
    return "metered network" if q.readings.metered else ""


def _hot(q: _Question) -> str | None:
    if q.readings.hottest_c is None:
        return None
    limit = q.chosen.hot_c - (_HOT_HYSTERESIS_C if q.active else 0.0)
    return f"hotter than {q.chosen.hot_c:g} °C" if q.readings.hottest_c > limit else ""


def _memory(q: _Question) -> str | None:
    if q.readings.memory_free_percent is None:
        return None
    minimum = q.chosen.memory_free_percent + (_HYSTERESIS_PERCENT if q.active else 0.0)
    short = q.readings.memory_free_percent < minimum
    return f"less than {q.chosen.memory_free_percent:g} % of memory free" if short else ""


def _traffic(q: _Question) -> str | None:
    return used_up(q.chosen, q.readings.up_today_bytes, q.readings.down_today_bytes)


def used_up(chosen: PolicySettings, up_bytes: int, down_bytes: int) -> str:
    """The daily limit that is reached, as text; empty if none is."""
    for cap_mb, used_bytes, verb in (
        (chosen.up_mb_a_day, up_bytes, "sent"),
        (chosen.down_mb_a_day, down_bytes, "received"),
    ):
        if cap_mb and used_bytes >= cap_mb * _BYTES_PER_MB:
            return f"{cap_mb:g} MB {verb} today"
    return ""


def _disk(q: _Question) -> str | None:
    if not q.chosen.disk_gb:
        return ""
    if q.readings.home_bytes is None:
        return None
    over = bytes_over_cap(q.chosen, q.readings) > 0
    return f"more than {q.chosen.disk_gb:g} GB in the agent's folder" if over else ""


_CHECKS: dict[str, Callable[[_Question], str | None]] = {
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
#: The rules that have a mode, in the order of their reasons.
RULES = tuple(_CHECKS)


def bytes_over_cap(chosen: PolicySettings, readings: SensorReadings) -> int:
    """Bytes in the agent's folder beyond its limit; 0 without a limit, or if unknown."""
    if not chosen.disk_gb or chosen.disk == "always" or readings.home_bytes is None:
        return 0
    return max(0, readings.home_bytes - int(chosen.disk_gb * _BYTES_PER_GB))


def _is_user_active(chosen: PolicySettings, readings: SensorReadings) -> bool:
    return readings.user_idle_s is not None and readings.user_idle_s < chosen.user_idle_s


# --- forecast ------------------------------------------------------------------------------------


class Forecast(NamedTuple):
    """Seconds until the agent expects to be free, and for how long it is free; 0: unknown.

    While it is free, `free_for_s` 0 means that the end is unknown.
    """

    free_in_s: float = 0.0
    free_for_s: float = 0.0


def forecast(chosen: PolicySettings, readings: SensorReadings, decision: Decision) -> Forecast:
    """When the clock alone will change the decision."""
    by_hours = bool(chosen.hours) and chosen.schedule != "always" and chosen.work == "auto"
    change_s = 0.0
    if by_hours and readings.minute is not None:
        change_s = 60.0 * schedule.parse(chosen.hours).minutes_until_change(readings.minute)
    if not isinstance(decision, Pause):
        return Forecast(0.0, change_s)
    if decision.rules == {"schedule"}:
        return Forecast(change_s, 0.0)
    if decision.rules == {"traffic"} and readings.minute is not None:
        return Forecast(60.0 * (schedule.DAY_MINUTES - readings.minute % schedule.DAY_MINUTES), 0.0)
    return Forecast()
