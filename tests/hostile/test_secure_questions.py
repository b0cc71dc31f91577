"""A coordinator that wants the answer of one peer to a secure question, against the agents' real
steps."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from agent.analytics.query_log import QuestionContext
from agent.home.secure_store import QUESTIONS
from coordinator.jobs.state import Job
from coordinator.remote.analysis import answers_of
from coordinator.storage.job_events import JobSpec
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query
from protocols.errors import CohortLost, CommonweightError
from protocols.messages.jobs import QuestionStep, SecureAnalyze
from protocols.privacy import question_layout, question_sums
from protocols.privacy.question_layout import Layout
from protocols.privacy.question_sums import MaskedAnswer
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.messages import AgreeRequest, ShareRequest, encode
from protocols.privacy.secagg.turn import Masking
from tests.support.secure_tables import SecurePeer, SecureTables

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
pytestmark = pytest.mark.attack("questions", by="coordinator")

QUESTION = "sum(salary), mean(age) by sex"


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits what each answer told."""
    return memory_path


def rows(seed: int, count: int = 40, **fixed: Any) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    return [
        {
            "salary": int(chance.integers(20_000, 90_000)),
            "age": int(chance.integers(20, 70)),
            "sex": "fm"[place % 2],
            "ward": "ABC"[place % 3],
        }
        | fixed
        for place in range(count)
    ]


def fleet(folder: Path, peers: int = 4, **allowed: Any) -> SecureTables:
    return SecureTables(folder, [rows(seed) for seed in range(peers)], **allowed)


def told_bytes(site: SecureTables, peer: str) -> bytes:
    return b"".join(body for _, one, _, body in site.seen if one == peer)


def own_numbers(site: SecureTables, peer: str, text: str) -> list[bytes]:
    """A peer's sums as they would leave without masks."""
    query = parse_query(text)
    layout = next(
        msgspec.msgpack.decode(asked.request, type=Layout)
        for step, _, asked, _ in site.seen
        if step == "ready"
    )
    agent = site.peers[peer]
    answer = msgspec.json.decode(
        agent._compute(query, QuestionContext(secure=True)), type=PeerAnswer
    )
    words = question_sums.encode(query, layout, peer, answer)
    return [word.tobytes() for word in words if word.any()]


def masked_numbers(site: SecureTables, peer: str) -> bytes:
    (body,) = (body for step, one, _, body in site.seen if (step, one) == ("mask", peer))
    return msgspec.msgpack.decode(body, type=MaskedAnswer).numbers


def test_no_peers_sum_is_in_what_a_coordinator_records(tmp_path: Path) -> None:
    """Attack: record every byte of a secure question, and look for the sums of each peer, also in
    the differences between two peers' masked numbers."""
    site = fleet(tmp_path)
    site.ask(QUESTION)
    masked = {peer: np.frombuffer(masked_numbers(site, peer), "<u8") for peer in site.ids}
    for peer in site.ids:
        own = own_numbers(site, peer, QUESTION)
        assert len(own) > 6
        assert not any(number in told_bytes(site, peer) for number in own)
        others = [masked[peer] - masked[one] for one in site.ids if one != peer]
        assert not any(number in part.tobytes() for number in own for part in others)
        # Uniform bytes: even the high ones, which are 0 in every sum.
        high = masked[peer].reshape(-1, question_sums.WORDS)[:, -1]
        assert len(np.unique(high)) == len(high)


