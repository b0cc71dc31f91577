"""An MkDocs hook: the reference, made from the code, and CONTRIBUTING.md as a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import manual  # noqa: E402
import python_api  # noqa: E402

from agent.home.settings import format_value  # noqa: E402
from agent.home.settings_schema import AgentSettings  # noqa: E402


def on_files(files: Files, config: object) -> Files:
    """Add the pages that docs/ does not hold."""
    from mkdocs.structure.files import File

    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))  # type: ignore[arg-type]
    return files


def generated() -> dict[str, str]:
    """The pages by name."""
    return {
        "reference.md": "\n".join(page()) + "\n",
        "reference-api.md": "\n".join(python_api.page()) + "\n",
        "contributing.md": contributing(),
    }


def contributing() -> str:
    """CONTRIBUTING.md with its links as they are inside docs/; links out of docs/ become text."""
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    return re.sub(r"\[([^\]]+)\]\((?!docs/|http)[^)]+\)", r"`\1`", text).replace("](docs/", "](")


def page() -> Iterator[str]:
    yield "# Commands and settings"
    yield (
        "\nEvery command, option and setting, generated from the code. See also"
        " [exit codes](troubleshooting.md#exit-codes) and [Python and HTTP](reference-api.md)."
    )
    for program in manual.PROGRAMS:
        yield f"\n## {program}\n"
        for command in manual.told(program):
            yield f"\n### `{command.words}`\n\n{command.help}\n"
            yield f"```text\n{command.words} {command.usage}\n```\n"
            if command.parameters:
                yield "| option | meaning |\n|---|---|"
                yield from (
                    f"| `{_cell(typed)}` | {_cell(said)} |" for typed, said in command.parameters
                )
    yield "\n## Settings of an agent\n\n`commonweight-agent policy set KEY VALUE`\n"
    yield "| key | default | meaning |\n|---|---|---|"
    defaults = AgentSettings()
    for name, hint in get_type_hints(AgentSettings, include_extras=True).items():
        about = next((m.description for m in getattr(hint, "__metadata__", ())), "") or ""
        shown = format_value(getattr(defaults, name))
        yield f"| `{name}` | {f'`{shown}`' if shown else ''} | {_cell(about)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
