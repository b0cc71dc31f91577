"""The plan of each method, and how its questions are put to peers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from coordinator.jobs.analysis import Merged, coverage
from coordinator.jobs.methods import counts, cox, glm, meta, moments, survival
from coordinator.jobs.methods.requests import Method
from coordinator.jobs.methods.results import PeersLost, Plan, Statistics
from protocols.analytics.query import Query

#: The error of an agent whose version does not have an operation.
_UNKNOWN_OPERATION = re.compile(r"Invalid enum value '(\w{1,32})' - at `?\$\.operations")

_PLANS: dict[str, Callable[[Method], Plan]] = {
    "ttest": moments.ttest,
    "anova": moments.anova,
    "corr": moments.corr,
    "pca": moments.pca,
    "chi2": counts.chi2,
    "hist": counts.hist,
    "table1": counts.table1,
    "glm": glm.glm,
    "km": survival.km,
    "cox": cox.cox,
    "meta": meta.meta,
}


def follow(method: Method, put: Callable[[Query, Sequence[str]], Merged]) -> Statistics:
    """The result of a method. `put(query, peers)` asks these peers, or all; raises what it raises.

    The peers that answer the first question have to answer all.
    """
    peers: list[str] = []
    left_out: dict[str, str] = {}
    while True:
        try:
            return _follow(method, put, peers, left_out)
        except PeersLost as lost:
            left_out |= lost.reasons
            peers = [peer for peer in peers if peer not in lost.reasons]
            if not peers:
                raise


def _follow(
    method: Method,
    put: Callable[[Query, Sequence[str]], Merged],
    peers: list[str],
    left_out: dict[str, str],
) -> Statistics:
    plan = _PLANS[method.name](method)
    query = next(plan)
    while True:
        merged = put(query, peers)
        if not peers:
            peers += merged.used
            left_out |= merged.left_out
        lost = {peer: merged.left_out.get(peer, "no answer") for peer in peers}
        lost = {peer: why for peer, why in lost.items() if peer not in merged.used}
        try:
            query = plan.throw(PeersLost(lost)) if lost else plan.send(merged)
        except StopIteration as done:
            found: Statistics = done.value
            label = coverage(merged, len(peers), len({*peers, *left_out}))
            return replace(found, label=label, left_out=dict(left_out))


def explain_refusal(why: str, method: str = "") -> str:
    """Why a peer gave no answer, also if its agent is older than the method or the operation."""
    if "'SecureAnalyze'" in why:
        return "this agent is too old for --secure: its owner can update it"
    if found := _UNKNOWN_OPERATION.search(why):
        return f"this agent is too old for {method or found[1]}: its owner can update it"
    return why
