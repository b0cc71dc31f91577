"""Small data sets in a cache as Hugging Face's `datasets` keeps it, under the names of real ones.

The images are the handwritten digits of scikit-learn, and the tables its iris and breast cancer:
what counts is that apps find real rows without a network.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

_HASH = "0" * 40


def fill(cache: Path) -> None:
    """Fill the cache with what the templates of Flower load."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL.Image import fromarray
    from sklearn.datasets import load_breast_cancer, load_digits, load_iris

    digits = load_digits()
    pictures = [
        fromarray((image * 15).astype(np.uint8)).resize((32, 32)) for image in digits.images
    ]
    labels = [int(label) for label in digits.target]
    for name, column, is_rgb in (
        ("uoft-cs/cifar10", "img", True),
        ("zalando-datasets/fashion_mnist", "image", False),
    ):
        shown = [p.convert("RGB") if is_rgb else p.resize((28, 28)) for p in pictures]
        features = Features({column: Image(), "label": ClassLabel(num_classes=10)})
        parts = {"train": slice(0, 600), "test": slice(600, 800)}
        _put(
            cache,
            name,
            {
                split: Dataset.from_dict(
                    {column: shown[part], "label": labels[part]}, features=features
                )
                for split, part in parts.items()
            },
        )
    iris = load_iris()
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    table: dict[str, Any] = {name: iris.data[:, i].tolist() for i, name in enumerate(names)}
    table["species"] = iris.target.tolist()
    _put(cache, "hitorilabs/iris", {"train": Dataset.from_dict(table)})
    cancer = load_breast_cancer()
    higgs = {"inputs": cancer.data.astype(np.float32).tolist(), "label": cancer.target.tolist()}
    features = Features({"inputs": [Value("float32")], "label": Value("float64")})
    _put(cache, "jxie/higgs", {"train": Dataset.from_dict(higgs, features=features)})


def _put(cache: Path, name: str, splits: dict[str, Any]) -> None:
    """Store a data set of this name."""
    from datasets import load_dataset

    short = name.rpartition("/")[2]
    source = cache.parent / "source" / short
    source.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(source / f"{split}.parquet")
    load_dataset(str(source), cache_dir=str(cache))
    (made,) = (path.parent for path in cache.glob(f"{short}/**/dataset_info.json"))
    target = cache / name.replace("/", "___") / "default" / "0.0.0" / _HASH
    target.parent.mkdir(parents=True)
    shutil.move(made, target)
    shutil.rmtree(cache / short)
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"builder_name": "parquet", "dataset_name": short, "config_name": "default"}
    (target / "dataset_info.json").write_text(json.dumps(info))
