"""The estimate of `featray plan` for real scans and a real model, limited by decoding or by the model.

How close it comes to the time of a run is measured on an idle machine; see deploy/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.hardware import count_usable_cores
from featray.synthetic.phantom import make_collection

ConfigOf = Callable[..., dict[str, Any]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape_zyx", "input_zyx", "slower"),
    [
        pytest.param((96, 256, 256), (8, 32, 32), "decode_s", id="decoding_is_slower"),
        pytest.param((8, 32, 32), (16, 128, 128), "infer_s", id="the_model_is_slower"),
    ],
)
def test_the_estimate_contains_the_slower_stage(
    shape_zyx: tuple[int, int, int], input_zyx: tuple[int, int, int], slower: str, tmp_path: Path
) -> None:
    from featray.synthetic.vae import build_encoder

    build_encoder(input_zyx).save(tmp_path / "encoder.keras")
    make_collection(tmp_path / "source", 3, shape_zyx=shape_zyx, seed=2, dicom_count=0)
    estimate = featray.plan(
        {
            "source": {"uri": str(tmp_path / "source")},
            "preprocess": {"size": list(input_zyx)},
            "model": {
                "uri": str(tmp_path / "encoder.keras"),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": ["z_mean"],
            },
            "output": {"uri": str(tmp_path / "out")},
            "run": {"engine": "inline"},
        }
    ).estimate
    assert estimate.sampled == 3
    other = {"decode_s": "infer_s", "infer_s": "decode_s"}[slower]
    assert getattr(estimate, slower) > getattr(estimate, other)
    work_s = 3 * (estimate.decode_s + estimate.infer_s)
    assert work_s / count_usable_cores() * 0.999 <= estimate.seconds <= work_s * 1.001


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