def test_without_masks_each_sum_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with the masks off, the same search finds the sums of each peer."""
    monkeypatch.setattr(Masking, "words", lambda self, numbers: numbers.copy())
    site = fleet(tmp_path)
    with pytest.raises(CommonweightError):
        site.ask(QUESTION)  # what is unmasked in vain is no count
    for peer in site.ids:
        assert all(number in told_bytes(site, peer) for number in own_numbers(site, peer, QUESTION))


def test_shapes_have_no_number(tmp_path: Path) -> None:
    """Attack: read sums, counts or rows of one peer from the first step, or from the rows that an
    answer claims."""
    site = fleet(tmp_path)
    found = site.ask("count, sum(salary), histogram(age, 4, 20, 60), levels(ward) by sex")
    assert found.rows == 160
    for step, _, _, body in site.seen:
        if step == "shape":
            shape = question_layout.read_shape(body)
            assert shape.answer.rows == 0
            numbers = [cell.rows for cell in shape.answer.cells]
            for cell in shape.answer.cells:
                numbers += [v for v in _numbers(msgspec.to_builtins(cell.states)) if v]
            assert not any(numbers)
        if step == "ready":
            card = messages.SIGNED_CARD.decode(messages.decode_ready(body).card.card)
            assert card.examples == 1


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) else []


def test_fewer_peers_than_the_owner_wants_are_refused(tmp_path: Path) -> None:
    """Attack: sum over three peers, where the owners want four; or over one that is trusted and two
    that the coordinator has invented."""
    site = fleet(tmp_path, 4, secure_min=4)
    left = site.peers[site.ids[3]]
    lie_about_shapes(site)
    with pytest.raises(CommonweightError, match="a secure sum needs 3"):
        site.merged(parse_query(QUESTION), site.ids[:3])
    assert "the owner requires 4" in site.errors[0]
    assert {step for step, *_ in site.seen} == {"shape"}, "no card has left"
    for peer in site.peers.values():
        trust = {left.me.peer: ""} if peer is not left else peer.owner.trust
        peer.owner = replace(peer.owner, trust=trust, secure_min=0)
    site.errors.clear()
    with pytest.raises(CommonweightError):
        site.ask("mean(age)")
    assert any("trusts 1 other peers" in why for _, _, _, why in _refusals(site))


def _refusals(site: SecureTables) -> list[tuple[str, str, Any, str]]:
    return [
        (step, peer, asked, question_layout.read_shape(body).answer.refused)
        for step, peer, asked, body in site.seen
        if step == "shape"
    ]


def lie_about_shapes(site: SecureTables) -> None:
    """The coordinator acts as if owners wanted three peers, and had told of none before."""

    def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
        if step != "shape":
            return None
        shape = question_layout.read_shape(site.peers[peer].step(asked))
        return msgspec.json.encode(replace(shape, minimum=3, together=()))

    site.reply = reply


@pytest.mark.parametrize("second", [QUESTION, "mean(salary) by ward"])
def test_a_question_is_not_repeated_with_another_peer_set(tmp_path: Path, second: str) -> None:
    """Attack: ask the same, or another question about the column, without one of the peers, or with
    one more: the difference of the sums would be that peer's."""
    site = fleet(tmp_path, 5)
    lie_about_shapes(site)
    site.merged(parse_query(QUESTION), site.ids[:4])
    for others in (site.ids[:3], site.ids):
        seen = len(site.seen)
        with pytest.raises(CommonweightError):
            site.merged(parse_query(second), others)
        assert any("fewer than 3 trusted peers" in why for why in site.errors)
        assert {step for step, *_ in site.seen[seen:]} <= {"shape", "ready"}
        # The new one has nothing to compare with; it alone makes a card.
        assert sum(step == "ready" for step, *_ in site.seen[seen:]) <= 1
    assert site.merged(parse_query(second), site.ids[:4]).rows == 160


def test_the_second_question_asks_the_same_peers(tmp_path: Path) -> None:
    """Control: an honest coordinator leaves out the peer that was not in the first sum."""
    site = fleet(tmp_path, 5)
    site.online.discard(site.ids[4])
    assert site.ask(QUESTION).rows == 160
    site.online.add(site.ids[4])
    again = site.ask("var(salary)")
    assert (again.peers, again.rows) == (4, 160)
    assert again.left_out == {site.ids[4]: "earlier sums about these columns were without it"}


@pytest.mark.parametrize("second", ["sum(salary)", "mean(salary), mean(age) by sex"])
def test_a_condition_does_not_leave_a_peer_out_of_a_sum(tmp_path: Path, second: str) -> None:
    """Attack: ask the same peers twice, the second time with a condition that no row of one of them
    meets, such as the name of its site. It would add 0, and the difference would be its sum. In
    either order."""
    parts = [rows(seed, site="north" if seed == 3 else "south") for seed in range(4)]
    questions = [(second, ""), ("sum(salary)", "site != 'north'")]
    for folder, asked in (("one", questions), ("two", questions[::-1])):
        (tmp_path / folder).mkdir()
        site = SecureTables(tmp_path / folder, parts)
        lie_about_shapes(site)
        site.ask(*asked[0])
        seen = len(site.seen)
        with pytest.raises(CommonweightError):
            site.ask(*asked[1])
        assert len(site.errors) == 4
        assert all("fewer than 3 trusted peers" in why for why in site.errors)
        assert {step for step, *_ in site.seen[seen:]} == {"shape"}
        assert site.ask(*asked[0]).rows == site.ask(*asked[0]).rows, "the first one is told again"


