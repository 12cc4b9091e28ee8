"""What the baselines share: the document they are given, two decoders, the cut model, the table at the end.

`decode_usual` is what people write; `decode_fast` raises on all but the common case, and is fast by that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Given = dict[str, Any]
Volume = NDArray[np.float32]


def given() -> Given:
    """Return the document from stdin; `featray/benchmark/scripts.py` says what is in it."""
    found: Given = json.load(sys.stdin)
    return found


def decode_usual(path: str, asked: Given) -> Volume:
    """Return the model input (z, y, x, 1) of one file: nibabel, clip, zoom, scale.

    Axes are turned to LPS and pixels counted from their edges, so that the features are featray's.
    """
    import nibabel
    from scipy.ndimage import zoom

    image = nibabel.as_closest_canonical(nibabel.load(path))
    volume = image.get_fdata()[::-1, ::-1].transpose(2, 1, 0)  # RAS (x, y, z) -> LPS (z, y, x)
    volume = np.clip(volume, *asked["window"])
    factors = [wanted / there for wanted, there in zip(asked["size"], volume.shape, strict=True)]
    volume = zoom(volume, factors, order=1, grid_mode=True, mode="nearest")
    return scaled(volume, asked)[..., None]


def scaled(volume: NDArray[Any], asked: Given) -> Volume:
    """Return the window mapped onto the scale."""
    (low, high), (first, last) = asked["window"], asked["scale"]
    mapped: Volume = ((volume - low) / (high - low) * (last - first) + first).astype(np.float32)
    return mapped


def decode_fast(path: str, asked: Given) -> Volume:
    """Return the same of one int16, unscaled, upright, single-member .nii.gz: libdeflate and OpenCV."""
    import deflate
    import nibabel

    from featray.benchmark.lower_bounds import resize_single_pass

    data = Path(path).read_bytes()
    content = deflate.gzip_decompress(data, int.from_bytes(data[-4:], "little"))
    header = nibabel.Nifti1Header(bytes(content[:348]))
    steps = np.diag(header.get_best_affine())[:3]
    is_plain = header.get_data_dtype() == np.int16 and header.get_slope_inter() in ((None, None), (1, 0))
    if not is_plain or abs(steps).min() == 0 or steps[2] < 0:
        raise ValueError(f"{path} is not the plain file that this script is made for")
    shape = header.get_data_shape()[::-1]
    voxels = np.frombuffer(content, np.int16, int(np.prod(shape)), int(header["vox_offset"])).reshape(shape)
    small = resize_single_pass(voxels, tuple(asked["size"]), tuple(asked["window"]), tuple(asked["scale"]))
    # RAS grows the other way than LPS along x and y; turning the small result is cheaper.
    return np.ascontiguousarray(small[:, :: int(-np.sign(steps[1])), :: int(-np.sign(steps[0]))])[..., None]


def load_model(asked: Given) -> Any:
    """Return a Keras model with the asked-for layers as outputs, {name: values}."""
    import keras

    from featray.synthetic.vae import Sampling  # noqa: F401 - registers the layer for load_model

    whole = keras.models.load_model(asked["model"], compile=False)
    outputs = {one["name"]: _pooled(whole, one) for one in asked["layers"]}
    return keras.Model(whole.input, outputs)


def save(values: list[dict[str, Any]], asked: Given) -> None:
    """Write batches of {name: (n, width)}, in the order of the files, as one table."""
    import pandas as pd

    names = [one["name"] for one in asked["layers"]]
    columns = {name: [row.tolist() for batch in values for row in np.asarray(batch[name])] for name in names}
    pd.DataFrame({"file": asked["files"], **columns}).to_parquet(asked["out"])


def _pooled(whole: Any, layer: dict[str, str]) -> Any:
    import keras

    output = whole.get_layer(layer["path"]).output
    if layer["pool"] == "none":
        return output if len(output.shape) == 2 else keras.layers.Flatten()(output)
    if layer["pool"] != "avg":
        raise ValueError(f"pool {layer['pool']}: this script knows none and avg")
    return keras.ops.mean(output, axis=(1, 2, 3))
