"""Make a model file readable for Keras: with a suffix that tells its format, and with a changed description.

In: a .keras or .h5 file of any name. Out: the path of a temporary file or link.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONFIG_MEMBER = "config.json"


@contextlib.contextmanager
def open_link(path: Path, name: str) -> Iterator[Path]:
    """Yield a link to `path` called `name`, because Keras decides by the suffix how to read a file."""
    with _open_link_or_copy(path, name, None) as link:
        yield link


@contextlib.contextmanager
def open_with_config(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield a .keras file with the weights of `path` and the description `config`.

    It is a link if the file already has this description.
    """
    with zipfile.ZipFile(path) as archive:
        is_same = json.loads(archive.read(CONFIG_MEMBER)) == config
    write = None if is_same else functools.partial(_copy_archive, path, config)
    with _open_link_or_copy(path, "model.keras", write) as readable:
        yield readable


@contextlib.contextmanager
def open_h5_with_config(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield an .h5 file with the weights of `path` and the description `config`, as `open_with_config`."""
    import h5py

    with h5py.File(path, "r") as file:
        is_same = json.loads(file.attrs["model_config"]) == config
    write = None if is_same else functools.partial(_copy_h5, path, config)
    with _open_link_or_copy(path, "model.h5", write) as readable:
        yield readable


@contextlib.contextmanager
def _open_link_or_copy(path: Path, name: str, write: Callable[[Path], None] | None) -> Iterator[Path]:
    """Yield a link to `path`, or the file that `write` writes, under a name with the suffix for Keras."""
    with tempfile.TemporaryDirectory() as folder:
        readable = Path(folder) / name
        if write is None:
            readable.symlink_to(path.absolute())
        else:
            write(readable)
        yield readable


def _copy_h5(source: Path, config: dict[str, Any], target: Path) -> None:
    import h5py

    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)


def _copy_archive(source: Path, config: dict[str, Any], target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name == CONFIG_MEMBER:
                new.writestr(name, json.dumps(config))
            else:
                with old.open(name) as member, new.open(name, "w", force_zip64=True) as copy:
                    shutil.copyfileobj(member, copy)
