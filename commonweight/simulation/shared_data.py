"""Whether simulated peers share one data set, and what is refused before a simulation starts.

A task's file is read, and none of its code is run.
"""

from __future__ import annotations

import ast
import difflib
import glob
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from agent.data.settings import SPLIT, DataSettings
from agent.policy import task_code
from agent.tasks import data_checks, registry
from agent.tasks.training.shared_data import MIN_ALPHA
from protocols.errors import DataError, UsageError

#: In a setting of the owners: the number of the peer.
PART = "{part}"
#: Installed tasks that divide a data set of their own, as `--split` says.
_DIVIDING = frozenset({"mnist"})
_GIVE = (
    f"--owner data=PATH, in Python owner={{'data': 'PATH'}}; {PART} in it is the number of the "
    "peer, from 0"
)


class _Use(NamedTuple):
    """What the method of a task that reads its data uses of its argument. `gives`: the method is
    `data`, which gives data sets."""

    read: frozenset[str]
    gives: bool

    @property
    def takes_part(self) -> bool:
        """True if the method itself takes the peer's part."""
        return not self.read.isdisjoint(("index", "parts"))


def check_split(split: str) -> None:
    """Raise UsageError unless this is a way to divide a data set."""
    if not re.fullmatch(SPLIT, split):
        raise UsageError(
            f"--split is iid, shards or dirichlet:NUMBER, not {split!r}", "--split dirichlet:0.3"
        )
    if split.startswith("dirichlet:") and float(split.partition(":")[2]) < MIN_ALPHA:
        raise UsageError(f"--split {split} is too small", f"dirichlet:{MIN_ALPHA:g} or more")


def is_shared(task: str, source: str, split: str, owner: Mapping[str, Any], peers: int) -> bool:
    """True if a task of a user's own gives the data of all peers, of which each takes its part.

    `split`: as the user has written it, or "". Raises UsageError for data that are missing, and for
    a `split` that would have no effect.
    """
    _check_task(task, source)
    use = _use_of(source) if source else None
    has_own = any(PART in str(value) for value in owner.values())
    _check_data(task, use, owner, peers)
    if not split:
        return use is not None and use.gives and not (use.takes_part or has_own)
    if has_own:
        raise UsageError(
            f"--split divides a data set that the peers share, and {PART} gives each its own",
            "leave one of them out",
        )
    if use is None and (source or task not in registry.BUILT_IN or task in _DIVIDING):
        return bool(source)  # its class is in another file
    if use is None or not ("split" in use.read or (use.gives and not use.takes_part)):
        raise UsageError(
            f"--split has no effect on the task {task}",
            f"leave it out; --owner data=clinics/{PART}.csv gives each peer data of its own",
        )
    return use.gives and not use.takes_part


def _check_task(task: str, source: str) -> None:
    """Raise UsageError unless this machine has the task."""
    if source:
        registry.check_source(source)
        return
    if task not in (known := registry.names()):
        near = difflib.get_close_matches(task, known, 1)
        raise UsageError(
            f"there is no task {task!r}" + (f"; did you mean {near[0]}?" if near else ""),
            f"tasks here: {', '.join(known)}; of your own: ./my_task.py:MyTask",
        )
    if missing := registry.missing_package(task):
        raise UsageError(f"the task {task} {missing}")


def _check_data(task: str, use: _Use | None, owner: Mapping[str, Any], peers: int) -> None:
    """Raise UsageError if the data of a peer are missing."""
    path, reader = str(owner.get("data", "")), str(owner.get("data_reader", ""))
    if not path and use is not None and "path" in use.read:
        raise UsageError(f"the task {task} reads data of its owner, and no owner has any", _GIVE)
    for part in range(peers if PART in path else 1):
        here = path.replace(PART, str(part))
        is_remote = "://" in here or ":" in reader
        if here and not is_remote and not os.path.exists(here) and not glob.glob(here):
            raise UsageError(f"there are no data at {here}", _GIVE)
        try:
            data_checks.check(task, DataSettings(path=here, reader=reader or "arrow"))
        except DataError as err:
            message = err.message.replace("on this machine", "for the owners")
            raise UsageError(message, _GIVE) from err


def _use_of(source: str) -> _Use | None:
    """What the file says about the class of a task; None if it does not have the method."""
    path, name = registry.split_source(source)
    body = task_code.parse(path).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    found = classes.get(name)
    while found is not None:
        methods = {one.name: one for one in found.body if isinstance(one, ast.FunctionDef)}
        for method in ("data", "load"):
            if method in methods and len(given := methods[method].args.args) > 1:
                read = frozenset(_read_of(methods[method], given[1].arg))
                return _Use(read, gives=method == "data")
        bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
        found = next((classes.pop(base) for base in bases if base in classes), None)
    return None


def _read_of(method: ast.FunctionDef, argument: str) -> Iterable[str]:
    """The attributes of an argument that a method reads."""
    for node in ast.walk(method):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == argument:
                yield attribute
            case ast.Call(func=ast.Attribute(attr="pictures") | ast.Name(id="pictures")):
                yield "path"  # cw.pictures(source, …)
