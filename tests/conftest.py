"""Shared fixtures: the folder of real CT, phantoms, a small VAE with random weights, and a local Ray."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featray.model import runtime

# Otherwise each of the many processes that tests start would compile featray again for half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
runtime.use_onednn()  # as featray does, also in the tests that import Keras before they call featray
REPOSITORY = Path(__file__).resolve().parent.parent
INPUT_ZYX = (8, 32, 32)
LAYERS = ["encoder/z_mean", "encoder/z_log_var", "encoder/pre_latent", "encoder/conv_2"]
ConfigOf = Callable[..., dict[str, Any]]
pytest_plugins = ["servers.fixtures", "kill.scenarios"]
SLOW_MARKERS = {"emulator", "kill", "ray", "soak"}
OPTIONAL_MARKERS = {"hosts", "soak"}
SLOW_FIXTURES = {"demo_run", "s3_server"}
RAY_GROUP = "files with tests of local_ray"
COSTS = {"slow": 1, "ray": 4, "kill": 10}
"""Rough work of a test with a marker, by which the groups of `name_group` are ordered."""


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

    The tests marked soak or hosts run only if `-m` names them. Files with many slow tests come first.
    """
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        for name in markers & OPTIONAL_MARKERS:
            if name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"lasts for minutes; run pytest -m {name}"))
        if markers & SLOW_MARKERS or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    # The processes of pytest-xdist end at about the same time if the files with most work come first.
    work: Counter[str] = Counter()
    for item in items:
        costs = (cost for name, cost in COSTS.items() if item.get_closest_marker(name))
        work[name_group(item.path)] += sum(costs)
    items.sort(key=lambda item: -work[name_group(item.path)])


@functools.cache
def name_group(path: Path) -> str:
    """Return the name of the tests that one process runs one after the other: those of a file.

    All files with tests of `local_ray` are one group, so that one Ray serves them and then ends. An idle Ray
    takes a tenth of a core.
    """
    return RAY_GROUP if re.search(r"\blocal_ray\b", path.read_text()) else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the groups of `name_group` among the processes."""
    from xdist.scheduler import LoadFileScheduling

    class GroupScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return name_group(REPOSITORY / super()._split_scope(nodeid))

    return GroupScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the local Ray after the last test of its group."""
    if name_group(item.path) == RAY_GROUP and (nextitem is None or name_group(nextitem.path) != RAY_GROUP):
        import ray

        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what featray remembers for one user in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATRAY_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        yield


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


@pytest.fixture
def local_ray() -> None:
    """Start one local Ray for all tests that need one; engine ray joins it."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))  # so that workers can import tests' classes
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        # "local": without it, Ray joins a Ray that another process has started on this machine.
        ray.init("local", num_cpus=2, num_gpus=2, logging_level="ERROR", **options)
