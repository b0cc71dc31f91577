"""A laptop for policy tests: a battery in a folder like /sys, and rules to obey."""

from __future__ import annotations

from pathlib import Path

RULES = ("battery", "busy", "user", "schedule", "metered", "hot", "memory", "traffic", "disk")


def on_mains(folder: Path, online: bool) -> None:
    """Write a laptop's /sys, with its battery and whether it is on mains power."""
    supplies = folder / "class/power_supply"
    for name, files in {
        "BAT0": {"type": "Battery", "status": "Discharging", "capacity": "41"},
        "AC": {"type": "Mains", "online": str(int(online))},
    }.items():
        (supplies / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (supplies / name / file).write_text(text)


def heeding(*rules: str, **settings: str) -> dict[str, str]:
    """Environment variables for agents that obey only these policy rules."""
    asked = {rule: "always" for rule in RULES if rule not in rules} | {"work": "auto"} | settings
    return {f"COMMONWEIGHT_AGENT_{name.upper()}": value for name, value in asked.items()}
