"""Functions that the baseline scripts share: read the input document, decode, cut the model, write the table.

`decode_usual` is the decoder that most scripts contain. `decode_fast` is faster because it supports only gzip
files with upright axes, and raises an error for all others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Document = dict[str, Any]
ModelInput = NDArray[np.float32]


def read_document() -> Document:
    """Return the document from stdin; `featray/benchmark/scripts.py` describes its keys."""
    document: Document = json.load(sys.stdin)
    return document


def decode_usual(path: str, document: Document) -> ModelInput:
    """Return the model input (z, y, x, 1) of one file: load with nibabel, clip, zoom, scale.

    Orientation LPS and the half-pixel centers (`grid_mode`) are those of featray, so that the features agree.
    """
    import nibabel
    from scipy.ndimage import zoom

    image = nibabel.as_closest_canonical(nibabel.load(path))
    volume = image.get_fdata()[::-1, ::-1].transpose(2, 1, 0)  # RAS (x, y, z) -> LPS (z, y, x)
    volume = np.clip(volume, *document["window"])
    factors = [size / old_size for size, old_size in zip(document["size"], volume.shape, strict=True)]
    volume = zoom(volume, factors, order=1, grid_mode=True, mode="nearest")
    return scale_window(volume, document)[..., None]


def scale_window(volume: NDArray[Any], document: Document) -> ModelInput:
    """Return the values with the window mapped linearly to the scale."""
    (low, high), (first, last) = document["window"], document["scale"]
    scaled: ModelInput = ((volume - low) / (high - low) * (last - first) + first).astype(np.float32)
    return scaled


def decode_fast(path: str, document: Document) -> ModelInput:
    """Return the same model input with libdeflate and OpenCV.

    Raises:
        ValueError: The axes of the volume are not parallel to those of the patient with z to Superior.
    """
    import deflate
    import nibabel

    from featray.benchmark.lower_bounds import resize_single_pass

    data = Path(path).read_bytes()
    content = deflate.gzip_decompress(data, int.from_bytes(data[-4:], "little"))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    affine = header.get_best_affine()[:3, :3]
    steps = np.diag(affine)
    if abs(affine - np.diag(steps)).max() > 1e-3 * abs(steps).min() or steps[2] <= 0:
        raise ValueError(f"{path}: this script reads only files with upright axes")
    shape = header.get_data_shape()[::-1]
    offset, dtype = int(header["vox_offset"]), header.get_data_dtype()
    voxels = np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
    slope, intercept = header.get_slope_inter()
    if slope not in (None, 1) or intercept not in (None, 0):
        voxels = voxels * np.float32(slope) + np.float32(intercept)
    small = resize_single_pass(
        voxels, tuple(document["size"]), tuple(document["window"]), tuple(document["scale"])
    )
    # RAS and LPS have opposite directions along x and y. Flipping the small result is cheaper.
    return np.ascontiguousarray(small[:, :: int(-np.sign(steps[1])), :: int(-np.sign(steps[0]))])[..., None]


def load_model(document: Document) -> Any:
    """Return a Keras model whose outputs are the layers of the document, {name: values}."""
    import keras

    from featray.synthetic.vae import Sampling  # noqa: F401 - registers the layer for load_model

    model = keras.models.load_model(document["model"], compile=False)
    outputs = {layer["name"]: _pool_layer(model, layer) for layer in document["layers"]}
    return keras.Model(model.input, outputs)


def save(values: list[dict[str, Any]], document: Document) -> None:
    """Write batches of {name: (n, width)}, in the order of the files, as one Parquet table."""
    import pandas as pd

    names = [layer["name"] for layer in document["layers"]]
    columns = {name: [row.tolist() for batch in values for row in np.asarray(batch[name])] for name in names}
    pd.DataFrame({"file": document["files"], **columns}).to_parquet(document["out"])


def _pool_layer(model: Any, layer: dict[str, str]) -> Any:
    """Return the pooled output of a layer."""
    import keras

    output = model.get_layer(layer["path"]).output
    if layer["pool"] == "none":
        return output if len(output.shape) == 2 else keras.layers.Flatten()(output)
    if layer["pool"] != "avg":
        raise ValueError(f"pool {layer['pool']}: this script supports only none and avg")
    return keras.ops.mean(output, axis=(1, 2, 3))
