"""The owner's monitor: what its panels say, and what its keys request."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from agent.cli.monitor.app import OwnerMonitor
from agent.cli.monitor.panels import BORDER, COLUMNS, MIN_PLOT_LINES, bars, panels
from agent.cli.monitor.readings import Machine, MachineReader
from agent.home import audit_log, consent_requests, privacy_ledger, settings, status_files
from agent.home.audit_log import AuditEntry
from agent.home.consent_requests import Request
from agent.home.own_results import OwnResult
from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.home.status_files import OwnerRequest, RuleOverride, Status
from agent.policy.rules import Pause, Run, SensorReadings, Slow
from protocols.messages.comparisons import Comparison, Estimate
from protocols.privacy.events import DiscreteLaplace, Gaussian

#: A Monday, 9:15 of local time.
NOW = time.mktime((2026, 11, 30, 9, 15, 0, 0, 334, -1))
STATUS = Status(
    pid=1,
    at=NOW,
    since=NOW - 8_000,
    peer="NORT-Q2WW-UHQW-W6BA",
    name="north",
    version="0.1.0",
    state="training",
    session=True,
    mqtt=True,
    run="tabular-7dc222",
    round=12,
)
SENSED = SensorReadings(minute=9 * 60 + 15, others_percent=12.0, memory_free_percent=40.0)
LEFT = AuditEntry(at=NOW - 60, run="tabular-7dc222", task="tabular", round=11, what="weights")


def machine(**changes: object) -> Machine:
    base = Machine(
        now=NOW,
        is_running=True,
        status=STATUS,
        request=OwnerRequest(),
        chosen=AgentSettings(),
        sensed=SENSED,
        decision=Run(),
        cpu=(10.0, 50.0),
        entries=(),
        num_left=0,
        bytes_left=0,
        spent_epsilon=None,
        limit=Limit(0.0, 1e-6),
        consents=(),
    )
    return base._replace(**changes)  # type: ignore[arg-type]


def shown(seen: Machine) -> dict[str, str]:
    """The text of each panel by its id."""
    return {p.id: "\n".join([p.title, *(line.text for line in p.lines)]) for p in panels(seen)}


OWN = OwnResult(
    run="tabular-7dc222",
    task="tabular",
    at=NOW,
    comparison=Comparison(
        run="tabular-7dc222",
        metric="accuracy",
        rows=120,
        models={"alone": Estimate(0.7, 0.6, 0.8), "shared": Estimate(0.8, 0.7, 0.9)},
        gains={"alone": Estimate(-0.1, -0.2, -0.01)},
    ),
)


def test_the_owner_sees_what_a_run_brought() -> None:
    assert "own" not in shown(machine())
    text = shown(machine(own=OWN))["own"]
    assert "on 120 held-out rows of yours" in text
    assert "→ shared    accuracy 0.8 (0.7 to 0.9)" in text
    assert "  alone     accuracy 0.7 (0.6 to 0.8), against shared -0.1 (-0.2 to -0.01)" in text


def test_the_owner_sees_which_model_a_run_has_chosen() -> None:
    assert "model  " not in shown(machine())["machine"]
    chosen = replace(STATUS, choice_run="tabular-7dc222", choice="trees (AUC 0.91; mlp 0.9)")
    text = shown(machine(status=chosen))["machine"]
    assert "model     trees (AUC 0.91; mlp 0.9) (run tabular-7dc222)" in text
    # After the end, the panel says which one is kept, also without a comparison.
    ended = replace(OWN, comparison=None, choice="mlp is kept (mlp: AUC 0.9)")
    text = shown(machine(status=chosen, own=ended))["machine"]
    assert "model     mlp is kept (mlp: AUC 0.9) (run tabular-7dc222)" in text
    other = replace(ended, run="tabular-2")
    assert "trees (AUC" in shown(machine(status=chosen, own=other))["machine"]


def test_the_panels_of_a_machine_at_work() -> None:
    text = shown(machine())
    assert "● training" in text["machine"]
    assert "up        2 h 13 min" in text["machine"]
    assert "tabular-7dc222 round 12" in text["machine"]
    assert "● may work" in text["policy"]
    assert "no hours are set" in text["policy"]
    assert "busy      12 %, limit 25 %" in text["policy"]
    assert text["cpu"].startswith("CPU 50 %\n")
    assert "nothing has left" in text["left"]
    assert "budget" not in text
    assert "asks" not in text


def test_a_stopped_agent_says_how_to_start_it() -> None:
    text = shown(machine(is_running=False))
    assert "not running; start it: commonweight-agent up" in text["machine"]
    assert "links" not in text["machine"]


def test_no_time_is_negative_after_a_clock_was_set_back() -> None:
    later = replace(STATUS, since=NOW + 60_000)
    assert "up        0 s" in shown(machine(status=later))["machine"]


def test_a_pause_has_its_reason_and_its_end() -> None:
    hours = AgentSettings(hours="mon-fri 18:00-08:00")
    paused = Pause(frozenset({"schedule"}), "outside of its hours")
    text = shown(machine(chosen=hours, decision=paused))["policy"]
    assert "‖ pauses: outside of its hours" in text
    assert "works again Mon 18:00" in text
    bar = text.split("today")[1].split(" 24 h")[0].strip()
    assert bar == "─" * 36 + "█" * 12, "the night from Sunday to Monday has no hours"
    night = machine(chosen=hours, sensed=SENSED._replace(minute=20 * 60), decision=Slow(0.5))
    assert "works 50% of the time" in shown(night)["policy"]
    assert "may work until" in shown(night)["policy"]


def test_the_bar_of_the_day_fits_a_narrow_terminal() -> None:
    hours = AgentSettings(hours="mon-fri 18:00-08:00")
    (policy,) = (p for p in panels(machine(chosen=hours), 55) if p.id == "policy")
    bar = next(line.text for line in policy.lines if line.text.startswith("today"))
    assert bar == "today     " + "─" * 18 + "█" * 6 + " 24 h"


def test_what_the_owner_has_asked_for_is_shown() -> None:
    wish = OwnerRequest(want="pause", modes={"busy": RuleOverride(value="always", until=NOW + 60)})
    text = shown(machine(request=wish))["policy"]
    assert "you have paused it; commonweight-agent resume" in text
    assert "busy is always until Mon 09:16" in text


def test_what_left_the_budget_and_open_questions() -> None:
    refused = replace(LEFT, what="refused", told="a learning rate of 9")
    asked = Request(task="tabular", run="tabular-1", at=NOW, target="readmitted")
    text = shown(
        machine(
            entries=(LEFT, refused),
            num_left=1,
            bytes_left=3_200_000,
            limit=Limit(2.0, 1e-6),
            spent_epsilon=1.5,
            consents=(asked,),
        )
    )
    assert text["left"].startswith("What left: 1 answer\n3.2 MB in total")
    assert text["left"].index("✕ ") < text["left"].index("↑ "), "the newest first"
    assert "ε 1.5 of 2 spent" in text["budget"]
    assert "to allow it: commonweight-agent task allow tabular" in text["asks"]


def test_on_a_wide_terminal_both_columns_have_the_same_height() -> None:
    seen = machine(
        limit=Limit(2.0, 1e-6),
        chosen=AgentSettings(hours="mon-fri 18:00-08:00"),
        sensed=SENSED._replace(hottest_c=58.0, user_idle_s=9.0, home_bytes=10, battery_percent=80),
    )
    found = {p.id: p for p in panels(seen, 60, wide=True)}
    lines = [sum(len(found[name].lines) + BORDER for name in column) for column in COLUMNS]
    assert lines[0] == lines[1]
    assert len(found["cpu"].lines) > MIN_PLOT_LINES


def test_bars_keep_the_newest_values_at_the_right() -> None:
    assert bars([0, 50, 100], 3, 2) == ["  █", " ██"]
    assert bars([100, 0], 1, 1) == [" "]
    assert bars([25], 3, 1) == ["  ▂"]
    assert bars([], 0, 1) == [""]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    settings.change(tmp_path, busy="never")
    status = replace(STATUS, pid=os.getpid(), at=time.time())
    status_files.write_status(tmp_path, status)
    (tmp_path / audit_log.FILE).write_bytes(msgspec.json.encode(LEFT) + b"\n")
    return tmp_path


def test_a_machine_is_read_from_its_home(home: Path) -> None:
    reader = MachineReader(home)
    seen = reader.read()
    assert seen.is_running
    assert (seen.num_left, seen.spent_epsilon) == (1, None)
    assert isinstance(seen.decision, Pause), "the use of the CPU is not known yet"
    mode = RuleOverride(value="always", until=time.time() + 60)
    status_files.write_request(home, OwnerRequest(modes={"busy": mode}))
    with closing(PrivacyLedger(privacy_ledger.ledger_file(home))) as ledger:
        noisy = Charge("added", "", (DiscreteLaplace(1.5),), "", "by hand")
        ledger.charge(noisy, Limit(0.0, 1e-6))
    status_files.write_status(home, replace(STATUS, pid=os.getpid(), at=time.time() - 300))
    seen = reader.read()
    assert seen.spent_epsilon == pytest.approx(1.5, rel=1e-3)
    assert seen.chosen.busy == "always", "a temporary mode is in force"
    assert not seen.is_running, "a running agent writes its status every 10 s"
    assert not consent_requests.read(home)


def test_the_spent_budget_is_computed_again_only_after_a_change(home: Path) -> None:
    file, reader = privacy_ledger.ledger_file(home), MachineReader(home)
    with closing(PrivacyLedger(file)) as ledger:
        ledger.charge(Charge("added", "", (Gaussian(1.0),)), Limit(0.0, 1e-6))
    os.utime(file, (1.0, 1.0))
    spent = reader.read().spent_epsilon
    assert file.stat().st_mtime == 1.0, "to look at the ledger is no change of it"
    assert reader.read().spent_epsilon == spent
    settings.change(home, privacy_delta=1e-2)
    of_this_delta = reader.read().spent_epsilon
    assert spent is not None
    assert of_this_delta is not None
    assert of_this_delta < 0.7 * spent


def test_a_file_that_is_gone_when_it_is_looked_at_is_left_out(home: Path) -> None:
    """SQLite's journal beside the ledger is there for milliseconds."""
    file = privacy_ledger.ledger_file(home)
    with closing(PrivacyLedger(file)) as ledger:
        ledger.charge(Charge("added", "", (DiscreteLaplace(1.5),)), Limit(0.0, 1e-6))
    for name in (file.with_name(f"{file.name}-gone"), home / "gone.jsonl"):
        name.symlink_to(home / "nothing")
    assert MachineReader(home).read().spent_epsilon == pytest.approx(1.5, rel=1e-3)


