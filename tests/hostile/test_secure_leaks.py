"""All that a coordinator has of a peer's update: its files, its memory, and all bytes on the wire.

A fleet of real processes. The coordinator is stopped at several steps, and searched for what one
peer has trained and measured, in every form that the peer, the wire or the coordinator gives it.
"""

from __future__ import annotations

import signal
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import psutil
import pytest

from benchmarks.faults import failpoint_names
from protocols.local.failpoints import VARIABLE
from protocols.model import weights
from protocols.model.bfloat16 import float32_to_bf16
from protocols.model.weights import Part, Weights, file_digest
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import keys, masked_file, peer, ring, tails
from protocols.privacy.secagg.cohort import Cohort, Pins
from protocols.privacy.secagg.messages import SIGNED_CARD
from protocols.privacy.secagg.turn import Turn
from tests.e2e.test_secure import NAMES, trusting
from tests.support import planted_task as planted
from tests.support.fleet_harness import COORDINATOR, HOST, ROOT, Fleet, fleet, two_free_ports
from tests.support.randomness import chi_squared_p, chi_squared_p_of_elements
from tests.support.searching import Search
from tests.support.tls_recorder.sitecustomize import SENT_VARIABLE
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.attack("secure", by="coordinator"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process in /proc"),
]

T = TypeVar("T")
TASK = "planted"
#: What the coordinator may know of the peer: so a search finds what is there.
KNOWN = "card"
#: What peers tell of it, once its masked update counts.
OWN_MASK = "own mask"
MIN_P = 1e-6
#: Of an array, so many places are searched for, with so many bytes each.
_PLACES, _WINDOW_BYTES = 24, 32
_TEXT_CHARS = 9


# --- what is searched for --------------------------------------------------------------------


