"""`featray doctor`: everything a run needs is looked at, nothing is changed, every problem is told."""

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


def verdicts(found: DoctorResult) -> dict[str, set[str]]:
    checks: dict[str, set[str]] = {}
    for result in found.results:
        checks.setdefault(result.check, set()).add(result.status)
    return checks


def messages(found: DoctorResult, check: str, status: str) -> str:
    return "\n".join(one.message for one in found.results if (one.check, one.status) == (check, status))


def test_a_config_that_can_run_passes_everywhere_and_nothing_is_written(
    config_of: Any, tmp_path: Path
) -> None:
    config = config_of()
    found = doctor(config)
    assert found.exit_code == 0
    assert not any("FAIL" in statuses for statuses in verdicts(found).values())
    assert set(verdicts(found)) == {
        "config", "source", "scans", "model", "layers", "invariance", "output", "memory", "accelerator",
        "engine",
    }  # fmt: skip
    assert "12 scans (1 dicom, 11 nifti)" in messages(found, "source", "PASS")
    assert not Path(config["output"]["uri"]).exists()


def test_problems_of_every_part_are_told_at_once(config_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = config_of()
    config["source"]["uri"] = str(tmp_path / "nowhere")
    config["model"]["layers"] = ["encoder/z_meen"]
    config["output"]["uri"] = str(tmp_path / "file")
    config["run"]["decode"]["wrokers"] = 1
    found = doctor(config)
    assert found.exit_code == 2
    failed = {check for check, statuses in verdicts(found).items() if "FAIL" in statuses}
    assert failed == {"config", "source", "model", "output"}
    assert "did you mean workers" in messages(found, "config", "FAIL")
    assert "encoder/z_mean" in messages(found, "model", "FAIL")


def test_a_sample_that_cannot_be_read_is_a_warning_and_none_that_can_is_a_failure(
    config_of: Any, tmp_path: Path, phantoms: Path
) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "cut.nii.gz").write_bytes((phantoms / "nifti/phantom_000.nii.gz").read_bytes()[:900])
    config = config_of()
    config["source"]["uri"] = str(tmp_path / "ct")
    assert "cut.nii.gz fails: truncated" in messages(doctor(config), "scans", "FAIL")
    (tmp_path / "ct" / "good.nii.gz").write_bytes((phantoms / "nifti/phantom_000.nii.gz").read_bytes())
    found = doctor(config)
    assert "cut.nii.gz fails: truncated" in messages(found, "scans", "WARN")
    assert found.exit_code == 0


def test_a_layer_that_looks_at_the_rest_of_the_batch_is_named(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        textwrap.dedent("""
            import keras
            @keras.saving.register_keras_serializable("tests_doctor")
            class Centred(keras.layers.Layer):
                def call(self, x):
                    return x - keras.ops.mean(x, axis=0, keepdims=True)
        """)
    )
    scope: dict[str, Any] = {}
    exec(code.read_text(), scope)
    chain = [keras.layers.Dense(4, name="first"), scope["Centred"](name="centred"), keras.layers.Dense(2)]
    keras.Sequential([keras.Input((5,)), *chain]).save(tmp_path / "m.keras")
    (tmp_path / "arrays").mkdir()
    for n in range(3):
        np.save(tmp_path / "arrays" / f"{n}.npy", np.random.default_rng(n).random(5, np.float32))
    model = {"uri": str(tmp_path / "m.keras"), "custom_objects": [f"{code}:Centred"], "layers": ["dense"]}
    source = {"uri": str(tmp_path / "arrays"), "format": "npy"}
    found = doctor({"source": source, "model": model, "output": {"uri": str(tmp_path / "out")}})
    assert "first seen at layer centred (Centred)" in messages(found, "invariance", "FAIL")
    assert found.exit_code == 2


def test_features_of_another_recipe_in_the_output_are_told(config_of: Any) -> None:
    config = config_of()
    featray.extract(config)
    assert doctor(config).exit_code == 0
    config["preprocess"]["window"] = [-500, 500]
    assert "another recipe" in messages(doctor(config), "output", "WARN")


def test_an_output_that_another_run_holds_is_told(config_of: Any) -> None:
    from featray.output.lease import Lease
    from featray.storage.store import Store

    config = config_of()
    with Lease(Store(config["output"]["uri"]), "20260101T000000000-abcdef"):
        assert "20260101T000000000-abcdef" in messages(doctor(config), "output", "FAIL")


def test_gpus_that_are_asked_for_but_not_there_are_a_warning(config_of: Any) -> None:
    from featray.model.runtime import list_gpu_names

    if list_gpu_names():
        pytest.skip("this machine has a GPU")
    config = config_of()
    config["run"]["actors"] = {"num_gpus": 0.5}
    assert "sees no GPU" in messages(doctor(config), "accelerator", "WARN")


def test_the_command_prints_one_line_each_and_json(
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
