"""Operations on runs and jobs, and the models of runs."""

from __future__ import annotations

from functools import cache

from benchmarks.faults import checker
from coordinator import strategies
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from protocols.errors import CommonweightError
from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import NAMES, Model, Run
from tests.journeys.operations import Choose, Deed, ignore, operation
from tests.support.waiting import wait_for

MODES = ("synchronous", "buffered", "fold")
CODECS = ("fp32", "bf16", "int8", "sign", "ternary", "topk")
#: What a strategy needs to work with three peers.
ARGUMENTS = {"fedtrimmedavg": ("beta=0.34",)}
#: More rounds than any sequence lasts.
ENDLESS = 100_000


@cache
def valid_runs(mode: str, quorum: int) -> list[tuple[str, str]]:
    """The strategies and codecs that work together in this mode."""
    found = []
    for strategy in strategies.names():
        for codec in CODECS:
            try:
                spec_rules.check(build_order(options(mode, strategy, codec, quorum, 1, 0)).spec)
            except CommonweightError:
                continue
            found.append((strategy, codec))
    return found


def options(
    mode: str, strategy: str, codec: str, quorum: int, rounds: int, kilobytes: int
) -> dict[str, object]:
    """The options of a run, by their names on the command line."""
    chosen: dict[str, object] = {
        "task": "quick",
        "rounds": rounds,
        "deadline": "4s",
        "strategy": strategy,
        "strategy-arg": ARGUMENTS.get(strategy, ()),
        "codec": codec,
        "set": (f"kilobytes={kilobytes}", f"pause_s={0.3 if rounds == ENDLESS else 0}"),
    }
    if mode == "buffered":
        return chosen | {"mode": "buffered", "buffer": 2}
    late = {"late": "fold"} if mode == "fold" else {}
    return chosen | {"quorum": quorum} | late


def words_of(chosen: dict[str, object]) -> list[str]:
    """These options as the words of a command line."""
    words = []
    for name, value in chosen.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name}", str(one)]
    return words


def _new_run(model: Model, choose: Choose, mode: str, rounds: int) -> tuple[Run, list[str]]:
    quorum = len(model.available) if rounds != ENDLESS else choose((1, len(model.available)))
    valid = valid_runs(mode, quorum)
    if model.peers_where(is_old=True):  # ternary updates of early builds are refused by design
        valid = [(strategy, codec) for strategy, codec in valid if codec != "ternary"]
    strategy, codec = choose(valid)
    kilobytes = choose((0, 200))
    run = Run(mode=mode, strategy=strategy, codec=codec, quorum=quorum)
    model.runs.append(run)
    return run, words_of(options(mode, strategy, codec, quorum, rounds, kilobytes))


def _can_start(model: Model) -> bool:
    return bool(model.available) and len(model.active) < 2


def _start(model: Model, choose: Choose, mode: str) -> Deed:
    run, words = _new_run(model, choose, mode, ENDLESS)
    waits_for_version = len(model.active) == 1 and choose((True, False))

    def deed(fleet: JourneyFleet) -> None:
        run.id = fleet.start_run(*words)
        if waits_for_version:
            fleet.until_versions(run.id)

    return deed


@operation(_can_start)
def start_synchronous_run(model: Model, choose: Choose) -> Deed:
    return _start(model, choose, "synchronous")


@operation(_can_start)
def start_buffered_run(model: Model, choose: Choose) -> Deed:
    return _start(model, choose, "buffered")


@operation(_can_start)
def start_run_that_folds(model: Model, choose: Choose) -> Deed:
    return _start(model, choose, "fold")


@operation(lambda model: bool(model.available) and not model.active)
def finish_run(model: Model, choose: Choose) -> Deed:
    """A run of three rounds with all peers that are there."""
    run, words = _new_run(model, choose, choose(MODES), rounds=3)
    run.state = "finished"

    def deed(fleet: JourneyFleet) -> None:
        run.id = fleet.start_run(*words)
        until_finished(fleet, run.id)

    return deed


def _all_can_sum(model: Model) -> bool:
    """A secure sum needs three peers; older agents know none."""
    is_whole = len(model.available) == len(NAMES)
    return is_whole and not model.active and not model.peers_where(is_old=True)


