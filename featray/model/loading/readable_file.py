"""Make a model file readable for Keras: with a suffix that tells its format, and with a changed description.

In: a .keras or .h5 file of any name. Out: the path of a temporary file or link.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_MEMBER = "config.json"


@contextlib.contextmanager
def open_link(path: Path, name: str) -> Iterator[Path]:
    """Yield a link to `path` called `name`, because Keras decides by the suffix how to read a file."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(path.absolute())
        yield link


@contextlib.contextmanager
def open_with_config(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield a .keras file with the weights of `path` and the description `config`.

    It is a link if the file already has this description.
    """
    with zipfile.ZipFile(path) as archive:
        is_same = json.loads(archive.read(CONFIG_MEMBER)) == config
    if is_same:
        with open_link(path, "model.keras") as link:
            yield link
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.keras"
        _copy_archive(path, copy, config)
        yield copy


@contextlib.contextmanager
def open_h5_with_config(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield an .h5 file with the weights of `path` and the description `config`, as `open_with_config`."""
    import h5py

    with h5py.File(path, "r") as file:
        is_same = json.loads(file.attrs["model_config"]) == config
    if is_same:
        with open_link(path, "model.h5") as link:
            yield link
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.h5"
        shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            file.attrs["model_config"] = json.dumps(config)
        yield copy


def _copy_archive(source: Path, target: Path, config: dict[str, Any]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name == CONFIG_MEMBER:
                new.writestr(name, json.dumps(config))
            else:
                with old.open(name) as member, new.open(name, "w", force_zip64=True) as copy:
                    shutil.copyfileobj(member, copy)
