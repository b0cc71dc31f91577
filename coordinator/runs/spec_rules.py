"""Rules for combinations of a run's options. `runs.options` checks each option alone. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from coordinator import strategies
from coordinator.runs import best_version, options, task_settings
from coordinator.runs.secure import plans
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import personal, svd, trees
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.custom import CustomStrategy
from protocols.codecs import registry
from protocols.errors import UnknownName, UsageError
from protocols.messages.task_names import is_name_of
from protocols.model import personalization
from protocols.privacy import private_training
from protocols.privacy.secagg.cohort import MIN_COHORT
from protocols.privacy.secagg.ring import RING_BITS


class Rule(NamedTuple):
    """A combination that is refused. `text` and `hint` may have fields of the spec in braces."""

    is_broken: Callable[[RunSpec, StrategyAdapter], bool]
    text: str
    hint: str = ""


_DEFAULTS = RunSpec(task="", rounds=1)
_BUFFERED = "--mode buffered"
_SERVER = "use fedavg or a server optimizer"
_ALONE = "or --dp-shared 1: each peer adds all of the noise alone"
#: Defaults of tasks that are not those of plain SGD (`agent.tasks`). Agents check all of them.
_STEP_DEFAULTS: dict[str, dict[str, object]] = {
    "images": {"momentum": 0.9},
    "tabular": {"optimiser": "adamw"},
}
_USER_LEVEL = "--dp-user 3 --clip-norm 1 --weighting equal --outlier-limit 0"

# fmt: off
#: Rules for runs with noise.
_PRIVATE_RULES = (
    Rule(lambda spec, _: spec.task in private_training.OTHER_TASKS,
         "--dp needs a task that can train with noise for single rows, and {spec.task} cannot",
         f"one of {', '.join(private_training.TASKS)}, or a cw.TorchTask of your own"),
    Rule(lambda spec, _: spec.settings.get("optimiser") == "muon",
         "--dp cannot be used with optimiser=muon", "--set optimiser=adamw, or sgd"),
    Rule(lambda spec, _: spec.mode != "synchronous",
         f"--dp cannot be used with {_BUFFERED}: the noise depends on how often a peer trains, "
         "which is not known in this mode", "--mode synchronous"),
    Rule(lambda spec, adapter: bool(adapter.required_metric(spec.strategy_args))
             or personalization.SCAFFOLD in adapter.trainer_settings(spec.strategy_args),
         "--dp cannot be used with {spec.strategy}, which needs figures of each peer without noise",
         f"{_SERVER}"),
    Rule(lambda spec, _: bool(spec.best_metric or spec.patience) or spec.target is not None,
         "with --dp no metric leaves a peer, so --best-metric, --patience and --until have no "
         "effect", "leave them out"),
)
#: Rules for runs in which peers share the noise: see docs/notes/shared-noise.md.
_SHARED_RULES = (
    Rule(lambda spec, _: not (spec.secure and spec.dp_epsilon),
         "--dp-shared needs --secure and --dp: the peers share the noise of a secure sum",
         "--secure --dp 3 --dp-shared {spec.dp_shared}"),
    Rule(lambda spec, _: spec.dp_shared > spec.quorum,
         "--dp-shared {spec.dp_shared} needs noise of more peers than a sum may have: the quorum "
         "is {spec.quorum}", "--quorum {spec.dp_shared}, or a smaller --dp-shared"),
    Rule(lambda spec, _: spec.settings.get("batch_size") not in ("all", 0)
             or spec.settings.get("epochs") != 1,
         "with --secure --dp, peers share the noise of one step over all rows in a round; each "
         "further step would need noise of its own",
         f"--set batch_size=all --set epochs=1; {_ALONE}"),
    Rule(lambda spec, _: not _is_number(spec.settings.get("lr")),
         "with --secure --dp, the range of the integers follows from the learning rate, so the run "
         "must say it", f"--set lr=0.5; {_ALONE}"),
    Rule(lambda spec, adapter: not _is_plain_step(spec, adapter),
         "with --secure --dp, peers share the noise of a step of plain SGD, and by its settings or "
         "defaults {spec.task} takes another step",
         "--set optimiser=sgd --set momentum=0, without weight_decay, clip_norm and proximal_mu; "
         f"--strategy fedavgm has momentum; {_ALONE}"),
    Rule(lambda spec, _: spec.weighting != "examples" or spec.max_weight_share < 1,
         "with --secure --dp, each row counts the same, so that the noise hides a row of each "
         "peer alike: --weighting equal and --max-weight-share would change that",
         f"leave them out; {_ALONE}"),
    Rule(lambda spec, _: bool(spec.clip_norm),
         "with --secure --dp, --clip-norm would clip the noise, too; --dp-clip bounds each row",
         f"leave it out; {_ALONE}"),
    Rule(lambda spec, _: spec.codec != "fp32",
         "with --secure --dp, --codec {spec.codec} is too coarse for the noise of one peer",
         f"--codec fp32; {_ALONE}"),
    Rule(lambda spec, _: bool(spec.dp_user_epsilon),
         "noise that peers share cannot be combined with --dp-user, which divides by a fixed "
         "number of peers", _ALONE),
)
#: Rules for runs whose versions have noise.
_VERSION_RULES = (
    Rule(lambda spec, _: not spec.clip_norm,
         "--dp-user needs --clip-norm: the noise hides at most what one peer can change",
         _USER_LEVEL),
    Rule(lambda spec, _: spec.weighting != "equal" or spec.max_weight_share < 1,
         "--dp-user needs the same weight for all peers: a weight by examples shows their number, "
         "and a cap depends on the others", f"{_USER_LEVEL}, without --max-weight-share"),
    Rule(lambda spec, _: bool(spec.outlier_limit),
         "--dp-user cannot be used with --outlier-limit, which compares each peer with the others: "
         "one peer could change how much all of them count", _USER_LEVEL),
    Rule(lambda spec, _: spec.mode != "synchronous",
         f"--dp-user cannot be used with {_BUFFERED}: a fast peer has several updates in a "
         "version, so the noise would not hide it", "--mode synchronous"),
    Rule(lambda spec, _: spec.late == "fold",
         "--dp-user cannot be used with --late fold: a peer could have two updates in a version, "
         "so the noise would not hide it", "--late drop"),
    Rule(lambda spec, adapter: adapter.feed != "mean",
         "--dp-user cannot be used with {spec.strategy}: the noise is for a mean of all updates, "
         "and this strategy chooses among them", f"{_SERVER}"),
    Rule(lambda spec, adapter: bool(adapter.required_metric(spec.strategy_args))
             or personalization.SCAFFOLD in adapter.trainer_settings(spec.strategy_args),
         "--dp-user cannot be used with {spec.strategy}, which needs figures of each peer without "
         "noise", f"{_SERVER}"),
    Rule(lambda spec, _: bool(spec.best_metric or spec.patience) or spec.target is not None,
         "with --dp-user no metric decides, as metrics have no noise: --best-metric, --patience "
         "and --until have no effect, and versions are not evaluated", "leave them out"),
)
#: Rules for secure runs: the coordinator has no figure of a single peer.
_SECURE_RULES = (
    Rule(lambda spec, _: spec.quorum < MIN_COHORT,
         "--secure needs a quorum of at least 3: a sum of fewer updates reveals them",
         "--quorum 3"),
    Rule(lambda spec, _: spec.mode != "synchronous",
         f"--secure cannot be used with {_BUFFERED}: the peers of a sum train on one version",
         "--mode synchronous"),
    Rule(lambda spec, _: spec.late == "fold",
         "--secure cannot be used with --late fold: a masked update belongs to one sum",
         "--late drop"),
    Rule(lambda spec, _: spec.codec not in RING_BITS,
         "--secure sends integers, and cannot send the codec {spec.codec}",
         "--codec fp32, or --codec int8 for half of the bytes"),
    Rule(lambda spec, _: spec.codec in RING_BITS
             and spec.quorum > plans.max_cohort(RING_BITS[spec.codec]),
         "--secure with --codec {spec.codec} cannot sum a quorum of {spec.quorum} updates: too few "
         "bits are left for each value", "--codec fp32, or a smaller quorum"),
    Rule(lambda _, adapter: isinstance(adapter, CustomStrategy),
         "--secure cannot be used with {spec.strategy}: a custom strategy may need single updates",
         _SERVER),
    Rule(lambda spec, adapter: bool(adapter.required_metric(spec.strategy_args)),
         "--secure cannot be used with {spec.strategy}, which needs a metric of each peer: "
         "a secure run knows only the mean of all", _SERVER),
    Rule(lambda _, adapter: adapter.feed not in ("mean", "sums"),
         "--secure cannot be used with {spec.strategy}, which compares single updates: "
         "a secure run knows only their mean", _SERVER),
    Rule(lambda spec, adapter: adapter.needs_base or bool(
             adapter.trainer_settings(spec.strategy_args).keys() & personalization.SETTINGS),
         "--secure cannot be used with {spec.strategy}, which keeps state for each peer", _SERVER),
    Rule(lambda spec, _: spec.outlier_limit > 0,
         "--secure cannot be used with --outlier-limit, which compares single updates",
         "leave it out, or --outlier-limit 0; --clip-norm bounds each honest peer"),
)
#: Rules for runs of trees: each round has the sums of the same peers.
_TREE_RULES = (
    Rule(lambda spec, _: spec.mode != "synchronous" or spec.late == "fold",
         f"trees cannot be used with {_BUFFERED} or --late fold: an update is for one level",
         "--mode synchronous, --late drop"),
    Rule(lambda spec, _: bool(spec.dp_epsilon or spec.dp_user_epsilon),
         "--dp and --dp-user cannot be used with trees, whose sums have no noise",
         "--secure, or --set model=linear"),
    Rule(lambda spec, _: bool(spec.outlier_limit or (spec.clip_norm and not spec.secure)),
         "--outlier-limit and --clip-norm cannot be used with trees, whose updates are sums",
         "leave them out"),
    Rule(lambda spec, _: bool(spec.select or "fraction_train" in spec.strategy_args),
         "--select and fraction_train cannot be used with trees: the levels of a tree come from "
         "the same peers", "leave them out"),
)
#: Rules for runs whose updates are factors of adapters.
_FACTOR_RULES = (
    Rule(lambda spec, adapter: spec.task != "lora"
             or spec.settings.get("aggregation") != (
                 svd.NAME if adapter.feed == "factors" else "stack"),
         "the codec {spec.codec} is for adapters that are multiplied",
         "commonweight run start lora --set aggregation=stack sets it"),
    Rule(lambda spec, _: spec.secure,
         "--secure cannot be used with aggregation={spec.settings[aggregation]}: the coordinator "
         "multiplies the factors of each peer, and a masked sum has no single factors",
         "--set aggregation=ffa, whose mean is exact too"),
    Rule(lambda spec, _: bool(spec.dp_user_epsilon),
         "--dp-user cannot be used with aggregation={spec.settings[aggregation]}: the noise would "
         "be for products, which have many more numbers than factors",
         "--set aggregation=ffa"),
    Rule(lambda spec, adapter: adapter.needs_base or bool(
             adapter.trainer_settings(spec.strategy_args).keys() & personalization.SETTINGS),
         "{spec.strategy} cannot be used with aggregation={spec.settings[aggregation]}, with which "
         "factors begin anew in each round", f"{_SERVER}, or --set aggregation=ffa"),
    Rule(lambda spec, adapter: adapter.feed == "factors" and (
            spec.mode != "synchronous" or spec.late == "fold"),
         f"aggregation=svd cannot be used with {_BUFFERED} or --late fold: an update replaces the "
         "factors of the version that it was trained on",
         "--mode synchronous, --late drop; or --set aggregation=stack"),
)
#: Rules for runs that train while they exchange updates.
_OVERLAP_RULES = (
    Rule(lambda spec, _: spec.mode != "synchronous" or spec.late == "fold",
         f"--overlap cannot be used with {_BUFFERED} or --late fold, in which an update may be for "
         "an older version", "--mode synchronous, --late drop"),
    Rule(lambda spec, _: spec.secure,
         "--secure cannot be used with --overlap: a lost sum starts again with other peers on the "
         "same version, and these peers have trained for the next one",
         "leave one of them out"),
    Rule(lambda spec, _: bool(spec.dp_epsilon),
         "--dp cannot be used with --overlap: noise is counted when a peer is asked for a round, "
         "and with --overlap the peer trains before that", "leave one of them out"),
    Rule(lambda _, adapter: adapter.feed in ("sums", "factors"),
         "--overlap cannot be used with {spec.strategy}, whose updates are no change of weights",
         _SERVER),
    Rule(lambda spec, _: bool(registry.parse(spec.codec).rank),
         "--overlap cannot be used with aggregation={spec.settings[aggregation]}, with which "
         "factors begin anew in each round", "--set aggregation=ffa"),
    Rule(lambda spec, adapter: personalization.SCAFFOLD in adapter.trainer_settings(
             spec.strategy_args),
         "--overlap cannot be used with {spec.strategy}, whose corrections belong to the newest "
         "version", _SERVER),
)
#: Rules for runs that exchange one fragment of the model in each round.
_FRAGMENT_RULES = (
    Rule(lambda spec, _: not spec.overlap,
         "--fragments needs --overlap 1: peers train all layers on, while a few are exchanged",
         "--overlap 1 --fragments {spec.fragments}"),
    Rule(lambda spec, adapter: adapter.feed != "mean" or isinstance(adapter, CustomStrategy),
         "--fragments cannot be used with {spec.strategy}, which may need whole models", _SERVER),
    Rule(lambda spec, _: bool(spec.dp_user_epsilon),
         "--dp-user cannot be used with --fragments: a peer's progress of several rounds is in one "
         "update, and the noise is planned for single ones", "leave --fragments out"),
)
#: Rules for all runs, then for synchronous and for buffered ones.
_RULES = (
    Rule(lambda spec, _: spec.rounds < 1, "a run needs 1 round or more", "--rounds 10"),
    Rule(lambda spec, _: bool(private_training.SETTINGS & spec.settings.keys()),
         "noise is not a setting of a task", "use --dp, --delta and --dp-clip"),
    Rule(lambda spec, _: not spec.dp_epsilon and (
            spec.dp_clip != _DEFAULTS.dp_clip
            or (spec.dp_delta != _DEFAULTS.dp_delta and not spec.dp_user_epsilon)),
         "--delta and --dp-clip have no effect without --dp", "add --dp, such as --dp 3"),
    Rule(lambda spec, _: bool(personalization.SETTINGS & spec.settings.keys()),
         "{reserved} is no setting of a task: the strategy sets it",
         "--strategy scaffold or fedbn, with --strategy-arg"),
    Rule(lambda spec, adapter: adapter.feed != "sums" and (
            spec.codec == registry.SUMS or (spec.task == "tabular" and
                                            spec.settings.get("model") == trees.NAME)),
         "a run of trees has the strategy trees and the codec sums",
         "commonweight run start tabular --set model=trees sets both"),
    Rule(lambda spec, adapter: not registry.parse(spec.codec).rank and (
            adapter.feed == "factors" or (spec.task == "lora" and
                                          spec.settings.get("aggregation") in ("stack", svd.NAME))),
         "a run of lora whose adapters are multiplied has the codec factors",
         "commonweight run start lora --set aggregation=stack sets it"),
    Rule(lambda spec, _: spec.min_examples > spec.max_examples,
         "--min-examples must be at most {spec.max_examples}"),
    Rule(lambda spec, _: bool(spec.best_direction) and not spec.best_metric,
         "--best-direction needs --best-metric"),
    Rule(lambda spec, adapter: spec.late == "fold" and (
            adapter.feed != "mean" or adapter.needs_base or spec.mode != "synchronous"),
         "--late fold cannot be used with {spec.strategy} in mode {spec.mode}",
         f"{_SERVER} in synchronous rounds, or --late drop"),
)
_SYNCHRONOUS_RULES = (
    Rule(lambda spec, _: bool(spec.buffer or spec.concurrency) or spec.server_lr != 1.0,
         f"--buffer, --concurrency and --server-lr belong to {_BUFFERED}",
         f"{_BUFFERED} --buffer 4"),
)
_BUFFERED_RULES = (
    Rule(lambda spec, _: spec.buffer < 1,
         f"{_BUFFERED} needs --buffer: how many updates make a version, 1 or more", "--buffer 4"),
    Rule(lambda spec, _: spec.quorum != 1,
         f"--quorum has no effect with {_BUFFERED}: --buffer says what a version needs"),
    Rule(lambda spec, _: spec.select != 0,
         f"--select has no effect with {_BUFFERED}: --concurrency says how many work"),
    Rule(lambda spec, _: "fraction_train" in spec.strategy_args,
         f"fraction_train has no effect with {_BUFFERED}: --concurrency says how many work"),
    Rule(lambda _, adapter: adapter.feed != "mean",
         f"{{spec.strategy}} cannot be used with {_BUFFERED}: a fast peer may have several updates "
         "in a buffer, so that a bound on the number of bad peers has no effect",
         f"{_SERVER}; --max-weight-share and --clip-norm bound each peer"),
    Rule(lambda _, adapter: adapter.needs_base,
         f"{{spec.strategy}} cannot be used with {_BUFFERED}: its control variates belong to one "
         "version",
         f"{_SERVER}, or --mode synchronous"),
)
# fmt: on


def check(spec: RunSpec) -> None:
    """Raise UsageError, UnknownName or CannotBeMet unless a run with these settings can work."""
    options.check(spec)
    adapter = strategies.find(spec.strategy)
    reserved = min(personalization.SETTINGS & spec.settings.keys(), default="")
    of_mode = _BUFFERED_RULES if spec.mode == "buffered" else _SYNCHRONOUS_RULES
    of_sums = _SECURE_RULES if spec.secure else ()
    of_factors = _FACTOR_RULES if registry.parse(spec.codec).rank else ()
    of_model = (*of_factors, *(_TREE_RULES if adapter.feed == "sums" else ()))
    of_noise = (
        *(_PRIVATE_RULES if spec.private else ()),
        *(_SHARED_RULES if spec.dp_shared > 1 else ()),
        *(_VERSION_RULES if spec.private_versions else ()),
    )
    of_overlap = (
        *(_OVERLAP_RULES if spec.overlap else ()),
        *(_FRAGMENT_RULES if spec.fragments > 1 else ()),
    )
    for rule in (*_RULES, *of_model, *of_overlap, *of_sums, *of_mode, *of_noise):
        if rule.is_broken(spec, adapter):
            text, hint = (t.format(spec=spec, reserved=reserved) for t in (rule.text, rule.hint))
            raise UsageError(text, hint)
    adapter.check(spec)
    personal.check(spec)
    best_version.check(spec)
    task_settings.check(spec)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_plain_step(spec: RunSpec, adapter: StrategyAdapter) -> bool:
    given = spec.settings | adapter.trainer_settings(spec.strategy_args)
    step = {**_STEP_DEFAULTS.get(spec.task, {}), **given}
    bent = ("momentum", "weight_decay", "clip_norm", "proximal_mu")
    return step.get("optimiser", "sgd") == "sgd" and not any(step.get(name) for name in bent)


def check_known(spec: RunSpec, known: Collection[str]) -> None:
    """Raise UnknownName unless a peer can run the task. `known`: the tasks of all online peers;
    empty if that is not known."""
    if not known or spec.task in known:
        return
    near = [task for task in known if is_name_of(task, spec.task)]
    near = near or difflib.get_close_matches(spec.task, known, 1)
    raise UnknownName(
        f"no peer can run the task {spec.task!r}" + (f"; did you mean {near[0]}?" if near else ""),
        f"tasks of the online peers: {', '.join(sorted(known))}; to add your own: "
        f"commonweight-agent {'app' if spec.app else 'task'} add, on each machine",
    )
