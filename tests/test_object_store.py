"""Source, model and output on an S3 server: the same job, and no secret anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
from moto.server import ThreadedMotoServer

import featray
from featray.dataset import FEATURES, Dataset
from featray.storage import Store

SECRET = "PLANTED-SECRET"


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    """Start a small S3 server and yield the storage options that reach it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "key": "PLANTED-KEY",
        "secret": SECRET,
        "endpoint_url": f"http://{host}:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    server.stop()


@pytest.fixture(scope="module")
def bucket(options: dict[str, Any], phantoms: Path, vae_file: Path) -> str:
    fs = fsspec.filesystem("s3", **options)
    fs.call_s3("create_bucket", Bucket="featray-test")
    fs.put(f"{phantoms}/", "featray-test/ct/", recursive=True)
    fs.put(str(vae_file), "featray-test/vae.keras")
    return "featray-test"


def test_a_job_on_s3_gives_the_same_values_and_resumes(
    config_of: Any, bucket: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    local = config_of()
    remote = config_of(
        source={"uri": f"s3://{bucket}/ct", "storage_options": options},
        model={"uri": f"s3://{bucket}/vae.keras", "storage_options": options},
        output={"uri": f"s3://{bucket}/out", "storage_options": options},
        run={"decode": {"workers": 2}},
    )
    featray.extract(local)
    summary = featray.extract(remote)
    assert (summary.ok, summary.exit_code) == (12, 0)
    assert featray.extract(remote).done == 0

    expected, found = (
        _features(Store(config["output"]["uri"], o)) for config, o in ((local, {}), (remote, options))
    )
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-6)

    store = Store(remote["output"]["uri"], options)
    table = pl.scan_delta(store.delta_uri("features"), storage_options=store.delta_options()).collect()
    assert len(table) == len(expected)
    everything = b"".join(store.read(name) for name in store.names())
    assert SECRET.encode() not in everything
    assert b"PLANTED-KEY" not in everything
    assert not [name for name in store.names() if name.endswith("lease.json")]


def test_a_glob_on_s3_lists_what_it_matches(bucket: str, options: dict[str, Any]) -> None:
    from featray.config import SourceConfig
    from featray.stages.list import list_scans

    source = SourceConfig(uri=f"s3://{bucket}/ct/**/phantom_00[12]*.nii.gz", storage_options=options)
    scans = list_scans(source).scans
    assert [scan.scan_id for scan in scans] == ["nifti/phantom_001.nii.gz", "nifti/phantom_002.nii.gz"]
    assert scans[0].uri == f"s3://{bucket}/ct/nifti/phantom_001.nii.gz"
    assert scans[0].content != scans[1].content


def _features(store: Store) -> dict[tuple[str, str], list[float]]:
    rows = Dataset(store).read(FEATURES, ("scan_id", "layer", "feature")).to_pylist()
    return {(row["scan_id"], row["layer"]): row["feature"] for row in rows}
