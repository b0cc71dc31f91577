"""The ASGI app of our own HTTP routes. Flower's Fleet routes have an app of their own.

Errors have no body for agents and strangers: they learn only the status.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from coordinator.api.routes import fleet, jobs, offers, runs, tickets
from coordinator.api.routes.agents import AgentRoutes
from coordinator.api.service import CoordinatorService, error_response
from coordinator.fleet.auth import Auth
from protocols.errors import StorageUnreachable
from protocols.messages.jobs import ANSWER_PATH, INPUT_PATH


def make_app(
    service: CoordinatorService, auth: Auth, ca_key: Any, issuer: bytes = b""
) -> Starlette:
    endpoints = (
        *(*fleet.ROUTES, *runs.ROUTES, *jobs.ROUTES),
        *(*tickets.ROUTES, *offers.ROUTES),
    )
    return Starlette(
        routes=[
            *AgentRoutes(service, auth, ca_key, issuer).routes(),
            *(endpoint.route(service, auth) for endpoint in endpoints),
            *service.transfer.routes(auth),
            service.transfer.patch_route(auth),
            *service.job_transfer.routes(auth, INPUT_PATH, ANSWER_PATH),
            *service.sharing.routes(auth),
        ],
        exception_handlers={StorageUnreachable: _is_away},
    )


async def _is_away(request: Request, err: Exception) -> Response:
    """For agents and strangers, who do not learn which database it is."""
    assert isinstance(err, StorageUnreachable)
    text = f"the coordinator does not reach {err.what}"
    return error_response(StorageUnreachable(text, "try again in a few minutes"), 503)
