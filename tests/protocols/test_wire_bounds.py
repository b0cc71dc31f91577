"""Every field that comes from the network has a bound; a new one without fails here."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from inspect import getsource as inspect_source
from typing import Any

import msgspec
import pytest
from msgspec import inspect

import coordinator.api.schema
import coordinator.fleet.state
import protocols
from agent.transport import version_proofs
from coordinator.remote import access, api_client
from coordinator.storage.job_events import JobSpec
from coordinator.storage.run_events import RunSpec

#: Structs in `protocols` that no network brings, and why they need no bounds.
NOT_FROM_THE_NETWORK = {
    "protocols.local.checks.Check": "made by the doctors, never decoded",
    "protocols.model.model_card.TensorCard": "part of a model card",
    "protocols.model.model_card.Contributor": "part of a model card",
    "protocols.model.model_card.ModelCard": "a file that a person names, read up to 64 MiB",
}


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(protocols.__path__, "protocols."):
        yield importlib.import_module(found.name)


def structs() -> list[type[msgspec.Struct]]:
    """All structs of `protocols`, and those of requests and proofs elsewhere."""
    found: dict[str, type[msgspec.Struct]] = {}
    for module in (*modules(), coordinator.api.schema, version_proofs):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, msgspec.Struct):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    for kind in (RunSpec, JobSpec):
        found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return [kind for name, kind in found.items() if name not in NOT_FROM_THE_NETWORK]


def decoded_by_clients() -> dict[str, Any]:
    """What monitors and operators decode: the types in the calls of the client, and `Fleet`."""
    found: dict[str, Any] = {"Fleet": coordinator.fleet.state.Fleet}
    for module in (api_client, access):
        for call in ast.walk(ast.parse(inspect_source(module))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            kinds = {one.arg: one.value for one in call.keywords}
            if name in ("self._get", "self._rows", "_decoded"):
                kind = ast.unparse(call.args[1])
            elif name.endswith(".decode") and "type" in kinds:
                kind = ast.unparse(kinds["type"])
            else:
                continue
            if kind not in ("kind", "Rows[kind]", "Access"):  # a parameter; a file of the owner
                found[kind] = eval(kind, vars(module))
    found["Rows"] = coordinator.api.schema.Rows[float]
    return found


def structs_in(kind: inspect.Type, found: dict[type[Any], inspect.StructType]) -> None:
    """Add all structs that a value of this type may have."""
    if isinstance(kind, inspect.StructType):
        if kind.cls in found:
            return
        found[kind.cls] = kind
        for field in kind.fields:
            structs_in(field.type, found)
    for name in ("item_type", "key_type", "value_type", "type"):
        if isinstance(part := getattr(kind, name, None), inspect.Type):
            structs_in(part, found)
    for name in ("item_types", "types"):
        for part in getattr(kind, name, ()):
            structs_in(part, found)


def unbounded(kind: inspect.Type, place: str) -> Iterator[str]:
    """The places in a type that may hold any amount of text, bytes, digits or members."""
    match kind:
        case inspect.StrType(max_length=None):
            yield f"{place}: text without max_length"
        case inspect.BytesType(max_length=None):
            yield f"{place}: bytes without max_length"
        case inspect.IntType() if kind.ge is None and kind.gt is None:
            yield f"{place}: an integer without ge"
        case inspect.IntType() if kind.le is None and kind.lt is None:
            yield f"{place}: an integer without le"
        case inspect.AnyType() | inspect.RawType():
            yield f"{place}: any value"
        case inspect.DictType():
            if kind.max_length is None:
                yield f"{place}: a dict without max_length"
            yield from unbounded(kind.key_type, f"{place} (key)")
            yield from unbounded(kind.value_type, f"{place} (value)")
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            if kind.max_length is None:
                yield f"{place}: a sequence without max_length"
            yield from unbounded(kind.item_type, f"{place} (item)")
        case inspect.FrozenSetType():
            if kind.max_length is None:
                yield f"{place}: a set without max_length"
            yield from unbounded(kind.item_type, f"{place} (item)")
        case inspect.TupleType():
            for number, item in enumerate(kind.item_types):
                yield from unbounded(item, f"{place}[{number}]")
        case inspect.UnionType():
            for item in kind.types:
                yield from unbounded(item, place)
        case _:  # structs have their own turn; floats, booleans, literals and None are small
            return


@pytest.mark.attack("20.4")
@pytest.mark.parametrize("kind", structs(), ids=lambda kind: kind.__qualname__)
def test_every_field_of_a_message_has_a_bound(kind: type[msgspec.Struct]) -> None:
    """Attack: a message has a field of any length, or an integer of thousands of digits."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    place = kind.__qualname__
    faults = [
        fault for field in info.fields for fault in unbounded(field.type, f"{place}.{field.name}")
    ]
    assert faults == []


@pytest.mark.attack("20.10", by="coordinator")
@pytest.mark.parametrize("name", decoded_by_clients())
def test_every_field_of_an_answer_to_an_operator_has_a_bound(name: str) -> None:
    """Attack: an answer to a monitor has a list, a text or an integer of any length."""
    kind = inspect.type_info(decoded_by_clients()[name])
    found: dict[type[Any], inspect.StructType] = {}
    structs_in(kind, found)
    faults = list(unbounded(kind, name))
    for cls, info in found.items():
        for field in info.fields:
            faults += unbounded(field.type, f"{cls.__qualname__}.{field.name}")
    assert faults == []


def test_the_guard_sees_the_types_of_the_client() -> None:
    kinds = decoded_by_clients()
    assert {"Fleet", "Run", "Job", "PeerRow", "TicketRow", "Made", "ErrorResponse"} <= kinds.keys()
    found: dict[type[Any], inspect.StructType] = {}
    structs_in(inspect.type_info(kinds["Run"]), found)
    names = {cls.__name__ for cls in found}
    assert {"RunSpec", "Round", "Update", "SchemaCard", "Holding"} <= names


class _Loose(msgspec.Struct):
    text: str
    data: bytes
    number: int
    names: list[float]
    by_name: dict[str, float | None]
    pairs: tuple[tuple[int, str], ...] = ()
    anything: Any = None


def test_the_guard_sees_what_has_no_bound() -> None:
    info = inspect.type_info(_Loose)
    assert isinstance(info, inspect.StructType)
    seen = {field.name for field in info.fields if list(unbounded(field.type, ""))}
    assert seen == {"text", "data", "number", "names", "by_name", "pairs", "anything"}


def test_the_list_of_exceptions_is_in_use() -> None:
    known = {
        f"{value.__module__}.{value.__qualname__}"
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type)
    }
    assert NOT_FROM_THE_NETWORK.keys() <= known
