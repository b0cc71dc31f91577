"""Training runs."""

from __future__ import annotations

from starlette.responses import Response

from coordinator.api.routes.endpoint import Call, get, post, record
from coordinator.api.schema import EvaluationsResponse, StartRunRequest
from coordinator.runs.comparisons import why_no_evaluations
from coordinator.runs.export import check_on_disk, resolve_version
from coordinator.runs.state import Run


def start_run(call: Call) -> dict[str, str]:
    request = call.read(StartRunRequest)
    return {"run": call.service.runs.start(request.spec, request.from_digest)}


def find_run(call: Call) -> Run:
    return call.service.runs.find(call.param("run"))


async def stop_run(call: Call) -> None:
    runs, run = call.service.runs, find_run(call).id
    if not runs.is_driven(run):
        await call.service.registry.until_writable()
    runs.stop(run)


def list_evaluations(call: Call) -> EvaluationsResponse:
    run = find_run(call)
    return EvaluationsResponse(
        evaluations=run.evaluations,
        comparisons=run.comparisons,
        withheld=why_no_evaluations(run),
    )


def version(call: Call) -> Response:
    """The file of a version of a run. Raises UnknownName."""
    run, transfer = find_run(call), call.service.transfer
    digest = resolve_version(run, call.param("digest"))
    check_on_disk(transfer.store.version_path(digest), run, digest)
    return transfer.send_version(call.request, digest)


def exported(call: Call) -> None:
    """The file of a version for an operator. The audit records the export. Raises UnknownName."""
    resolve_version(find_run(call), call.param("digest"))


ROUTES = (
    get(
        "/cw/v1/runs", lambda call: call.service.runs.all(), reads="the peers' answers in all runs"
    ),
    record("/cw/v1/runs", start_run),
    get("/cw/v1/runs/{run}", find_run, reads="the peers' answers in run {run}"),
    get(
        "/cw/v1/runs/{run}/evaluations",
        list_evaluations,
        reads="the peers' evaluations in run {run}",
    ),
    get("/cw/v1/runs/{run}/versions/{digest}", version, reads="version {digest} of run {run}"),
    record("/cw/v1/runs/{run}/exported/{digest}", exported, reads="exported {digest} of run {run}"),
    post("/cw/v1/runs/{run}/stop", stop_run),
    record("/cw/v1/runs/{run}/resume", lambda call: call.service.runs.resume(call.param("run"))),
    get("/cw/v1/runs/{run}/deletion", lambda call: call.service.runs.deletion(call.param("run"))),
    record("/cw/v1/runs/{run}/delete", lambda call: call.service.runs.delete(call.param("run"))),
)
