"""Training runs."""

from __future__ import annotations

from coordinator.api.routes.endpoint import Call, change, show
from coordinator.api.schema import RunOrder
from coordinator.runs.deletion import Deletion
from coordinator.runs.state import Run


async def start_run(call: Call) -> dict[str, str]:
    order = call.read(RunOrder)
    return {"run": call.desk.runs.start(order.spec, order.from_digest)}


async def list_runs(call: Call) -> list[Run]:
    return call.desk.runs.all()


async def show_run(call: Call) -> Run:
    return call.desk.runs.find(call.param("run"))


async def stop_run(call: Call) -> None:
    call.desk.runs.stop(call.desk.runs.find(call.param("run")).id)


async def resume_run(call: Call) -> None:
    call.desk.runs.resume(call.param("run"))


async def show_deletion(call: Call) -> Deletion:
    return call.desk.runs.deletion(call.param("run"))


async def delete_run(call: Call) -> Deletion:
    return call.desk.runs.delete(call.param("run"))


ROUTES = (
    show("/cw/v1/runs", list_runs),
    change("/cw/v1/runs", start_run),
    show("/cw/v1/runs/{run}", show_run),
    change("/cw/v1/runs/{run}/stop", stop_run),
    change("/cw/v1/runs/{run}/resume", resume_run),
    show("/cw/v1/runs/{run}/deletion", show_deletion),
    change("/cw/v1/runs/{run}/delete", delete_run),
)
