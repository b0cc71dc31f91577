"""The Helm chart, by Helm itself and by the schemas of Kubernetes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[3] / "deploy" / "helm" / "commonweight"
BIN = Path(sys.executable).parent
VALUES = {
    "image": f"images.example.org/commonweight-replica@sha256:{'0' * 64}",
    "ledger": "postgresql://commonweight@db.example.org/fleets?sslmode=verify-full",
    "versions": "s3://bucket/fleets/a",
    "keysSecret": "commonweight-keys",
    "environmentSecret": "commonweight-environment",
    "publicAddresses": ["one.example.org:9092", "two.example.org:9092"],
    "downloadAddresses": ["one.example.org:9094", "two.example.org:9094"],
    "environment": {"COMMONWEIGHT_APPROVE": True},
}


def helm(folder: Path, *words: str, **changed: Any) -> subprocess.CompletedProcess[str]:
    (folder / "values.json").write_text(json.dumps(VALUES | changed))
    return subprocess.run(
        [BIN / "helm", *words, CHART, "-f", folder / "values.json"], capture_output=True, text=True
    )


def test_helm_finds_nothing_wrong(tmp_path: Path) -> None:
    done = helm(tmp_path, "lint", "--strict")
    assert done.returncode == 0, done.stdout


def test_kubernetes_takes_what_it_makes(tmp_path: Path) -> None:
    made = tmp_path / "made.yaml"
    made.write_text(helm(tmp_path, "template", "fleet").stdout)
    done = subprocess.run(
        [BIN / "kubernetes-validate", "--strict", made], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(made.open())}
    assert set(found) == {
        ("StatefulSet", "fleet"),
        ("PodDisruptionBudget", "fleet"),
        ("NetworkPolicy", "fleet"),
        ("Service", "fleet"),
        ("Service", "fleet-0"),
        ("Service", "fleet-1"),
    }
    pod = found["StatefulSet", "fleet"]["spec"]["template"]["spec"]
    environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert json.loads(environment["COMMONWEIGHT_PUBLIC_ADDRESSES"]) == VALUES["publicAddresses"]
    assert json.loads(environment["COMMONWEIGHT_DOWNLOAD_ADDRESSES"]) == VALUES["downloadAddresses"]
    assert environment["COMMONWEIGHT_APPROVE"] == "true"
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ledger": "postgresql://commonweight:secret@db.example.org/fleets"},
        {"ledger": ""},
        {"versions": "file:///versions"},
        {"publicAddresses": []},
        {"image": ""},
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    done = helm(tmp_path, "template", "fleet", **wrong)
    assert done.returncode != 0
    assert next(iter(wrong)) in done.stderr
