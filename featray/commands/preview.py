"""`featray preview`: one scan as the model would receive it, as a picture and as an array.

Configuration in, one PNG and one .npy file out. The collection is listed and the scan is decoded as in a run.
The model is not loaded and the output is not touched.
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
from featray.commands.input_view import choose_gray_range, find_voxel_mm
from featray.commands.montage import VoxelGrid, draw_montage
from featray.config import ConfigInput, PreprocessConfig
from featray.errors import ConfigError, ExitCode, UsageError
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.storage.ray_job import refuse_package

DIRECTORY = "featray-preview"
"""Default folder for the two files, below the working directory."""

MAX_TRIES = 20
"""Scans that are decoded to find a usable one if `--scan` is not given."""

_MAX_STEM_LENGTH = 100


@dataclass(frozen=True)
class PreviewResult:
    """Description of one model input and of its scan; `reason` says why the input is missing.

    Attributes:
        scan_id: Id of the scan.
        status: `ok`, `failed` or `excluded`; files are written only if it is `ok`.
        reason: Reason code, as in the scans table.
        stage: Stage that failed, as in the scans table.
        message: Message of the failure, as in the scans table.
        montage: Path of the PNG.
        tensor: Path of the .npy file: float32 (patches, z, y, x), the input of the model.
        shape: Shape of the tensor.
        minimum: Minimum of the tensor.
        maximum: Maximum of the tensor.
        mean: Mean of the tensor.
        voxel_mm: Voxel spacing (z, y, x) of the tensor in mm. None for an array, and for a scan that was
            cropped to a mask or resampled to an upright grid.
        orientation: Directions in which x, y and z of the tensor grow; None for an array.
        input_shape: Shape (z, y, x) of the scan before preprocessing.
        input_spacing: Voxel spacing (z, y, x) of the scan in mm.
        input_orientation: Orientation of the scan, three letters.
        hu_min: Smallest value of the scan in HU, before windowing.
        hu_max: Largest value of the scan in HU, before windowing.
        warnings: Warning codes of the scan.
        skipped: Ids and reason codes of the scans that were tried before this one and cannot be used.
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
        """Exit code of the command: 3 if the scan gives no model input."""
        return ExitCode.OK if self.status == "ok" else ExitCode.TOO_MANY_FAILED

    def text(self) -> str:
        """Return the result as text for the terminal."""
        lines = [f"skipped   {scan_id} ({reason})" for scan_id, reason in self.skipped]
        lines.append(f"scan      {self.scan_id}")
        if self.status != "ok":
            problem = f"{self.status} in stage {self.stage}: {self.reason}; {self.message}"
            return "\n".join([*lines, f"no input  {problem}"])
        lines += [f"montage   {self.montage}", f"tensor    {self.tensor}"]
        return "\n".join([*lines, *(f"          {fact}" for fact in self.describe())])

    def describe(self) -> list[str]:
        """Return lines that describe the tensor, its scan and the warnings."""
        geometry = f", voxels of {_format_numbers(self.voxel_mm)} mm" if self.voxel_mm else ""
        geometry += f", {self.orientation}" if self.orientation else ""
        values = f"min {self.minimum:.4g}, max {self.maximum:.4g}, mean {self.mean:.4g}"
        lines = [f"model input {_format_shape(self.shape)}{geometry}; {values}"]
        if self.input_spacing:
            lines.append(
                f"scan {_format_shape(self.input_shape or ())}, voxels of "
                f"{_format_numbers(self.input_spacing)} mm, {self.input_orientation}, "
                f"{self.hu_min:.5g} to {self.hu_max:.5g} HU"
            )
        elif self.input_shape:
            lines.append(f"array {_format_shape(self.input_shape)}")
        return [*lines, f"warnings: {', '.join(self.warnings) or 'none'}"]


