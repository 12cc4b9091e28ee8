"""`featray doctor` checks everything that a run needs, reports every problem, and changes nothing."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml

import featray
from featray.cli.main import main
from featray.commands.doctor import DoctorResult, doctor


def statuses_by_check(report: DoctorResult) -> dict[str, set[str]]:
    """Return the statuses of the results of each check."""
    statuses: dict[str, set[str]] = {}
    for result in report.results:
        statuses.setdefault(result.check, set()).add(result.status)
    return statuses


def join_messages(report: DoctorResult, check: str, status: str) -> str:
    """Return the messages of a check with this status, one per line."""
    results = [result for result in report.results if (result.check, result.status) == (check, status)]
    return "\n".join(result.message for result in results)


@pytest.mark.slow
def test_a_correct_config_passes_every_check_and_nothing_is_written(config_of: Any, tmp_path: Path) -> None:
    config = config_of()
    report = doctor(config)
    assert report.exit_code == 0
    assert not any("FAIL" in statuses for statuses in statuses_by_check(report).values())
    assert set(statuses_by_check(report)) == {
        "config", "source", "scans", "model", "layers", "invariance", "output", "memory", "accelerator",
        "engine",
    }  # fmt: skip
    assert "12 scans (1 dicom, 11 nifti)" in join_messages(report, "source", "PASS")
    assert not Path(config["output"]["uri"]).exists()


@pytest.mark.slow
def test_problems_of_all_checks_are_reported_together(config_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = config_of()
    config["source"]["uri"] = str(tmp_path / "nowhere")
    config["model"]["layers"] = ["encoder/z_meen"]
    config["output"]["uri"] = str(tmp_path / "file")
    config["run"]["decode"]["wrokers"] = 1
    report = doctor(config)
    assert report.exit_code == 2
    failed = {check for check, statuses in statuses_by_check(report).items() if "FAIL" in statuses}
    assert failed == {"config", "source", "model", "output"}
    assert "did you mean workers" in join_messages(report, "config", "FAIL")
    assert "encoder/z_mean" in join_messages(report, "model", "FAIL")


@pytest.mark.slow
def test_one_unreadable_sample_scan_is_a_warning_but_no_readable_one_is_a_failure(
    config_of: Any, tmp_path: Path, phantoms: Path
) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "cut.nii.gz").write_bytes((phantoms / "nifti/phantom_000.nii.gz").read_bytes()[:900])
    config = config_of()
    config["source"]["uri"] = str(tmp_path / "ct")
    assert "cut.nii.gz fails: truncated" in join_messages(doctor(config), "scans", "FAIL")
    (tmp_path / "ct" / "good.nii.gz").write_bytes((phantoms / "nifti/phantom_000.nii.gz").read_bytes())
    report = doctor(config)
    warning = join_messages(report, "scans", "WARN")
    assert "cut.nii.gz fails: truncated" in warning
    assert warning.endswith("the run records it as failed with this reason")
    assert report.exit_code == 0


@pytest.mark.slow
def test_a_layer_that_depends_on_the_rest_of_the_batch_is_named(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        textwrap.dedent("""
            import keras
            @keras.saving.register_keras_serializable("tests_doctor")
            class Centered(keras.layers.Layer):
                def call(self, x):
                    return x - keras.ops.mean(x, axis=0, keepdims=True)
        """)
    )
    scope: dict[str, Any] = {}
    exec(code.read_text(), scope)
    chain = [
        keras.layers.Dense(4, name="first"),
        scope["Centered"](name="centered"),
        keras.layers.Dense(2, name="last"),
    ]
    keras.Sequential([keras.Input((5,)), *chain]).save(tmp_path / "m.keras")
    (tmp_path / "arrays").mkdir()
    for n in range(3):
        np.save(tmp_path / "arrays" / f"{n}.npy", np.random.default_rng(n).random(5, np.float32))
    model = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{code}:Centered"], "layers": ["last"]}
    source = {"uri": str(tmp_path / "arrays"), "format": "npy"}
    report = doctor({"source": source, "model": model, "output": {"uri": str(tmp_path / "out")}})
    assert "first seen at layer centered (Centered)" in join_messages(report, "invariance", "FAIL")
    assert report.exit_code == 2


@pytest.mark.slow
def test_features_of_another_recipe_in_the_output_are_a_warning(config_of: Any) -> None:
    config = config_of()
    featray.extract(config)
    assert doctor(config).exit_code == 0
    config["preprocess"]["window"] = [-500, 500]
    assert "another recipe" in join_messages(doctor(config), "output", "WARN")


@pytest.mark.slow
def test_an_output_that_another_run_has_locked_is_a_failure(config_of: Any) -> None:
    from featray.output.lease import Lease
    from featray.storage.store import Store

    config = config_of()
    with Lease(Store(config["output"]["uri"]), "20260101T000000000-abcdef"):
        assert "20260101T000000000-abcdef" in join_messages(doctor(config), "output", "FAIL")


@pytest.mark.slow
def test_requested_gpus_that_do_not_exist_are_a_warning(config_of: Any) -> None:
    from featray.model.runtime import list_gpu_names

    if list_gpu_names():
        pytest.skip("this machine has a GPU")
    config = config_of()
    config["run"]["actors"] = {"num_gpus": 0.5}
    assert "sees no GPU" in join_messages(doctor(config), "accelerator", "WARN")


@pytest.mark.slow
def test_the_command_prints_one_line_per_result_or_json(
    config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_of()))
    assert main(["doctor", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["exit_code"] == 0
    assert {check["status"] for check in answer["checks"]} == {"PASS", "WARN"}
    assert main(["doctor", str(path), "--set", "model.layers=[nope]"]) == 2
    assert "FAIL  model" in capsys.readouterr().out