def test_a_key_keeps_what_was_asked_before(home: Path) -> None:
    status_files.write_request(home, OwnerRequest(want="pause", until=NOW + 60, restart_at=NOW))
    status_files.ask(home, "run", NOW + 1)
    assert status_files.read_request(home) == OwnerRequest(at=NOW + 1, restart_at=NOW)


async def test_keys_pause_and_resume(home: Path) -> None:
    read = MachineReader(home).read
    app = OwnerMonitor(read, lambda want: status_files.ask(home, want, time.time()))
    async with app.run_test(size=(110, 40)) as pilot:
        await pilot.pause()
        app.draw()
        await pilot.press("p")
        assert status_files.read_request(home).want == "pause"
        await pilot.pause()
        lines = [strip.text for strip in app.screen._compositor.render_strips()]
        text = "\n".join(lines)
        for words in ("north · ● training", "What left: 1 answer", "you have paused it"):
            assert words in text
        assert "Policy now" in lines[1]
        assert "This machine" in lines[1], "beside the first panel"
        await pilot.press("r")
        assert status_files.read_request(home).want == "run"
        await pilot.resize_terminal(60, 20)
        await pilot.pause()
        await pilot.pause()
        assert "This machine" not in app.screen._compositor.render_strips()[1].text
        (home / settings.FILE).write_text("hours = 7")
        await pilot.press("p")
        await pilot.pause()
        assert app.screen._compositor.render_strips()[0].text.strip().startswith("✕")
        await pilot.press("q")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (140, 40), (200, 60)])
