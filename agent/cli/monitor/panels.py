"""The owner's monitor as lines of text by panel. Pure.

No information is in a color alone: a line's tone only picks one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from agent.cli.monitor.readings import Machine
from agent.home import own_results
from agent.home.audit_log import NOTHING_LEFT, AuditEntry, format_entry
from agent.home.own_results import OwnResult
from agent.policy import rules, schedule
from agent.policy.rules import Pause, Slow
from protocols.local.cli_entry import printable
from protocols.messages.states import PeerState, label

Tone = Literal["plain", "dim", "good", "warn", "bad", "busy"]
_LABEL_WIDTH = 10
#: The panels of the two columns of a wide terminal.
COLUMNS = (("policy", "budget"), ("machine", "cpu"))
#: The lines that a border takes.
BORDER = 2
#: The bar of the day shows half hours from this width on, else hours.
MIN_WIDTH_HALF_HOURS = 64
MIN_PLOT_LINES = 4
_EIGHTHS = " ▁▂▃▄▅▆▇█"


class Line(NamedTuple):
    text: str
    tone: Tone = "plain"


class Panel(NamedTuple):
    """A title and its lines. `id` is the one of the widget."""

    id: str
    title: str
    lines: list[Line]


def panels(machine: Machine, width: int = 76, *, wide: bool = False) -> list[Panel]:
    """Every panel in `width` characters. `wide`: the plot of the CPU makes both columns equal."""
    answers = "1 answer" if machine.num_left == 1 else f"{machine.num_left:,} answers"
    found = [
        Panel("machine", "This machine", _machine(machine)),
        Panel("policy", "Policy now", _policy(machine, width)),
        Panel("left", f"What left: {answers}", _left(machine)),
    ]
    if budget := _budget(machine):
        found.insert(2, Panel("budget", "Privacy budget", budget))
    other, own = (
        sum(len(one.lines) + BORDER for one in found if one.id in column) for column in COLUMNS
    )
    height = max(MIN_PLOT_LINES, other - own - BORDER if wide else 0)
    cpu = f"CPU {machine.cpu[-1]:.0f} %" if machine.cpu else "CPU"
    plot = [Line(line, "busy") for line in bars(machine.cpu, width, height)]
    found.insert(2, Panel("cpu", cpu, plot))
    if machine.own is not None and machine.own.comparison is not None:
        found.insert(-1, Panel("own", "What the run brought", _own(machine.own)))
    if machine.consents:
        found.insert(0, Panel("asks", "Waits for your decision", _asks(machine)))
    return found


def _own(found: OwnResult) -> list[Line]:
    lines = [printable(line) for line in own_results.lines_of(found)]
    return [Line(line, "good" if line.startswith("→") else "plain") for line in lines]


def _asks(machine: Machine) -> list[Line]:
    lines = []
    for request in machine.consents:
        lines.append(Line(printable(f"? {request.about}"), "warn"))
        lines.append(Line(f"  {printable(request.answer)}"))
    return lines


def _fact(name: str, text: str, tone: Tone = "plain") -> Line:
    return Line(f"{name:<{_LABEL_WIDTH}}{printable(text)}", tone)


# --- the agent -------------------------------------------------------------------------------


def state_line(machine: Machine) -> Line:
    """What the agent does."""
    status = machine.status
    if status is None or not machine.is_running:
        return Line("✕ not running; start it: commonweight-agent up", "bad")
    try:
        state = PeerState(status.state)
    except ValueError:  # of another version
        return Line(printable(status.state))
    tones: dict[PeerState, Tone] = {
        PeerState.PAUSED: "warn",
        PeerState.ERROR: "bad",
        PeerState.IDLE: "plain",
    }
    return Line(printable(label(state, status.reason)), tones.get(state, "good"))


def _machine(machine: Machine) -> list[Line]:
    status, state = machine.status, state_line(machine)
    lines = [_fact("state", state.text, state.tone)]
    if status is None:
        return lines
    lines.append(_fact("name", f"{status.name} ({status.peer})"))
    if machine.is_running:
        lines.append(_fact("up", _span(machine.now - status.since)))
        coordinator, mqtt = ("●" if up else "○" for up in (status.session, status.mqtt))
        tone: Tone = "plain" if status.session and status.mqtt else "warn"
        lines.append(_fact("links", f"coordinator {coordinator}  mqtt {mqtt}", tone))
        if status.mqtt_why:
            lines.append(_fact("", status.mqtt_why, tone))
    lines.append(_fact("run", f"{status.run} round {status.round}" if status.run else "none"))
    if told := own_results.text_of_model(status.choice_run, status.choice, machine.own):
        lines.append(_fact("model", f"{told} (run {status.choice_run})"))
    lines.append(_fact("rounds", f"{status.rounds_done} done since the start"))
    lines.append(_fact("sent", f"{_size(status.bytes_up)} up, {_size(status.bytes_down)} down"))
    if status.head is not None:
        lines.append(_fact("version", f"{status.head.version} of {status.head.run}"))
    if status.last_error:
        is_over = status.error_until > 0
        word = "before" if is_over else "error"
        lines.append(_fact(word, status.error_text, "dim" if is_over else "bad"))
    return lines


# --- the policy ------------------------------------------------------------------------------


def _policy(machine: Machine, width: int) -> list[Line]:
    match machine.decision:
        case Pause(reason=reason):
            lines = [_fact("now", f"‖ pauses: {reason}", "warn")]
        case Slow(share=share):
            lines = [_fact("now", f"● works {share:.0%} of the time", "good")]
        case _:
            lines = [_fact("now", "● may work", "good")]
    wants = {"pause": "you have paused it", "finish": "it stops after this round"}
    if machine.request.want in wants:
        until = machine.request.until
        end = f" until {_clock(until)}" if until else "; commonweight-agent resume"
        lines.append(_fact("you", wants[machine.request.want] + end, "warn"))
    for rule, mode in machine.request.modes.items():
        if mode.until > machine.now:
            lines.append(_fact("you", f"{rule} is {mode.value} until {_clock(mode.until)}", "warn"))
    lines.append(_fact("next", _next_window(machine)))
    if machine.chosen.hours and machine.sensed.minute is not None:
        step = 30 if width >= MIN_WIDTH_HALF_HOURS else 60
        today, cursor = _day_bar(machine.chosen.hours, machine.sensed.minute, step)
        lines += [_fact("today", today), _fact("", cursor, "dim")]
    return lines + _sensed(machine)


def _next_window(machine: Machine) -> str:
    """When the clock alone will change what the agent may do."""
    free_in_s, free_for_s = rules.forecast(machine.chosen, machine.sensed, machine.decision)
    if free_in_s:
        return f"works again {_clock(machine.now + free_in_s)}"
    if free_for_s:
        return f"may work until {_clock(machine.now + free_for_s)}"
    if isinstance(machine.decision, Pause):
        return "works again when the reason ends"
    return "at any time; no hours are set"


def _day_bar(hours: str, minute: int, step: int) -> tuple[str, str]:
    """Each `step` minutes of this day, `█` where it may work; below a mark at the present time."""
    open_hours = schedule.parse(hours)
    start = minute - minute % schedule.DAY_MINUTES
    spans = range(0, schedule.DAY_MINUTES, step)
    bar = "".join("█" if open_hours.is_open(start + span) else "─" for span in spans)
    return f"{bar} 24 h", " " * ((minute - start) // step) + "▲ now"


def _sensed(machine: Machine) -> list[Line]:
    """Each reading with its limit; unknown ones are left out."""
    seen, chosen = machine.sensed, machine.chosen
    rows: list[tuple[str, str | None, str]] = [
        ("busy", _percent(seen.others_percent), f", limit {chosen.busy_percent:g} %"),
        (
            "battery",
            _percent(seen.battery_percent),
            ", " + ("on battery" if seen.on_battery else "plugged in"),
        ),
        ("user", _idle(seen.user_idle_s), f", away after {_span(chosen.user_idle_s)}"),
        ("hot", _celsius(seen.hottest_c), f", limit {chosen.hot_c:g} °C"),
        (
            "memory",
            _percent(seen.memory_free_percent),
            f" free, limit {chosen.memory_free_percent:g} %",
        ),
        ("traffic", _traffic(machine), " today"),
        ("disk", _disk(machine), ""),
    ]
    pausing = machine.decision.rules if isinstance(machine.decision, Pause) else frozenset()
    return [
        _fact(name, text + about, "warn" if name in pausing else "dim")
        for name, text, about in rows
        if text is not None
    ]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f} %"


def _celsius(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f} °C"


def _idle(value: float | None) -> str | None:
    return None if value is None else f"no input for {_span(value)}"


def _traffic(machine: Machine) -> str | None:
    seen, chosen = machine.sensed, machine.chosen
    parts = []
    for used, limit, arrow in (
        (seen.up_today_bytes, chosen.up_mb_a_day, "↑"),
        (seen.down_today_bytes, chosen.down_mb_a_day, "↓"),
    ):
        parts.append(f"{arrow} {_size(used)}" + (f" of {_size(limit * 1e6)}" if limit else ""))
    return "  ".join(parts)


def _disk(machine: Machine) -> str | None:
    used, limit = machine.sensed.home_bytes, machine.chosen.disk_gb
    if used is None:
        return None
    return _size(used) + (f" of {_size(limit * 1e9)}" if limit else "")


# --- what left -------------------------------------------------------------------------------


def _left(machine: Machine) -> list[Line]:
    if not machine.entries:
        return [Line("nothing has left this machine yet", "dim")]
    total = Line(f"{_size(machine.bytes_left)} in total; all: commonweight-agent ledger", "dim")
    return [total, *map(_entry_line, reversed(machine.entries))]


def _entry_line(entry: AuditEntry) -> Line:
    is_refused = entry.what == "refused"
    mark = "✕" if is_refused else "·" if entry.what in NOTHING_LEFT else "↑"
    return Line(printable(f"{mark} {format_entry(entry)}"), "warn" if is_refused else "plain")


def _budget(machine: Machine) -> list[Line]:
    """What all answers with noise have cost of the owner's privacy budget."""
    limit, spent = machine.limit.epsilon, machine.spent_epsilon
    if not limit and spent is None:
        return []
    spent, more = spent or 0.0, Line("all: commonweight-agent budget", "dim")
    if not limit:
        return [Line(f"ε {spent:.3g} spent; no limit is set"), more]
    share = min(spent / limit, 1.0)
    bar = "━" * round(share * 24) + "─" * (24 - round(share * 24))
    tone: Tone = "warn" if share > 0.8 else "plain"
    return [Line(f"{bar} ε {spent:.3g} of {limit:g} spent", tone), more]


# --- small texts -----------------------------------------------------------------------------


def bars(values: Sequence[float], width: int, height: int) -> list[str]:
    """Bars of percentages, one a value, the newest at the right: `height` lines."""
    shown = list(values)[-width:] if width > 0 else []
    eighths = [round(min(max(value, 0.0), 100.0) / 100 * 8 * height) for value in shown]
    lines = []
    for line in range(height):
        base = 8 * (height - 1 - line)
        chars = (_EIGHTHS[min(max(filled - base, 0), 8)] for filled in eighths)
        lines.append("".join(chars).rjust(width))
    return lines


def _size(nbytes: float) -> str:
    """`999 B`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return (
                f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 9.95 else f"{nbytes:.1f} {unit}"
            )
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _span(seconds: float) -> str:
    """`42 s`, `5 min`, `3 h 20 min`, `12 d`; 0 s where a clock was set back."""
    seconds = max(seconds, 0.0)
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{int(seconds)} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d"


def _clock(at: float) -> str:
    return time.strftime("%a %H:%M", time.localtime(at))
