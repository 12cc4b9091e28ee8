"""Test complete runs on real CT with known properties, with both engines."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featray
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.storage.store import Store

LAYERS = [
    "encoder/z_mean",
    "encoder/z_log_var",
    "encoder/pre_latent",
    {"layer": "encoder/conv_4", "as": "conv_4"},
]

INPUT_ZYX = (16, 128, 128)
"""Half of the usual size along each axis, so that the runs take seconds."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from featray.synthetic.vae import build_vae

    path = tmp_path_factory.mktemp("model") / "vae.keras"
    build_vae(INPUT_ZYX).save(path)
    return path


def extract_features(
    source: Path, vae: Path, output: Path, engine: str = "inline"
) -> dict[str, dict[str, Any]]:
    """Extract features; return the row of each scan by its id, with its features under `layers`."""
    summary = featray.extract(
        {
            "source": {"uri": str(source)},
            "preprocess": {"size": list(INPUT_ZYX)},
            "model": {
                "uri": str(vae),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": LAYERS,
            },
            "output": {"uri": str(output)},
            "run": {"engine": engine},
            "limits": {"max_failed_fraction": 1},
        }
    )
    assert summary.exit_code == 0
    dataset = Dataset(Store(str(output)))
    scans = {row["scan_id"]: {**row, "layers": {}} for row in dataset.read(SCANS).to_pylist()}
    for row in dataset.read(FEATURES, ("scan_id", "layer", "feature", "shape")).to_pylist():
        scans[row["scan_id"]]["layers"][row["layer"]] = np.array(row["feature"])
    return scans


@pytest.fixture(scope="module")
def inline(shared_ct: Path, large_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return extract_features(shared_ct / "collection", large_vae, tmp_path_factory.mktemp("inline"))


def test_every_scan_of_the_collection_has_its_known_properties(
    shared_ct: Path, inline: dict[str, Any]
) -> None:
    with (shared_ct / "collection" / "facts.csv").open() as file:
        facts = {row["path"].removeprefix("collection/"): row for row in csv.DictReader(file)}
    assert inline.keys() == facts.keys()
    for name, fact in facts.items():
        scan = inline[name]
        assert scan["status"] == "ok"
        assert scan["shape"] == [int(n) for n in fact["shape_zyx"].split()]
        np.testing.assert_allclose(
            scan["spacing"], [float(mm) for mm in fact["spacing_zyx"].split()], atol=1e-3
        )
        assert scan["orientation"] == fact["orientation"]
        for column in ("hu_min", "hu_p01", "hu_p50", "hu_p99", "hu_max"):
            assert scan[column] == pytest.approx(float(fact[column]), abs=1), (name, column)
        assert {layer: len(values) for layer, values in scan["layers"].items()} == {
            "encoder.z_mean": 32,
            "encoder.z_log_var": 32,
            "encoder.pre_latent": 256,
            "conv_4": 32,
        }


def test_dicom_and_nifti_twins_have_the_same_features(inline: dict[str, Any]) -> None:
    """Allow for rounding: batches of different sizes may lead to sums in another order."""
    for name in ("STS_002", "CRLM-CT-1004"):
        dicom, nifti = inline[f"dicom/{name}"], inline[f"nifti/{name}.nii.gz"]
        for layer, values in nifti["layers"].items():
            np.testing.assert_allclose(
                dicom["layers"][layer], values, rtol=1e-5, atol=1e-6, err_msg=f"{name} {layer}"
            )


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_gives_the_same_scans_and_features(
    shared_ct: Path, large_vae: Path, inline: dict[str, Any], tmp_path: Path
) -> None:
    ray = extract_features(shared_ct / "collection", large_vae, tmp_path, engine="ray")
    assert ray.keys() == inline.keys()
    for name, scan in inline.items():
        for layer, values in scan["layers"].items():
            np.testing.assert_allclose(ray[name]["layers"][layer], values, rtol=1e-5, atol=1e-6)


def test_only_readable_unusual_scans_are_ok_and_have_their_known_properties(
    shared_ct: Path, vae_file: Path, tmp_path: Path
) -> None:
    """Run once over all unusual cases; odd/cases.csv states the acceptable outcome of each."""
    summary = featray.extract(
        {
            "source": {"uri": str(shared_ct / "odd")},
            "preprocess": {"size": [8, 32, 32]},
            "model": {
                "uri": str(vae_file),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": ["encoder/z_mean"],
            },
            "output": {"uri": str(tmp_path / "out")},
            "run": {"engine": "inline"},
        }
    )
    assert summary.found == summary.ok + summary.failed + summary.excluded
    scans = {row["scan_id"]: row for row in Dataset(Store(str(tmp_path / "out"))).read(SCANS).to_pylist()}
    ok = {name.split("/")[0].split("#")[0]: row for name, row in scans.items() if row["status"] == "ok"}
    assert ok.keys() <= {
        "jpeg2000-empty-uids",
        "multiframe-and-singles-one-uid",
        "uint8-slope",
        "oblique-8bit-windowed",
        "slice-without-preamble",
    }
    assert ok["jpeg2000-empty-uids"]["shape"] == [20, 512, 512]
    assert ok["jpeg2000-empty-uids"]["spacing"][0] == pytest.approx(2.0)
    assert "not_hu" in ok["uint8-slope"]["warnings"]
    assert ok["uint8-slope"]["hu_max"] == pytest.approx(563.19, abs=0.01)
    assert {"not_hu", "oblique"} <= set(ok["oblique-8bit-windowed"]["warnings"])
    assert ok["slice-without-preamble"]["shape"][0] == 48
