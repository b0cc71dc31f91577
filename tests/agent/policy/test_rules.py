"""The policy as a table: settings, readings, decision."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.rules import (
    RULES,
    Forecast,
    Pause,
    PolicySettings,
    Run,
    SensorReadings,
    Slow,
    decide,
    forecast,
)
from agent.policy.schedule import DAY_MINUTES

#: A quiet desktop on mains, Wednesday noon, nobody at it.
QUIET: dict[str, Any] = {
    "minute": 2 * DAY_MINUTES + 720,
    "on_battery": False,
    "others_percent": 3.0,
    "others_long_percent": 3.0,
    "user_idle_s": 3600.0,
    "metered": False,
    "hottest_c": 50.0,
    "memory_free_percent": 60.0,
    "home_bytes": 10**8,
}
NOTHING: dict[str, Any] = dict.fromkeys(QUIET)
NIGHTS = "mon-fri 18:00-08:00"
CAP = {"up_mb_a_day": 500.0}

TABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # settings, readings (over QUIET), decision: "run", "slow S", or the reason of the pause
    ({}, {}, "run"),
    ({}, NOTHING, "run"),
    # all rules together
    ({"work": "never"}, {}, "work is set to never"),
    ({"work": "always"}, {"on_battery": True, "others_percent": 99.0}, "run"),
    ({"work": "always"}, {"user_idle_s": 0.0}, "run"),
    ({"work": "always", "battery": "never"}, NOTHING, "run"),
    ({"work": "always", "cpu_share": 0.3}, {}, "slow 0.3"),
    # battery
    ({}, {"on_battery": True}, "on battery"),
    ({}, {"on_battery": True, "battery_percent": 100.0}, "on battery"),
    ({}, {"on_battery": False, "battery_percent": 3.0}, "run"),
    ({}, {"on_battery": None}, "run"),
    ({"battery": "never"}, {"on_battery": None}, "battery: unknown here"),
    ({"battery": "never"}, {"on_battery": False}, "run"),
    ({"battery": "always"}, {"on_battery": True}, "run"),
    ({"battery_least_percent": 40.0}, {"on_battery": True, "battery_percent": 41.0}, "run"),
    (
        {"battery_least_percent": 40.0},
        {"on_battery": True, "battery_percent": 39.0},
        "battery below 40 %",
    ),
    ({"battery_least_percent": 40.0}, {"on_battery": True, "battery_percent": None}, "run"),
    (
        {"battery_least_percent": 40.0, "battery": "never"},
        {"on_battery": True, "battery_percent": 90.0},
        "on battery",
    ),
    ({"battery_least_percent": 40.0}, {"on_battery": False, "battery_percent": 5.0}, "run"),
    # other programs
    ({}, {"others_percent": 25.0}, "run"),
    ({}, {"others_percent": 25.1}, "other programs use more than 25 % of the CPU"),
    ({}, {"others_percent": None}, "run"),
    ({"busy": "never"}, {"others_percent": None}, "busy: unknown here"),
    ({"busy": "never"}, {"others_percent": 10.0}, "run"),
    ({"busy": "always"}, {"others_percent": 100.0}, "run"),
    ({"busy_percent": 60.0}, {"others_percent": 59.0}, "run"),
    (
        {"busy_percent": 60.0},
        {"others_percent": 61.0},
        "other programs use more than 60 % of the CPU",
    ),
    ({"busy_percent": 0.0}, {"others_percent": 1.0}, "other programs use more than 0 % of the CPU"),
    # user
    ({}, {"user_idle_s": 5.0}, "slow 0.5"),
    ({}, {"user_idle_s": 5.0, "gpu": True}, "somebody uses this machine"),
    ({}, {"user_idle_s": 180.0, "gpu": True}, "run"),
    ({}, {"user_idle_s": None, "gpu": True}, "run"),
    ({"user": "never"}, {"user_idle_s": 5.0}, "somebody uses this machine"),
    ({"user": "never"}, {"user_idle_s": 500.0}, "run"),
    ({"user": "never"}, {"user_idle_s": None}, "user: unknown here"),
    ({"user": "always"}, {"user_idle_s": 5.0, "gpu": True}, "run"),
    ({"user_idle_s": 2.0}, {"user_idle_s": 5.0}, "run"),
    ({"user_idle_s": 900.0}, {"user_idle_s": 600.0, "gpu": True}, "somebody uses this machine"),
    ({"user": "never"}, {"user_idle_s": float("inf")}, "run"),
    # schedule
    ({"hours": NIGHTS}, {}, "schedule, until wed 18:00"),
    ({"hours": NIGHTS}, {"minute": 2 * DAY_MINUTES + 1100}, "run"),
    ({"hours": NIGHTS}, {"minute": 5 * DAY_MINUTES + 600}, "schedule, until mon 18:00"),
    ({"hours": NIGHTS}, {"minute": None}, "run"),
    ({"hours": NIGHTS, "schedule": "never"}, {"minute": None}, "schedule: unknown here"),
    ({"hours": NIGHTS, "schedule": "always"}, {}, "run"),
    ({"schedule": "never"}, {}, "run"),
    # metered network
    ({}, {"metered": True}, "metered network"),
    ({}, {"metered": None}, "run"),
    ({"metered": "never"}, {"metered": None}, "metered: unknown here"),
    ({"metered": "always"}, {"metered": True}, "run"),
    # temperature
    ({}, {"hottest_c": 85.0}, "run"),
    ({}, {"hottest_c": 85.5}, "hotter than 85 °C"),
    ({"hot_c": 70.0}, {"hottest_c": 71.0}, "hotter than 70 °C"),
    ({"hot": "always"}, {"hottest_c": 99.0}, "run"),
    ({"hot": "never"}, {"hottest_c": None}, "hot: unknown here"),
    ({}, {"hottest_c": None}, "run"),
    # memory
    ({}, {"memory_free_percent": 4.9}, "less than 5 % of memory free"),
    ({}, {"memory_free_percent": 5.0}, "run"),
    ({"memory": "always"}, {"memory_free_percent": 1.0}, "run"),
    ({"memory": "never"}, {"memory_free_percent": None}, "memory: unknown here"),
    ({"memory_free_percent": 20.0}, {"memory_free_percent": 19.0}, "less than 20 % of memory free"),
    # traffic
    (CAP, {"up_today_bytes": 499_999_999}, "run"),
    (CAP, {"up_today_bytes": 500_000_000}, "500 MB sent today"),
    ({"down_mb_a_day": 50.0}, {"down_today_bytes": 10**9}, "50 MB received today"),
    (CAP, {"down_today_bytes": 10**12}, "run"),
    (CAP | {"traffic": "always"}, {"up_today_bytes": 10**12}, "run"),
    ({}, {"up_today_bytes": 10**15}, "run"),
    # disk
    ({"disk_gb": 1.0}, {"home_bytes": 10**9 + 1}, "more than 1 GB in the agent's folder"),
    ({"disk_gb": 1.0}, {"home_bytes": 10**9}, "run"),
    ({"disk_gb": 1.0}, {"home_bytes": None}, "run"),
    ({"disk_gb": 1.0, "disk": "never"}, {"home_bytes": None}, "disk: unknown here"),
    ({"disk_gb": 1.0, "disk": "always"}, {"home_bytes": 10**12}, "run"),
    # pace
    ({"cpu_share": 0.25}, {}, "slow 0.25"),
    ({"cpu_share": 0.25}, {"user_idle_s": 1.0}, "slow 0.25"),
    ({"cpu_share_in_use": 0.1}, {"user_idle_s": 1.0}, "slow 0.1"),
    ({"cpu_share_in_use": 1.0}, {"user_idle_s": 1.0}, "run"),
    ({"gpu_share": 0.6, "cpu_share": 0.1}, {"gpu": True}, "slow 0.6"),
    ({"gpu_share": 0.6, "cpu_share": 0.1}, {}, "slow 0.1"),
    # several rules at once, in their order
    ({}, {"on_battery": True, "metered": True}, "on battery, metered network"),
    (
        {"hours": NIGHTS},
        {"on_battery": True, "others_percent": 80.0},
        "on battery, other programs use more than 25 % of the CPU, schedule, until wed 18:00",
    ),
]


def told(chosen: dict[str, Any], sensed: dict[str, Any]) -> str:
    match decide(PolicySettings(**chosen), SensorReadings(**{**QUIET, **sensed})):
        case Pause(reason=reason):
            return reason
        case Slow(share):
            return f"slow {share:g}"
        case _:
            return "run"


@pytest.mark.parametrize(("chosen", "sensed", "decided"), TABLE)
def test_decisions(chosen: dict[str, Any], sensed: dict[str, Any], decided: str) -> None:
    assert told(chosen, sensed) == decided


@pytest.mark.parametrize(
    ("rule", "sensed", "still"),
    [
        ("busy", {"others_percent": 1.0, "others_long_percent": 30.0}, True),
        ("busy", {"others_percent": 30.0, "others_long_percent": 20.0}, True),
        ("busy", {"others_percent": 20.0, "others_long_percent": 20.0}, False),
        ("hot", {"hottest_c": 76.0}, True),
        ("hot", {"hottest_c": 74.0}, False),
        ("memory", {"memory_free_percent": 7.0}, True),
        ("memory", {"memory_free_percent": 8.5}, False),
    ],
)
def test_an_active_rule_ends_at_a_lower_limit(
    rule: str, sensed: dict[str, Any], still: bool
) -> None:
    decided = decide(PolicySettings(), SensorReadings(**{**QUIET, **sensed}), frozenset({rule}))
    assert isinstance(decided, Pause) is still


modes = st.sampled_from(["always", "auto", "never"])
percents = st.none() | st.floats(0, 100)
senses = st.builds(
    SensorReadings,
    minute=st.none() | st.integers(0, 7 * DAY_MINUTES - 1),
    on_battery=st.none() | st.booleans(),
    battery_percent=percents,
    others_percent=percents,
    others_long_percent=percents,
    user_idle_s=st.none() | st.floats(0, 1e6),
    metered=st.none() | st.booleans(),
    hottest_c=st.none() | st.floats(0, 120),
    memory_free_percent=percents,
    gpu=st.booleans(),
    up_today_bytes=st.integers(0, 10**12),
    down_today_bytes=st.integers(0, 10**12),
    home_bytes=st.none() | st.integers(0, 10**12),
)
settings = st.builds(
    PolicySettings,
    work=st.sampled_from(["always", "auto"]),
    hours=st.sampled_from(["", NIGHTS]),
    up_mb_a_day=st.sampled_from([0.0, 100.0]),
    disk_gb=st.sampled_from([0.0, 5.0]),
    battery_least_percent=st.floats(0, 100),
    cpu_share=st.floats(0.01, 1),
    **dict.fromkeys(RULES, modes),
)
rules = st.frozensets(st.sampled_from(RULES))


@given(chosen=settings, sensed=senses, held=rules)
def test_a_decision_names_only_rules_that_apply(
    chosen: PolicySettings, sensed: SensorReadings, held: frozenset[str]
) -> None:
    decided = decide(chosen, sensed, held)
    if isinstance(decided, Pause):
        assert decided.rules
        assert decided.reason
        assert chosen.work == "auto"
        assert all(getattr(chosen, rule) != "always" for rule in decided.rules)
        assert decide(chosen, sensed, decided.rules) == decided, (
            "the same readings keep the decision"
        )
    elif isinstance(decided, Slow):
        assert 0 < decided.share < 1
    ahead = forecast(chosen, sensed, decided)
    assert ahead.free_in_s >= 0
    assert ahead.free_for_s >= 0
    assert not ahead.free_in_s or isinstance(decided, Pause)


@given(chosen=settings, sensed=senses)
def test_a_stricter_mode_never_allows_more(chosen: PolicySettings, sensed: SensorReadings) -> None:
    from msgspec.structs import replace

    for rule in RULES:
        paused = [
            rule in decided.rules
            if isinstance(decided := decide(replace(chosen, **{rule: mode}), sensed), Pause)
            else False
            for mode in ("always", "auto", "never")
        ]
        assert paused == sorted(paused)


@given(chosen=settings)
def test_auto_works_if_all_readings_are_unknown(chosen: PolicySettings) -> None:
    from msgspec.structs import replace

    auto = replace(chosen, work="auto", **dict.fromkeys(RULES, "auto"))
    assert not isinstance(decide(auto, SensorReadings()), Pause)


@pytest.mark.parametrize(
    ("chosen", "sensed", "ahead"),
    [
        ({}, {}, Forecast()),
        ({"hours": NIGHTS}, {}, Forecast(free_in_s=6 * 3600.0)),
        ({"hours": NIGHTS}, {"minute": 2 * DAY_MINUTES + 1140}, Forecast(free_for_s=13 * 3600.0)),
        ({"hours": NIGHTS}, {"on_battery": True}, Forecast()),
        ({"hours": NIGHTS, "schedule": "always"}, {}, Forecast()),
        (CAP, {"up_today_bytes": 10**9}, Forecast(free_in_s=12 * 3600.0)),
    ],
)
def test_forecast(chosen: dict[str, Any], sensed: dict[str, Any], ahead: Forecast) -> None:
    made, felt = PolicySettings(**chosen), SensorReadings(**{**QUIET, **sensed})
    assert forecast(made, felt, decide(made, felt)) == ahead


def test_an_idle_machine_works_without_limits() -> None:
    assert decide(PolicySettings(), SensorReadings(**QUIET)) == Run()
