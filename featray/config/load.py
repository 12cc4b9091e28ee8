"""TODO: say what goes in and comes out."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from featray.config.models import Config, ModelConfig
from featray.config.problems import _sentences
from featray.errors import ConfigError
from featray.storage.urls import mask_url

ConfigInput = str | os.PathLike[str] | dict[str, Any] | Config
"""What `load` takes: the path of a YAML file, its content, or a config made earlier."""


def load(config: ConfigInput, overrides: list[str] | None = None) -> Config:
    """Return the checked config.

    Args:
        config: Path of a YAML file, its content as a dict, or an earlier `Config`.
        overrides: `key.path=value` texts; values are YAML (`[1, 2]`, `null`, `true`).

    Relative paths in the file are relative to the working directory, as in a shell.

    Raises:
        ConfigError: Lists every unknown key (with the nearest known one), wrong type and
            contradiction found.
    """
    checked, problems = load_partly(config, overrides)
    if problems or checked is None:
        raise ConfigError(problems, name_of(config))
    return checked


def load_partly(config: ConfigInput, overrides: list[str] | None = None) -> tuple[Config | None, list[str]]:
    """Return what can be used of a config, and every problem found.

    Offending values are replaced by their defaults, so that a caller can go on to look for problems
    of the source and the model and report all at once. None when too little is left for that.

    Raises:
        ConfigError: The file cannot be read as YAML at all.
    """
    if isinstance(config, Config) and not overrides:
        return config, []
    values = _as_dict(config)
    for override in overrides or []:
        _apply(values, override)
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    for item in found:
        if item["loc"]:  # else two sections contradict each other, and nobody knows which is meant
            _drop(values, item["loc"])
    with contextlib.suppress(ValidationError):
        return Config.model_validate(values), _sentences(found)
    return None, _sentences(found)


def load_model_section(values: Mapping[str, Any]) -> ModelConfig:
    """Return a checked `model` section given on its own.

    Raises:
        ConfigError: As `load`.
    """
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        found = [{**item, "loc": ("model", *item["loc"])} for item in error.errors(include_url=False)]
        raise ConfigError(_sentences(found), "model") from None


def name_of(config: ConfigInput) -> str:
    """Return how messages call this config."""
    return str(config) if isinstance(config, str | os.PathLike) else "config"


def without_secrets(config: Config) -> dict[str, Any]:
    """Return the config as JSON-ready dict with every storage option and URL credential masked."""
    values: dict[str, Any] = json.loads(config.model_dump_json(by_alias=True))
    for section in ("source", "model", "output"):
        options = values[section].get("storage_options") or {}
        values[section]["storage_options"] = dict.fromkeys(options, "***")
        values[section]["uri"] = mask_url(values[section]["uri"])
    return values


def _as_dict(config: ConfigInput) -> dict[str, Any]:
    if isinstance(config, Config):
        dumped: dict[str, Any] = config.model_dump(by_alias=True)
        return dumped
    if isinstance(config, dict):
        copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(config)))
        return copied
    path = Path(config)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no sections; a config has source, model and output at least")
    return values


def _plain(value: Any) -> Any:
    """Return value with paths, tuples and the like as YAML-ready plain types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {key!r}: expected key.path=value, e.g. model.batch_size=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is not YAML") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section")
    values[last] = value


def _drop(values: Any, path: tuple[int | str, ...]) -> None:
    """Remove the value at `path`, or the nearest key of a section above it."""
    holder, key = values, path[0]
    for part in path:
        if not isinstance(values, dict) or part not in values:
            break
        holder, key, values = values, part, values[part]
    if isinstance(holder, dict):
        holder.pop(key, None)
