"""`featray preview`: what the network would see of one scan, as a picture and as the tensor itself.

Config in, one PNG and one .npy out. Lists and decodes as a run does, but loads no model, writes nothing to
the output, and records nothing.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.checks import check
from featray.collection.listing import Listing
from featray.commands.montage import montage
from featray.config import Config, ConfigInput, PreprocessConfig
from featray.errors import ConfigError, ExitCode, Reason, UsageError, WarningCode
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.preprocess import input_spacing

DIRECTORY = "featray-preview"
"""In the working directory; where the files go unless told otherwise."""

TRIES = 20
"""Scans looked at for a usable one when none is named."""

_LONGEST_STEM = 100
_AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}


@dataclass(frozen=True)
class PreviewResult:
    """One scan as the network would see it, or why it would not.

    Attributes:
        scan_id: Which scan.
        status: `ok`, `failed` or `excluded`; when it is not `ok`, there are no files.
        reason: As in `scans`.
        stage: As in `scans`.
        message: As in `scans`.
        montage: Path of the PNG.
        tensor: Path of the .npy: float32 (patches, z, y, x), the values the model would be given.
        shape: Of the tensor.
        minimum: Of the tensor.
        maximum: Of the tensor.
        mean: Of the tensor.
        voxel_mm: Millimetres (z, y, x) between the tensor's voxels; None for an array, and where the scan
            was cut to a mask or resampled to an upright grid first.
        orientation: Directions in which the tensor's x, y and z grow; None where nothing tells.
        input_shape: Of the scan, as in `scans`, and so the next four.
        input_spacing: Millimetres (z, y, x).
        input_orientation: Three letters.
        hu_min: Before windowing.
        hu_max: Before windowing.
        warnings: Codes of what was odd but accepted.
        skipped: Scans before this one that could not be used: id and reason.
    """

    scan_id: str
    status: str
    reason: str | None = None
    stage: str | None = None
    message: str | None = None
    montage: str | None = None
    tensor: str | None = None
    shape: tuple[int, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    voxel_mm: tuple[float, float, float] | None = None
    orientation: str | None = None
    input_shape: tuple[int, ...] | None = None
    input_spacing: tuple[float, ...] | None = None
    input_orientation: str | None = None
    hu_min: float | None = None
    hu_max: float | None = None
    warnings: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """As of a run over this one scan: no input is a failure above any limit."""
        return ExitCode.OK if self.status == "ok" else ExitCode.TOO_MANY_FAILED

    def text(self) -> str:
        """Return the preview for a person."""
        lines = [f"skipped   {scan_id} ({reason})" for scan_id, reason in self.skipped]
        lines.append(f"scan      {self.scan_id}")
        if self.status != "ok":
            why = f"{self.status} in stage {self.stage}: {self.reason}; {self.message}"
            return "\n".join([*lines, f"no input  {why}"])
        lines += [f"montage   {self.montage}", f"tensor    {self.tensor}"]
        return "\n".join([*lines, *(f"          {fact}" for fact in self.facts())])

    def facts(self) -> list[str]:
        """Return what is known of the tensor and of the scan behind it, a line each."""
        where = f", voxels of {_numbers(self.voxel_mm)} mm" if self.voxel_mm else ""
        where += f", {self.orientation}" if self.orientation else ""
        values = f"min {self.minimum:.4g}, max {self.maximum:.4g}, mean {self.mean:.4g}"
        lines = [f"model input {_sizes(self.shape)}{where}; {values}"]
        if self.input_spacing:
            lines.append(
                f"scan {_sizes(self.input_shape or ())}, voxels of {_numbers(self.input_spacing)} mm, "
                f"{self.input_orientation}, {self.hu_min:.5g} to {self.hu_max:.5g} HU"
            )
        elif self.input_shape:
            lines.append(f"array {_sizes(self.input_shape)}")
        return [*lines, f"warnings: {', '.join(self.warnings) or 'none'}"]


def preview(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    scan: str | None = None,
    directory: str | Path = DIRECTORY,
) -> PreviewResult:
    """Write the picture and the tensor of one scan.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that win over the file.
        scan: Its id; None takes the first scan that can be used.
        directory: Made if missing; the files' names are made from the scan's id.

    Returns:
        What was written; for a scan that cannot be used, why, and nothing is written.

    Raises:
        UsageError: The config or the source cannot be used, no scan has that id, or `directory` cannot
            be written.
    """
    checked, listing = check(config, overrides)
    wanted = listing.scans if scan is None else [_named(listing, scan)]
    used, decoded, skipped = _first_usable(wanted, Decoder.from_config(checked))
    found = replace(_described(decoded), skipped=skipped)
    if found.status != "ok":
        return found
    if decoded.record.orientation:
        voxel_mm = (
            None if _is_regridded(used, decoded.record, checked) else _voxel_mm(decoded.record, checked)
        )
        found = replace(found, orientation=checked.preprocess.orientation, voxel_mm=voxel_mm)
    picture = montage(
        decoded.tensor,
        decoded.origins,
        gray=_gray(found, checked.preprocess),
        caption=[*found.facts(), _gray_fact(found, checked.preprocess)],
        voxel_mm=found.voxel_mm or (1.0, 1.0, 1.0),
        orientation=found.orientation,
    )
    return _written(found, picture, decoded.tensor, Path(directory))


def _named(listing: Listing, scan_id: str) -> Scan:
    for scan in listing.scans:
        if scan.scan_id == scan_id:
            return scan
    near = ", ".join(listing.find_similar_ids(scan_id))
    raise UsageError(f"--scan: no scan has the id {scan_id!r}; near it: {near}")


def _first_usable(
    scans: Iterable[Scan], decoder: Decoder
) -> tuple[Scan, Decoded, tuple[tuple[str, str], ...]]:
    """Return the first scan that decodes, and those before it; the first of all if none does."""
    failed: list[tuple[Scan, Decoded]] = []
    for scan in islice(scans, TRIES):
        decoded = decoder(scan)
        if decoded.record.status == "ok":
            return scan, decoded, tuple(map(_why, failed))
        failed.append((scan, decoded))
    return *failed[0], tuple(map(_why, failed[1:]))


def _why(failed: tuple[Scan, Decoded]) -> tuple[str, str]:
    scan, decoded = failed
    return scan.scan_id, str(decoded.record.reason)


def _described(decoded: Decoded) -> PreviewResult:
    record, tensor = decoded.record, decoded.tensor
    found = PreviewResult(
        scan_id=record.scan_id,
        status=record.status,
        reason=record.reason,
        stage=record.stage,
        message=record.message,
        input_shape=tuple(record.shape) if record.shape else None,
        input_spacing=tuple(record.spacing) if record.spacing else None,
        input_orientation=record.orientation,
        hu_min=record.hu_min,
        hu_max=record.hu_max,
        warnings=tuple(record.warnings),
    )
    if record.status != "ok":
        return found
    return replace(
        found,
        shape=tensor.shape,
        minimum=float(tensor.min()),
        maximum=float(tensor.max()),
        mean=float(tensor.mean(dtype=np.float64)),
    )


def _is_regridded(scan: Scan, record: ScanRecord, config: Config) -> bool:
    """Return whether the model input was made from another grid than the scan's own."""
    codes = {Reason.GANTRY_TILT, WarningCode.RESAMPLED_STEPS}
    if config.policy.oblique == "resample":
        codes.add(WarningCode.OBLIQUE)
    return bool(scan.mask) or not codes.isdisjoint(record.warnings)


