"""The owner's ledger of privacy: it forgets no charge, and its limit holds."""

from __future__ import annotations

import math
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from agent.home import privacy_ledger
from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger
from protocols.errors import DiskFull, HomeError, NotAllowed
from protocols.privacy import accountant
from protocols.privacy.events import DiscreteLaplace, Event, Exact, Gaussian, SampledGaussian

NO_LIMIT = Limit(0.0, 1e-5)
ROUND = Gaussian(accountant.noise_for(3.0, 1e-5, 1.0, 10))


def charge(number: int = 1) -> Charge:
    return Charge("training", "r1", (ROUND,), "f", f"mnist, round {number}")


def test_the_limit_is_for_all_events_together(tmp_path: Path) -> None:
    ledger, limit = PrivacyLedger(tmp_path / "privacy.db"), Limit(3.0, 1e-5)
    for number in range(10):
        ledger.charge(charge(number), limit)
    with pytest.raises(NotAllowed, match=r"privacy_max_epsilon is 3 .* 3 is spent") as caught:
        ledger.charge(charge(11), limit)
    assert "commonweight-agent budget" in caught.value.hint
    with pytest.raises(NotAllowed):
        ledger.charge(Charge("question", "j1", (DiscreteLaplace(0.1),), epsilon=0.1), limit)
    assert len(ledger.charges()) == 10
    assert privacy_ledger.spent_epsilon(ledger.charges(), 1e-5) == pytest.approx(3.0, abs=1e-3)
    assert privacy_ledger.left_epsilon(ledger.charges(), limit) == 0.0
    assert 0.9 < privacy_ledger.left_epsilon(ledger.charges()[:8], limit) < 1.5


def test_the_limit_is_exact_though_a_first_check_is_coarse() -> None:
    spent = [DiscreteLaplace(0.1), Gaussian(3.0), SampledGaussian(1.1, 0.01, 1000)]
    exact = accountant.epsilon_of(spent, 1e-5)
    assert accountant.epsilon_of(spent, 1e-5, accountant.CHECK_POINTS) > exact + 2e-5
    privacy_ledger.check(spent[1:], spent[:1], Limit(exact + 1e-5, 1e-5))
    with pytest.raises(NotAllowed):
        privacy_ledger.check(spent[1:], spent[:1], Limit(exact - 1e-5, 1e-5))


def test_a_killed_process_has_charged_what_it_said(tmp_path: Path) -> None:
    """Killed at once after `charge` returns, without closing anything."""
    code = (
        "import os, pathlib, sys\n"
        "from agent.home.privacy_ledger import *\n"
        "from protocols.privacy.events import Gaussian\n"
        "ledger = PrivacyLedger(pathlib.Path(sys.argv[1]))\n"
        "ledger.charge(Charge('training', 'r1', (Gaussian(9.0),)), Limit(0.0, 1e-5))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    file = tmp_path / "privacy.db"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert PrivacyLedger(file).events_of("training", "r1") == [Gaussian(9.0)] * 2
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_at_once_do_not_both_get_the_last_of_the_budget(tmp_path: Path) -> None:
    limit, told = Limit(1.0, 1e-5), list[str]()
    start = threading.Barrier(4)

    def ask(number: int) -> None:
        ledger = PrivacyLedger(tmp_path / "privacy.db")
        start.wait()
        try:
            ledger.charge(Charge("question", str(number), (DiscreteLaplace(0.6),)), limit)
            told.append("answered")
        except NotAllowed:
            told.append("refused")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["answered", "refused", "refused", "refused"]


def test_others_charge_during_a_check_and_count_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, file, checked = Limit(1.0, 1e-5), tmp_path / "privacy.db", privacy_ledger.check
    ledger, other = PrivacyLedger(file), PrivacyLedger(file)

    def interrupted(spent: Iterable[Event], more: Sequence[Event], limit: Limit) -> None:
        checked(spent, more, limit)
        monkeypatch.setattr(privacy_ledger, "check", checked)
        other.charge(Charge("question", "j2", (DiscreteLaplace(0.6),)), limit)

    monkeypatch.setattr(privacy_ledger, "check", interrupted)
    with pytest.raises(NotAllowed):
        ledger.charge(Charge("question", "j1", (DiscreteLaplace(0.6),)), limit)
    ledger.charge(Charge("question", "j3", (DiscreteLaplace(0.3),)), limit)
    assert [entry.name for entry in ledger.charges()] == ["j2", "j3"]


def test_what_has_no_noise_is_named_once_and_costs_no_epsilon(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "privacy.db")
    exact = Charge("evaluation", "r1", (Exact(),), "f", "mnist, its metrics")
    for _ in range(3):
        ledger.charge_exact(exact)
    ledger.charge(charge(), NO_LIMIT)
    assert [entry.is_exact for entry in ledger.charges()] == [True, False]
    assert 0 < privacy_ledger.spent_epsilon(ledger.charges(), 1e-5) < 3
    assert math.isinf(accountant.epsilon_of([Exact()], 1e-5))


def test_the_ledger_reports_a_full_disk_and_works_again_afterwards(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "privacy.db")
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    large = charge()._replace(about="x" * 100_000)
    with pytest.raises(DiskFull, match="full"):
        ledger.charge(large, NO_LIMIT)
    ledger._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    ledger.charge(large, NO_LIMIT)
    assert len(ledger.charges()) == 1


def test_a_charge_that_could_not_be_written_does_not_block_the_next(tmp_path: Path) -> None:
    """Another process reads for longer than the ledger waits, so that the commit fails."""
    ledger = PrivacyLedger(tmp_path / "privacy.db")
    ledger.charge(charge(), NO_LIMIT)
    ledger._db.execute("PRAGMA busy_timeout = 10")
    reader = sqlite3.connect(tmp_path / "privacy.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM charges").fetchone()
    with pytest.raises(HomeError, match="locked"):
        ledger.charge(charge(2), NO_LIMIT)
    reader.execute("COMMIT")
    reader.close()
    ledger.charge(charge(3), NO_LIMIT)
    assert [one.about for one in ledger.charges()] == ["mnist, round 1", "mnist, round 3"]


def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "privacy.db").write_bytes(b"no database" * 1000)
    with pytest.raises(HomeError, match="not a database"):
        PrivacyLedger(tmp_path / "privacy.db")


def test_answers_that_it_does_not_count_are_said(tmp_path: Path) -> None:
    """Versions before 0.1 had them in the home itself, some with noise that no ledger had."""
    (tmp_path / "analysis.db").touch()
    with pytest.raises(HomeError, match="does not count"):
        PrivacyLedger(tmp_path / "told" / "privacy.db")
    (tmp_path / "analysis.db").unlink()
    PrivacyLedger(tmp_path / "told" / "privacy.db").close()
