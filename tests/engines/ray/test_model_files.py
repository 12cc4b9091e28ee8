"""The model and the user's code reach workers of Ray that lack their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from featray.config import ModelConfig
from featray.engines.base import Stages
from featray.engines.ray.model_files import _look_up_modules, send_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def test_a_worker_without_the_model_file_gets_it_from_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(b"weights")
    cache = str(tmp_path / "cache")

    def load() -> Any:
        import os

        from featray.model.loading.download import get_local_file

        os.environ["FEATRAY_CACHE"] = cache
        return get_local_file(str(path)).path.read_bytes()

    model = ModelConfig.model_validate({"uri": str(path), "layers": ["a"]})
    stages = send_model(Stages(load, load, "r", load, scans_per_file=1, run_id="run", model=model))
    path.unlink()
    load_sent = stages.load_extractor
    assert ray.get(ray.remote(num_cpus=0.1)(lambda: load_sent()).remote()) == b"weights"


def test_without_a_model_of_files_nothing_is_sent() -> None:
    stages = Stages(lambda: None, lambda: None, "r", lambda: None, scans_per_file=1, run_id="run")  # type: ignore[arg-type]
    assert send_model(stages) is stages


def test_each_node_says_which_modules_it_has() -> None:
    (found,) = _look_up_modules(["json", "no_such_module"])
    assert found.keys() == {"json"}
