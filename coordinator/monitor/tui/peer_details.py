"""What the screen of a peer shows: overview, metrics, and shared settings, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coordinator.fleet import remedies
from coordinator.fleet.readings import current_run, shown_state
from coordinator.fleet.state import Event, Fleet, Peer
from coordinator.monitor.evaluations import Evaluations, describe, describe_comparison, metric_rows
from coordinator.monitor.fleet_layout import BORDER
from coordinator.monitor.peer_table import (
    LEVELS,
    PARTICIPATION_GLYPHS,
    Cell,
    battery,
    links,
    peer_name,
    refusal,
    smoothed_loss,
    state_cell,
    status_dot,
    training_loss,
)
from coordinator.monitor.tui.plots import Behind, Plot, curve_plot
from coordinator.monitor.tui.theme import Fact, colors, facts_table, styles
from coordinator.remote import formatting as fmt
from protocols.messages.states import PeerState

MAX_EVENTS = 8
#: Width and height in characters.
Size = tuple[int, int]
#: The border of a panel, and a blank at each side of its text.
_EDGES = BORDER + 2
#: For the settings below the facts.
MIN_POLICY_LINES = 12
MIN_ROOMY_WIDTH = 70
MIN_FACTS_WIDTH, MIN_PLOT_LINES = 36, 8


def overview(
    peer: Peer, fleet: Fleet, found: Evaluations, now: float, size: Size, *, roomy: bool
) -> Table:
    """The facts about `peer`, its latest events and, if there is room, its losses."""
    width, height = size
    facts = _facts(peer, fleet, found, now)
    events = [event for event in fleet.events if event.subject == peer.peer][-MAX_EVENTS:]
    if not roomy:
        room = max(height - facts.row_count - 2, 3)
        return _column(facts, "", _event_table(events[-room:], now))
    right = width // 2
    left = width - right
    below = max(len(events), 1) + BORDER
    plot = loss_plot(peer, right - _EDGES, max(height - below - BORDER, MIN_PLOT_LINES))
    latest = _event_table(events, now) if events else Text("nothing yet", colors().dim)
    shared = policy(peer)
    lines = _count_lines(facts, left - _EDGES)
    if height - lines - BORDER >= MIN_POLICY_LINES:
        rest = height - lines - BORDER
        own = [_panel(peer_name(fleet, peer.peer), facts, left, lines + BORDER)]
        own.append(_panel("Shared settings", shared, left, rest))
    else:
        own = [_panel(peer_name(fleet, peer.peer), facts, left, height)]
    others = [
        _panel("Training", Group(*plot), right, height - below),
        _panel("Latest", latest, right, below),
    ]
    return _beside((left, _column(*own)), (right, _column(*others)))


def _beside(*parts: tuple[int, RenderableType]) -> Table:
    """Parts of these widths side by side."""
    table = Table.grid()
    for width, _ in parts:
        table.add_column(width=width)
    table.add_row(*(part for _, part in parts))
    return table


def _panel(title: str, content: RenderableType, width: int, height: int) -> Panel:
    """A part with a border, as on the pages of the fleet."""
    own = colors()
    return Panel(
        content,
        ROUNDED,
        title=Text(title, f"bold {own.text}") if title else None,
        title_align="left",
        border_style=own.faint,
        padding=(0, 1),
        width=width,
        height=height,
    )


def _count_lines(table: Table, width: int) -> int:
    """The lines that a table takes in this width."""
    console = Console(width=width)
    return len(console.render_lines(table, console.options, pad=False))


def _column(*parts: RenderableType) -> Table:
    table = Table.grid()
    for part in parts:
        table.add_row(part)
    return table


def _facts(peer: Peer, fleet: Fleet, found: Evaluations, now: float) -> Table:
    sent, state = peer.telemetry, state_cell(peer, now, 400)
    labels = "  ".join(f"{key}={value}" for key, value in sorted(peer.labels.items()))
    rows: list[Fact] = [
        ("state", state),
        ("id", peer.peer),
        ("labels", labels or fmt.NOTHING),
        ("seen", f"{fmt.age(now - peer.seen_at)} ago" if peer.seen_at else "never"),
    ]
    if reason := refusal(fleet, peer):
        rows.insert(1, ("refused", Cell(reason, "bad")))
    elif remedy := remedies.remedy(peer, now):
        rows.insert(1, ("next", remedy))
    if peer.standing == "enrolled":
        mqtt, flower = links(peer, now)
        rows.append(("links", f"mqtt {status_dot(mqtt)} · flower {status_dot(flower)}"))
    rows.append(("version", peer.version or fmt.NOTHING))
    rows.append(("run", f"{peer.run} · round {peer.round}" if peer.run else fmt.NOTHING))
    if sent:
        if sent.steps and shown_state(peer, now) in (PeerState.TRAINING, PeerState.SENDING):
            done = (
                f"{fmt.progress(sent.step, sent.steps, 16)} {sent.step}/{sent.steps} {sent.phase}"
            )
            rows.append(("step", done))
        up, down = fmt.format_bytes(sent.bytes_up), fmt.format_bytes(sent.bytes_down)
        rows.append(("sent", f"{up} up · {down} down"))
    if peer.contributions:
        glyphs = Text(peer.contributions.translate(PARTICIPATION_GLYPHS).strip(), colors().green)
        count = f"  {peer.contributions.count('1')} of the last {len(peer.contributions)} rounds"
        rows.append(("took part", glyphs.append(count, colors().dim)))
    if (run := current_run(fleet)) and run.changed.run == found.run and peer.peer in found.by_peer:
        rows.append(("held out", describe(found.by_peer[peer.peer])))
    if run and run.changed.run == found.run and peer.peer in found.compared:
        rows.append(("brought", describe_comparison(found.compared[peer.peer])))
    rows += [
        (
            "disk left",
            fmt.format_bytes(peer.disk_free_bytes) if peer.disk_free_bytes else fmt.NOTHING,
        ),
        ("clock", _describe_skew(peer.skew_s)),
        ("messages", f"{peer.missed} missed · {peer.ignored} ignored"),
    ]
    return facts_table(rows)


def _describe_skew(skew_s: float) -> str:
    if abs(skew_s) < 1:
        return "correct within 1 s"
    return f"{fmt.age(abs(skew_s))} {'ahead' if skew_s > 0 else 'behind'}"


def _event_table(events: Sequence[Event], now: float) -> Table:
    """Events with their ages."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style=colors().dim, justify="right", no_wrap=True)
    table.add_column(width=1)
    table.add_column(style=colors().text)
    for event in events:
        glyph, tone = LEVELS[event.level]
        table.add_row(
            f"{fmt.age(now - event.at)} ago", Text(glyph, styles()[tone]), Text(event.text)
        )
    return table


