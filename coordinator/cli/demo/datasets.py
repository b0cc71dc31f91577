"""Data that packages ship, split over the owners of a demo.

Tabular: one real table over several clinics.

569 breast tumors, 30 measures of each (Street, Wolberg and Mangasarian 1993), from scikit-learn.
The clinics have very different sizes, and each has its own order of columns.

Text: the reference of the Python language, which Python's own `help()` shows, in one line for each
paragraph. Each owner has some of its chapters.
"""

from __future__ import annotations

import csv
from pathlib import Path
from random import Random

TARGET = "diagnosis"


def write_texts(folder: Path, peers: int) -> list[Path]:
    """Write `folder`/owner1.txt and so on, one for each peer. Each chapter is in one of them."""
    from pydoc_data.topics import topics

    chapters = [topics[name] for name in sorted(topics, key=lambda name: len(topics[name]))]
    paths = []
    for number in range(peers):
        path = folder / f"owner{number + 1}.txt"
        mine = "\n\n".join(chapters[number::peers]).split("\n\n")
        lines = [" ".join(paragraph.split()) for paragraph in mine]
        path.write_text("\n".join(lines), encoding="utf-8")
        paths.append(path)
    return paths


def write(folder: Path, peers: int, seed: int) -> list[Path]:
    """Write `folder`/clinic1.csv and so on, one for each peer. Each row is in one of them."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in found.feature_names]
    labels = [str(name) for name in found.target_names]
    rng = Random(seed)
    rows = [
        [*map(repr, values), labels[label]]
        for values, label in zip(found.data.tolist(), found.target.tolist(), strict=True)
    ]
    rng.shuffle(rows)
    paths, first = [], 0
    for number, size in enumerate(_sizes(len(rows), peers), 1):
        order = rng.sample(range(len(names) + 1), len(names) + 1)
        path = folder / f"clinic{number}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([[*names, TARGET][place] for place in order])
            part = rows[first : first + size]
            writer.writerows([[row[place] for place in order] for row in part])
        paths.append(path)
        first += size
    return paths


def _sizes(rows: int, peers: int) -> list[int]:
    """Rows of each peer: linearly fewer from peer to peer; the first one also takes the rest."""
    weights = [peers + 1 - number for number in range(1, peers + 1)]
    sizes = [rows * weight // sum(weights) for weight in weights]
    sizes[0] += rows - sum(sizes)
    return sizes
