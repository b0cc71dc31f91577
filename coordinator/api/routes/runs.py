"""Training runs."""

from __future__ import annotations

from coordinator.api.routes.endpoint import Call, get, post
from coordinator.api.schema import StartRunRequest
from coordinator.runs.deletion import Deletion
from coordinator.runs.state import Run


async def start_run(call: Call) -> dict[str, str]:
    order = call.read(StartRunRequest)
    return {"run": call.service.runs.start(order.spec, order.from_digest)}


async def list_runs(call: Call) -> list[Run]:
    return call.service.runs.all()


async def show_run(call: Call) -> Run:
    return call.service.runs.find(call.param("run"))


async def stop_run(call: Call) -> None:
    call.service.runs.stop(call.service.runs.find(call.param("run")).id)


async def resume_run(call: Call) -> None:
    call.service.runs.resume(call.param("run"))


async def show_deletion(call: Call) -> Deletion:
    return call.service.runs.deletion(call.param("run"))


async def delete_run(call: Call) -> Deletion:
    return call.service.runs.delete(call.param("run"))


ROUTES = (
    get("/cw/v1/runs", list_runs),
    post("/cw/v1/runs", start_run),
    get("/cw/v1/runs/{run}", show_run),
    post("/cw/v1/runs/{run}/stop", stop_run),
    post("/cw/v1/runs/{run}/resume", resume_run),
    get("/cw/v1/runs/{run}/deletion", show_deletion),
    post("/cw/v1/runs/{run}/delete", delete_run),
)
