"""Which versions a job takes."""

from __future__ import annotations

import pytest

from coordinator.jobs import model_refs
from coordinator.runs.recorded import named_run
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import RunSpec
from protocols.errors import UnknownName, UsageError

DIGEST = "ab" * 32


def run_of(strategy: str) -> Run:
    spec = RunSpec(task="ping", rounds=1, strategy=strategy)
    closed = Round(round=1, digest=DIGEST)
    return Run(id=f"ping-{strategy}", spec=spec, head=DIGEST, best=closed, history=(closed,))


def test_a_run_whose_peers_keep_layers_has_no_model_for_a_job() -> None:
    runs = [run_of("fedavg"), run_of("fedbn")]
    assert model_refs.resolve(runs, ["ping-fedavg"]).models[0].digest == DIGEST
    with pytest.raises(
        UsageError, match=r"the layers \*norm\* of run ping-fedbn stay on each peer"
    ):
        model_refs.resolve(runs, ["ping-fedbn"])


def run_named(run_id: str, task: str, digest: str, app: str = "") -> Run:
    spec, closed = RunSpec(task=task, rounds=1, app=app), Round(round=1, digest=digest)
    return Run(id=run_id, spec=spec, head=digest, best=closed, history=(closed,))


RUNS = [
    run_named("pets-py-Pets-aa", "pets.py:Pets", "aa" * 32),
    run_named("pets-py-Pets-bb", "pets.py:Pets", "bb" * 32),
    run_named("ping-cc", "ping", "cc" * 32),
    run_named("flower-qs-dd", "flower:qs", "dd" * 32, app="0" * 64),
]


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("pets.py:Pets", "pets-py-Pets-bb"),
        ("./pets.py:Pets", "pets-py-Pets-bb"),
        ("some/folder/pets.py:Pets", "pets-py-Pets-bb"),
        ("Pets", "pets-py-Pets-bb"),
        ("pets-py-Pets-a", "pets-py-Pets-aa"),
        ("ping", "ping-cc"),
        ("flower:qs", "flower-qs-dd"),
        ("qs", "flower-qs-dd"),
    ],
)
def test_a_run_is_found_by_each_name_of_its_task(name: str, run_id: str) -> None:
    assert named_run(RUNS, name).id == run_id
    if run_id.startswith("pets"):
        digest = run_id[-2:] * 32
        for asked, full in ((name, run_id), (f"{name}:latest", f"{run_id}:latest")):
            found = model_refs.resolve(RUNS, [asked])
            assert (found.names, found.models[0].digest) == ((full,), digest)


def test_a_command_that_takes_an_id_says_so() -> None:
    for name in ("pets.py:Pets", "Pets"):
        with pytest.raises(UnknownName, match="is a task, and this command takes the id") as caught:
            named_run(RUNS, name, newest=False)
        assert caught.value.hint == "its newest run is pets-py-Pets-bb"
    assert named_run(RUNS, "ping", newest=False).id == "ping-cc"  # the only one that begins so


def test_a_name_of_several_tasks_is_refused_with_their_names() -> None:
    runs = [*RUNS, run_named("cats-py-Pets-ee", "cats.py:Pets", "ee" * 32)]
    with pytest.raises(UnknownName, match=r"several tasks .*: pets\.py:Pets, cats\.py:Pets"):
        named_run(runs, "Pets")
    assert named_run(runs, "cats.py:Pets").id == "cats-py-Pets-ee"


def test_the_model_of_a_flower_app_is_for_the_app_alone() -> None:
    with pytest.raises(UsageError, match="only the app can use its model"):
        model_refs.resolve(RUNS, ["flower:qs"])
