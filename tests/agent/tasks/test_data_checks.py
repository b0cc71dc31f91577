"""Data that a task cannot read are refused once, with what it expects, and without their path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.home.settings_schema import AgentSettings
from agent.setup import own_data
from agent.tasks import data_checks
from agent.tasks.work import Describe
from agent.trainer.process import TrainerProcess, trainer_program
from agent.trainer.retry import RetryingTrainer
from protocols.errors import DataError, TrainerFailed, UsageError
from protocols.messages.refusals import refusal_of
from tests.support.fleet_harness import ROOT


def folder_of_pictures(path: Path) -> None:
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        (path / name / "1.png").write_bytes(b"x")


def folder_of_texts(path: Path) -> None:
    path.mkdir()
    (path / "1.txt").write_text("hello")


def table(path: Path) -> None:
    path.write_text("price\n1\n")


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    """The disk with the data is not mounted."""


MADE: list[tuple[str, Callable[[Path], None], str]] = [
    ("tabular", folder_of_pictures, "the data are a folder without tables, and the task tabular"),
    ("tabular", empty_file, "the file of data is empty"),
    ("tabular", nothing, "there are no data at the path that is set on this machine"),
    ("images", table, "the data are a file, and the task images reads a folder with a folder of"),
    ("images", folder_of_texts, "the data are a folder without folders in it, and the task images"),
    ("images", empty_folder, "the folder of data is empty"),
    ("text-lm", folder_of_pictures, "the data are a folder without text files, and the task text"),
    ("lora", nothing, "there are no data at the path that is set on this machine"),
]


def test_a_file_of_a_table_fits_tabular_alone(tmp_path: Path) -> None:
    for name, tasks in (
        ("visits.csv", ["tabular"]),
        ("visits.PARQUET", ["tabular"]),
        ("notes.txt", ["lora", "tabular", "text-lm"]),
    ):
        (tmp_path / name).write_text("a\n1\n")
        found = data_checks.fitting_tasks(DataSettings(path=str(tmp_path / name)))
        assert found == tasks, "a text file may have columns"
    with pytest.raises(DataError, match="the data are a table, and the task text-lm"):
        data_checks.check("text-lm", DataSettings(path=str(tmp_path / "visits.csv")))


@pytest.mark.parametrize(("task", "make", "why"), MADE)
def test_a_misfit_is_told_without_its_path_and_with_it_to_the_owner(
    tmp_path: Path, task: str, make: Callable[[Path], None], why: str
) -> None:
    path = tmp_path / "secret"
    make(path)
    with pytest.raises(DataError) as caught:
        data_checks.check(task, DataSettings(path=str(path)))
    assert caught.value.message.startswith(why)
    assert "secret" not in caught.value.message
    assert str(path) in caught.value.hint


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("tabular", table),
        ("images", folder_of_pictures),
        ("text-lm", folder_of_texts),
        ("lora", folder_of_texts),
        ("mnist", nothing),
        ("line.py:Line", folder_of_texts),
    ],
)
def test_data_that_fit_pass(tmp_path: Path, task: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / "data")
    data_checks.check(task, DataSettings(path=str(tmp_path / "data")))


def test_a_pattern_and_data_on_another_machine_pass(tmp_path: Path) -> None:
    table(tmp_path / "visits-1.csv")
    data_checks.check("tabular", DataSettings(path=str(tmp_path / "visits-*.csv")))
    data_checks.check("tabular", DataSettings(path="s3://bucket/visits", reader="spark"))
    data_checks.check("tabular", DataSettings(path="/cluster/visits", reader="dask:tcp://h:8786"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_the_agent_may_not_read_is_told(tmp_path: Path) -> None:
    table(tmp_path / "locked.csv")
    (tmp_path / "locked.csv").chmod(0)
    with pytest.raises(DataError, match="the agent may not read the data of this machine"):
        data_checks.check("tabular", DataSettings(path=str(tmp_path / "locked.csv")))


def test_a_task_of_ones_own_is_not_tried_again_over_a_folder(tmp_path: Path) -> None:
    """Its own error, "Is a directory", said neither what is wrong nor that a retry is useless."""
    trainer = TrainerProcess(
        trainer_program(tmp_path / "work", threads=1),
        DataSettings(path=str(tmp_path)),
        sources={"line": f"{ROOT}/docs/examples/line.py:Line"},
    )
    given_up: list[str] = []
    retrying = RetryingTrainer(trainer, first_delay_s=0.01, on_given_up=given_up.append)
    try:
        for path, why in (
            (tmp_path, "the data are a folder, and the task reads a file"),
            (tmp_path / "none", "there are no data at the path that is set on this machine"),
        ):
            trainer.data = DataSettings(path=str(path))
            with pytest.raises(TrainerFailed) as caught:
                retrying.run(Describe(task="line", settings={}))
            assert str(path) in caught.value.hint, "the owner sees the path"
            told = refusal_of(caught.value)
            assert told.text == f"{why} (its owner sees why: commonweight-agent status)"
        trainer.data = DataSettings()
        with pytest.raises(TrainerFailed, match="reads data, and none are set on this machine"):
            retrying.run(Describe(task="line", settings={}))
        table(tmp_path / "words.csv")
        trainer.data = DataSettings(path=str(tmp_path / "words.csv"))
        with pytest.raises(TrainerFailed, match="the task line fails on these data: ValueError"):
            retrying.run(Describe(task="line", settings={}))
        assert not given_up, "the agent does not pause: other tasks may fit"
    finally:
        retrying.close()


# --- what the owner sees before a run --------------------------------------------------------


def test_the_owner_is_told_which_tasks_read_the_data(tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "pets")
    pets = AgentSettings(data=str(tmp_path / "pets"))
    said = "the data fit the tasks: images; none of them is allowed yet"
    assert own_data.check_setting(pets) == said
    assert own_data.check_setting(pets, allowing=True) == "the data fit the tasks: images"
    allowed = replace(pets, tasks=("images",))
    assert own_data.check_setting(allowed) == "the data fit the tasks: images"
    assert "tasks that bring their own data" in own_data.check(AgentSettings())


def test_data_that_fit_no_allowed_task_are_refused_at_once(tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "pets")
    only_tables = AgentSettings(data=str(tmp_path / "pets"), tasks=("tabular",))
    with pytest.raises(UsageError, match="tabular reads a CSV or Parquet file, or a folder of"):
        own_data.check_setting(only_tables)
    with_own_task = AgentSettings(data=str(tmp_path / "pets"), tasks=("tabular", "mine.py:Mine"))
    assert "only tasks of your own (tabular reads" in own_data.check_setting(with_own_task)
    only_own = replace(with_own_task, tasks=("mine.py:Mine",))
    said = "no built-in task reads such data, only tasks of your own"
    assert own_data.check_setting(only_own) == said


def test_a_wrong_path_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there are no data at .*typo\.csv"):
        own_data.check_setting(AgentSettings(data=str(tmp_path / "typo.csv")))
    with pytest.raises(UsageError, match=r"there are no data at .*typo\.csv"):
        own_data.check_path(AgentSettings(data=str(tmp_path / "typo.csv")))
