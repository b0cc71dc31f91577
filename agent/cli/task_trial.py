"""The step of training and of evaluation that `commonweight-agent task check` tries."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protocols.errors import TrainerFailed


class TrialRun:
    """Runs one step of training and of evaluation, and measures them."""

    def __init__(self) -> None:
        self._first = threading.Event()
        self._progress: Any = None

    def on_progress(self, progress: Any) -> None:
        if not self._first.is_set():
            self._progress = progress
            self._first.set()

    def run(self, trainer: Any, name: str, settings: Any, folder: Path) -> dict[str, Any]:
        """The report for `task check`. Raises TrainerFailed."""
        import msgspec

        from agent.tasks.work import Describe, Evaluate, Init, Train
        from protocols.model import schema_card
        from protocols.tables import class_names, preprocessing

        def describe() -> Any:
            done = trainer.run(Describe(task=name, settings=dict(settings)))
            return schema_card.decode(done.description)

        began = time.monotonic()
        card = describe()
        load_s = time.monotonic() - began
        report: dict[str, Any] = {"task": name, "schema": msgspec.to_builtins(card)}
        report |= {"load_s": load_s, "memory_bytes": trainer.rss_bytes}
        if not isinstance(card, schema_card.SchemaCard):
            # In a run the preprocessing is derived from the data of all peers; here from this.
            if isinstance(card, class_names.ClassCounts):
                agreed, notes = class_names.agree({"here": card})
            else:
                derived = preprocessing.derive({"here": card}, settings)
                agreed, notes = preprocessing.encode(derived.preprocessing), derived.notes
            report["notes"] = [text for _, text in notes]
            settings = {**settings, "preprocessing": agreed}
            report["schema"] = msgspec.to_builtins(describe())
            report["load_s"] = time.monotonic() - began
        base = folder / "first.safetensors"
        first = trainer.run(Init(task=name, settings=dict(settings), seed=0, out=str(base)))
        report["weights_bytes"] = first.nbytes
        out = folder / "out.safetensors"
        common: dict[str, Any] = {
            "task": name,
            "settings": {**settings, "round": 1},
            "base": str(base),
        }
        for kind, work in (
            ("train", Train(**common, out=str(out))),
            ("evaluate", Evaluate(**common)),
        ):
            report[kind] = self._step(trainer, work)
            memory_bytes = report[kind].pop("memory_bytes")
            report["memory_bytes"] = max(report["memory_bytes"], memory_bytes)
        return report

    def _step(self, trainer: Any, work: Any) -> dict[str, Any]:
        self._progress = None
        self._first.clear()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(trainer.run, work)
            while not running.done() and not self._first.wait(0.01):
                pass
            taken = {
                "first_step_s": time.monotonic() - began,
                "memory_bytes": trainer.rss_bytes,
            }
            trainer.cancel()
            try:
                running.result()
            except TrainerFailed as err:
                if err.kind != "cancelled":
                    raise
        if self._progress is None:
            return taken
        return {"steps": self._progress.steps, "loss": self._progress.loss} | taken


def write_report(report: dict[str, Any]) -> None:
    write = sys.stdout.write
    schema = report["schema"]
    write(f"task {report['task']}")
    write(f" version {schema['version']}\n" if schema.get("version") else "\n")
    for name, words in schema.get("traits", {}).items():
        shown = ", ".join(words[:12]) + (f" … {len(words)} in all" if len(words) > 12 else "")
        write(f"{name}: {shown}\n")
    for name, (dtype, shape) in schema.get("tensors", {}).items():
        write(f"  {name:32} {dtype:5} {shape}\n")
    for words in report.get("notes", ()):
        write(f"{words}\n")
    if "weights_bytes" in report:
        write(f"weights {report['weights_bytes'] / 1e6:,.2f} MB, sent up each round as fp32\n")
    write(f"data and model ready in {report['load_s']:.1f} s\n")
    for kind in ("train", "evaluate"):
        if kind in report:
            steps = f" of {report[kind]['steps']}" if "steps" in report[kind] else ""
            loss = report[kind].get("loss")
            write(f"{kind}: first step{steps} in {report[kind]['first_step_s']:.2f} s")
            write(f", loss {loss:.4f}\n" if loss is not None else "\n")
    write(f"memory {report['memory_bytes'] / 1e6:,.0f} MB\n")