async def test_every_line_fits_and_ascii_is_ascii(size: tuple[int, int]) -> None:
    asked = Request(task="tabular", run="tabular-1", at=NOW, target="readmitted")
    hours = AgentSettings(hours="mon-fri 18:00-08:00")
    hot = SENSED._replace(hottest_c=61.0, battery_percent=80.0)
    seen = machine(
        chosen=hours,
        consents=(asked,),
        sensed=hot,
        limit=Limit(2.0, 1e-6),
        spent_epsilon=1.0,
        own=OWN,
    )
    app = OwnerMonitor(lambda: seen, lambda want: None, in_ascii=True)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        app.draw()
        await pilot.pause()
        await pilot.pause()
        screen = [strip.text for strip in app.screen._compositor.render_strips()]
        text = "\n".join(screen)
        assert text.isascii()
        assert "?" not in text.replace("? run tabular-1", ""), "every glyph has a plain form"
        for panel in app.query(".panel"):
            assert panel.region.right <= size[0], panel.id
        assert "Waits for your decision" in text
        assert text.rstrip().endswith("q quit")


async def test_the_light_theme_and_the_key_between_them() -> None:
    app = OwnerMonitor(machine, lambda want: None, look="light")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert app.theme == "commonweight-light"
        await pilot.press("t")
        await pilot.pause()
        assert app.theme == "commonweight-dark"


async def test_a_resize_before_the_widgets_draws_nothing() -> None:
    app = OwnerMonitor(machine, lambda want: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        await app.query_one("#header").remove()
        app.draw()
        assert not app.query("#header")
