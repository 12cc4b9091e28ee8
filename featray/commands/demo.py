"""`featray demo`: a small collection, a small trained VAE and an extraction, all made here.

    DIR/ct/               phantoms: NIfTI files, one DICOM series, labels.csv with the truth
    DIR/vae.keras         a VAE trained on them
    DIR/demo.yaml         the config; run it again with `featray extract DIR/demo.yaml`
    DIR/out               the output

What is there already is used again, so a second call does nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from featray.config import Config, load
from featray.errors import ConfigError, FeatrayError
from featray.pipeline import extract
from featray.schema import Scan
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.stages.report import Summary
from featray.synthetic.phantom import make_collection

log = logging.getLogger(__name__)

SCANS = 24
SHAPE_ZYX = (48, 96, 96)
INPUT_ZYX = (16, 64, 64)
LAYERS = ("encoder/z_mean", "encoder/z_log_var", "encoder/pre_latent", "encoder/conv_3")
SEED = 0
EPOCHS = 30


@dataclass(frozen=True)
class DemoResult:
    """Where the demo lies and what its extraction found."""

    directory: str
    config: str
    output: str
    labels: str
    summary: Summary

    def text(self) -> str:
        """Return what was made and what to look at next."""
        return f"""{self.summary.text()}

What to look at next
  featray status {self.output}            rows of each layer
  featray layers {self.config}       every layer you could have chosen
  featray plan {self.config}         nothing is left to do; change the collection and see
  {self.labels}      the truth about each scan: lesion size and place, body width

  import pyarrow.parquet as pq, pandas as pd          # no featray needed to read the features
  z = pq.read_table("{self.output}/features/layer=z_mean").to_pandas()
  z.merge(pd.read_csv("{self.labels}"), on="scan_id")"""


def demo(
    directory: str | os.PathLike[str], *, show: bool = False, stop: threading.Event | None = None
) -> DemoResult:
    """Make the demo in a folder and extract four layers.

    Args:
        directory: Made if it does not exist; what an earlier demo left there is used again.
        show: Whether to report progress on stderr.
        stop: Set it to stop the extraction cleanly.

    Raises:
        ConfigError: The folder holds something else.
    """
    folder = Path(directory)
    config_path = folder / "demo.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the demo a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ct").is_dir():
        raise ConfigError(f"{folder} holds something else; give the demo a folder of its own")
    values = demo_config(folder)
    config = load(values)
    if not (folder / "ct" / "labels.csv").exists():
        log.info("making %d phantom scans in %s", SCANS, folder / "ct")
        make_collection(folder / "ct", SCANS, shape_zyx=SHAPE_ZYX, seed=SEED)
    if not (folder / "vae.keras").exists():
        _train(config, folder / "vae.keras")
    config_path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    summary = extract(config_path, show=show, stop=stop)
    return DemoResult(
        str(folder), str(config_path), str(folder / "out"), str(folder / "ct" / "labels.csv"), summary
    )


def demo_config(folder: Path) -> dict[str, Any]:
    """Return the demo's config; `configs/demo.yaml` is the same for the default folder."""
    short = [{"layer": layer, "as": layer.rpartition("/")[2]} for layer in LAYERS]
    return {
        "source": {"uri": str(folder / "ct")},
        "preprocess": {"window": [-1000, 1000], "scale": [0, 1], "size": list(INPUT_ZYX)},
        "model": {
            "uri": str(folder / "vae.keras"),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": short,
        },
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline"},
    }


def _train(config: Config, path: Path) -> None:
    """Train on exactly what the extractor will see: the volumes go through featray's own stages."""
    scans = list_scans(config.source).scans
    volumes = np.concatenate([_volume(config, scan) for scan in scans])
    log.info("training a small VAE on %d volumes of %s voxels", len(volumes), "x".join(map(str, INPUT_ZYX)))
    from featray.model import runtime

    runtime.configure()
    from featray.synthetic.vae import build_vae, train_vae

    vae = build_vae(INPUT_ZYX, filters=(4, 8, 16), dense=32, latent=8, seed=SEED)
    train_vae(vae, volumes, epochs=EPOCHS, seed=SEED)
    temporary = path.with_name(f"part-{path.name}")
    vae.save(temporary)
    temporary.replace(path)


def _volume(config: Config, scan: Scan) -> NDArray[np.float32]:
    decoded = Decoder.from_config(config)(scan)
    if decoded.record.status != "ok":
        raise FeatrayError(f"demo scan {scan.scan_id}: {decoded.record.message}")
    return decoded.tensor
