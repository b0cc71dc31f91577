"""Checks invariants A, B and C of FAULTS.md from files, independently of the product's code.

It reads the ledger with sqlite3, recomputes its hash chain, and hashes the versions. What agents
received is in their truth files (`protocols.local.failpoints.note`). A finding is one sentence.

A  Each acknowledged update is accepted once or refused with a reason. An update accepted in a round
   is summed in that round's version exactly once, and nothing else is.
B  The parent of each version is the one before; no version is missing or made twice. The newest
   version, its parent and the best one are on disk with the right digest. No ledger entry changed
   since an earlier check.
C  No training step is repeated, except those since the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Fact = dict[str, Any]


class Violation(Exception):
    """An invariant does not hold and the check cannot continue."""


class Line(NamedTuple):
    """An entry of the ledger on disk."""

    seq: int
    at: float
    subject: str
    body: bytes
    hash: bytes


def read_ledger(home: Path) -> list[Line]:
    """All entries, oldest first."""
    return [Line(*row) for row in _rows(home, "SELECT seq, at, subject, body, hash FROM log")]


def read_facts(home: Path, run: str, kind: str = "") -> list[Fact]:
    """The events of a run, or those of a kind; cheap enough for polling."""
    select = "SELECT body FROM log WHERE subject = ? AND CAST(body AS TEXT) LIKE ?"
    return [json.loads(row[0]) for row in _rows(home, select, run, f'{{"type":"{kind}%')]


def count(home: Path, kind: str) -> int:
    """The number of events of a kind, over all runs."""
    select = "SELECT COUNT(*) FROM log WHERE CAST(body AS TEXT) LIKE ?"
    return int(_rows(home, select, f'{{"type":"{kind}"%')[0][0])


def run_names(home: Path) -> set[str]:
    """All runs in the ledger."""
    return {row[0] for row in _rows(home, "SELECT subject FROM log")} - {"fleet"}


def _rows(home: Path, select: str, *arguments: str) -> list[tuple[Any, ...]]:
    uri = f"{(home / 'ledger.db').absolute().as_uri()}?mode=ro"
    db = sqlite3.connect(uri, uri=True)
    try:
        return db.execute(f"{select} ORDER BY seq", arguments).fetchall()
    finally:
        db.close()


def facts_by_run(lines: Sequence[Line]) -> dict[str, list[Fact]]:
    """The events of each run, in order."""
    found: dict[str, list[Fact]] = defaultdict(list)
    for line in lines:
        if line.subject != "fleet":
            found[line.subject].append(json.loads(line.body))
    return found


def digests(facts: Sequence[Fact]) -> list[str]:
    """The versions of a run, one per round."""
    return [fact["digest"] for fact in facts if fact["type"] == "VersionCommitted"]


def ended(facts: Sequence[Fact]) -> str:
    """How the run ended; empty if it has not."""
    told = [fact for fact in facts if fact["type"] in ("RunEnded", "RunResumed")]
    return told[-1].get("state", "") if told else ""


# --- what agents saw -------------------------------------------------------------------------


class Truth(NamedTuple):
    """The notes of an agent's processes: acknowledged claims, and repeated steps."""

    acknowledged: list[Fact]
    repeated: int
    steps: int


