"""An endpoint for operators: who may call it, what its handler is given and returns.

An operator is the key in this home, or one that joined with that role. Answers are JSON; an error
is `{"code", "message", "hint"}`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.api.schema import STATUS
from coordinator.api.service import CoordinatorService, error_response, json_response
from coordinator.fleet.auth import Auth
from protocols.errors import CommonweightError, UsageError

T = TypeVar("T")


class Call(NamedTuple):
    """A request of an operator or observer whose signature and role were checked."""

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
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise UsageError(f"the request is not right: {err}") from err


class Endpoint(NamedTuple):
    """`handler` returns what becomes JSON (None: an empty object), or raises CommonweightError."""

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Any]]

    def route(self, service: CoordinatorService, auth: Auth) -> Route:
        """The endpoint as Starlette knows it."""

        async def answer(request: Request) -> Response:
            try:
                body = await auth.operator(request, changes=self.method == "POST")
                value = await self.handler(Call(service, request, body))
            except CommonweightError as err:
                return error_response(err, STATUS.get(err.exit_code, 400))
            return json_response({} if value is None else value)

        return Route(self.path, answer, methods=[self.method])


#: For operators and observers: it only shows something.
get = partial(Endpoint, "GET")
#: For operators.
post = partial(Endpoint, "POST")