def test_dropouts_of_a_second_sum_are_not_its_difference(tmp_path: Path) -> None:
    """Attack: begin the second sum with the same peers, and say that the upload of one of them has
    not come."""
    site = fleet(tmp_path)
    site.ask(QUESTION)
    victim = site.ids[0]

    def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
        body = site.peers[peer].step(asked)
        if step == "mask" and peer == victim:
            raise CommonweightError("the coordinator says that it has not come")
        return body

    site.reply = reply
    with pytest.raises(CohortLost):
        site.ask(QUESTION)
    assert "fewer than 3 trusted peers" in " ".join(site.errors)
    assert "unmask" not in {step for step, *_ in site.seen[-4:]}


def test_an_answer_alone_and_one_in_a_sum_are_not_both_told(tmp_path: Path) -> None:
    """Attack: subtract what three peers answer without --secure from the secure sum of four; or ask
    without --secure first."""
    site = fleet(tmp_path)
    site.ask("sum(salary)")
    for peer in site.peers.values():
        refused = peer.answer(parse_query("mean(salary) by sex")).refused
        assert "in secure sums alone" in refused
        assert not peer.answer(parse_query("mean(age)")).refused
    with pytest.raises(CommonweightError, match="without --secure about column 'age'"):
        site.ask("sum(age)")
    job = Job(id="analyze-1", spec=JobSpec(kind="analyze"), excused={"p": refused})
    with pytest.raises(CommonweightError, match="no peer has answered") as caught:
        answers_of(job)
    assert "ask the same with --secure" in caught.value.hint


def test_an_owner_of_secure_sums_answers_nothing_alone(tmp_path: Path) -> None:
    """Attack: ask an owner with secure_min without --secure."""
    site = fleet(tmp_path, 3, secure_min=3)
    for peer in site.peers.values():
        assert "secure questions alone" in peer.answer(parse_query("count")).refused
        assert not peer.answer(parse_query("columns")).refused, "names of columns are no sums"
    assert site.ask("count").groups[0].figures == (120,)


def sent(site: SecureTables, change: Callable[[str, Layout], Layout]) -> None:
    """Ask with a layout that the coordinator has changed, for each peer."""

    def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
        if step != "ready":
            return None
        layout = change(peer, msgspec.msgpack.decode(asked.request, type=Layout))
        asked = SecureAnalyze(
            query=asked.query, session=asked.session, step=step, request=encode(layout)
        )
        return site.peers[peer].step(asked)

    site.reply = reply


def test_a_sum_without_one_number_of_a_peer_is_refused(tmp_path: Path) -> None:
    """Attack: leave some numbers of one peer out of a sum, to subtract it from one with them."""
    site = fleet(tmp_path)
    site.ask(QUESTION)
    victim = site.ids[0]

    def without(peer: str, layout: Layout) -> Layout:
        bits = bytearray(layout.told[victim])
        bits[0] &= 0b10111111
        return replace(layout, told=layout.told | {victim: bytes(bits)})

    sent(site, without)
    seen = len(site.seen)
    with pytest.raises(CommonweightError):
        site.ask(QUESTION)
    assert "does not say what this peer tells" in " ".join(site.errors)
    assert {step for step, *_ in site.seen[seen:]} <= {"shape", "ready"}


def test_a_group_of_one_peer_has_no_sum(tmp_path: Path) -> None:
    """Attack: sum a group that one peer alone has; tell it that others have the group, too; or tell
    each peer another layout."""
    parts = [rows(0), rows(1), rows(2)]
    parts[0] += rows(3, 20, ward="only here")
    site = SecureTables(tmp_path, parts)
    found = site.ask("sum(salary) by ward")
    assert {group.group[0] for group in found.groups} == {"A", "B", "C"}
    rare = ("only here",)
    owner = max(site.ids, key=lambda peer: len(site.peers[peer].file.read_bytes()))

    def told_of_rare() -> PeerAnswer:
        shapes = [body for step, one, _, body in site.seen if (step, one) == ("shape", owner)]
        return question_layout.read_shape(shapes[-1]).answer

    def with_rare(peer: str, layout: Layout) -> Layout:
        more = replace(layout, groups=(*layout.groups, rare), told={})
        bits = {}
        for one, packed in layout.told.items():
            known = np.unpackbits(np.frombuffer(packed, np.uint8), count=6).astype(bool)
            bits[one] = np.packbits([*known, True, True]).tobytes()
        invented = {one: (*some, {"": {9: 1}}, {"": {9: 1}}) for one, some in layout.rows.items()}
        own = question_layout.rows_of(parse_query("sum(salary) by ward"), more, told_of_rare())
        return replace(more, told=bits, rows=invented | {owner: own})

    sent(site, with_rare)
    with pytest.raises(CommonweightError):
        site.ask("sum(salary) by ward")
    assert "does not say what this peer tells" in " ".join(site.errors), "they do not have it"

    def for_each(peer: str, layout: Layout) -> Layout:
        return with_rare(peer, layout) if peer == owner else layout

    sent(site, for_each)
    seen = len(site.seen)
    with pytest.raises(CommonweightError):
        site.ask("sum(salary) by ward")  # the coordinator's own code refuses it, too
    ready = [(asked, body) for step, _, asked, body in site.seen[seen:] if step == "ready"]
    cards = tuple(messages.decode_ready(body).card for _, body in ready)
    card = messages.SIGNED_CARD.decode(cards[0].card)
    asked = ready[0][0]
    plan = messages.Plan(
        fleet=card.fleet,
        run=card.run,
        round=0,
        kind="question",
        base=card.base,
        ring=32,
        sizes=(),
        limits=(),
    )
    share = encode(ShareRequest(plan=encode(plan), cards=cards))
    lie = SecureAnalyze(query=asked.query, session=asked.session, step="share", request=share)
    with pytest.raises(CommonweightError, match="work with different settings"):
        site.peers[owner].step(lie)


