"""The moving picture of the README: python deploy/monitor_animation.py > docs/monitor.svg

Plays the recording of `commonweight monitor --replay demo` in the real monitor, takes a screenshot
at each moment of STORY, and joins the screenshots into one SVG that needs no script and no font
from another host. An element that several screenshots have in common is written once.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from coordinator.monitor.tui.replay_app import ReplayApp  # noqa: E402
from coordinator.remote.recording import DEMO_FILE  # noqa: E402
from coordinator.remote.replay import ReplaySource  # noqa: E402

SIZE = (100, 30)
TITLE, COMMAND = "commonweight monitor", "python deploy/monitor_animation.py > docs/monitor.svg"
#: Second of the recording, page, and for how many seconds the picture shows it.
STORY = (
    *((at / 4, "fleet", 0.6) for at in range(10, 22, 3)),
    *((at / 4, "fleet", 0.6) for at in range(35, 68, 2)),
    (17.0, "fleet", 2.5),
    (17.0, "rounds", 3.0),
)
#: What viewers see who do not want moving pictures: the number of a screenshot.
STILL = len(STORY) - 3
_SVG = "{http://www.w3.org/2000/svg}"


class Element(NamedTuple):
    """A rectangle, or a text without a break of style; `style` is CSS."""

    kind: str
    x: str
    y: str
    width: str
    height: str
    style: str
    text: str


async def screenshots() -> list[str]:
    """One SVG of Textual for each moment of STORY."""
    source = ReplaySource(DEMO_FILE, wall=lambda: 0.0)  # it plays, and only seeks move it
    app = ReplayApp(source)
    found = []
    async with app.run_test(size=SIZE) as pilot:
        for at_s, page, _ in STORY:
            source.seek(at_s - source.position_s)
            await pilot.press({"fleet": "1", "rounds": "2"}[page])
            # The snapshot after a seek comes from another task.
            await pilot.pause(0.2)
            app._draw_frame(app._clock())
            await pilot.pause()
            found.append(app.export_screenshot(title=TITLE))
    return found


def elements(screenshot: str) -> Iterator[Element]:
    """What Textual has drawn inside the window, backgrounds first."""
    styles = dict(re.findall(r"\.([\w-]+-r\d+) \{ (.*?);? \}", screenshot))
    tree = ElementTree.fromstring(screenshot)
    (window,) = (group for group in tree.iter(f"{_SVG}g") if "-clip-terminal" in _clip(group))
    for rect in window.iter(f"{_SVG}rect"):
        x, y, width, height = (_number(rect.get(key)) for key in ("x", "y", "width", "height"))
        yield Element("rect", x, y, width, height, f"fill: {rect.get('fill')}", "")
    for text in window.iter(f"{_SVG}text"):
        x, y, width = (_number(text.get(key)) for key in ("x", "y", "textLength"))
        written = (text.text or "").rstrip("\n")
        if written.strip("\xa0 "):
            yield Element("text", x, y, width, "", styles[text.get("class") or ""], written)


def _clip(group: ElementTree.Element) -> str:
    return group.get("clip-path") or ""


def _number(text: str | None) -> str:
    return f"{float(text or 0):g}"


class Film(NamedTuple):
    """How long each picture is shown, and what stands around them. `still`: the number of the
    picture for viewers who do not want moving ones; `command` writes the file."""

    seconds: list[float]
    size: tuple[int, int]
    title: str
    command: str
    still: int = 0


def animation(pictures: Iterable[Iterable[Element]], film: Film) -> str:
    """One SVG that shows each picture for its seconds, again and again."""
    seconds, title = film.seconds, film.title
    shown: dict[Element, list[int]] = {}
    for number, picture in enumerate(pictures):
        for element in picture:
            shown.setdefault(element, []).append(number)
    # One rectangle behind everything: seams between many would show.
    fills = Counter(e.style for e in shown if e.kind == "rect")
    ((behind, _),) = fills.most_common(1)
    shown = {e: numbers for e, numbers in shown.items() if (e.kind, e.style) != ("rect", behind)}
    # By kind, and by the pictures that show them: no background is above a text.
    parts: dict[tuple[str, tuple[int, ...]], list[Element]] = {}
    for element, numbers in shown.items():
        parts.setdefault((element.kind, tuple(dict.fromkeys(numbers))), []).append(element)
    names: dict[tuple[int, ...], str] = {}
    styles = {style: f"s{i}" for i, style in enumerate(dict.fromkeys(e.style for e in shown))}
    width, height = film.size[0] * 12.2 + 20, film.size[1] * 24.4 + 50
    css = [f".{name}{{{style.replace(': ', ':')}}}" for style, name in styles.items()]
    body = []
    for (_, numbers), inside in sorted(parts.items()):
        name = ""
        if len(numbers) < len(seconds):
            if numbers not in names:
                names[numbers] = f"v{len(names)}"
                css.append(_visibility(names[numbers], numbers, film))
            name = f' class="{names[numbers]}"'
        body.append(f"<g{name}>{''.join(_drawn(e, styles[e.style]) for e in inside)}</g>")
    return "\n".join(
        (
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {width:g} {height:g}">',
            f"<title>{title}</title>",
            f"<!-- {film.command} -->",
            "<style>",
            'text{font:20px "Fira Code",ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;'
            "white-space:pre}",
            *css,
            "@media (prefers-reduced-motion:reduce){g{animation:none!important}}",
            "</style>",
            f'<rect width="{width:g}" height="{height:g}" rx="8" style="{behind}"/>',
            '<circle cx="22" cy="20" r="6" fill="#ff5f57"/>',
            '<circle cx="42" cy="20" r="6" fill="#febc2e"/>',
            '<circle cx="62" cy="20" r="6" fill="#28c840"/>',
            f'<text x="{width / 2:g}" y="26" text-anchor="middle" fill="#c5c8c6">{title}</text>',
            '<g transform="translate(10,40)">',
            *body,
            "</g>",
            "</svg>\n",
        )
    )


def _visibility(name: str, numbers: tuple[int, ...], film: Film) -> str:
    """The CSS that shows the class `name` in these pictures and hides it in the others."""
    whole_s, at_s, steps, before = sum(film.seconds), 0.0, [], None
    for number, length_s in enumerate(film.seconds):
        now = "visible" if number in numbers else "hidden"
        if now != before:
            steps.append(f"{100 * at_s / whole_s:.4g}%{{visibility:{now}}}")
        before, at_s = now, at_s + length_s
    still = "visible" if film.still in numbers else "hidden"
    return (
        f"@keyframes {name}{{{''.join(steps)}}}"
        f".{name}{{visibility:{still};animation:{name} {whole_s:g}s step-end infinite}}"
    )


def _drawn(element: Element, style: str) -> str:
    place = f'class="{style}" x="{element.x}" y="{element.y}"'
    if element.kind == "rect":
        return f'<rect {place} width="{element.width}" height="{element.height}"/>'
    return f"<text {place} textLength={quoteattr(element.width)}>{escape(element.text)}</text>"


def main() -> None:
    taken = asyncio.run(screenshots())
    film = Film([length_s for _, _, length_s in STORY], SIZE, TITLE, COMMAND, STILL)
    sys.stdout.write(animation(map(elements, taken), film))


if __name__ == "__main__":
    main()
