"""`featray demo`: make a small collection, train a small VAE on it, extract four layers, draw two pictures.

    DIR/ct/               phantoms: NIfTI files, one DICOM series, and their true properties in labels.csv
    DIR/vae.keras         a VAE trained on them
    DIR/demo.yaml         the config; `featray extract DIR/demo.yaml` runs it again
    DIR/out               the output
    DIR/scans.png         some scans as the model sees them
    DIR/z_mean.png        the features of all scans, colored by a label

Collection and model are kept and used again, so a second call extracts nothing.
"""

from __future__ import annotations

import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from featray.commands.demo_pictures import draw_features, draw_scans, read_labels
from featray.commands.montage import spread_indices
from featray.config import Config, load
from featray.errors import ConfigError, FeatrayError
from featray.job import make_engine
from featray.output.read import read
from featray.pipeline import extract
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.stages.report import Summary
from featray.synthetic.phantom import make_collection
from featray.terminal.command_line import find_python, format_command

log = logging.getLogger(__name__)

SCANS = 24
SHAPE_ZYX = (48, 96, 96)
INPUT_ZYX = (16, 64, 64)
LAYERS = ("encoder/z_mean", "encoder/z_log_var", "encoder/pre_latent", "encoder/conv_3")
SEED = 0
EPOCHS = 15

_PICTURE_LAYER = "z_mean"
_PICTURE_SCANS = 6
_TABLE_ROWS = 3
_TABLE_VALUES = 4
_PROGRESS_S = 10.0
"""Shortest time between two lines about the training."""