@operation(_all_can_sum)
def finish_secure_run(model: Model, choose: Choose) -> Deed:
    """A secure run of two rounds, after all owners have entered the ids that peers have now."""
    codec, strategy = choose(("fp32", "int8")), choose(("fedavg", "fedadam"))
    run = Run(mode="secure", strategy=strategy, codec=codec, quorum=3, state="finished")
    model.runs.append(run)
    chosen = options("synchronous", strategy, codec, 3, 2, choose((0, 200)))
    words = [*words_of(chosen | {"deadline": "30s"}), "--secure"]

    def deed(fleet: JourneyFleet) -> None:
        fleet.trust_each_other(NAMES)
        run.id = fleet.start_run(*words)
        until_finished(fleet, run.id)
        facts = checker.read_facts(fleet.home, run.id, "VersionCommitted")
        assert [len(fact["contributors"]) for fact in facts] == [3, 3]

    return deed


def until_finished(fleet: JourneyFleet, run: str) -> None:
    """Wait until a run has finished; fails with what it waits for."""
    try:
        fleet.outcome(run, within_s=60.0)
    except AssertionError as err:
        raise AssertionError(f"{err}\n{fleet.ask('run', 'show', run).stdout}") from err
    assert fleet.ended(run) == "finished", fleet.ask("run", "show", run).stdout


@operation(lambda model: bool(model.active))
def stop_run(model: Model, choose: Choose) -> Deed:
    run = choose(model.active)
    run.state = "stopped"

    def deed(fleet: JourneyFleet) -> None:
        fleet.do("run", "stop", run.id)
        wait_for(lambda: fleet.ended(run.id) == "stopped", f"run {run.id} is stopped")

    return deed


def _resumable(model: Model) -> list[Run]:
    """A run is resumed only if the enrolled peers can meet its quorum."""
    return [run for run in model.runs_in("stopped") if run.quorum <= len(model.enrolled)]


@operation(lambda model: bool(_resumable(model)) and _can_start(model))
def resume_run(model: Model, choose: Choose) -> Deed:
    run = choose(_resumable(model))
    run.state = "active"
    model.runs.remove(run)  # it is queued behind the others
    model.runs.append(run)
    return lambda fleet: ignore(fleet.do("run", "resume", run.id))


@operation(lambda model: bool(model.runs_in("stopped", "finished")))
def delete_run(model: Model, choose: Choose) -> Deed:
    run = choose(model.runs_in("stopped", "finished"))
    run.state = "deleted"
    return lambda fleet: ignore(fleet.do("run", "delete", run.id, "--yes"))


@operation(lambda model: bool(model.runs_in("finished")))
def export_model(model: Model, choose: Choose) -> Deed:
    run, which = choose(model.runs_in("finished")), choose(("best", "latest"))

    def deed(fleet: JourneyFleet) -> None:
        out = fleet.new_file(".safetensors")
        fleet.do("models", "export", run.id, str(out), "--which", which)
        assert out.stat().st_size > 0
        out.unlink()
        for card in fleet.files.glob(f"{out.stem}*"):
            card.unlink()

    return deed


# --- jobs ---


def _whole(model: Model) -> list[Run]:
    """The finished runs whose versions are whole models."""
    return [run for run in model.runs_in("finished") if run.strategy != "fedbn"]


@operation(lambda model: bool(model.available and _whole(model)))
def infer_sent_rows(model: Model, choose: Choose) -> Deed:
    run = choose(_whole(model))

    def deed(fleet: JourneyFleet) -> None:
        rows, out = fleet.folder / "ada.csv", fleet.new_file(".csv")
        fleet.do("infer", "--model", run.id, "--scatter", str(rows), "--out", str(out), "--yes")
        assert len(out.read_text().splitlines()) == len(rows.read_text().splitlines())
        out.unlink()

    return deed


@operation(lambda model: bool(model.available and _whole(model)))
def infer_privately(model: Model, choose: Choose) -> Deed:
    run, available = choose(_whole(model)), len(model.available)

    def deed(fleet: JourneyFleet) -> None:
        told = fleet.data("infer", "--private", "--model", run.id, "--deadline", "20s")
        assert told["peers"]["answered"] >= available, told

    return deed


@operation(lambda model: bool(model.available))
def analyze(model: Model, choose: Choose) -> Deed:
    available = len(model.available)

    def deed(fleet: JourneyFleet) -> None:
        told = fleet.data("analyze", "count, mean(x0)", "--deadline", "20s")["answer"]
        assert told["peers"] >= available, told

    return deed