def windows(array: Any) -> list[bytes]:
    """Parts of an array's bytes, from its beginning to its end."""
    data = np.ascontiguousarray(array).tobytes()
    starts = np.linspace(0, max(0, len(data) - _WINDOW_BYTES), _PLACES).astype(int)
    step = np.asarray(array).itemsize
    return [data[start // step * step :][:_WINDOW_BYTES] for start in starts]


def numbers(values: Iterable[float]) -> list[bytes]:
    """Numbers as text and as floats of 64 bits, in both orders of bytes."""
    forms: list[bytes] = []
    for value in values:
        forms += [struct.pack("<d", value), struct.pack(">d", value)]
        forms.append(f"{value:.15f}"[:_TEXT_CHARS].encode())
    return forms


def floats(array: Any) -> list[bytes]:
    """An array as floats of 64, 32 and 16 bits, of both kinds."""
    single = np.asarray(array, "<f4")
    forms = (array.astype("<f8"), single, single.astype("<f2"), float32_to_bf16(single))
    return [one for form in forms for one in windows(np.asarray(form).ravel())]


def trained(number: int) -> Weights:
    base, moved = planted.first(), planted.change(number)
    return Weights({name: base[name] + moved[name] for name in base})


def of_peer(number: int) -> dict[str, list[bytes]]:
    """What a peer has trained and measured."""
    base, made, moved = planted.first(), trained(number), planted.change(number)
    loss, sums = planted.LOSSES[number], planted.tally(number)
    examples = planted.EXAMPLES[number]
    weighted = [made[name].astype("f8") * examples for name in base]
    return {
        "weights": [one for array in (*made.values(), *weighted) for one in floats(array)],
        "change": [
            one
            for name in base
            for array in (made[name] - base[name], moved[name], moved[name] * np.float32(examples))
            for one in floats(array)
        ],
        "loss": numbers([loss, loss * examples]),
        "tally": [*numbers(sums[1:]), *windows(ring.encode_tail(sums, 3))],
    }


class Taken(NamedTuple):
    """A peer's part in the open sum, from its own disk."""

    turn: Turn
    cohort: Cohort

    @property
    def secrets(self) -> list[bytes]:
        """The secrets that nobody ever gets: of the card, and of the masks of pairs."""
        own, me = keys.CardSecrets(self.turn.master), self.turn.peer
        pairs = [
            keys.pair_mask(own.mask_key, self.cohort.cards[other].mask_key, self.cohort.id)
            for other in self.cohort.neighbors(me)
        ]
        channel = own.channel_key.private_bytes_raw()
        return [self.turn.master, own.mask_seed, channel, *pairs, *self._shares(1)]

    @property
    def own_mask(self) -> list[bytes]:
        """The secrets of its own mask, which are told when its update counts."""
        seed = keys.CardSecrets(self.turn.master).self_seed
        return [seed, keys.self_mask(seed, self.cohort.id), *self._shares(0)]

    def _shares(self, kind: int) -> list[bytes]:
        """What others have of this peer's own mask (0), or of the key for masks of pairs (1)."""
        cohort, me = self.cohort, self.turn.peer
        places = range(1, len(cohort.group(me)) + 1)
        split = keys.CardSecrets(self.turn.master).split(cohort.id, cohort.threshold, places)
        return [pair[kind] for pair in split]


def taken(home: Path) -> Taken:
    """The newest turn that a peer has masked in."""
    with sqlite3.connect(f"file:{home / 'secure.db'}?mode=ro", uri=True) as db:
        query = "SELECT state FROM turns WHERE state NOT NULL ORDER BY number DESC LIMIT 1"
        ((state,),) = db.execute(query)
    db.close()
    turn = msgspec.msgpack.decode(state, type=Turn)
    assert turn.cohort is not None
    return Taken(turn, Cohort(turn.cohort))


class Integers(NamedTuple):
    """A peer's part of the sum without its masks: the update uint[n], and the metrics uint64[m]."""

    update: Any
    tail: Any

    def forms(self) -> list[bytes]:
        if not len(self.update):
            return windows(self.tail)
        signed = self.update.view(f"<i{self.update.itemsize}")
        wider = (signed.astype("<i4"), signed.astype("<i8"), signed.astype("<f4"))
        return [one for form in (signed, *wider) for one in windows(form)] + windows(self.tail)


def integers(of: Taken, number: int, folder: Path) -> Integers:
    """What this peer added its masks to."""
    assert of.turn.mask is not None
    pins = Pins(frozenset(of.cohort.peers), 2)
    masking = peer.mask(of.turn, of.turn.mask, pins)[1]._replace(plus=[], minus=[])
    plan, cards = of.cohort.plan, of.cohort.cards
    is_training = plan.kind == "train"
    loss = {"train_loss" if is_training else "loss": planted.LOSSES[number]}
    sums = {} if is_training else {"regression": planted.tally(number)}
    most = max(card.examples for card in cards.values())
    told = tails.values(plan.names, loss, sums, cards[of.turn.peer].examples, most)
    files = [folder / name for name in ("base", "trained", "unmasked")]
    weights.save(planted.first(), files[0])
    weights.save(trained(number), files[1])
    with WeightsFile(files[0]) as base, WeightsFile(files[1]) as made:
        masked_file.write(masking, (made, base) if is_training else None, told, files[2])
    return read_masked(files[2], of)


def read_masked(path: Path, of: Taken) -> Integers:
    dtype = ring.DTYPES[of.cohort.plan.ring]
    with WeightsFile(path) as file:
        update = file.read(Part("w", 0, sum(of.cohort.plan.sizes)))
        tail = file.read(Part("t", 0, tails.count(of.cohort.plan.names)))
    return Integers(update.view(dtype), tail.view("<u8"))


# --- a fleet whose coordinator is stopped and searched ---------------------------------------

#: Of one round of a secure run: after the masked uploads, after the masks were removed, after the
#: commit; then in the evaluation, and after the end.
_BEGINNING = ("run.recorded.SurvivorsFixed", "run.recording.VersionCommitted")
SECURE_STEPS = (
    *_BEGINNING,
    "run.recorded.VersionCommitted",
    "run.recorded.SurvivorsFixed",
    "run.recording.RoundClosed",
    "run.recorded.RunEnded",
)
#: By codec, one secure run after the other, and then a plain one.
RUNS = {"fp32": SECURE_STEPS, "int8": _BEGINNING}
PLAIN_STEPS = ("run.recorded.TrainingClosed", "run.recording.RoundClosed")


class Watched:
    """A fleet of which all that it sends is kept. Its coordinator stops at steps of its runs."""

    def __init__(self, site: Fleet) -> None:
        self.site, self.sent = site, site.folder / "sent"
        self.sent.mkdir()
        #: By step, in order: files that the coordinator makes before it stops.
        self._reached: dict[str, list[Path]] = {}
        points = list[str]()
        for number, steps in enumerate((*RUNS.values(), PLAIN_STEPS)):
            for place, step in enumerate(steps):
                nth = number * SECURE_STEPS.count(step) if step in SECURE_STEPS else number
                nth += steps[:place].count(step) + 1
                file = site.folder / f"reached{len(points)}"
                points.append(f"{step}:{nth}=stop@{file}")
                self._reached.setdefault(step, []).append(file)
        env = site._env() | {VARIABLE: failpoint_names.check(",".join(points))}
        words = [COORDINATOR, "up", "--host", HOST, "--port", str(two_free_ports()[0])]
        self._process = site._start("up", words, env).process
        wait_for((site.home / "up.json").exists, "the coordinator is up")
        trusting(site, *NAMES)
        self.peers = [site.folder / name for name in NAMES]
        #: What is searched for: of the first peer.
        self.patterns = of_peer(0)

    def start(self, *words: str) -> str:
        return self.site.start_run(TASK, "--quorum", "3", "--rounds", "1", *words)

    def at(self, step: str, look: Callable[[], T]) -> T:
        """Wait until the coordinator stops at this step, look, and let it go on."""
        process, file = psutil.Process(self._process.pid), self._reached[step].pop(0)
        wait_for(file.exists, f"the coordinator reaches {step}")
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "it stops")
        try:
            return look()
        finally:
            process.send_signal(signal.SIGCONT)

    def found(self) -> dict[str, set[str]]:
        """What is found by place: the files of the coordinator, its memory, all that was sent."""
        search, process = Search(self.patterns), psutil.Process(self._process.pid)
        memory = [search.in_memory(one.pid) for one in (process, *process.children(recursive=True))]
        return {
            "files": search.in_files(self.site.home),
            "log": search.in_files(self.site.folder / "up.log"),
            "memory": set[str]().union(*memory),
            "sent": search.in_files(self.sent),
        }

    def backup(self) -> set[str]:
        """What is found in a backup with all versions."""
        file = self.site.folder / f"backup{len(list(self.site.folder.glob('backup*')))}"
        done = self.site.ask("admin", "backup", str(file), "--with-versions")
        assert done.returncode == 0, done.stderr
        return Search(self.patterns).in_files(file)

    def masked(self) -> dict[str, set[str]]:
        """Look after the masked uploads: check these, search also for what was masked."""
        first, *_ = sums = [taken(home) for home in self.peers]
        plain = integers(first, 0, self.site.folder)
        card = first.turn.card
        self.patterns |= {
            f"integers {len(self.patterns)}": plain.forms(),
            "secrets": [*self.patterns.get("secrets", []), *first.secrets],
            OWN_MASK: first.own_mask,
            KNOWN: [card.signature, SIGNED_CARD.decode(card.card).nonce],
        }
        spool = {file_digest(path): path for path in (self.site.home / "spool").rglob("*.*")}
        uploads = [read_masked(spool[one.turn.upload], one) for one in sums]
        if len(plain.update):
            check_random(uploads, plain)
        return self.found()


def check_random(uploads: list[Integers], plain: Integers) -> None:
    """The masked updates, and sums of two, look random; without masks, they do not."""
    masked = [one.update for one in uploads]
    pairs = [masked[0] + masked[1], masked[1] - masked[2], masked[0] - plain.update]
    for array in (*masked, *map(np.diff, masked), *pairs):
        assert chi_squared_p(array) > MIN_P
        assert chi_squared_p_of_elements(array) > MIN_P
    assert chi_squared_p(plain.update) < MIN_P
    assert chi_squared_p_of_elements(plain.update) < MIN_P


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    recorder = ROOT / "tests" / "support" / "tls_recorder"
    settings = {
        "COMMONWEIGHT_AGENT_TASK_FILES": f"{TASK}={Path(planted.__file__)}:Planted",
        "PYTHONPATH": f"{recorder}:{ROOT}",
        SENT_VARIABLE: str(tmp_path / "sent"),
    }
    with fleet(tmp_path, **settings) as site:
        try:
            yield Watched(site)
        finally:
            if "up" in site.programs:  # a failed test may leave it stopped
                site.programs["up"].kill()


@pytest.mark.timeout(900)  # ten searches through the memory of the coordinator
def test_nothing_of_one_peer_is_anywhere_at_the_coordinator(watched: Watched) -> None:
    """Attack: search the coordinator's files, its memory in each step, a backup and all bytes on
    the wire for the update, the metrics and the secrets of one peer.

    In a plain run after that, the same search finds the update and the metrics.
    """
    for codec, steps in RUNS.items():
        run = watched.start("--secure", "--codec", codec)
        for number, step in enumerate(steps):
            is_masked = step == SECURE_STEPS[0]
            found = watched.at(step, watched.masked if is_masked else watched.found)
            assert found["files"] | found["log"] <= {KNOWN}, (step, found)
            allowed = {KNOWN} if is_masked else {KNOWN, OWN_MASK}
            assert found["sent"] | found["memory"] <= allowed, (step, found)
            if number < 2:  # the search sees what has come just now
                assert KNOWN in found["files"]
                assert found["sent"] & found["memory"] == allowed
        assert watched.site.ended_run(run)["state"] == "finished"
        assert watched.backup() == set()

    run = watched.start()
    first, last = (watched.at(step, watched.found) for step in PLAIN_STEPS)
    for where in ("files", "sent"):
        assert first[where] >= {"weights", "loss"}
        assert last[where] >= {"loss", "tally"}
    # What was read of the weights can be overwritten by now, but not what the coordinator knows.
    assert first["memory"] | last["memory"] >= {"loss", "tally"}
    assert watched.site.ended_run(run)["state"] == "finished"
    assert "loss" in watched.backup()
