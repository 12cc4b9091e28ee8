"""Load the weights of a file into a model that code has built: either all weights or none.

In: a built Keras model and an .h5 or .keras file. Out: nothing; the model then has the weights of the file. A
weight that only the model or only the file has is an error, because Keras might leave random values in it.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featray.errors import ModelError
from featray.model import keras_versions
from featray.model.loading import readable_file
from featray.model.loading.model_file import ModelFormat

_TRAINING_GROUPS = ("optimizer", "metrics", "compile_metrics", "_metrics")
"""Groups of a weights file that training writes and that are not weights of the model."""
_KERAS2_PREFIX = "_layer_checkpoint_dependencies"
"""First group of the weights that Keras 2 writes to .weights.h5."""


@dataclass(frozen=True)
class _WeightsLayout:
    """The weights in a weights file.

    Attributes:
        shapes: {path of a dataset: its shape}.
        names: {path of a group `…/vars`: name of the layer that has these weights}.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def load_weights(model: Any, path: Path, file_format: ModelFormat) -> None:
    """Load the weights in `path` into `model`.

    Args:
        model: A Keras model that has its variables.
        path: A .keras or .h5 file; its name may have any suffix.
        file_format: The format of the file.

    Raises:
        ModelError: Weights are missing in the file, are not in the model, or differ in shape. The message
            names them.
        ValueError: Keras cannot match a file in the layout of Keras 2 with the model.
    """
    import h5py

    if file_format is ModelFormat.ARCHIVE:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open("model.weights.h5") as member,
            h5py.File(member, "r") as file,
        ):
            layout = _read_layout(file)
        _check_layout(layout, model)
        _load_as(model, path, "model.keras")
        return
    with h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        layer_names = _read_keras2_layer_names(group)
        layout = _read_layout(file)
    if layer_names is not None:
        _load_as(model, path, "model.h5", **_choose_matching(layer_names, model))
        return
    _check_layout(layout, model)
    _load_as(model, path, "model.weights.h5")


def _load_as(model: Any, path: Path, name: str, **options: Any) -> None:
    """Load `path` through a link called `name`, because Keras decides by the suffix how to read a file."""
    with readable_file.open_link(path, name) as link:
        model.load_weights(str(link), **options)


def _read_keras2_layer_names(group: Any) -> list[str] | None:
    """Return the layers with weights in their order in the file; None if it has the layout of Keras 3."""
    if not any(key.startswith("layer_names") for key in group.attrs):
        return None
    names = _read_names(group, "layer_names")
    return [name for name in names if _read_names(group[name], "weight_names")]


def _read_names(group: Any, key: str) -> list[str]:
    """Return a list of names; Keras splits a long one over the attributes `key0`, `key1` and so on."""
    if key in group.attrs:
        parts = [group.attrs[key]]
    else:
        parts = [group.attrs[part] for at in range(len(group.attrs)) if (part := f"{key}{at}") in group.attrs]
    return [name.decode() if isinstance(name, bytes) else str(name) for part in parts for name in part]


def _choose_matching(names: list[str], model: Any) -> dict[str, bool]:
    """Return the options of `load_weights` for the Keras 2 layout: match by layer name or by layer order.

    By default Keras matches by order. If file and model have the same layers in another order, this would
    give z_mean the weights of z_log_var, so these layers are matched by name.
    """
    own_names = [layer.name for layer in model.layers if layer.weights]
    is_reordered = names != own_names and sorted(names) == sorted(own_names)
    return {"by_name": True} if is_reordered else {}


def _read_layout(file: Any) -> _WeightsLayout:
    import h5py

    layout = _WeightsLayout()

    def add_weight(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and _is_weight(name):
            layout.shapes[name] = tuple(item.shape)
            layout.names[item.parent.name.strip("/")] = str(item.parent.attrs.get("name", ""))

    file.visititems(add_weight)
    return layout


def _is_weight(name: str) -> bool:
    """Return whether a dataset is a weight, not training state or the random state of a layer."""
    return name.split("/")[0] not in _TRAINING_GROUPS and "seed_generator" not in name


def _check_layout(saved: _WeightsLayout, model: Any) -> None:
    """Raise ModelError unless the file has exactly the weights of the model."""
    is_keras2_layout = any(name.startswith(_KERAS2_PREFIX) for name in saved.shapes)
    if is_keras2_layout and not keras_versions.is_keras2_layer(model):
        raise ModelError(
            "Keras 2 wrote these weights in a layout that Keras 3 cannot read; let the builder make a model "
            "of Keras 2 (import tf_keras as keras)"
        )
    own = _read_own_layout(model)
    differences = {
        "not in the file": sorted(own.shapes.keys() - saved.shapes.keys()),
        "in the file but not in the model": sorted(saved.shapes.keys() - own.shapes.keys()),
        "of another shape": [
            f"{name} (file {list(saved.shapes[name])}, model {list(own.shapes[name])})"
            for name in sorted(own.shapes.keys() & saved.shapes.keys())
            if own.shapes[name] != saved.shapes[name]
        ],
        "of another layer": _find_swapped_layers(saved.names, own.names),
    }
    problems = [
        f"{len(names)} {difference}, e.g. {names[0]}" for difference, names in differences.items() if names
    ]
    if problems:
        is_other_layout = not (saved.shapes.keys() & own.shapes.keys())
        hint = (
            "; if Keras 2 wrote the file, let the builder make a model of Keras 2 (import tf_keras as keras)"
        )
        raise ModelError("; ".join(problems) + (hint if is_other_layout else ""))


def _find_swapped_layers(saved: dict[str, str], own: dict[str, str]) -> list[str]:
    """Return the groups with the weights of a layer that the model has in another place.

    Keras loads the groups by their order and ignores these names. Only names that a user chose are compared.
    """
    chosen_names = {name for group, name in own.items() if not _is_automatic_name(group, name)}
    return [
        f"{group} (file {saved[group]!r}, model {own[group]!r})"
        for group in sorted(own.keys() & saved.keys())
        if saved[group] != own[group]
        and saved[group] in chosen_names
        and not _is_automatic_name(group, saved[group])
    ]


def _is_automatic_name(group: str, name: str) -> bool:
    """Return whether Keras named the layer after its class, as it names groups: `layers/dense_1/vars`."""
    class_name = re.sub(r"_\d+$", "", group.removesuffix("/vars").rpartition("/")[2])
    return re.sub(r"_\d+$", "", name) == class_name


def _read_own_layout(model: Any) -> _WeightsLayout:
    """Return the layout that Keras writes for `model`; Keras describes it only by saving a file."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.weights.h5"
        model.save_weights(str(path))
        with h5py.File(path, "r") as file:
            return _read_layout(file)
