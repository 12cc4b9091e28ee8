"""Sources and files on emulators of Azure and Google storage, if they are installed.

Outputs are not tested here, because neither emulator supports a Delta log. Azurite 3.35 ignores `startFrom`
in listings, so the second commit fails. fake-gcs-server rejects the uploads that deltalake makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from servers import emulators

import featray
from featray.errors import ConfigError
from featray.output.dataset import FEATURES, Dataset
from featray.storage.store import Store

pytestmark = [
    pytest.mark.emulator,
    # Both libraries leave it to the garbage collector to close connections.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
Cloud = tuple[str, dict[str, Any]]
Emulator = Callable[[Path], AbstractContextManager[dict[str, Any]]]
CLOUDS: list[tuple[str, str, Emulator]] = [
    ("adlfs", "az", emulators.run_azurite),
    ("gcsfs", "gs", emulators.run_fake_gcs),
]


@pytest.fixture(params=CLOUDS, ids=["azure", "google"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """Start an emulator; yield the URL of a bucket in it, and its storage options."""
    package, protocol, emulator = request.param
    # gcsfs asks whether a bucket has a hierarchical namespace; the emulator takes a minute to answer.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with emulator(tmp_path) as options:
        pytest.importorskip(package)
        fsspec.filesystem(protocol, **options).mkdir("featray-test")
        yield f"{protocol}://featray-test", options


def test_a_collection_in_a_cloud_gives_the_same_values(
    cloud: Cloud, config_of: Any, phantoms: Path, tmp_path: Path
) -> None:
    bucket, options = cloud
    fsspec.filesystem(bucket.partition(":")[0], **options).put(
        f"{phantoms}/", f"{bucket}/ct/", recursive=True
    )
    local = config_of(output={"uri": str(tmp_path / "expected")})
    remote = config_of(source={"uri": f"{bucket}/ct", "storage_options": options})
    assert [featray.extract(config).ok for config in (local, remote)] == [12, 12]
    assert featray.extract(remote).done == 0
    actual, expected = (read_features(Store(config["output"]["uri"])) for config in (remote, local))
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-5, atol=1e-6)


def test_files_in_a_cloud_are_written_read_listed_and_deleted(cloud: Cloud) -> None:
    bucket, options = cloud
    store = Store(f"{bucket}/out", options)
    store.check_writable()
    assert (store.list_files(), store.get_size("a/b")) == ([], None)
    store.write("a/b", b"12")
    store.write("a/b", b"123")
    assert (store.list_file_sizes(), store.read("a/b")) == ({"a/b": 3}, b"123")
    assert [store.create("c", b"1"), store.create("c", b"2")] == [True, False]
    assert store.read("c") == b"1"
    store.delete(["a/b", "c", "gone"])
    assert store.list_files() == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_a_missing_bucket_is_a_config_error(cloud: Cloud) -> None:
    bucket, options = cloud
    with pytest.raises(ConfigError, match="create the bucket or container"):
        Store(f"{bucket}-missing/out", options).check_writable()


def read_features(store: Store) -> dict[tuple[str, str], list[float]]:
    """Return (scan_id, layer) → feature."""
    rows = Dataset(store).read(FEATURES, ("scan_id", "layer", "feature")).to_pylist()
    return {(row["scan_id"], row["layer"]): row["feature"] for row in rows}
