"""Tests of the JSON schema of the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from featray.config import load, models
from featray.config.json_schema import make_json_schema, read_descriptions

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "source": {"uri": "data"},
    "model": {"uri": "vae.keras", "layers": ["z_mean", {"layer": "conv_5", "pool": "avg", "as": "conv"}]},
    "output": {"uri": "out"},
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """Return a validator of config files."""
    schema = make_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_fits_the_schema(
    path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_config_that_featray_loads_fits_the_schema(validator: jsonschema.Draft202012Validator) -> None:
    assert load(MINIMAL).model.layers[0].layer == "z_mean"
    validator.validate(MINIMAL)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("source", {"url": "data"}),
        ("preprocess", {"size": [32, 256]}),
        ("preprocess", {"fit": "squeeze"}),
        ("model", {"uri": "vae.keras", "layers": []}),
        ("model", {"uri": "vae.keras", "layers": [{"layer": "conv_5", "pooling": "avg"}]}),
        ("limits", {"max_failed_fraction": 2}),
        ("run", {"actors": {"min": 0}}),
    ],
)
def test_the_schema_rejects_what_loading_rejects(
    section: str, values: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    config = {**MINIMAL, section: values}
    with pytest.raises(Exception, match=section):
        load(config)
    assert not validator.is_valid(config)


def test_every_key_has_a_description() -> None:
    schema = make_json_schema()
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        for key, value in section["properties"].items():
            is_section = name == "Config" and "$ref" in value
            text = value.get("description", "")
            assert is_section or text, f"{name}.{key}"
            assert text == " ".join(text.split()), f"{name}.{key}"


def test_a_description_is_the_text_below_its_field() -> None:
    descriptions = read_descriptions()["LayerConfig"]
    assert set(descriptions) == {"layer", "pool", "grid", "as"}
    assert f'"""{descriptions["layer"]}"""' in Path(models.__file__).read_text(encoding="utf-8")


def test_importing_the_configuration_reads_no_source() -> None:
    assert not models.Config.model_config.get("use_attribute_docstrings")
    code = "import sys, featray.config; assert 'featray.config.json_schema' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
