"""What a process knows of the Ray job that it is, and what it refuses to write into the folder of the job."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.benchmark.run import benchmark
from featray.commands.demo import demo
from featray.commands.plan import plan
from featray.commands.preview import preview
from featray.commands.vacuum import vacuum
from featray.commands.verify import verify
from featray.errors import ConfigError
from featray.output.query import open_output
from featray.storage.ray_job import find_package_problem, find_stop_limit_s, find_submission_id

ConfigOf = Callable[..., dict[str, Any]]


@pytest.fixture(params=["_ray_pkg_0123456789abcdef", "s3_bucket_code"])
def package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a Ray job, which is the working directory; its name depends on its source."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / str(request.param)
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "path", ["out", "./a/b", "../out", "{package}", "{package}/out", "file://{package}/out"]
)
def test_paths_that_are_lost_with_a_job_are_found(path: str, package: Path) -> None:
    assert "URL" in find_package_problem(path.format(package=package))


@pytest.mark.parametrize(
    "path",
    ["{tmp}/out", "file://{tmp}/out", "s3://bucket/out", "link/out", "../../../../out", "/_ray_pkg_/out"],
)
def test_other_paths_and_urls_can_be_written_in_a_job(path: str, package: Path, tmp_path: Path) -> None:
    (package / "link").symlink_to(tmp_path)
    assert not find_package_problem(path.format(tmp=tmp_path))


def test_relative_paths_can_be_written_outside_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not find_package_problem("out")


WRITERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "DIR": lambda config: featray.export(open_output(config["output"]["uri"]), "plain"),
    "DIR: vectors": lambda config: featray.export_vectors(open_output(config["output"]["uri"]), "vectors"),
    "DIR: demo": lambda _: demo("demo"),
    "--out": lambda config: preview(config, directory="pictures"),
    "--out: benchmark": lambda config: benchmark(config, directory="figures"),
    "--out: report": lambda config: featray.report(config["output"]["uri"], directory="page"),
    "output.uri: report": lambda _: featray.report("out"),
    "OUTPUT: vacuum": lambda _: vacuum(open_output("out")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_command_writes_to_a_folder_that_is_lost(name: str, package: Path, tmp_path: Path) -> None:
    model = {"uri": "model.keras", "layers": ["z_mean"]}
    config = {"source": {"uri": "ct"}, "model": model, "output": {"uri": str(tmp_path / "out")}}
    with pytest.raises(ConfigError, match=rf"^{name.partition(':')[0]}: .* is in the folder to which Ray"):
        WRITERS[name](config)
    assert not list(package.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("package", ["_ray_pkg_0123456789abcdef"], indirect=True)
def test_output_and_cache_are_refused_before_a_run_and_by_its_plan(
    package: Path, config_of: ConfigOf
) -> None:
    config = config_of()
    config |= {"output": {"uri": "out"}, "cache": {"uri": "cache"}}
    for command in (featray.extract, featray.refresh, plan):
        with pytest.raises(ConfigError) as raised:
            command(config)
        assert [problem.split(":")[0] for problem in raised.value.problems] == ["output.uri", "cache.uri"]
    assert not list(package.iterdir())


@pytest.mark.parametrize("package", ["_ray_pkg_0123456789abcdef"], indirect=True)
def test_reading_in_the_folder_of_a_job_is_allowed(package: Path) -> None:
    with pytest.raises(ConfigError, match="is this a featray output"):
        verify(str(package / "out"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"metadata": {"job_submission_id": "nightly-1", "job_name": "x"}}', "nightly-1"),
        ('{"runtime_env": {}}', None),
        ("[]", None),
        ("no JSON", None),
        ("", None),
    ],
)
def test_the_submission_id_comes_from_the_variable_of_ray(
    text: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    assert find_submission_id() == expected


def test_a_job_gives_up_before_ray_kills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    assert find_stop_limit_s() == math.inf
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "a"}}))
    assert find_stop_limit_s() == 1.0  # of the 3 s that Ray gives by default
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    assert find_stop_limit_s() == 110.0
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "long")
    assert find_stop_limit_s() == 1.0
