"""No name imitates another, and peers of one ticket weigh no more than one peer may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.runs.aggregation import _own_ticket
from coordinator.strategies import averaging
from protocols.enrollment import names
from protocols.errors import Refused
from tests.support.https_site import Machine, Site

pytestmark = pytest.mark.attack("20.15")

IMITATIONS = [
    "\N{CYRILLIC SMALL LETTER ES}linic",
    "CLINIC",
    "clin\N{LATIN SMALL LETTER DOTLESS I}c",
    "c1inic",
    "c|inic",
    "cl\N{LATIN SMALL LETTER I WITH ACUTE}nic",
    "сӏіпіс",
    "\N{MATHEMATICAL BOLD SMALL C}LINIC",
    "\N{LATIN LETTER SMALL CAPITAL C}linic",
    "clini\N{LATIN LETTER SMALL CAPITAL C}",
    "clin\N{LATIN SMALL LETTER IOTA}c",
]
#: Of the name ward-10.
DASHED = [
    "ward\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}10",
    "ward\N{CJK UNIFIED IDEOGRAPH-4E00}10",
    "w\N{LATIN SMALL LETTER ALPHA}rd-10",
    "ward-1\N{HANGUL LETTER IEUNG}",
    "ward-\N{HANGUL LETTER I}0",
    "ward-\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT FIVE}",
]
RESERVED = [
    *("coordinator", "Operator", "ALL", "se1f", "none", "\N{CYRILLIC SMALL LETTER A}ll"),
    *("\N{LATIN LETTER SMALL CAPITAL A}ll", "coordinat\N{LATIN LETTER SMALL CAPITAL O}r"),
    "AAAA-BBBB-CCCC-DDDD",
]
HIDDEN = ["cli\N{RIGHT-TO-LEFT OVERRIDE}nic", "cli\N{ZERO WIDTH SPACE}nic", "a\x1b[2Jb", "a\nb"]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("name", [*IMITATIONS, *RESERVED])
def test_a_peer_does_not_imitate_another(site: Site, name: str) -> None:
    """Attack: a machine joins with a name that looks like another's, or stands for something."""
    site.enroll("clinic")
    machine = Machine()
    with pytest.raises(Refused, match=r"looks like|stands for|mixes letters"):
        site.registry.join(machine.joining(site.ticket(), name=name))
    assert [peer.name for peer in site.registry.peers.values()] == ["clinic"]


@pytest.mark.parametrize("name", DASHED)
def test_signs_of_other_scripts_are_no_dashes_and_digits(name: str) -> None:
    """Attack: letters of other scripts that look like a dash, or digits that look like others."""
    try:
        plain = names.normalize(name)
        names.check_free(plain, ["ward-10"])
    except Refused:
        return
    assert plain == "ward-15", "the digits are shown as what they mean"


@pytest.mark.parametrize(
    "name", [*HIDDEN, "", "  ", "x" * 65, "-rf", "\N{COMBINING ACUTE ACCENT}a"]
)
def test_a_name_that_cannot_be_read_is_refused(name: str) -> None:
    """Attack: a name with characters that turn, hide or move what a terminal shows."""
    with pytest.raises(Refused):
        names.normalize(name)


def test_a_removed_peer_leaves_its_name_and_the_same_name_is_numbered(site: Site) -> None:
    """Control: the same name gets a number, and a removed peer leaves its name."""
    first = site.registry.peers[site.enroll("clinic").peer]
    assert site.registry.peers[site.enroll("  clinic ").peer].name == "clinic-2"
    site.registry.remove(first.peer, "test")
    machine = Machine()
    site.registry.join(
        machine.joining(site.ticket(), name="\N{FULLWIDTH LATIN SMALL LETTER X}-ray")
    )
    assert site.registry.peers[machine.peer].name == "x-ray"


@pytest.mark.parametrize(
    "name",
    [
        "клиника",
        "Klinik Zürich 2",
        "病院-3",
        "a.b:c@d_e",
        "Łódź",
        "Ålesund Sør",
        "Bình Dương",
        "Iași",
    ],
)
def test_honest_names_of_any_language_are_taken(name: str) -> None:
    """Control: honest names of any language are taken."""
    assert names.normalize(name) == name
    names.check_free(name, ["clinic"])


# --- one ticket, one cap ---------------------------------------------------------------------


def ticket_of(tickets: dict[str, str]) -> Callable[[str], str]:
    return tickets.__getitem__


def test_sybils_of_one_ticket_share_one_cap() -> None:
    """Attack: somebody with a ticket for three machines joins three times for three caps."""
    counts = {"honest1": 100, "honest2": 100, "s1": 1000, "s2": 1000, "s3": 1000}
    tickets = {"honest1": "a", "honest2": "b", "s1": "c", "s2": "c", "s3": "c"}
    apart = averaging.shares(counts, cap=0.34)
    assert sum(apart[peer] for peer in ("s1", "s2", "s3")) > 0.9
    share = averaging.shares_by_ticket(counts, ticket_of(tickets), cap=0.34)
    assert sum(share.values()) == pytest.approx(1.0)
    assert sum(share[peer] for peer in ("s1", "s2", "s3")) == pytest.approx(0.34)
    assert share["s1"] == pytest.approx(share["s2"])


def test_shares_stay_the_same_bits_where_no_cap_binds() -> None:
    """Control: shares stay the same bits where no cap binds."""
    counts = {"a": 7, "b": 11, "c": 13}
    plain = averaging.shares(counts, cap=0.5)
    for tickets in ({"a": "1", "b": "2", "c": "3"}, dict.fromkeys(counts, "1")):
        assert averaging.shares_by_ticket(counts, ticket_of(tickets), cap=0.5) == plain
    assert averaging.shares_by_ticket(counts, _own_ticket, cap=1.0) == averaging.shares(
        counts, cap=1.0
    )


def test_the_registry_knows_the_ticket_of_each_peer(site: Site) -> None:
    """Control: the registry knows the ticket of each peer."""
    shared = site.ticket(uses=2)
    machines = [Machine("one"), Machine("two")]
    for machine in machines:
        site.registry.join(machine.joining(shared))
    other = site.enroll("three")
    assert {site.registry.ticket_of(machine.peer) for machine in machines} == {shared.id}
    assert site.registry.ticket_of(other.peer) != shared.id
    assert site.registry.ticket_of("unknown") == "unknown"