def read_truth(path: Path) -> Truth:
    """Read a truth file; an agent that never worked has none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return Truth([], 0, 0)
    acknowledged: list[Fact] = []
    done: Counter[tuple[Any, ...]] = Counter()
    work: tuple[Any, ...] = ()
    for line in lines:
        match line["what"]:
            case "acknowledged":
                acknowledged.append(json.loads(line["claim"]))
            case "work":
                work = (line["run"], line["round"], line["kind"])
            case "step" if line["phase"] == "train":
                done[*work, line["step"]] += 1
    return Truth(acknowledged, sum(n - 1 for n in done.values()), len(done))


# --- the invariants --------------------------------------------------------------------------


def violations(home: Path, truths: Iterable[Truth] = (), before: Sequence[Line] = ()) -> list[str]:
    """The findings as sentences; `before` is the result of an earlier check of the same ledger."""
    lines = read_ledger(home)
    found = _chain(lines, before)
    runs = facts_by_run(lines)
    for run, facts in runs.items():
        found += [f"{run}: {text}" for text in _files(home / "versions", facts)]
    return found + told(runs, [claim for truth in truths for claim in truth.acknowledged])


def told(runs: Mapping[str, Sequence[Fact]], acknowledged: Iterable[Fact]) -> list[str]:
    """The findings from the events of the runs and the acknowledged claims alone."""
    found: list[str] = []
    for run, facts in runs.items():
        found += [f"{run}: {text}" for text in _versions(facts)]
        found += [f"{run}: {text}" for text in _counted(standing(facts))]
        found += [f"{run}: {text}" for text in _described(facts)]
    for claim in acknowledged:
        found += _acknowledged(claim, runs.get(claim["run"], []))
    return found


def standing(facts: Sequence[Fact]) -> list[Fact]:
    """The facts without the rounds that were done again: a disk lost their version, or they were
    under way when the run was stopped."""
    found: list[Fact] = []
    made: dict[str, int] = {}
    for fact in facts:
        if fact["type"] in ("WeightsInitialised", "VersionCommitted"):
            made[fact["digest"]] = fact.get("round", 0)
        if fact["type"] == "VersionRecalled":
            made[fact["version"]["digest"]] = fact["version"]["round"]
        if fact["type"] in ("VersionLost", "VersionRecalled"):
            to = fact["to"] if fact["type"] == "VersionLost" else fact["version"]["digest"]
            _undo(found, made.get(to, 0) + 1)
        elif fact["type"] == "RunResumed":
            begun = [f["round"] for f in found if f["type"] == "RoundOpened"][-1:]
            if begun and begun[0] not in made.values():
                _undo(found, begun[0])
            elif found[-1]["type"] == "RunEnded":
                _drop_unsummed(found)
        else:
            if fact["type"] == "EvaluationOpened":  # a resumed run asks all peers again
                _drop_evaluations(found, fact["round"])
            found.append(fact)
    return found


def _drop_evaluations(found: list[Fact], number: int) -> None:
    """Drop the results of an evaluation that is done again."""
    found[:] = [
        fact
        for fact in found
        if fact["type"] != "UpdateAccepted"
        or fact["round"] != number
        or fact["update"].get("digest")
    ]


def _undo(found: list[Fact], again: int) -> None:
    """Drop the rounds from this one on, and the updates that were taken for them before."""
    opened = (n for n, fact in enumerate(found) if _opens(fact, again))
    del found[next(opened, len(found)) :]
    _drop_unsummed(found)


def _drop_unsummed(found: list[Fact]) -> None:
    """Drop the updates after the last sum. A buffered run takes them before its round opens."""
    closed = max((n for n, f in enumerate(found) if f["type"] == "TrainingClosed"), default=-1)
    found[closed + 1 :] = [
        fact
        for fact in found[closed + 1 :]
        if not (fact["type"] == "UpdateAccepted" and fact["update"].get("digest"))
    ]


def _opens(fact: Fact, number: int) -> bool:
    return (fact["type"], fact.get("round")) == ("RoundOpened", number)


def _chain(lines: Sequence[Line], before: Sequence[Line]) -> list[str]:
    found, head = [], bytes(32)
    for number, line in enumerate(lines, 1):
        sha = hashlib.sha256(head + f"{line.at!r}\n{line.subject}\n".encode() + line.body)
        head = sha.digest()
        if line.seq != number or head != line.hash:
            found.append(f"the ledger's chain is broken at entry {number}")
            break
    if list(lines[: len(before)]) != list(before):
        found.append("an entry that was in the ledger is gone or changed")
    return found


def _counted(facts: Sequence[Fact]) -> list[str]:
    """A: each update is accepted once in its round, and summed if it was accepted in time."""
    if facts and facts[0].get("spec", {}).get("mode") == "buffered":
        return _buffered(facts)
    found: list[str] = []
    accepted: Counter[str] = Counter()
    number, training, closed = 0, False, list[str]()
    late: Counter[tuple[str, int, int]] = Counter()
    kind, masked = "", set[str]()
    for fact in facts:
        match fact["type"]:
            case "RoundOpened":
                number, training, accepted = fact["round"], True, Counter()
            case "EvaluationOpened":
                accepted = Counter()
            case "CohortFixed":
                kind, masked = fact["kind"], set()
            case "MaskedUpdateAccepted":
                masked.add(fact["peer"])
            case "SurvivorsFixed":
                if sorted(masked) != sorted(fact["survivors"]):
                    found.append(f"round {number} sums other masked updates than it accepted")
                closed = fact["survivors"] if kind == "train" else closed
            case "CohortLost":  # all peers train again
                training, accepted = True, Counter()
            case "UpdateAccepted" if fact["update"].get("base"):
                late[fact["peer"], fact["round"], fact["update"].get("turn", 0)] += 1
            case "UpdateAccepted":
                accepted[fact["peer"]] += 1
                if fact["round"] != number:
                    found.append(f"an update of round {fact['round']} counts in round {number}")
            case "TrainingClosed":
                twice = [peer for peer, times in accepted.items() if times > 1]
                if twice:
                    found.append(f"round {number} counts {twice} more than once")
                found += [f"{one} is folded {n} times" for one, n in late.items() if n > 1]
                if set(fact["contributors"]) != set(accepted) | {peer for peer, _, _ in late}:
                    found.append(f"round {number} sums other updates than it accepted")
                if not training:
                    found.append(f"round {number} was closed twice")
                closed, training, accepted = fact["contributors"], False, Counter()
                late = Counter()
            case "VersionCommitted" if fact["contributors"] != closed:
                found.append(f"version {number} has other contributors than its round")
            case "RoundClosed" if any(times > 1 for times in accepted.values()):
                found.append(f"round {number} counts an evaluation more than once")
    return found


def _buffered(facts: Sequence[Fact]) -> list[str]:
    """A, for buffered runs: each update is accepted once, and summed in the next version."""
    found: list[str] = []
    buffer: list[str] = []
    closed: list[str] = []
    ever: Counter[tuple[Any, ...]] = Counter()
    for fact in facts:
        match fact["type"]:
            case "UpdateAccepted" if fact["update"].get("digest"):
                buffer.append(fact["peer"])
                ever[fact["peer"], fact["round"], fact["update"].get("turn", 0)] += 1
            case "TrainingClosed":
                if sorted(buffer) != sorted(fact["contributors"]):
                    found.append(f"version {fact['round']} sums other updates than were accepted")
                closed, buffer = fact["contributors"], []
            case "VersionCommitted" if fact["contributors"] != closed:
                found.append(f"version {fact['round']} has other contributors than its buffer")
    found += [f"{key} counts {times} times" for key, times in ever.items() if times > 1]
    return found


def _described(facts: Sequence[Fact]) -> list[str]:
    """A, before round 1: one description per peer, then one agreement, before any work."""
    found: list[str] = []
    heard: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    waits = any(fact.get("spec", {}).get("handshake") for fact in facts[:1])
    for fact in facts:
        match fact["type"]:
            case "PeerDescribed":
                heard[fact["peer"]] += 1
            case "PreprocessingFixed" | "SchemaAgreed":
                found += [f"{peer} is heard {n} times" for peer, n in heard.items() if n > 1]
                agreed[fact["type"]] += 1
                heard = Counter()
            case "RoundOpened" if waits and not agreed["SchemaAgreed"]:
                found.append(f"round {fact['round']} opens before anything is agreed on")
    return found + [f"{what} {times} times" for what, times in agreed.items() if times > 1]


def _versions(facts: Sequence[Fact]) -> list[str]:
    """B: one version per round, each the child of the previous one."""
    found: list[str] = []
    head, rounds = "", 0
    made: dict[str, int] = {}
    for fact in facts:
        match fact["type"]:
            case "WeightsInitialised":
                if rounds:
                    found.append("first weights in the middle of the run")
                head = fact["digest"]
                made[head] = 0
            case "RoundOpened" if fact["base"] != head:
                found.append(f"round {fact['round']} builds on {fact['base'][:8]}, not {head[:8]}")
            case "VersionCommitted":
                rounds += 1
                if fact["parent"] != head:
                    found.append(f"version {rounds} is not the child of the one before")
                if fact["round"] != rounds:
                    found.append(f"version {fact['round']} where version {rounds} was due")
                head = fact["digest"]
                made[head] = rounds
            case "VersionLost":
                if fact["to"] not in made:
                    found.append(f"fell back to {fact['to'][:8]}, which is no version of the run")
                head, rounds = fact["to"], made.get(fact["to"], 0)
            case "VersionRecalled":
                head, rounds = fact["version"]["digest"], fact["version"]["round"]
                made[head] = rounds
    return found


def _files(folder: Path, facts: Sequence[Fact]) -> list[str]:
    """B: the versions that a run needs are on disk, and every version matches its digest."""
    if facts and facts[-1]["type"] == "RunDeleted":
        return []
    found = []
    made = [fact["digest"] for fact in facts if fact["type"] == "WeightsInitialised"][-1:]
    ever = set(made)
    for fact in facts:
        if fact["type"] == "VersionCommitted":
            made.append(fact["digest"])
        elif fact["type"] == "VersionRecalled":
            made.append(fact["version"]["digest"])
        elif fact["type"] == "VersionLost" and fact["to"] in made:
            del made[made.index(fact["to"]) + 1 :]
        ever.update(made)
    for digest in made[-1:] if ended(facts) else made[-2:]:
        if not (folder / f"{digest}.safetensors").exists():
            found.append(f"version {digest[:8]} is not on disk")
    for path in folder.glob("[0-9a-f]*.safetensors"):
        if path.stem in ever and hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
            found.append(f"version {path.stem[:8]} on disk is not what its name says")
    return found


def _acknowledged(claim: Fact, facts: Sequence[Fact]) -> list[str]:
    """A: the ledger has exactly one result for each acknowledged answer."""
    who = f"{claim['peer'][:8]}'s {claim['kind']} of round {claim['round']}"
    if claim["kind"] in ("share", "agree", "unmask"):
        return []  # the ledger has only the decisions that follow from all of them
    if claim["kind"] == "mask":  # two sums of a round may have one
        fates = int(any(_is_fate_of_masked(fact, claim) for fact in facts))
    elif claim["kind"] in ("holdings", "recall"):
        told = {(f["type"], f.get("peer", f.get("by"))) for f in facts}
        wanted = "HoldingTold" if claim["kind"] == "holdings" else "VersionRecalled"
        fates = int((wanted, claim["peer"]) in told)
    elif claim["kind"] == "describe":
        fates = int(any(f["type"] == "PeerDescribed" and f["peer"] == claim["peer"] for f in facts))
    elif claim["kind"] == "init":
        made = [f for f in facts if f["type"] == "WeightsInitialised" and f["by"] == claim["peer"]]
        fates = len(made)
    else:
        fates = sum(_is_fate(fact, claim) for fact in standing(facts))
        fates = fates or min(1, sum(_is_fate(fact, claim) for fact in facts))
    refused = any(
        fact["type"] == "UpdateRefused"
        and (fact["peer"], fact["round"]) == (claim["peer"], claim["round"])
        for fact in facts
    )
    if fates > 1:
        return [f"{who} is counted {fates} times"]
    return [] if fates or refused else [f"{who} was acknowledged and is in no entry of the ledger"]


def _is_fate_of_masked(fact: Fact, claim: Fact) -> bool:
    if fact["type"] not in ("MaskedUpdateAccepted", "CohortLost"):
        return False
    is_its_peer = fact.get("peer", claim["peer"]) == claim["peer"]
    return is_its_peer and bool(fact["round"] == claim["round"])


def _is_fate(fact: Fact, claim: Fact) -> bool:
    if (
        fact["type"] != "UpdateAccepted"
        or (fact["peer"], fact["round"]) != (claim["peer"], claim["round"])
        or fact["update"].get("digest", "") != claim["digest"]
    ):
        return False
    if claim.get("codec", "").startswith("masked:"):
        return True  # the digest of a card is that of one turn
    is_its_turn = fact["update"].get("turn", 0) == claim.get("turn", 0)
    return is_its_turn and bool(claim["digest"]) == (claim["kind"] == "train")
