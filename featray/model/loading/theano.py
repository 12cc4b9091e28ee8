"""Convert the kernels of files that Keras wrote with its backend Theano.

In: a model with the weights of such a file. Out: the same model, with mirrored kernels. Theano computed
convolutions, TensorFlow computes correlations; Keras 2 mirrored the kernels when it loaded such a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from featray.errors import ModelError
from featray.model.loading.model_file import ModelFile

_LAYERS_WITH_KERNEL = ("Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose")
"""The layers whose kernels Keras 2 mirrored, besides ConvLSTM2D."""


def is_written_with_theano(content: ModelFile) -> bool:
    """Return whether the kernels in a file are mirrored.

    Raises:
        ModelError: A file of Keras 1 does not say, and its channels are on axis 1, as was usual with Theano.
    """
    if content.backend or content.keras_version.split(".")[0] not in ("", "1"):
        return content.backend == "theano"
    if "'th'" in str(content.config):
        raise ModelError(
            "Keras 1 wrote this file with channels on axis 1 (dim_ordering th) and did not write whether "
            "Theano or TensorFlow computed the model, whose kernels are mirrored; set the attribute backend "
            "of the file to theano or tensorflow: h5py.File(PATH, 'r+').attrs['backend'] = 'theano'"
        )
    return False


def flip_kernels(model: Any) -> None:
    """Mirror all kernels of convolutions along their spatial axes, as Keras 2 did for files of Theano."""
    for kernel in _list_kernels(model):
        values = np.asarray(kernel)
        spatial_axes = tuple(range(values.ndim - 2))
        kernel.assign(np.flip(values, spatial_axes))


def _list_kernels(model: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for layer in model._flatten_layers():
        class_name = type(layer).__name__
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if class_name in _LAYERS_WITH_KERNEL:
            yield layer.kernel
        elif class_name == "ConvLSTM2D":
            yield from (layer.cell.kernel, layer.cell.recurrent_kernel)
