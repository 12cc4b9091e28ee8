"""The JSON schema of the configuration: every key with its type, default and description, for editors.

The descriptions are the texts below the fields in `models.py`. They are read from its source only here,
because pydantic would otherwise read the source in every worker process.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

from featray.config import models

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, as a dict that `json` can write.

    Rules between keys, such as a `stride` that needs `fit: patches`, are not part of the schema;
    `featray.config.load` checks them.
    """
    schema = models.Config.model_json_schema(by_alias=True)
    descriptions = read_descriptions()
    for name, section in {models.Config.__name__: schema, **schema["$defs"]}.items():
        for key, text in descriptions.get(name, {}).items():
            section["properties"][key]["description"] = text
    return {"$schema": _DIALECT, **schema}


def read_descriptions() -> dict[str, dict[str, str]]:
    """Return the description of each key by class and key, from the source of `featray.config.models`."""
    classes = [node for node in ast.parse(inspect.getsource(models)).body if isinstance(node, ast.ClassDef)]
    return {node.name: _read_field_texts(node) for node in classes}


def _read_field_texts(node: ast.ClassDef) -> dict[str, str]:
    """Return the text below each annotated field of a class, on one line, by the key of the field."""
    fields = getattr(models, node.name).model_fields
    return {
        fields[field.target.id].alias or field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