@dataclass(frozen=True)
class DemoResult:
    """Files of the demo and the summary of its extraction.

    Attributes:
        directory: Folder of the demo.
        config: Path of the config.
        output: Folder of the output.
        labels: Path of labels.csv.
        summary: Summary of the extraction.
        pictures: Paths of the pictures; empty if the extraction was interrupted.
        table: First rows of the layer `z_mean`, as lines of text.
    """

    directory: str
    config: str
    output: str
    labels: str
    summary: Summary
    pictures: tuple[str, ...] = ()
    table: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the summary, the first rows of a table, and commands that can be copied to the shell."""
        parts = ["\n".join(self.summary.lines())]
        if self.table:
            parts.append("\n".join([f"First rows of layer {_PICTURE_LAYER}", *self.table]))
        if self.pictures:
            parts.append("\n".join(["Pictures", *(f"  {path}" for path in self.pictures)]))
        return "\n\n".join([*parts, "\n".join(["What to try next", *self._list_next_steps()])])

    def _list_next_steps(self) -> list[str]:
        code = f'import featray; print(featray.read("{self.output}", "{_PICTURE_LAYER}").array)'
        steps = {
            "rows, files and bytes of each layer": format_command("status", self.output),
            "every layer that can be extracted": format_command("layers", self.config),
            "what a run would do now: nothing, until the collection changes": format_command(
                "plan", self.config
            ),
            f"the values of layer {_PICTURE_LAYER} as an array, one row per scan": shlex.join(
                [find_python(), "-c", code]
            ),
        }
        return [line for purpose, command in steps.items() for line in (f"  # {purpose}", f"  {command}")]


def demo(
    directory: str | os.PathLike[str], *, show: bool = False, stop: threading.Event | None = None
) -> DemoResult:
    """Make the demo in a folder, extract four layers, and draw pictures of scans and features.

    Args:
        directory: Folder, created if it does not exist. Files of an earlier demo in it are used again.
        show: Whether to report progress on stderr.
        stop: Event that stops the extraction after the scans in progress.

    Raises:
        ConfigError: `directory` is a file, or a folder with other files.
    """
    folder = Path(directory)
    _check_folder(folder)
    config_path, labels_path = folder / "demo.yaml", folder / "ct" / "labels.csv"
    values = make_demo_config(folder)
    config = load(values)
    if not labels_path.exists():
        log.info("making %d phantom scans in %s", SCANS, folder / "ct")
        make_collection(folder / "ct", SCANS, shape_zyx=SHAPE_ZYX, seed=SEED)
    if not (folder / "vae.keras").exists():
        _train(config, folder / "vae.keras", show=show)
    config_path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    log.info("extracting %d layers of %d scans", len(LAYERS), SCANS)
    summary = extract(config_path, show=show, stop=stop)
    is_complete = summary.ok == SCANS
    return DemoResult(
        directory=str(folder),
        config=str(config_path),
        output=str(folder / "out"),
        labels=str(labels_path),
        summary=summary,
        pictures=_draw_pictures(folder, config, labels_path) if is_complete else (),
        table=_format_table(str(folder / "out")) if is_complete else (),
    )


def make_demo_config(folder: Path) -> dict[str, Any]:
    """Return the config of the demo; `configs/demo.yaml` is this config for the default folder."""
    layers = [{"layer": layer, "as": layer.rpartition("/")[2]} for layer in LAYERS]
    return {
        "source": {"uri": str(folder / "ct")},
        "preprocess": {"window": [-1000, 1000], "scale": [0, 1], "size": list(INPUT_ZYX)},
        "model": {
            "uri": str(folder / "vae.keras"),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": layers,
        },
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline"},
    }


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the demo")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ct").is_dir():
        raise ConfigError(f"{folder} holds other files; name a new folder for the demo")


def _train(config: Config, path: Path, *, show: bool) -> None:
    """Train the VAE on the model inputs that the extraction will use, and write it to `path`."""
    scans = list_scans(config.source).scans
    volumes = np.concatenate([_decode(config, scan).tensor for scan in scans])
    shape = "x".join(map(str, INPUT_ZYX))
    log.info("training a small VAE on %d volumes of %s voxels (about a minute)", len(volumes), shape)
    from featray.model import runtime

    # TensorFlow fixes its threads at its first operation, so set those that the extraction will want.
    runtime.configure(make_engine(config, len(scans)).threads)
    from featray.synthetic.vae import build_vae, train_vae

    vae = build_vae(INPUT_ZYX, filters=(4, 8, 16), dense=32, latent=8, seed=SEED)
    train_vae(vae, volumes, epochs=EPOCHS, seed=SEED, on_epoch=_make_epoch_logger() if show else None)
    temporary = path.with_name(f"part-{path.name}")
    vae.save(temporary)
    temporary.replace(path)


def _make_epoch_logger() -> Callable[[int, float], None]:
    """Return a function that logs the progress of the training, at most every few seconds."""
    start = last = time.monotonic()

    def log_epoch(epoch: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_S and epoch < EPOCHS:
            last = now
            remaining_s = (now - start) / epoch * (EPOCHS - epoch)
            log.info("epoch %d of %d, loss %.0f, about %.0f s left", epoch, EPOCHS, loss, remaining_s)

    return log_epoch


def _decode(config: Config, scan: Scan) -> Decoded:
    decoded = Decoder.from_config(config)(scan)
    if decoded.record.status != "ok":
        raise FeatrayError(f"demo scan {scan.scan_id}: {decoded.record.message}")
    return decoded


def _draw_pictures(folder: Path, config: Config, labels_path: Path) -> tuple[str, ...]:
    labels = read_labels(labels_path)
    scans = list_scans(config.source).scans
    decoded = [_decode(config, scans[index]) for index in spread_indices(len(scans), _PICTURE_SCANS)]
    paths = folder / "scans.png", folder / f"{_PICTURE_LAYER}.png"
    draw_scans(paths[0], decoded, labels)
    draw_features(paths[1], read(config.output.uri, _PICTURE_LAYER), labels)
    return tuple(map(str, paths))


def _format_table(output: str) -> tuple[str, ...]:
    """Return the first values of the first rows of a layer as aligned text."""
    features = read(output, _PICTURE_LAYER)
    rows, width = features.array.shape
    lines = [
        f"  {scan_id:<26}" + "".join(f"{value:>9.3f}" for value in values[:_TABLE_VALUES]) + "  ..."
        for scan_id, values in zip(features.scan_ids[:_TABLE_ROWS], features.array, strict=False)
    ]
    return *lines, f"  ... {rows} rows (scans) of {width} values"