def test_a_card_is_in_one_sum(tmp_path: Path) -> None:
    """Attack: put the cards of one question into a second cohort, and name other survivors than
    were signed."""
    site = fleet(tmp_path)
    requests: dict[str, tuple[SecurePeer, SecureAnalyze]] = {}

    def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
        requests[step] = (site.peers[peer], asked)
        return None

    site.reply = reply
    site.ask("mean(age)")
    # A question that has not come to its last step.
    stop_at(site, "unmask")
    with pytest.raises(CohortLost):
        site.ask("mean(age)")
    agent, asked = requests["share"]
    whole = msgspec.msgpack.decode(asked.request, type=ShareRequest)
    fewer = encode(ShareRequest(plan=whole.plan, cards=whole.cards[:3]))
    with pytest.raises(CommonweightError):
        agent.step(_with(asked, fewer))
    agent, asked = requests["agree"]
    signed = msgspec.msgpack.decode(asked.request, type=AgreeRequest)
    others = tuple(one for one in signed.survivors if one != site.ids[0])
    with pytest.raises(CommonweightError):
        site.peers[site.ids[1]].step(_with(asked, encode(replace(signed, survivors=others))))


def stop_at(site: SecureTables, last: QuestionStep) -> None:
    before = site.reply

    def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
        if step == last:
            raise CommonweightError("stopped")
        return before(step, peer, asked)

    site.reply = reply


def _with(asked: SecureAnalyze, request: bytes) -> SecureAnalyze:
    return SecureAnalyze(query=asked.query, session=asked.session, step=asked.step, request=request)


def test_answers_and_masks_do_not_outlive_the_agent(tmp_path: Path) -> None:
    """Attack: ask for the steps of a question after the agent was restarted, and search its home
    for the sums that it has masked."""
    site = fleet(tmp_path)
    stop_at(site, "agree")
    with pytest.raises(CohortLost):
        site.ask("sum(salary)")
    step, peer, asked, _ = site.seen[-1]
    assert step == "mask"
    agent = site.peers[peer]
    agent.questions = agent.restarted()
    with pytest.raises(CommonweightError, match="no longer has its answer"):
        agent.step(asked)
    (number,) = own_numbers(site, peer, "sum(salary)")[2:3]
    for file in (agent.home / QUESTIONS).rglob("*"):
        assert number not in file.read_bytes()


def test_a_sum_beyond_the_ring_is_refused(tmp_path: Path) -> None:
    """Attack: have a sum wrap, by a column of huge numbers."""
    parts = [rows(seed) for seed in range(3)]
    for part in parts:
        for row in part:
            row["salary"] *= 10.0**30
    site = SecureTables(tmp_path, parts)
    with pytest.raises(CommonweightError, match="too large to be masked"):
        site.ask("var(salary)")
    assert {step for step, *_ in site.seen} == {"shape"}


@pytest.mark.attack("10", by="coordinator")
def test_a_layout_of_millions_of_numbers_takes_no_memory(tmp_path: Path) -> None:
    """Attack: name many groups and categories in a layout of 140 kB, so that an agent makes a list
    of 65 million figures of it."""
    site = fleet(tmp_path, 3)
    levels = tuple(map(str, range(256)))
    groups = tuple((f"g{number}",) for number in range(2000))

    def change(peer: str, layout: Layout) -> Layout:
        return replace(layout, groups=groups, levels=(levels,) * len(layout.levels))

    sent(site, change)
    tracemalloc.start()
    try:
        with pytest.raises(CommonweightError):
            site.ask("levels(ward), levels(sex) by sex")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all("1,026,000 numbers" in why for why in site.errors)
    assert len(site.errors) == 3
    assert most < 64 << 20
