"""The estimate of `featray plan` compared with a run that is limited by decoding, or by the model.

The README has the accuracy on an idle machine. The factor that is allowed here leaves room for a busy machine
and for the start-up of the run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.synthetic.phantom import make_collection

ConfigOf = Callable[..., dict[str, Any]]
FACTOR = 5.0
"""Allowed factor between estimate and run. An estimate without the slower stage is wrong by ten or more."""
FEW, MANY = 2, 60


def make_copies(folder: Path, count: int, shape_zyx: tuple[int, int, int]) -> Path:
    """Make a collection of one phantom and copies of it under other names."""
    make_collection(folder, 1, shape_zyx=shape_zyx, seed=2, dicom_count=0)
    (first,) = folder.rglob("*.nii.gz")
    for number in range(1, count):
        shutil.copy(first, first.with_name(f"copy_{number:03}.nii.gz"))
    return folder


def measure_run(config: dict[str, Any]) -> float:
    """Run `extract`; return its seconds."""
    start = time.monotonic()
    assert featray.extract(config).failed == 0
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape_zyx", "input_zyx", "slower"),
    [
        pytest.param((96, 256, 256), (8, 32, 32), "decode_s", id="decoding_is_slower"),
        pytest.param((8, 32, 32), (16, 128, 128), "infer_s", id="the_model_is_slower"),
    ],
)
def test_the_estimate_is_close_to_the_time_of_the_run(
    shape_zyx: tuple[int, int, int], input_zyx: tuple[int, int, int], slower: str, tmp_path: Path
) -> None:
    from featray.synthetic.vae import build_encoder

    model = tmp_path / "encoder.keras"
    build_encoder(input_zyx).save(model)

    def make_config(count: int, name: str) -> dict[str, Any]:
        source = tmp_path / f"source_{count}"
        return {
            "source": {"uri": str(source if source.exists() else make_copies(source, count, shape_zyx))},
            "preprocess": {"size": list(input_zyx)},
            "model": {
                "uri": str(model),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": ["z_mean"],
            },
            "output": {"uri": str(tmp_path / name)},
            "run": {"engine": "inline"},
        }

    estimate = featray.plan(make_config(MANY, "planned")).estimate
    other = {"decode_s": "infer_s", "infer_s": "decode_s"}[slower]
    assert getattr(estimate, slower) > 3 * getattr(estimate, other), (
        "the other stage is slower than the id of the case says"
    )
    measure_run(make_config(FEW, "warm-up"))
    seconds = measure_run(make_config(MANY, "run"))
    assert seconds / FACTOR < estimate.seconds < seconds * FACTOR


@pytest.mark.slow
def test_the_estimate_is_for_the_layers_that_the_scans_lack(config_of: ConfigOf) -> None:
    config = config_of(model={"layers": ["encoder/z_mean"]})
    featray.extract(config)
    config["model"]["layers"] = ["encoder/z_mean", "encoder/pre_latent"]
    result = featray.plan(config)
    assert result.work == "1 new layer for 12 scans; 1 layer is up to date and stays as it is"
    assert (result.estimate.command, result.estimate.output_bytes) == ("extract", 4 * 16 * 12)
    assert featray.extract(config).done == 12
    assert featray.plan(config).estimate.sampled == 0
