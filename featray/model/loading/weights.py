"""Puts the weights of a file into a model that code has made, all of them or none.

In: a built Keras model and an .h5 or .keras file. Out: nothing; the model holds the file's weights.
A weight that one side has and the other has not is an error, never left at random.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featray.errors import ModelError
from featray.model.loading.model_file import Kind

# What training leaves beside the weights; the random state of dropout and sampling is no weight either.
_NOT_WEIGHTS = ("optimizer", "metrics", "compile_metrics", "_metrics")
_LAYOUT_OF_KERAS_2 = "_layer_checkpoint_dependencies"


@dataclass(frozen=True)
class _Layout:
    """What a weights file holds: shape per dataset, and the layer's name per group `…/vars`."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def load_into(model: Any, path: Path, kind: Kind) -> None:
    """Load `path` into `model`.

    Raises:
        ModelError: Weights are missing in the file, too many, or of other shapes; says which.
    """
    import h5py

    if kind is Kind.ARCHIVE:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open("model.weights.h5") as member,
            h5py.File(member, "r") as file,
        ):
            layout = _layout(file)
        _require_equal(layout, model)
        _load(model, path, "model.keras")
        return
    with h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        names = _layers_with_weights(group)
        layout = _layout(file)
    if names is not None:
        _load(model, path, "model.h5", **_by_name(names, model))
        return
    _require_equal(layout, model)
    _load(model, path, "model.weights.h5")


def _load(model: Any, path: Path, name: str, **how: Any) -> None:
    """Load under a name by whose suffix Keras recognises the layout; the file's own may be another."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(path.absolute())
        model.load_weights(link, **how)


def _layers_with_weights(group: Any) -> list[str] | None:
    """Return the layers of the older layout in their order, or None when the file has the newer one."""
    if not any(key.startswith("layer_names") for key in group.attrs):
        return None
    from keras.src.legacy.saving import legacy_h5_format

    read = legacy_h5_format.load_attributes_from_hdf5_group
    return [name for name in read(group, "layer_names") if len(read(group[name], "weight_names"))]


def _by_name(names: list[str], model: Any) -> dict[str, bool]:
    """Return how to load the older layout, which goes by order unless told otherwise.

    With the same names in another order, order would give z_mean the weights of z_log_var.
    """
    own = [layer.name for layer in model.layers if layer.weights]
    return {"by_name": True} if names != own and sorted(names) == sorted(own) else {}


def _layout(file: Any) -> _Layout:
    import h5py

    found = _Layout()

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and _is_weight(name):
            found.shapes[name] = tuple(item.shape)
            found.names[item.parent.name.strip("/")] = str(item.parent.attrs.get("name", ""))

    file.visititems(note)
    return found


def _is_weight(name: str) -> bool:
    return name.split("/")[0] not in _NOT_WEIGHTS and "seed_generator" not in name


def _require_equal(saved: _Layout, model: Any) -> None:
    if any(name.startswith(_LAYOUT_OF_KERAS_2) for name in saved.shapes):
        raise ModelError(
            "these are weights as Keras 2 writes them to .weights.h5, which Keras 3 cannot read; "
            "save them there with save_weights('NAME.h5'), or save the whole model as .h5"
        )
    own = _own_layout(model)
    both = sorted(own.shapes.keys() & saved.shapes.keys())
    found = {
        "not in the file": sorted(own.shapes.keys() - saved.shapes.keys()),
        "in the file but not asked for": sorted(saved.shapes.keys() - own.shapes.keys()),
        "of another shape": [
            f"{name} (file {list(saved.shapes[name])}, model {list(own.shapes[name])})"
            for name in both
            if own.shapes[name] != saved.shapes[name]
        ],
        "of another layer": _exchanged(saved.names, own.names),
    }
    problems = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in found.items() if names]
    if problems:
        raise ModelError("; ".join(problems))


def _exchanged(saved: dict[str, str], own: dict[str, str]) -> list[str]:
    """Return where the file has the weights of a layer that the model has elsewhere: Keras goes by order."""
    chosen = {name for group, name in own.items() if not _made_up(group, name)}
    return [
        f"{group} (file {saved[group]!r}, model {own[group]!r})"
        for group in sorted(own.keys() & saved.keys())
        if saved[group] != own[group] and saved[group] in chosen and not _made_up(group, saved[group])
    ]


def _made_up(group: str, name: str) -> bool:
    """Return whether Keras named the layer after its class, as it names the group: `layers/dense_1/vars`."""
    kind = re.sub(r"_\d+$", "", group.removesuffix("/vars").rpartition("/")[2])
    return re.sub(r"_\d+$", "", name) == kind


def _own_layout(model: Any) -> _Layout:
    """Return what the model itself would write: the only description of the layout Keras gives."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.weights.h5"
        model.save_weights(path)
        with h5py.File(path, "r") as file:
            return _layout(file)
