"""The table of run options and what is made from it: command line, checks and form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import msgspec
import pytest
import typer.main
from msgspec.structs import replace
from typer.testing import CliRunner

from coordinator.cli import runs
from coordinator.monitor.tui import run_form
from coordinator.remote import run_options
from coordinator.runs import options, spec_rules
from coordinator.runs.options import OPTIONS, Bounds, Option
from coordinator.runs.state import Run
from coordinator.runs.task_settings import ToldSettings
from coordinator.storage.run_events import RunSpec
from protocols.errors import NotRunning, UnknownName, UsageError
from protocols.model.schema_card import SchemaCard
from protocols.model.setting_specs import SettingSpec

FIELDS = {field.name: field for field in msgspec.structs.fields(RunSpec)}
BOUNDED = [option for option in OPTIONS if option.bounds is not None]
#: How a number is typed that has a unit.
FORMS = {"deadline": "{}s", "select": "{}x"}


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.is_plain], ids=lambda o: o.name)
def test_a_plain_option_is_as_its_field(option: Option) -> None:
    kind = FIELDS[option.field].type
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind  # without its bound
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    assert (option.kind, set(option.choices)) == (str if choices else kind, set(choices))
    assert not option.choices or option.default in option.choices
    if option.bounds is not None:
        assert option.bounds.contains(option.default)


def test_the_command_line_takes_every_option_of_the_table() -> None:
    group = typer.main.get_command(runs.runs)
    assert isinstance(group, click.Group)
    flags = [opt for one in group.commands["start"].params for opt in one.opts]
    assert flags == ["task", *(f"--{o.name}" for o in OPTIONS), "--follow", "--json"]


def help_words(*words: str) -> list[str]:
    """The options in the help of `run start`."""
    done = CliRunner(env={"COLUMNS": "80"}).invoke(runs.runs, ["start", *words])
    assert done.exit_code == 0
    return re.findall(r"^  --(\S+)", done.stdout, re.MULTILINE)


def test_help_shows_the_common_options_and_help_all_the_others() -> None:
    common = [option.name for option in OPTIONS if option.is_common]
    short = help_words("--help")
    assert short == [*common, "follow", "json", "help-all", "help"]
    assert len(short) - len(["help-all", "help"]) == 10
    rest = [o.name for o in OPTIONS if not o.is_common and o.name != "task"]
    assert help_words("--help-all") == [*short, *rest]


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (
            ["--target", "price", "--target", "rmse=2.5"],
            "the goal is now set by: --until rmse=2.5\n",
        ),
        (["--target", "0.9"], "the goal is now set by: --until 0.9\n"),
        (["--target", "price", "--until", "rmse=2.5"], ""),
    ],
)
def test_a_goal_in_target_is_read_with_a_note(
    words: list[str], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    done = CliRunner().invoke(runs.runs, ["start", "tabular", *words])
    assert isinstance(done.exception, NotRunning)  # no coordinator: all options were read
    assert done.stderr.endswith(note)
    assert bool(done.stderr) == bool(note)


NUMBERS = [o for o in BOUNDED if o.kind in (int, float) and not o.repeatable]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda o: o.name)
def test_the_command_line_takes_the_least_number_of_an_option(option: Option) -> None:
    assert option.bounds is not None
    group = typer.main.get_command(runs.runs)
    assert isinstance(group, click.Group)
    least = 0 if option.bounds.or_zero else option.bounds.minimum
    least += 1 if option.bounds.above_minimum else 0
    text = str(option.kind(least))
    with group.commands["start"].make_context("start", ["ping", f"--{option.name}", text]) as made:
        assert made.params[runs._variable(option)] == least


def outside(bounds: Bounds) -> float:
    """A number that does not hold."""
    if bounds.minimum == float("-inf"):
        return float("inf")
    if bounds.above_minimum:
        return int(bounds.minimum)
    return bounds.minimum / 2 if bounds.or_zero else bounds.minimum - 1


@pytest.mark.parametrize("option", BOUNDED, ids=lambda o: o.name)
def test_each_bound_is_checked_at_every_entrance(option: Option) -> None:
    assert option.bounds is not None
    number = outside(option.bounds)
    words = f"--{option.name} must be {option.limits}"
    text = FORMS.get(option.name, "{}").format(number)
    value: Any = text if option.kind is str else number
    with pytest.raises(UsageError, match=words):
        run_options.build_order(
            {"task": "ping", option.name: [value] if option.repeatable else value}
        )
    with pytest.raises(UsageError, match=words):
        run_form.order({"task": "ping", option.name: text})
    spec = RunSpec(task="ping", rounds=1)
    options.check(spec)
    for bad in (number, float("nan")):
        with pytest.raises(UsageError, match=words):
            options.check(replace(spec, **{option.field: bad}))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.choices], ids=lambda o: o.name)
def test_a_choice_that_is_not_there_is_refused(option: Option) -> None:
    with pytest.raises(UsageError, match=f"--{option.name} must be .* or .*, not 'by mood'"):
        run_options.build_order({"task": "ping", option.name: "by mood"})


def test_what_is_left_out_is_as_the_table_says() -> None:
    spec = run_options.build_order({"task": "ping"}).spec
    for option in OPTIONS:
        if option.is_plain:
            assert getattr(spec, option.field) == option.default, option.name
    assert (spec.deadline_s, spec.deadline, spec.select, spec.handshake) == (
        600.0,
        "fixed",
        0,
        True,
    )


def test_bounds_hold_for_numbers_without_limit() -> None:
    assert Bounds("1 or more", 1).contains(10**400)
    assert not Bounds("1 or more", 1).contains(-(10**400))


@pytest.mark.parametrize(
    ("task", "settings", "told", "hint"),
    [
        ("tabular", {}, "needs the column to predict", "--target COLUMN"),
        ("tabular", {"target": "x", "kind": "ranking"}, "--kind must be auto, class", ""),
        ("tabular", {"target": "x", "features": "a,x"}, "x is the target", ""),
        ("tabular", {"target": "x", "scaling": "log"}, "scaling must be standard or", ""),
        ("mnist", {"target": "x"}, "mnist predicts no column of a table", "--until accuracy=0.9"),
        ("lora", {"rank": 4}, "lora needs the name of its base model", "--set model=NAME"),
    ],
)
def test_a_run_without_what_its_task_needs_is_refused_at_once(
    task: str, settings: dict[str, str], told: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        spec_rules.check(RunSpec(task=task, rounds=1, settings=settings))
    assert hint in refused.value.hint
    spec_rules.check(RunSpec(task="tabular", rounds=1, settings={"target": "x", "features": "a"}))
    spec_rules.check(RunSpec(task="mine.py:Mine", rounds=1))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("Pets", "'Pets'; did you mean pets.py:Pets"),
        ("pest.py:Pets", "did you mean pets.py:Pets"),
        ("other", "can run the task 'other'$"),
    ],
)
def test_a_task_that_no_peer_has_is_refused_with_the_nearest(task: str, words: str) -> None:
    known = {"pets.py:Pets", "mnist"}
    spec_rules.check_known(RunSpec(task="mnist", rounds=1), known)
    spec_rules.check_known(RunSpec(task=task, rounds=1), ())
    with pytest.raises(UnknownName, match=words) as caught:
        spec_rules.check_known(RunSpec(task=task, rounds=1), known)
    assert "tasks of the online peers: mnist, pets.py:Pets;" in caught.value.hint


def test_a_new_run_of_lora_says_how_adapters_are_averaged() -> None:
    """Agents take a run that does not say so for an old one, which averaged both factors."""
    for given, wanted in (([], "ffa"), (["aggregation=average"], "average")):
        order = run_options.build_order({"task": "lora", "set": ["model=tiny", *given]})
        assert order.spec.settings["aggregation"] == wanted
    assert "aggregation" not in run_options.build_order({"task": "mnist"}).spec.settings


def test_settings_that_peers_of_an_older_version_did_not_tell_are_known() -> None:
    card = SchemaCard(
        task="lora", version="1", tensors={}, settings={"rank": SettingSpec(default=8)}
    )
    told = ToldSettings()
    told.note(Run(id="lora-1", spec=RunSpec(task="lora", rounds=1), card=card))
    told.check(RunSpec(task="lora", rounds=1, settings={"aggregation": "ffa", "rank": 4}))
    with pytest.raises(UnknownName, match="no setting 'agregation'"):
        told.check(RunSpec(task="lora", rounds=1, settings={"agregation": "ffa"}))