def preview(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    scan: str | None = None,
    directory: str | Path = DIRECTORY,
) -> PreviewResult:
    """Write a picture and the tensor of one scan.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts, which take precedence over the file.
        scan: Scan id; None takes the first scan that decodes.
        directory: Folder for the files, created if missing; file names are made from the scan id.

    Returns:
        The description of the input. If the scan cannot be used, nothing is written and the result has the
        reason.

    Raises:
        UsageError: The config or the source cannot be used, no scan has this id, or `directory` is not
            writable.
    """
    refuse_package(directory, "--out")
    checked, listing = check(config, overrides)
    candidates = listing.scans if scan is None else [_find_scan(listing, scan)]
    used, decoded, skipped = _decode_first_usable(candidates, Decoder.from_config(checked))
    result = replace(_describe_input(decoded), skipped=skipped)
    if result.status != "ok":
        return result
    if decoded.record.orientation:
        voxel_mm = find_voxel_mm(used, decoded.record, checked.preprocess, checked.policy)
        result = replace(result, orientation=checked.preprocess.orientation, voxel_mm=voxel_mm)
    image = draw_montage(
        decoded.tensor,
        decoded.origins,
        gray=_get_gray_range(result, checked.preprocess),
        caption=[*result.describe(), _describe_gray_range(result, checked.preprocess)],
        grid=VoxelGrid(result.voxel_mm or (1.0, 1.0, 1.0), result.orientation or ""),
    )
    return _write_files(result, image, decoded.tensor, Path(directory))


def _find_scan(listing: Listing, scan_id: str) -> Scan:
    """Return the scan with this id.

    Raises:
        UsageError: No scan has this id; the message names similar ids.
    """
    for scan in listing.scans:
        if scan.scan_id == scan_id:
            return scan
    similar = ", ".join(listing.find_similar_ids(scan_id))
    raise UsageError(f"--scan: no scan has the id {scan_id!r}; similar ids: {similar}")


def _decode_first_usable(
    scans: Iterable[Scan], decoder: Decoder
) -> tuple[Scan, Decoded, tuple[tuple[str, str], ...]]:
    """Decode scans until one is `ok`; return it with the ids and reasons of the scans that failed before it.

    If none is `ok`, return the first scan, with the ids and reasons of the others.
    """
    failures: list[tuple[Scan, Decoded]] = []
    for scan in islice(scans, MAX_TRIES):
        decoded = decoder(scan)
        if decoded.record.status == "ok":
            return scan, decoded, tuple(map(_get_id_and_reason, failures))
        failures.append((scan, decoded))
    return *failures[0], tuple(map(_get_id_and_reason, failures[1:]))


def _get_id_and_reason(failure: tuple[Scan, Decoded]) -> tuple[str, str]:
    scan, decoded = failure
    return scan.scan_id, str(decoded.record.reason)


def _describe_input(decoded: Decoded) -> PreviewResult:
    record, tensor = decoded.record, decoded.tensor
    result = PreviewResult(
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
        return result
    return replace(
        result,
        shape=tensor.shape,
        minimum=float(tensor.min()),
        maximum=float(tensor.max()),
        mean=float(tensor.mean(dtype=np.float64)),
    )


def _get_gray_range(result: PreviewResult, config: PreprocessConfig) -> tuple[float, float]:
    return choose_gray_range(config, result.minimum or 0.0, result.maximum or 0.0)


def _describe_gray_range(result: PreviewResult, config: PreprocessConfig) -> str:
    black, white = _get_gray_range(result, config)
    window = f"; window {_format_numbers(config.window)}" if config.window else "; no window"
    return f"gray: {black:.4g} is black, {white:.4g} is white{window}"


def _write_files(
    result: PreviewResult, image: NDArray[np.uint8], tensor: NDArray[np.float32], directory: Path
) -> PreviewResult:
    """Write both files; return the result with their paths.

    Raises:
        ConfigError: The folder cannot be created or written.
    """
    stem = _make_stem(result.scan_id)
    paths = directory / f"{stem}.png", directory / f"{stem}.npy"
    png, npy = cv2.imencode(".png", image)[1], io.BytesIO()
    np.save(npy, tensor, allow_pickle=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths[0].write_bytes(png.tobytes())
        paths[1].write_bytes(npy.getbuffer())
    except OSError as error:
        raise ConfigError(
            f"--out: cannot write to {directory} ({error.strerror}); name a writable folder"
        ) from None
    return replace(result, montage=str(paths[0]), tensor=str(paths[1]))


def _make_stem(scan_id: str) -> str:
    """Return a file name without suffix for a scan id, which may be a path.

    If characters of the id had to be replaced, a hash of the id keeps file names of different ids different.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", scan_id).strip("._-")[:_MAX_STEM_LENGTH]
    if safe == scan_id:
        return safe
    suffix = hashlib.sha256(scan_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe}-{suffix}" if safe else suffix


def _format_shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _format_numbers(values: Sequence[float] | None) -> str:
    return ", ".join(f"{value:.4g}" for value in values or ())