def _voxel_mm(record: ScanRecord, config: Config) -> tuple[float, float, float]:
    """Return the tensor's spacing (z, y, x), from the scan's along its own axes."""
    shape, spacing = record.shape or [], record.spacing or []
    have = [_AXES[letter] for letter in record.orientation or ""]
    z, y, x = (2 - have.index(_AXES[letter]) for letter in reversed(config.preprocess.orientation))
    own = (shape[z], shape[y], shape[x]), (spacing[z], spacing[y], spacing[x])
    return input_spacing(config.preprocess, *own)


def _gray(found: PreviewResult, config: PreprocessConfig) -> tuple[float, float]:
    """Return the values of black and white: the ends of the scale, or what there is without a window."""
    if config.window is None:
        return found.minimum or 0.0, found.maximum or 0.0
    return min(config.scale), max(config.scale)


def _gray_fact(found: PreviewResult, config: PreprocessConfig) -> str:
    black, white = _gray(found, config)
    window = f"; window {_numbers(config.window)}" if config.window else "; no window"
    return f"gray: {black:.4g} is black, {white:.4g} is white{window}"


def _written(
    found: PreviewResult, picture: NDArray[np.uint8], tensor: NDArray[np.float32], directory: Path
) -> PreviewResult:
    stem = _stem(found.scan_id)
    paths = directory / f"{stem}.png", directory / f"{stem}.npy"
    png, npy = cv2.imencode(".png", picture)[1], io.BytesIO()
    np.save(npy, tensor, allow_pickle=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths[0].write_bytes(png.tobytes())
        paths[1].write_bytes(npy.getbuffer())
    except OSError as error:
        raise ConfigError(f"--out: cannot write into {directory} ({error.strerror})") from None
    return replace(found, montage=str(paths[0]), tensor=str(paths[1]))


def _stem(scan_id: str) -> str:
    """Return a file name for an id, which may be a path; a hash keeps what was changed apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", scan_id).strip("._-")[:_LONGEST_STEM]
    if plain == scan_id:
        return plain
    mark = hashlib.sha256(scan_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}-{mark}" if plain else mark


def _sizes(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _numbers(values: Sequence[float] | None) -> str:
    return ", ".join(f"{value:.4g}" for value in values or ())
