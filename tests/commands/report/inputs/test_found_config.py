"""The config that a run recorded: which run counts, and what it cannot be used for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from featray.commands.report.inputs.found_config import FoundConfig, find_recorded_config

from .conftest import Project


def add_run(project: Project, run_id: str, **changes: Any) -> None:
    """Write the run.json of the only run again under another id, with some keys of sections changed."""
    (file,) = [path for path in project.folder.glob("out/runs/*/run.json") if path.parent.name < "9"]
    run = json.loads(file.read_text())
    for section, keys in changes.items():
        if isinstance(keys, dict):
            run["config"][section].update(keys)
        else:
            run[section] = keys
    folder = project.folder / "out" / "runs" / run_id
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))


def test_the_config_of_the_run_is_found_and_points_to_the_output(project: Project) -> None:
    found = find_recorded_config(project.dataset, project.recipe)
    assert found.is_recorded
    assert found.config is not None
    assert found.config.preprocess == project.config().preprocess
    assert found.config.output.uri == str(project.folder / "out")
    assert found.explain_source() == found.explain_model() == ""


def test_the_newest_run_with_the_recipe_counts(project: Project) -> None:
    add_run(project, "9-a", source={"uri": "newest"})
    add_run(project, "9-b", source={"uri": "other"}, recipe_id="other", recipe=None)
    found = find_recorded_config(project.dataset, project.recipe)
    assert found.config is not None
    assert found.config.source.uri == "newest"


def test_a_recipe_that_no_run_recorded_has_no_config_and_a_way_out(project: Project) -> None:
    found = find_recorded_config(project.dataset, "0" * 16)
    assert found.config is None
    assert found.explain_source() == found.explain_model() == found.problem
    assert "No run" in found.problem
    assert "featray report CONFIG" in found.way_out


def test_a_config_of_a_later_version_cannot_be_used(project: Project) -> None:
    add_run(project, "9-a", source={"new_key": 1})
    found = find_recorded_config(project.dataset, project.recipe)
    assert found.config is None
    assert "cannot be used" in found.problem


def test_masked_storage_options_are_explained(project: Project) -> None:
    masked = {"storage_options": {"key": "***"}}
    add_run(project, "9-a", source=masked, model=masked, cache={"uri": "s3://cache", **masked})
    found = find_recorded_config(project.dataset, project.recipe)
    assert "scans were not read again" in found.explain_source()
    assert "model was not loaded" in found.explain_model()
    assert found.config is not None
    assert found.config.cache.uri is None


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        ({"custom_objects": ["layers.py:Sampling"]}, True),
        ({"builder": "/code/build.py:make"}, True),
        ({"trust": True}, True),
        ({"custom_objects": ["package.module:Sampling"]}, False),
    ],
)
def test_code_that_a_folder_names_is_not_run(
    project: Project, keys: dict[str, Any], *, is_refused: bool
) -> None:
    config = project.config(model=keys)
    assert bool(FoundConfig(config, is_recorded=True).explain_model()) == is_refused
    assert FoundConfig(config).explain_model() == ""
