"""Load the configuration: YAML, `--set` texts or a dict in, a checked `Config` or every problem out."""

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
from featray.config.problems import describe_problems
from featray.config.yaml_text import DuplicateKeyError, parse_yaml
from featray.errors import ConfigError
from featray.storage.urls import mask_url

ConfigInput = str | os.PathLike[str] | dict[str, Any] | Config
"""Input of `load`: the path of a YAML file, its content as a dict, or a `Config`."""


def is_config_file(uri: str) -> bool:
    """Return whether the name of a file or URL is that of a config."""
    return uri.endswith((".yaml", ".yml"))


def load(config: ConfigInput, overrides: list[str] | None = None) -> Config:
    """Return the checked config. Relative paths in it are relative to the working directory.

    Args:
        config: Path of a YAML file, its content as a dict, or an earlier `Config`.
        overrides: `key.path=value` texts; values are YAML (`[1, 2]`, `null`, `true`).

    Raises:
        ConfigError: Lists every unknown key (with the most similar known one), wrong type and contradiction.
    """
    checked, problems = load_partly(config, overrides)
    if problems or checked is None:
        raise ConfigError(problems, get_name(config))
    return checked


def load_partly(config: ConfigInput, overrides: list[str] | None = None) -> tuple[Config | None, list[str]]:
    """Return the usable part of a config, and every problem.

    Invalid values are replaced by their defaults, so that the caller can also check the source and the model,
    and report all problems at once. The config is None if too little of it is usable.

    Raises:
        ConfigError: The file cannot be read as YAML, or has a key twice.
    """
    if isinstance(config, Config) and not overrides:
        return config, []
    values = _to_dict(config)
    for override in overrides or []:
        _apply_override(values, override)
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    for item in errors:
        if item["loc"]:  # without a place, two sections contradict each other, and either could be wrong
            _drop_value(values, item["loc"])
    with contextlib.suppress(ValidationError):
        return Config.model_validate(values), describe_problems(errors)
    return None, describe_problems(errors)


def load_model_section(values: Mapping[str, Any]) -> ModelConfig:
    """Return the checked `model` section of a config.

    Raises:
        ConfigError: Lists every problem, as `load` does.
    """
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        errors = [{**item, "loc": ("model", *item["loc"])} for item in error.errors(include_url=False)]
        raise ConfigError(describe_problems(errors), "model") from None


def get_name(config: ConfigInput) -> str:
    """Return the name by which messages mention a config."""
    return str(config) if isinstance(config, str | os.PathLike) else "config"


def mask_secrets(config: Config) -> dict[str, Any]:
    """Return the config as a dict for JSON, with all storage options and URL credentials masked."""
    values: dict[str, Any] = json.loads(config.model_dump_json(by_alias=True))
    for section in ("source", "model", "output", "cache"):
        options = values[section].get("storage_options") or {}
        values[section]["storage_options"] = dict.fromkeys(options, "***")
        values[section]["uri"] = mask_url(values[section]["uri"] or "") or None
    return values


def _to_dict(config: ConfigInput) -> dict[str, Any]:
    if isinstance(config, Config):
        dumped: dict[str, Any] = config.model_dump(by_alias=True)
        return dumped
    if isinstance(config, dict):
        copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_to_plain(config)))
        return copied
    path = Path(config)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise ConfigError(error.problems, str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} contains no sections; a config has at least source, model and output")
    return values


def _to_plain(value: Any) -> Any:
    """Return the value with paths, tuples and NumPy values replaced by types that YAML knows."""
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy numbers and arrays
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {key!r}: expected key.path=value, e.g. model.batch_size=8")
    try:
        value = parse_yaml(text)
    except DuplicateKeyError as error:
        raise ConfigError(error.problems, f"--set {key}") from None
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is not YAML") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section")
    values[last] = value


def _drop_value(values: Any, path: tuple[int | str, ...]) -> None:
    """Remove the value at `path`; if it does not exist, remove the closest existing key above it."""
    holder, key = values, path[0]
    for part in path:
        if not isinstance(values, dict) or part not in values:
            break
        holder, key, values = values, part, values[part]
    if isinstance(holder, dict):
        holder.pop(key, None)
