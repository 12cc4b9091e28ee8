"""`featray demo`: make scans, train a small VAE, extract five layers, draw two pictures, write the report.

    DIR/ct/               phantoms: NIfTI files, DICOM series, and their true properties in labels.csv
    DIR/vae.keras         a VAE trained on them
    DIR/demo.yaml         the config; `featray extract DIR/demo.yaml` runs it again
    DIR/out               the output
    DIR/out/report        the report: which layer to use for which property
    DIR/scans.png         some scans as the model sees them
    DIR/z_mean.png        the features of all scans, colored by a label

Collection and model are kept and used again, so a second call extracts nothing.

The default collection is small, so that the demo is fast; the report says that it is too small for a verdict.
The properties of more scans vary independently, so that the verdicts are clear, and the model sees these
scans smaller, so that the training takes about as long.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from featray.commands.demo_pictures import draw_features, draw_scans, read_labels
from featray.commands.montage import spread_indices
from featray.config import Config, load
from featray.errors import ConfigError, FeatrayError, UsageError
from featray.job import make_engine
from featray.output.read import read
from featray.pipeline import extract
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.stages.report import Summary
from featray.storage.ray_job import refuse_package
from featray.synthetic.phantom import make_collection
from featray.synthetic.varied_collection import make_varied_collection
from featray.terminal.command_line import find_python, format_command

log = logging.getLogger(__name__)

SCANS = 24
"""Number of scans by default. A larger demo has phantoms with independent properties."""
MIN_SCANS = 6
LARGE_SCANS = 200
"""Number of scans that the default demo recommends, because its report has verdicts."""
SHAPE_ZYX = (48, 96, 96)
INPUT_ZYX, LARGE_INPUT_ZYX = (16, 64, 64), (16, 48, 48)
"""Size of the model input: of the default demo, and of a demo of more scans."""
LAYERS: tuple[dict[str, Any], ...] = (
    {"layer": "encoder/z_mean", "as": "z_mean"},
    {"layer": "encoder/z_log_var", "as": "z_log_var"},
    {"layer": "encoder/pre_latent", "as": "pre_latent"},
    {"layer": "encoder/conv_3", "as": "conv_3"},
    {"layer": "encoder/conv_3", "pool": "grid", "grid": [4, 4, 4], "as": "conv_3_grid"},
)
SEED = 0
LARGE_SEED = 1
"""Seed of a larger collection, with which the properties of 200 scans are little correlated by chance."""
EPOCHS = 15
MIN_EPOCHS = 3
LARGE_VOLUMES = 1600
"""Number of volumes, counted in each epoch, with which the model of a larger demo is trained."""

_PARTIAL = "part-ct"
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
        report: Path of the page of the report; empty if the extraction was interrupted.
        sentences: The verdict for each column of labels.csv, or the reason why it has none.
    """

    directory: str
    config: str
    output: str
    labels: str
    summary: Summary
    pictures: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    report: str = ""
    sentences: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the summary, the first rows of a table, and commands that can be copied to the shell."""
        blocks = {
            f"First rows of layer {_PICTURE_LAYER}": self.table,
            "Pictures": [f"  {path}" for path in self.pictures],
            "Which layer to use for which property": [f"  {sentence}" for sentence in self.sentences],
            "Report": [f"  {self.report}"] if self.report else [],
            "What to try next": self._list_next_steps(),
        }
        texts = ["\n".join([title, *lines]) for title, lines in blocks.items() if lines]
        return "\n\n".join(["\n".join(self.summary.lines()), *texts])

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
        if self.summary.ok <= SCANS:
            steps["more scans, for a report with verdicts (some minutes)"] = _format_larger_demo(
                LARGE_SCANS, self.directory
            )
        return [line for purpose, command in steps.items() for line in (f"  # {purpose}", f"  {command}")]


def demo(
    directory: str | os.PathLike[str],
    scans: int | None = None,
    *,
    show: bool = False,
    stop: threading.Event | None = None,
) -> DemoResult:
    """Make the demo in a folder: extract five layers, draw pictures of scans and features, write the report.

    Args:
        directory: Folder, created if it does not exist. Files of an earlier demo in it are used again.
        scans: Number of phantoms; None for as many as the folder has, or 24 in a new folder.
        show: Whether to report progress on stderr.
        stop: Event that stops the extraction after the scans in progress.

    Raises:
        ConfigError: `directory` is a file, a folder with other files, or holds a demo of another number of
            scans.
        UsageError: There are too few scans for a demo.
    """
    folder = Path(directory)
    scans = _choose_scans(folder, scans)
    config_path, labels_path = folder / "demo.yaml", folder / "ct" / "labels.csv"
    values = make_demo_config(folder, scans)
    config = load(values)
    if not labels_path.exists():
        log.info("making %d phantom scans in %s", scans, folder / "ct")
        _make_collection(folder, scans)
    if not (folder / "vae.keras").exists():
        _train(config, folder / "vae.keras", show=show)
    config_path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    log.info("extracting %d layers of %d scans", len(LAYERS), scans)
    summary = extract(config_path, show=show, stop=stop)
    result = DemoResult(str(folder), str(config_path), str(folder / "out"), str(labels_path), summary=summary)
    return _add_views(result, config, show=show) if summary.ok == scans else result


def make_demo_config(folder: Path, scans: int = SCANS) -> dict[str, Any]:
    """Return the config of a demo; `configs/demo.yaml` is the default one for the default folder."""
    size = LARGE_INPUT_ZYX if scans > SCANS else INPUT_ZYX
    return {
        "source": {"uri": str(folder / "ct")},
        "preprocess": {"window": [-1000, 1000], "scale": [0, 1], "size": list(size)},
        "model": {
            "uri": str(folder / "vae.keras"),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": [dict(layer) for layer in LAYERS],
        },
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline"},
    }


def _choose_scans(folder: Path, scans: int | None) -> int:
    """Return the number of scans of the demo, after a check that the folder is new or holds such a demo."""
    refuse_package(folder, "DIR")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the demo")
    if scans is not None and scans < MIN_SCANS:
        raise UsageError(f"{scans} scans are too few for the demo; the smallest number is {MIN_SCANS}")
    labels = folder / "ct" / "labels.csv"
    if labels.is_file():
        return _require_scans(folder, len(read_labels(labels)), scans)
    if folder.exists() and any(path.name != _PARTIAL for path in folder.iterdir()):
        raise ConfigError(f"{folder} holds other files; name a new folder for the demo")
    return SCANS if scans is None else scans


def _require_scans(folder: Path, present: int, wanted: int | None) -> int:
    """Return the number of scans that are present, if no other number is wanted.

    More scans are not added to a demo: its model would have been trained on the first scans alone, so its
    features would differ from those of a new demo of the same number of scans.
    """
    if wanted is None or wanted == present:
        return present
    command = _format_larger_demo(wanted, str(folder))
    raise ConfigError(
        f"{folder} holds a demo of {present} scans, and its model was trained on these; make a demo of "
        f"{wanted} scans in another folder: {command}"
    )


def _format_larger_demo(scans: int, directory: str) -> str:
    """Return the command that makes a demo of more scans next to a folder."""
    return format_command("demo", "--scans", str(scans), f"{directory.rstrip(os.sep)}-{scans}")


def _make_collection(folder: Path, scans: int) -> None:
    """Write the phantoms to `ct`, which exists only when it is complete."""
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    if scans > SCANS:
        make_varied_collection(partial, scans, seed=LARGE_SEED)
    else:
        make_collection(partial, scans, shape_zyx=SHAPE_ZYX, seed=SEED)
    partial.replace(folder / "ct")


def _train(config: Config, path: Path, *, show: bool) -> None:
    """Train the VAE on the model inputs that the extraction will use, and write it to `path`."""
    scans = list_scans(config.source).scans
    volumes = np.concatenate([_decode(config, scan).tensor for scan in scans])
    epochs = _count_epochs(len(scans))
    shape = "x".join(map(str, volumes.shape[1:]))
    log.info("training a small VAE on %d volumes of %s voxels (a minute or two)", len(volumes), shape)
    from featray.model import runtime

    # TensorFlow fixes its threads at its first operation, so set those that the extraction will want.
    runtime.configure(make_engine(config).threads)
    from featray.synthetic.vae import build_vae, train_vae

    vae = build_vae(volumes.shape[1:], filters=(4, 8, 16), dense=32, latent=8, seed=SEED)
    on_epoch = _make_epoch_logger(epochs) if show else None
    train_vae(vae, volumes, epochs=epochs, seed=SEED, on_epoch=on_epoch)
    temporary = path.with_name(f"part-{path.name}")
    vae.save(temporary)
    temporary.replace(path)


def _count_epochs(scans: int) -> int:
    """Return the number of epochs; the training of a larger demo takes about the same time for any number."""
    return max(MIN_EPOCHS, LARGE_VOLUMES // scans) if scans > SCANS else EPOCHS


def _make_epoch_logger(epochs: int) -> Callable[[int, float], None]:
    """Return a function that logs the progress of the training, at most every few seconds."""
    start = last = time.monotonic()

    def log_epoch(epoch: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_S and epoch < epochs:
            last = now
            remaining_s = (now - start) / epoch * (epochs - epoch)
            log.info("epoch %d of %d, loss %.0f, about %.0f s left", epoch, epochs, loss, remaining_s)

    return log_epoch


def _add_views(result: DemoResult, config: Config, *, show: bool) -> DemoResult:
    """Return the result with views of the features: the first rows of a table, pictures and the report."""
    from featray.commands.report import report  # imports scikit-learn

    log.info("writing the report")
    written = report(result.config, result.labels, show=show)
    return replace(
        result,
        pictures=_draw_pictures(Path(result.directory), config, Path(result.labels)),
        table=_format_table(result.output),
        report=written.page,
        sentences=written.sentences,
    )


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