def loss_plot(peer: Peer, width: int, height: int) -> list[Text]:
    """Its training losses in this run: the moving average, with the losses dotted behind it."""
    last = smoothed_loss(peer)
    notes = ["" if last is None else f"smoothed {fmt.decimal(last)}"]
    plot = Plot(
        *("Training loss", width, height, (1, len(peer.losses))),
        notes=notes,
        nothing="no training in this run",
    )
    end = training_loss(peer)
    shown = Text(fmt.DIVERGED if end is None else fmt.decimal(end), colors().text)
    lines = curve_plot(
        plot, fmt.smooth(peer.losses), colors().blue, behind=Behind(peer.losses, colors().dim)
    )
    if peer.losses:
        lines[0] = plot.title_line(shown)
        lines[-1] = Text(
            "smoothed; dotted: its last reports, the newest at the right", colors().dim
        )
    return lines


def metrics(peer: Peer, fleet: Fleet, found: Evaluations, size: Size, *, roomy: bool) -> Table:
    """Its telemetry, its last evaluation of the model, and a plot of its losses in this run."""
    width, height = size
    sent = peer.telemetry
    rows: list[Fact] = [("", Text("No telemetry yet.", colors().dim))]
    if sent is not None:
        loss = training_loss(peer)
        rows = [
            ("loss", Cell(fmt.DIVERGED, "bad") if peer.diverged else fmt.decimal(loss)),
            ("smoothed", fmt.decimal(smoothed_loss(peer))),
            ("speed", f"{fmt.rate(sent.samples_per_s)[:-2]} samples/s"),
            ("processor", f"{sent.cpu_percent:.0f} %"),
            ("memory", fmt.format_bytes(sent.memory_bytes)),
            ("battery", battery(sent.battery_percent)),
        ]
    facts, held_out = facts_table(rows), _held_out(peer, fleet, found, width)
    if roomy:
        lines = max(facts.row_count, held_out.row_count) + BORDER
        rest, right = max(height - lines, MIN_PLOT_LINES + BORDER), width - MIN_FACTS_WIDTH
        plot = Group(*loss_plot(peer, width - _EDGES, rest - BORDER))
        top = _beside(
            (MIN_FACTS_WIDTH, _panel(peer_name(fleet, peer.peer), facts, MIN_FACTS_WIDTH, lines)),
            (right, _panel("Evaluation", held_out, right, lines)),
        )
        return _column(top, _panel("Training", plot, width, rest))
    top = _column(facts, "", held_out)
    lines = facts.row_count + 1 + held_out.row_count
    if not peer.losses:
        return top
    return _column(top, "", Group(*loss_plot(peer, width, max(height - lines - 1, MIN_PLOT_LINES))))


def _held_out(peer: Peer, fleet: Fleet, found: Evaluations, width: int) -> Table:
    """How it last evaluated the model of the run on its held-out rows, or why this is not known."""
    own, run = colors(), current_run(fleet)
    if run is None or found.run != run.changed.run:
        found = Evaluations()
    known, table = found.by_peer.get(peer.peer), Table.grid(padding=(0, 2))
    if run is None or known is None:
        text = "this peer has not evaluated a version of the current run yet"
        table.add_row(Text("held out: ", own.dim).append(found.withheld or found.error or text))
        return table
    table.add_column(style=own.dim, no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", style=own.text, no_wrap=True)
    rows = f", {fmt.count(known.num_examples)} rows" if width >= MIN_ROOMY_WIDTH else ""
    heads = (f"held out{rows}", f"round {known.round}", "all peers", "from … to")
    table.add_row(*(Text(head, f"bold {own.text}") for head in heads))
    for row in metric_rows(known, run):
        table.add_row(row.name, row.own, row.mean, row.spread)
    return table


def policy(peer: Peer) -> Table:
    """The settings that its owner shares; they cannot be changed from here."""
    hint = "To change them, on that machine: commonweight-agent policy set NAME VALUE"
    return facts_table(
        [
            ("tasks", ", ".join(peer.tasks) or "none yet: its owner allows each"),
            *([(f"awaits {peer.awaits}", peer.awaits_consent)] if peer.awaits_consent else []),
            *((name, value or fmt.NOTHING) for name, value in sorted(peer.policy.items())),
            ("", ""),
            ("", Text(hint, colors().dim)),
        ]
    )
