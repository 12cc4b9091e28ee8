"""The config: defaults, overrides, problems, which are all listed at once, and hidden secrets."""

from __future__ import annotations

import ast
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest

from featray.config import Config, load, mask_secrets
from featray.config import models as config_models
from featray.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "source": {"uri": "data"},
    "model": {"uri": "vae.keras", "layers": ["z_mean"]},
    "output": {"uri": "out"},
}


def make_config(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, **sections}


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = load(MINIMAL)
    assert config.preprocess.orientation == "LPS"
    assert config.preprocess.window == (-1000, 1000)
    assert config.preprocess.scale == (0, 1)
    assert config.preprocess.size == (32, 256, 256)
    assert (config.preprocess.fit, config.preprocess.interpolation) == ("stretch", "linear")
    assert config.preprocess.align_corners is False
    assert config.model.batch_size == 4
    assert config.output.partition_by == ("layer",)
    assert config.output.keep_versions_days == 0
    assert (config.run.engine, config.run.actors.min, config.run.actors.max) == ("auto", 1, None)
    assert config.limits.model_dump() == {
        "max_failed_fraction": 0.05,
        "max_removed_fraction": 0.5,  # guards against a collection that is missing by mistake
        "max_voxels": 2_000_000_000,
        "scan_timeout_s": 600,
        "attempts": 3,
    }


def test_every_problem_is_listed_in_one_message() -> None:
    values = {
        "source": {"uri": "data", "fromat": "auto"},
        "preprocess": {"window": [100, -100], "size": [32, 256], "orientation": "LPP"},
        "model": {"uri": "vae.keras", "layers": ["z_mean", {"layer": "a", "pol": "avg"}], "batch_size": "x"},
        "output": {"uri": "out"},
        "outputt": {},
    }
    with pytest.raises(ConfigError) as caught:
        load(values)
    text = str(caught.value)
    for fact in (
        "source.fromat: unknown key; did you mean format?",
        "is reversed; give the lower HU first",
        "preprocess.size",
        "not an orientation",
        "model.layers.1.pol: unknown key; did you mean pool?",
        "model.batch_size",
        "outputt: unknown key; did you mean output?",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("section", "values", "fact"),
    [
        ("preprocess", {"scale": [1, 1]}, "every voxel would get the same value"),
        ("preprocess", {"size": [0, 1, 1]}, "must be positive"),
        ("preprocess", {"stride": [1, 1, 1]}, "only used with fit: patches"),
        ("preprocess", {"fit": "patches", "size": None}, "patches needs size"),
        ("output", {"uri": "o", "partition_by": ["site"]}, "must begin with layer"),
        ("run", {"actors": {"min": 3, "max": 2}}, "max 2 is below min: 3"),
        ("model", {"uri": "m", "layers": []}, "model.layers"),
        ("limits", {"max_failed_fraction": 2}, "limits.max_failed_fraction"),
    ],
)
def test_a_wrong_or_contradictory_value_is_refused_with_its_reason(
    section: str, values: dict[str, Any], fact: str
) -> None:
    with pytest.raises(ConfigError, match=fact):
        load(make_config(**{section: values}))


def test_overrides_are_yaml_and_replace_values_of_the_file() -> None:
    config = load(MINIMAL, ["preprocess.size=[8, 16, 16]", "model.batch_size=2", "preprocess.window=null"])
    assert config.preprocess.size == (8, 16, 16)
    assert config.model.batch_size == 2
    assert config.preprocess.window is None


@pytest.mark.parametrize("override", ["model.batch_size", "=3", "model.uri.x=1"])
def test_an_override_without_key_value_or_existing_section_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(MINIMAL, [override])


def test_a_layer_is_a_name_or_a_mapping() -> None:
    layers = load(
        make_config(model={"uri": "m", "layers": ["a/b", {"layer": "c", "pool": "max", "as": "d"}]})
    )
    assert [(layer.layer, layer.pool, layer.as_) for layer in layers.model.layers] == [
        ("a/b", None, None),
        ("c", "max", "d"),
    ]


def test_neither_the_masked_config_nor_its_repr_shows_a_secret() -> None:
    secret = {"key": "AKIA-PLANTED", "secret": "PLANTED", "client_kwargs": {"endpoint_url": "http://PLANTED"}}
    config = load(
        make_config(
            source={
                "uri": "s3://PLANTED:PLANTED@bucket/ct?X-Amz-Signature=PLANTED",
                "storage_options": secret,
            },
            output={"uri": "s3://bucket/out", "storage_options": secret},
        )
    )
    assert "PLANTED" not in repr(mask_secrets(config))
    assert "AKIA-PLANTED" not in repr(config.output)


def test_the_message_for_a_wrong_storage_option_does_not_show_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        load(make_config(source={"uri": "s3://bucket", "storage_options": "PLANTED"}))
    assert "PLANTED" not in str(caught.value)


def test_a_config_file_that_is_missing_not_yaml_or_without_sections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("source: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="contains no sections"):
        load(tmp_path / "list.yaml")


def test_every_key_has_a_docstring() -> None:
    sections = {field.annotation.__name__ for field in Config.model_fields.values()}  # type: ignore[union-attr]
    undocumented, parsed = [], set()
    for section in ast.parse(inspect.getsource(config_models)).body:
        if not isinstance(section, ast.ClassDef) or section.name not in sections:
            continue
        parsed.add(section.name)
        for key, after in itertools.pairwise([*section.body, ast.Pass()]):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(key, ast.AnnAssign) and not is_text:
                undocumented.append(f"{section.name}.{ast.unparse(key.target)}")
    assert parsed == sections
    assert undocumented == []


def test_the_message_counts_the_problems_and_names_the_file_if_there_is_one() -> None:
    assert str(ConfigError(["one", "two"])) == "2 problems\n  - one\n  - two"
    assert str(ConfigError(["one", "two"], "c.yaml")).startswith("c.yaml: 2 problems\n")
