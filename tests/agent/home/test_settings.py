"""The agent's settings (flag, environment, file, default) and its enrollment."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.home import enrollment_file, sensible_values, settings
from agent.home.enrollment_file import Enrollment
from agent.home.settings_schema import AgentSettings
from agent.setup import consents
from protocols.enrollment import certificates
from protocols.errors import ExitCode, HomeError, NotEnrolled, UsageError
from protocols.messages.mqtt import MqttAddress
from tests.support.ascii_locale import in_ascii


def file(home: Path, text: str) -> None:
    (home / settings.FILE).write_text(text)


def test_defaults_without_anything(tmp_path: Path) -> None:
    assert settings.read(tmp_path) == AgentSettings()


def test_the_order_is_flag_environment_file_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path, "parts = 2\nthreads = 2\nsplit = 'shards'\n")
    assert settings.read(tmp_path).threads == 2
    monkeypatch.setenv("COMMONWEIGHT_AGENT_THREADS", "3")
    monkeypatch.setenv("COMMONWEIGHT_AGENT_PARTS", "4")
    assert settings.read(tmp_path).threads == 3
    chosen = settings.read(tmp_path, threads=4, parts=None)
    assert (chosen.threads, chosen.parts, chosen.split, chosen.data_seed) == (4, 4, "shards", 0)


def test_a_wrong_variable_is_named_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_THREADS", "abc")
    with pytest.raises(UsageError, match="threads must be a whole number") as caught:
        settings.read(tmp_path)
    assert caught.value.hint == "correct the environment variable COMMONWEIGHT_AGENT_THREADS"


def test_tasks_in_the_environment_are_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_TASKS", "mnist, ping")
    chosen = settings.read(tmp_path)
    assert chosen.tasks == ("mnist", "ping")
    assert chosen.allows("ping")
    assert not chosen.allows("gait")
    assert not AgentSettings().allows("mnist"), "a new home allows nothing"
    assert AgentSettings(tasks=("*",)).allows("gait")


@pytest.mark.parametrize("tasks", ["tabular", "*"])
def test_tasks_in_the_environment_await_the_names_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: str
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_TASKS", tasks)
    file(tmp_path, "data = 'a.csv'\n")
    assert settings.read(tmp_path).standing_of("tabular") == "columns"
    assert settings.read(tmp_path).columns_of("tabular") == ()
    allowed = consents.allow(tmp_path, "tabular", columns=["age"])
    assert allowed.columns_of("tabular") == ("age",)
    assert settings.read(tmp_path).columns_of("tabular") == ("age",)
    # A home of an older version allows the columns that it always did.
    file(tmp_path, f"data = 'a.csv'\ntasks = ['{tasks}']\n")
    assert settings.read(tmp_path).columns_of("tabular") == ("*",)
    file(tmp_path, "data = 'a.csv'\n")
    monkeypatch.setenv("COMMONWEIGHT_AGENT_DATA_COLUMNS", "age,sex")
    assert settings.read(tmp_path).columns_of("tabular") == ("age", "sex")


@pytest.mark.attack("20.3", by="operator")
@pytest.mark.parametrize(
    "name", ["max_lr", "analyze_epsilon", "analyze_epsilon_per_question", "share_mbit_s"]
)
@pytest.mark.parametrize("text", ["inf", "nan", "1e999"])
def test_a_limit_is_a_finite_number(tmp_path: Path, name: str, text: str) -> None:
    """Attack: have an owner set a limit to a number that limits nothing: inf, nan, 1e999."""
    with pytest.raises(UsageError, match=f"{name} must be a number"):
        settings.change(tmp_path, **{name: settings.parse_value(name, text)})
    file(tmp_path, f"{name} = {'inf' if text == '1e999' else text}\n")
    with pytest.raises(UsageError, match=f"{name} must be a number"):
        settings.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("privacy_max_epsilon", "1e9", "must be at most 100, not 1e\\+09: with such an ε one row"),
        ("analyze_epsilon", "101", "which hides nothing"),
        ("max_lr", "1e30", "limits nothing; 0 is no limit"),
        ("up_mbit", "1e15", "limits nothing; 0 is no limit"),
        ("hang_timeout_s", "1e12", "longer than 31 days"),
        ("hang_timeout_s", "1e-9", "must be at least 1, not 1e-09: the trainer would be stopped"),
        ("data_min_rows", "99999999999999999999", "could take part in no run"),
        ("data_seed", "-1", "must be at least 0"),
        ("data_seed", "99999999999999999999", "a seed is a number of 63 bits"),
        ("threads", "100000", "no machine has so many cores"),
        ("privacy_delta", "1e-300", "hides all of the answer"),
        ("min_batch", "-3", "must be a whole number, at least 1"),
        ("busy_percent", "-1", "must be a number, at least 0, at most 100"),
    ],
)
def test_a_value_without_sense_is_refused_with_what_it_means(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} .*{told}"):
        settings.change(tmp_path, **{name: settings.parse_value(name, text)})
    assert settings.read(tmp_path) == AgentSettings()


def test_a_home_with_such_a_value_still_works_and_others_can_be_changed(tmp_path: Path) -> None:
    file(tmp_path, "privacy_max_epsilon = 1e9\nidle_timeout_s = 1e9\n")
    assert settings.change(tmp_path, threads=2).idle_timeout_s == 1e9
    told = sensible_values.objections(settings.read(tmp_path), AgentSettings.__struct_fields__)
    assert [text.partition(" ")[0] for text in told] == ["privacy_max_epsilon", "idle_timeout_s"]
    for value in (AgentSettings(), AgentSettings(privacy_max_epsilon=100.0)):
        assert not sensible_values.objections(value, AgentSettings.__struct_fields__)


def test_two_commands_at_once_lose_no_change(tmp_path: Path) -> None:
    names = ["mnist", "ping", "tabular", "images", "motion", "text-lm"]
    start = threading.Barrier(len(names) + 2)

    def allow(name: str) -> None:
        start.wait()
        consents.allow(tmp_path, name)

    def change(**values: Any) -> None:
        start.wait()
        settings.change(tmp_path, **values)

    with ThreadPoolExecutor(len(names) + 2) as pool:
        done = [pool.submit(allow, name) for name in names]
        done += [pool.submit(change, threads=3), pool.submit(change, min_batch=9)]
        for one in done:
            one.result()
    chosen = settings.read(tmp_path)
    assert set(chosen.tasks) == set(chosen.consents) == set(names)
    assert (chosen.threads, chosen.min_batch) == (3, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        "part = -1",
        "parts = 0",
        "part = 'two'",
        "part = 1",
        "part = 3\nparts = 3",
        "split = 'half'",
        "threads = -1",
        "idle_timeout_s = 0",
        "idle_timeout_s = nan",
        "log_level = 'loud'",
        "tasks = 'mnist'",
        "colour = 'red'",
        "part = ",
        "= 1",
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, wrong: str) -> None:
    file(tmp_path, wrong)
    with pytest.raises(UsageError) as caught:
        settings.read(tmp_path)
    assert caught.value.exit_code is ExitCode.USAGE
    assert settings.FILE in caught.value.message + caught.value.hint


def test_a_binary_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / settings.FILE).write_bytes(b"part = \xff\xfe")
    with pytest.raises(UsageError):
        settings.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("PART", "x"), ("PARTS", "0"), ("SPLIT", ""), ("IDLE_TIMEOUT_S", "-1")]
)
def test_a_wrong_variable_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(settings.ENVIRONMENT_PREFIX + name, value)
    with pytest.raises(UsageError):
        settings.read(tmp_path)


def test_a_change_keeps_the_rest_and_is_private(tmp_path: Path) -> None:
    settings.change(tmp_path, part=1, parts=3)
    settings.change(tmp_path, split="shards", data=None)
    assert settings.read(tmp_path) == AgentSettings(part=1, parts=3, split="shards")
    if os.name == "posix":
        assert (tmp_path / settings.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrong", [{"part": 1}, {"parts": 0}, {"split": "half"}, {"part": "x"}])
def test_a_wrong_change_leaves_the_file_alone(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """An agent could not start with a setting that `read` refuses."""
    settings.change(tmp_path, split="shards")
    before = (tmp_path / settings.FILE).read_bytes()
    with pytest.raises(UsageError):
        settings.change(tmp_path, **wrong)
    assert (tmp_path / settings.FILE).read_bytes() == before
    settings.read(tmp_path)


_, CA = certificates.new_ca("test")


def an_enrollment() -> Enrollment:
    return Enrollment(
        peer="P",
        name="box",
        fleet=certificates.fleet_id(CA),
        addresses=("host:1",),
        ca_pem=CA.decode(),
        certificate=b"\x00\xff",
        coordinator_public=bytes(32),
        mqtt=MqttAddress(host="host", port=1, user="fleet", password="secret"),
    )


def test_an_enrollment_is_read_back_and_private(tmp_path: Path) -> None:
    enrollment_file.write_enrollment(tmp_path, an_enrollment())
    assert enrollment_file.read_enrollment(tmp_path) == an_enrollment()
    if os.name == "posix":
        assert (tmp_path / enrollment_file.ENROLLMENT_FILE).stat().st_mode & 0o777 == 0o600


def test_without_an_enrollment_the_hint_is_join(tmp_path: Path) -> None:
    with pytest.raises(NotEnrolled) as caught:
        enrollment_file.read_enrollment(tmp_path)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert "join TICKET" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"peer":1}', b"[" * 100_000])
def test_a_damaged_enrollment_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / enrollment_file.ENROLLMENT_FILE).write_bytes(content)
    with pytest.raises(HomeError, match="damaged"):
        enrollment_file.read_enrollment(tmp_path)


def test_non_ascii_settings_in_any_locale(tmp_path: Path) -> None:
    settings.change(tmp_path, data="/home/jürgen/data.csv")
    in_ascii(f"""
        from pathlib import Path
        from agent.home import sensible_values, settings
        assert settings.read(Path({str(tmp_path)!r})).data == "/home/j\\u00fcrgen/data.csv"
    """)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tasks = 'x'", "tasks must be a list of texts; not 'x'"),
        ("hours = []", "hours must be text; not"),
        ("cpu_share = 'lots'", "cpu_share must be a number, .*; not 'lots'"),
        ("task_files = []", "task_files must be a table of names and values"),
    ],
)
def test_a_wrong_type_in_the_file_is_told_in_a_sentence(
    tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / settings.FILE).write_text(line)
    with pytest.raises(UsageError, match=words) as caught:
        settings.read(tmp_path)
    assert "`" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("battery", "maybe", "battery must be one of always, auto, never; not 'maybe'"),
        ("cpu_share", "200", "cpu_share must be a number, .*at most 1; not '200'"),
        ("min_batch", "-3", "min_batch must be a whole number, at least 1; not '-3'"),
        ("min_batch", "abc", "min_batch must be a whole number, at least 1; not 'abc'"),
        ("max_lr", "nan", "max_lr must be a number, at least 0; not 'nan'"),
        ("sandbox", "perhaps", "sandbox must be one of auto, require, off; not 'perhaps'"),
    ],
)
def test_the_error_for_a_wrong_value_names_the_valid_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(settings.ENVIRONMENT_PREFIX + name.upper(), value)
    with pytest.raises(UsageError, match=words):
        settings.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dta", "there is no setting 'dta'; did you mean data\\?"),
        ("cpu-share", "there is no setting 'cpu-share'; did you mean cpu_share\\?"),
        ("colour", "there is no setting 'colour'$"),
    ],
)
def test_a_misspelled_setting_is_told_with_the_nearest(
    tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        settings.change(tmp_path, **{name: "1"})
