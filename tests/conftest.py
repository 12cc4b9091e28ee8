"""Shared fixtures: the folder of real CT, phantoms, a small VAE with random weights, and a local Ray."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
INPUT_ZYX = (8, 32, 32)
LAYERS = ["encoder/z_mean", "encoder/z_log_var", "encoder/pre_latent", "encoder/conv_2"]
ConfigOf = Callable[..., dict[str, Any]]
pytest_plugins = ["servers.fixtures", "kill.scenarios"]
SLOW_MARKERS = {"emulator", "kill", "ray", "soak"}
SLOW_FIXTURES = {"demo_run", "s3_server"}
COSTS = {"slow": 1, "ray": 4, "kill": 10}
"""Rough work of a test with a marker, by which the files are ordered."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `pytest -m soak`; see `test_soak`."""
    group = parser.getgroup("soak")
    group.addoption("--soak-minutes", type=float, default=10, help="how long `-m soak` searches (10)")
    group.addoption("--soak-seed", type=int, help="first seed of `-m soak`; random without it")
    group.addoption("--soak-failures", default="soak-failures", help="folder for what `-m soak` finds")
    group.addoption("--soak-repeat", help="folder of one failure that `-m soak` tries again")


@pytest.hookimpl(tryfirst=True)  # before pytest applies `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow each test that starts Ray or an object store, kills a run, or reads the demo output.

    The tests marked soak run only if `-m` names them, because they last as long as the caller wishes. Files
    with many slow tests come first.
    """
    skip_soak = pytest.mark.skip(reason="lasts for minutes; run pytest -m soak")
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        if "soak" in markers and "soak" not in config.option.markexpr:
            item.add_marker(skip_soak)
        if markers & SLOW_MARKERS or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    # The processes of pytest-xdist end at about the same time if the files with most work come first.
    work: Counter[Path] = Counter()
    for item in items:
        work[item.path] += sum(cost for name, cost in COSTS.items() if item.get_closest_marker(name))
    items.sort(key=lambda item: -work[item.path])


@pytest.fixture(scope="session")
def shared_ct() -> Path:
    """Return the folder of real CT whose properties are known; skip the test if it is not there."""
    folder = Path(os.environ.get("FEATRAY_TEST_CT", REPOSITORY.parent / "shared" / "data" / "ct"))
    if not (folder / "collection" / "facts.csv").is_file():
        pytest.skip(f"there is no real CT in {folder}; set FEATRAY_TEST_CT to its folder")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a collection of eleven small NIfTI phantoms and one DICOM series."""
    from featray.synthetic.phantom import make_collection

    folder = tmp_path_factory.mktemp("phantoms")
    make_collection(folder, 12, shape_zyx=(16, 40, 48), seed=3)
    return folder


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the .keras file of a small VAE with random weights; its layer Sampling is a custom one."""
    from featray.synthetic.vae import build_vae

    path = tmp_path_factory.mktemp("model") / "vae.keras"
    build_vae(INPUT_ZYX, filters=(4, 8), dense=16, latent=4, seed=1).save(path)
    return path


@pytest.fixture
def config_of(vae_file: Path, phantoms: Path, tmp_path: Path) -> ConfigOf:
    """Return a function that makes a config for the phantoms; its arguments replace keys of sections."""

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = {
            "source": {"uri": str(phantoms)},
            "preprocess": {"size": list(INPUT_ZYX)},
            "model": {
                "uri": str(vae_file),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": list(LAYERS),
            },
            "output": {"uri": str(tmp_path / "out")},
            "run": {"engine": "inline", "decode": {"workers": 0}},
        }
        return {name: {**values, **sections.get(name, {})} for name, values in {**sections, **config}.items()}

    return make


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one local Ray for all tests that need one; engine ray joins it."""
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))  # so that workers can import tests' classes
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        # "local": without it, Ray joins a Ray that another process has started on this machine.
        ray.init("local", num_cpus=2, num_gpus=2, logging_level="ERROR", **options)
    yield
    ray.shutdown()
