"""Describe the problems of a configuration: errors of pydantic in, sentences for the user out."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
)

from featray.config.models import Config
from featray.errors import find_similar_names


def describe_problems(errors: Sequence[Any]) -> list[str]:
    """Return one sentence per problem; an error that only follows from an error inside a list is dropped."""
    paths = [item["loc"] for item in errors]
    inside = {path[:length] for path in paths for length in range(len(path))}
    kept = [item for item in errors if item["type"] != "too_short" or item["loc"] not in inside]
    return [_describe_problem(item) for item in kept]


def _describe_problem(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        where = ".".join(str(part) for part in item["loc"][:-1])
        return f"{where}: too few values (got {list(item['input'])!r})"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggest_key(str(item['loc'][-1]), _known_keys(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{path}: missing; this key has no default value"
    if item["type"] == "value_error":
        return f"{path}: {item['ctx']['error']}".removeprefix(": ")
    secret = isinstance(item["input"], dict) or {"storage_options", "uri"} & set(item["loc"])
    got = "" if secret else f" (got {item['input']!r})"
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}{got}"


def _suggest_key(name: str, known: list[str]) -> str:
    close = find_similar_names(name, known)
    return f"; did you mean {close[0]}?" if close else f"; the known keys are {', '.join(known)}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = _section_type(model.model_fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation such as `tuple[LayerConfig, ...]`; None for other annotations."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Annotated, Union, UnionType):
        found = (_section_type(inner) for inner in get_args(annotation))
        return next((section for section in found if section), None)
    return None
