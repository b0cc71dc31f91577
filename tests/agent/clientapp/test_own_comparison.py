"""When an agent compares models after a run, and what of it leaves the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from msgspec.structs import replace

from agent.clientapp import own_comparison
from agent.clientapp.own_comparison import OwnComparisons
from agent.data.settings import DataSettings
from agent.home import audit_log, own_results
from agent.home.settings_schema import AgentSettings
from agent.tasks import tabular_local
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_blend import Blend
from agent.tasks.work import Done, Measure
from agent.tasks.work import Work as TrainerWork
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Failed
from agent.trainer.progress import WorkControl
from protocols.errors import CommonweightError, Refused, TrainerFailed, UnknownName, Unreachable
from protocols.messages.comparisons import Comparison, without_blend
from protocols.messages.work import NamedModel, Which, Work
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.private_training import EPSILON
from protocols.tables import preprocessing
from tests.support.tables import patients


class Trainer:
    """The real executor, in this process."""

    def __init__(self, data: DataSettings) -> None:
        self.data, self.done = data, 0
        self._executor = WorkExecutor(WorkControl(), lambda answer: None, 1)

    def run(self, work: TrainerWork) -> Done:
        try:
            found = self._executor.do(replace(work, data=self.data))
        except CommonweightError as err:
            raise TrainerFailed(err.code, err.message) from err
        assert not isinstance(found, Failed)
        self.done += 1
        return found


class Link:
    """A coordinator, as an agent sees it. `told`: what it was sent."""

    def __init__(self, model: NamedModel, file: Path) -> None:
        self.model, self.file = model, file
        self.told: list[Comparison] = []
        self.asked = 0
        self.error: CommonweightError | None = None

    def named_model(self, name: str, which: Which) -> NamedModel:
        self.asked += 1
        if name != self.model.run:
            raise UnknownName("no such run")
        return self.model

    def download(self, digest: str, nbytes: int, target: Path) -> None:
        shutil.copy(self.file, target)

    def send_comparison(self, told: Comparison) -> None:
        if self.error is not None:
            raise self.error
        self.told.append(told)


class Site:
    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        table = patients(folder / "own.csv", 150, 1)
        data = DataSettings(path=str(table), device="cpu", min_count=1)
        settings: dict[str, Any] = {"target": "ill", "model": "linear", "epochs": 1}
        task = Tabular()
        task.load(data)
        made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
        settings["preprocessing"] = preprocessing.encode(made)
        shared = folder / "shared.safetensors"
        digest = weights.save(task.init(0, settings), shared)
        self.work = Work(run="tabular-1", round=1, kind="train", task="tabular", settings=settings)
        nbytes = shared.stat().st_size
        model = NamedModel(
            run="tabular-1",
            round=3,
            task="tabular",
            digest=digest,
            nbytes=nbytes,
            ended_rounds=3,
        )
        self.link, self.trainer = Link(model, shared), Trainer(data)
        self.owner = AgentSettings(tasks=("tabular",), data_columns=("*",))
        self.was_told, self.states = True, list[bool]()

    def own(self) -> OwnComparisons:
        return OwnComparisons(
            self.home,
            self.trainer,
            lambda: self.owner,
            lambda: self.link,
            lambda run: self.states.append(bool(run)),
            lambda task, settings, digest: self.was_told and digest == self.link.model.digest,
        )

    def result(self) -> own_results.OwnResult | None:
        return own_results.newest(self.home)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_comparison, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(tabular_local, "MIN_LOCAL_ROUNDS", 3)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def finish(own: OwnComparisons) -> None:
    for _ in range(100):
        if not own.advance() and own.due_s == float("inf"):
            return
    raise AssertionError("it does not end")


def test_it_waits_for_the_end_then_compares_and_tells_once(site: Site) -> None:
    ended = site.link.model
    site.link.model = replace(ended, ended_rounds=0)
    own = site.own()
    assert own.due_s == float("inf")
    own.note(site.work)
    assert not own.advance()
    assert (site.link.asked, site.trainer.done) == (1, 0), "the run goes on"
    own = site.own()  # a restart
    site.link.model = ended
    finish(own)
    found = site.result()
    assert found is not None
    assert found.comparison is not None
    assert (found.is_told, found.to_tell) == (True, False)
    assert found.comparison.models.keys() == {"alone", "shared", "personal", "blend"}
    assert site.link.told == [without_blend(found.comparison)]
    assert "blend" not in site.link.told[0].models
    assert site.states == [True, False] * site.trainer.done
    (left,) = audit_log.read(site.home)
    assert (left.what, left.run, left.num_held_out) == ("comparison", "tabular-1", 30)
    assert left.metrics.keys() == {"alone accuracy", "shared accuracy", "personal accuracy"}
    assert site.own().due_s == float("inf"), "nothing is left to do"
    kept = own_results.recommended(site.home, "tabular-1", "shared")
    assert kept is not None
    assert weights.file_digest(kept.path) == ended.digest, "it predicts with the best version"
    own.note(replace(site.work, round=4))  # the run was resumed
    assert site.result() is None


def test_the_model_that_the_run_has_kept_is_compared_not_the_one_it_trained_last(
    site: Site,
) -> None:
    own = site.own()
    own.note(site.work)
    last = {**site.work.settings, "model": "mlp", "hidden": "4"}
    own.note(replace(site.work, round=7, begun=5, settings=last))
    own = site.own()  # a restart
    finish(own)
    found = site.result()
    assert found is not None
    assert found.comparison is not None, found.why
    assert (found.model, found.is_told) == ("linear", True)
    assert own_results.lines_of(found)[0].startswith("run tabular-1, model linear, on 30 held-out")
    run = own_results.read_run(own_results.folder_of(site.home, "tabular-1"))
    assert run is not None
    assert run.settings_of(7)["model"] == "mlp"
    kept = own_results.recommended(site.home, "tabular-1", "shared")
    assert kept is not None
    assert weights.file_digest(kept.path) == site.link.model.digest, "it predicts offline"
    assert kept.settings["model"] == "linear"


def test_the_other_models_of_a_run_are_in_the_blend_without_a_download(site: Site) -> None:
    (site.home / "cache").mkdir()
    settings, bases = {**site.work.settings, "hidden": "4"}, dict[str, str]()
    task = Tabular()
    task.load(site.trainer.data)
    kinds: tuple[dict[str, Any], ...] = (
        {"model": "linear"}, {"model": "mlp"}, {"model": "trees", "trees": 3}
    )  # fmt: skip
    own = site.own()
    for number, kind in enumerate(kinds):
        of, file = {**settings, **kind}, site.home / "cache" / "new"
        digest = weights.save(task.train_locally(task.init(0, of), of, lambda *_: None), file)
        file.rename(file.with_name(f"{digest}.safetensors"))
        bases[kind["model"]] = digest
        begun = 10 * number
        own.note(replace(site.work, round=begun + 1, begun=begun, settings=of, base=digest))
        for old in (site.home / "cache").iterdir():  # the cache has room for the newest alone
            if old.stem != digest:
                old.unlink()
    finish(own)
    folder = own_results.folder_of(site.home, "tabular-1")
    found = own_results.recommended(site.home, "tabular-1", "blend")
    assert found is not None
    blend = Blend.read(weights.load(found.path))
    assert blend is not None
    assert [one.kind for one in blend.members] == ["linear", "linear", "mlp", "trees"]
    for member in blend.members[2:]:
        file = site.home / "one"
        assert weights.save(member.weights, file) == bases[member.kind]
    assert {file.stem for file in folder.glob("*.safetensors")} == {
        "shared", "alone", "personal", "blend"
    }, "the others are deleted"  # fmt: skip
    data = DataSettings(path=site.trainer.data.path, device="cpu")
    rows = [*task.predict(weights.load(found.path), found.settings, data.path)]
    assert sum(len(batch["ill"]) for batch in rows) == 150


@pytest.mark.parametrize("compare", ["on", "off"])
def test_versions_for_a_blend_stay_only_until_its_end(
    site: Site, compare: Literal["on", "off"]
) -> None:
    site.owner = replace(site.owner, compare=compare)
    (site.home / "cache").mkdir()
    digest = weights.save(weights.load(site.link.file), site.home / "cache" / "new")
    (site.home / "cache" / "new").rename(site.home / "cache" / f"{digest}.safetensors")
    own = site.own()
    own.note(replace(site.work, base=digest))
    own.note(replace(site.work, round=7, begun=5))
    folder = own_results.folder_of(site.home, "tabular-1")
    other = own_results.other_file(folder, 0)
    assert other.exists() == (compare == "on")
    finish(own)
    assert not other.exists()
    other.write_bytes(b"left by a stop before it was deleted")
    site.own()
    assert not other.exists()


def test_a_version_that_is_not_the_best_one_any_more_is_not_compared(site: Site) -> None:
    """The run is resumed while its comparison waits, and keeps another version then."""

    def stops(work: TrainerWork) -> Done:
        raise TrainerFailed("stopped", "the agent ends")

    own, run = site.own(), site.trainer.run
    own.note(site.work)
    site.trainer.run = stops  # type: ignore[method-assign]
    own.advance()
    site.trainer.run = run  # type: ignore[method-assign]
    shared = own_results.model_file(own_results.folder_of(site.home, "tabular-1"), "shared")
    assert weights.file_digest(shared) == site.link.model.digest
    own.note(replace(site.work, round=4))
    version = weights.load(shared)
    changed = Weights({name: version[name] + 1 for name in version})
    digest = weights.save(changed, site.home / "changed")
    site.link = Link(
        replace(site.link.model, round=6, digest=digest),
        site.home / "changed",
    )
    finish(own)
    found = site.result()
    assert found is not None
    assert (found.digest, weights.file_digest(shared)) == (digest, digest)


def test_a_machine_that_trained_another_model_alone_is_told_which_one_is_kept(site: Site) -> None:
    mlp = {**site.work.settings, "model": "mlp", "hidden": "4"}
    site.link.model = replace(site.link.model, settings=dict(site.work.settings))
    site.owner = replace(site.owner, compare="off")
    own = site.own()
    own.note(replace(site.work, round=7, begun=5, settings=mlp))
    finish(own)
    kept = own_results.recommended(site.home, "tabular-1")
    assert kept is not None
    assert (kept.model, kept.settings["model"], kept.result.model) == (
        "shared", "linear", "linear",
    )  # fmt: skip
    assert (site.trainer.done, site.link.told) == (0, []), "the owner wants no comparison"


def test_a_large_version_does_not_stay(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_comparison, "_KEPT_BYTES", site.link.model.nbytes - 1)
    own = site.own()
    own.note(site.work)
    finish(own)
    found = site.result()
    assert found is not None
    assert found.comparison is not None
    assert own_results.recommended(site.home, "tabular-1", "shared") is None
    better = own_results.text_of_better(site.home, "tabular-1", "0" * 64)
    assert "the run has kept another version, after round 3" in better
    assert own_results.text_of_better(site.home, "tabular-1", found.digest) == ""


def test_what_the_coordinator_could_not_take_is_told_later_and_what_it_refuses_is_not(
    site: Site,
) -> None:
    own = site.own()
    own.note(site.work)
    site.link.error = Unreachable("away")
    with pytest.raises(Unreachable):
        finish(own)
    site.link.error = None
    own = site.own()
    own.advance()
    assert len(site.link.told) == 1
    own.note(site.work)
    site.link.error = Refused("not taken")
    finish(own)
    found = site.result()
    assert found is not None
    assert (found.is_told, found.to_tell) == (False, False)


#: Why nothing may leave: of the run's work, and of the owner's settings.
QUIET: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a secure run": ({"codec": "masked:32"}, {}),
    "a run with noise": ({"settings": {EPSILON: 3.0}}, {}),
    "local": ({}, {"compare": "local"}),
    "a privacy budget": ({}, {"privacy_max_epsilon": 4.0}),
    "secure runs alone": ({}, {"secure_min": 3}),
}


@pytest.mark.attack("3", by="coordinator")
@pytest.mark.parametrize("why", [*QUIET, "off", "a version that was not evaluated here"])
def test_no_coordinator_gets_a_comparison_that_the_owner_keeps(site: Site, why: str) -> None:
    """Attack: a coordinator asks for the comparison of a run, or makes the run plain afterwards,
    although its metrics stay on the machine."""
    of_run, of_owner = QUIET.get(why, ({}, {}))
    settings = {**site.work.settings, **of_run.get("settings", {})}
    work = replace(site.work, **{**of_run, "settings": settings})
    site.owner = replace(site.owner, **of_owner)
    own = site.own()
    own.note(work)
    if why == "off":
        site.owner = replace(site.owner, compare="off")
    if why == "a version that was not evaluated here":
        site.was_told = False
    if of_run:  # the same run again, as if it had been a plain one
        own.note(site.work)
    finish(own)
    assert site.link.told == []
    assert audit_log.read(site.home) == []
    found = site.result()
    assert found is not None
    if why == "off":
        assert (found.comparison, site.trainer.done) == (None, 0)
        return
    assert found.comparison is not None, "its owner sees it"
    assert not found.to_tell


@pytest.mark.attack("3", by="coordinator")
def test_no_coordinator_gets_a_metric_of_a_blend(site: Site) -> None:
    """Attack: a coordinator has a machine train from a version that it has made to learn about a
    row, as another model of the run. It is in the blend, so that a metric of that tells the row,
    although this machine has told no evaluation of the version."""
    (site.home / "cache").mkdir()
    own = site.own()
    own.note(site.work)
    settings = {**site.work.settings, "model": "mlp", "hidden": "4"}
    task = Tabular()
    task.load(site.trainer.data)
    made = site.home / "cache" / "made"
    digest = weights.save(task.init(1, settings), made)
    made.rename(made.with_name(f"{digest}.safetensors"))
    own.note(replace(site.work, round=7, begun=5, settings=settings, base=digest))
    finish(own)
    found = site.result()
    assert found is not None
    assert found.comparison is not None
    assert "blend" in found.comparison.models, "its owner sees it"
    (told,) = site.link.told
    assert {*told.models, *told.gains, told.recommended} <= {"alone", "shared", "personal"}
    (left,) = audit_log.read(site.home)
    assert left.metrics.keys() == {"alone accuracy", "shared accuracy", "personal accuracy"}


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (TrainerFailed("usage", "the task cannot measure models row by row"), "task"),
        (TrainerFailed("data", "a comparison needs 21 held-out rows, and there are 20"), "rows"),
        (TrainerFailed("died", "the trainer ended"), "failed"),
    ],
)
def test_the_coordinator_hears_that_there_is_none_and_no_more(
    site: Site, error: TrainerFailed, missing: str
) -> None:
    def fails(work: TrainerWork) -> Done:
        raise error

    site.trainer.run = fails  # type: ignore[method-assign]
    own = site.own()
    own.note(site.work)
    finish(own)
    found = site.result()
    assert found is not None
    assert (found.comparison, found.why, found.is_told) == (None, error.message, True)
    (told,) = site.link.told
    assert told == Comparison(run="tabular-1", metric="", rows=0, models={}, missing=missing)  # type: ignore[arg-type]
    site.link.told.clear()
    site.owner = replace(site.owner, compare="local")
    own.note(replace(site.work, run="tabular-2"))
    site.link.model = replace(site.link.model, run="tabular-2")
    finish(own)
    assert site.link.told == []


def test_a_task_that_the_owner_forbids_meanwhile_is_not_run(site: Site) -> None:
    own = site.own()
    own.note(site.work)
    site.owner = replace(site.owner, forbidden_tasks=("tabular",))
    finish(own)
    found = site.result()
    assert found is not None
    assert "does not allow the task" in found.why
    assert site.trainer.done == 0


def test_it_waits_while_another_run_needs_the_machine_and_obeys_its_bounds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.link.model = replace(site.link.model, metric="loss", lower_is_better=True)
    works: list[Measure] = []
    done = site.trainer.run

    def run(work: TrainerWork) -> Done:
        assert isinstance(work, Measure)
        works.append(work)
        return done(work)

    site.trainer.run = run  # type: ignore[method-assign]
    own = site.own()
    own.note(site.work)
    own.add_time("tabular-1", 40.0)
    own = site.own()  # after a restart
    own.note(site.work)
    own.add_time("tabular-1", 2.5)
    own.note(replace(site.work, run="tabular-2"))
    for _ in range(5):
        assert not own.advance()
    assert works == [], "the newer run may soon have more work"
    monkeypatch.setattr(own_comparison, "_QUIET_S", 0.0)
    own = site.own()
    while not works:
        own.advance()
    assert (works[0].run, works[0].most_s, works[0].metric) == ("tabular-1", 42.5, "loss")
    while not site.link.told:
        own.advance()
    assert site.link.told[0].metric == "loss"


def test_a_cancelled_part_is_done_again(site: Site) -> None:
    own, run = site.own(), site.trainer.run
    own.note(site.work)

    def cancelled(work: TrainerWork) -> Done:
        raise TrainerFailed("cancelled", "the work was cancelled")

    site.trainer.run = cancelled  # type: ignore[method-assign]
    assert not own.advance()
    assert (site.result(), site.states) == (None, [True, False])
    site.trainer.run = run  # type: ignore[method-assign]
    finish(own)
    assert site.link.told


def test_old_comparisons_are_deleted(site: Site) -> None:
    site.owner = replace(site.owner, compare="local")
    own = site.own()
    for number in range(own_results.MAX_RUNS + 3):
        own.note(replace(site.work, run=f"tabular-{number}"))
    assert len(list((site.home / own_results.FOLDER).iterdir())) == own_results.MAX_RUNS
