"""An endpoint for operators: who may call it, and what its handler gets and returns.

An operator has the key in this home, or joined with a ticket for that role. Responses are JSON,
except files. An error is `{"code", "message", "hint"}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.api.schema import STATUS
from coordinator.api.service import CoordinatorService, error_response
from coordinator.fleet.auth import Auth, json_response
from protocols.enrollment.signed_requests import SENDER
from protocols.errors import CommonweightError, UsageError
from protocols.messages.decoding import MALFORMED

T = TypeVar("T")


class Call(NamedTuple):
    """An authorized request of an operator, or of an observer where the endpoint admits one."""

    service: CoordinatorService
    request: Request
    body: bytes

    def param(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def read(self, kind: type[T]) -> T:
        """The body. Raises UsageError."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except MALFORMED as err:
            raise UsageError(f"the request is malformed: {err}") from err


class Endpoint(NamedTuple):
    """`handler` returns a value for JSON (None: an empty object), a response, or an awaitable.

    It may raise CommonweightError. Observers are refused unless `or_observer`. `reads`: what the
    audit says that its caller has read, with the parts of the path in braces. `records`: the
    handler appends to the ledger.
    """

    method: str
    path: str
    handler: Callable[[Call], Any]
    or_observer: bool = False
    reads: str = ""
    records: bool = False

    def route(self, service: CoordinatorService, auth: Auth) -> Route:
        async def answer(request: Request) -> Response:
            try:
                body = await auth.operator(request, or_observer=self.or_observer)
                if self.records:
                    await service.registry.until_writable()
                value = self.handler(Call(service, request, body))
                if inspect.isawaitable(value):
                    value = await value
                if self.reads:
                    read = request.headers[SENDER], self.reads.format(**request.path_params)
                    if not service.registry.has_read(*read):
                        await service.registry.until_writable()
                    service.registry.record_read(*read)
            except CommonweightError as err:
                return error_response(err, STATUS.get(err.exit_code, 400))
            if isinstance(value, Response):
                return value
            return json_response({} if value is None else value)

        return Route(self.path, answer, methods=[self.method])


#: For operators.
get, post = partial(Endpoint, "GET"), partial(Endpoint, "POST")
record = partial(post, records=True)
#: For operators and observers: the state of the fleet, and nothing that a single peer answered.
watch = partial(Endpoint, "GET", or_observer=True)
