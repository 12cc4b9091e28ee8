"""Facts from the checks of a model, so that a process that loads it again need not check it again.

A model is recorded, traced and run on random inputs before it is used. All that this finds out is a property
of the model and its code, and is small. An actor gets it from the driver; `remembered.py` keeps it for later
runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featray.errors import ModelError
from featray.model.inputs import Shape
from featray.model.pooling import Pool


@dataclass(frozen=True)
class OutputLayer:
    """One output of the truncated model.

    Attributes:
        name: Name of the output: `as` of the config, or the path in the config with `.` instead of `/`.
        path: Path of the layer in the model, such as `encoder/conv_1`.
        pool: Pooling over the spatial axes.
        shape: Shape of the value for one input after pooling and before flattening, without the batch axis;
            None along an axis whose size depends on the input.
        values: Number of values per input. If it depends on the size of the input, the number is that for a
            small input.
        class_name: Class of the Keras layer.
        grid: For pool `grid`: number of cells along each spatial axis.
        position: Position of the layer in the order of computation. Outputs of one layer have the same.
    """

    name: str
    path: str
    pool: Pool
    shape: tuple[int | None, ...]
    values: int
    class_name: str
    grid: tuple[int, ...] = ()
    position: int = 0


@dataclass(frozen=True)
class OutputPlace:
    """Where the values of an output are found in the model.

    Attributes:
        key: Key of the tap; see `trace.Tap`.
        channels_first: Whether axis 1 holds the channels, and not the last axis.
    """

    key: str
    channels_first: bool


@dataclass(frozen=True)
class ModelFacts:
    """All that the checks of a model found out.

    Attributes:
        layers: The outputs, in the order of the config.
        places: Where each of them is found.
        input_shape: Shape of one input with its channels; None along an axis that accepts any size.
        sha256: Digest of the model file, the builder and the custom code together.
        files: sha256 of each of these files, by its role.
        versions: Versions of keras and tensorflow.
        sampling_layers: Names of the outputs that sample.
        compute_dtypes: Types in which layers compute.
        corrections: Parts of this file of Keras 2 that featray 0.1.0 computed differently.
    """

    layers: tuple[OutputLayer, ...]
    places: tuple[OutputPlace, ...]
    input_shape: Shape
    sha256: str
    files: dict[str, str]
    versions: dict[str, str]
    sampling_layers: frozenset[str]
    compute_dtypes: tuple[str, ...]
    corrections: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts ready for JSON."""
        return {**asdict(self), "sampling_layers": sorted(self.sampling_layers)}

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> ModelFacts | None:
        """Return the facts that `to_dict` made ready for JSON; None if they are not of this form."""
        try:
            return None if values is None else cls._parse(values)
        except (KeyError, TypeError, ValueError):
            return None

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> ModelFacts:
        layers = [
            {**layer, "shape": tuple(layer["shape"]), "grid": tuple(layer["grid"])}
            for layer in values["layers"]
        ]
        return cls(
            layers=tuple(OutputLayer(**layer) for layer in layers),
            places=tuple(OutputPlace(**place) for place in values["places"]),
            input_shape=tuple(values["input_shape"]),
            sha256=values["sha256"],
            files=dict(values["files"]),
            versions=dict(values["versions"]),
            sampling_layers=frozenset(values["sampling_layers"]),
            compute_dtypes=tuple(values["compute_dtypes"]),
            corrections=tuple(values["corrections"]),
        )


def refuse_changed_model(sha256: str, expected: str) -> None:
    """Raise ModelError if the digest of a loaded model is not the one that the recipe was made from."""
    if sha256 != expected:
        raise ModelError("the model or its code changed while the run was starting; start the run again")
