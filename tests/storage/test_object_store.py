"""Source, model and output on a real S3 server, disturbed or not: the same job, and no secret anywhere."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
import yaml
from servers.faulty import Faults, FaultyProxy
from servers.fixtures import BUCKET
from servers.seaweedfs import KEY, READ_ONLY_KEY, READ_ONLY_SECRET, SECRET, SeaweedFS

import featray
from featray.cli.main import main
from featray.config import SourceConfig
from featray.errors import OutputBusyError
from featray.output.dataset import FEATURES, Dataset
from featray.output.lease import Lease
from featray.stages.list import list_scans
from featray.storage.store import Store

Features = dict[tuple[str, str], list[float]]


@pytest.fixture(scope="module")
def collection(s3_server: SeaweedFS, phantoms: Path, vae_file: Path) -> str:
    """Put the phantoms and the model on the server; return the URL of their folder."""
    folder = f"s3://{BUCKET}/collection"
    fs = fsspec.filesystem("s3", **s3_server.options())
    fs.put(f"{phantoms}/", f"{folder}/ct/", recursive=True)
    fs.put(str(vae_file), f"{folder}/vae.keras")
    return folder


@pytest.fixture
def expected(config_of: Any, tmp_path: Path) -> Features:
    """Return the values of the same job on local disk."""
    config = config_of(output={"uri": str(tmp_path / "expected")})
    assert featray.extract(config).ok == 12
    return features(Store(config["output"]["uri"]))


def features(store: Store) -> Features:
    rows = Dataset(store).read(FEATURES, ("scan_id", "layer", "feature")).to_pylist()
    found = {(row["scan_id"], row["layer"]): row["feature"] for row in rows}
    assert len(found) == len(rows)
    return found


def assert_same(found: Features, expected: Features) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-6)


def assert_tidy(store: Store) -> None:
    """Check that a run has left neither a lease nor a data file that no table holds."""
    names = store.list_files()
    assert not [name for name in names if "lease" in name or "write-check" in name]
    snapshot = Dataset(store).open_snapshot()
    live = {f"{table}/{file.path}" for table in ("features", "scans") for file in snapshot.files(table)}
    data = {name for name in names if name.startswith(("features/", "scans/")) and "_delta_log" not in name}
    assert data == live


def on_s3(config_of: Any, collection: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = config_of(
        source={"uri": f"{collection}/ct", "storage_options": options},
        output={"uri": output, "storage_options": options},
    )
    return config


def test_a_job_on_s3_gives_the_same_values_and_resumes(
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_options: dict[str, Any],
    expected: Features,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    config = on_s3(config_of, collection, s3_folder, s3_options)
    config["model"] |= {"uri": f"{collection}/vae.keras", "storage_options": s3_options}
    config["run"]["decode"]["workers"] = 2
    summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    assert featray.extract(config).done == 0
    store = Store(s3_folder, s3_options)
    assert_same(features(store), expected)
    assert_tidy(store)
    table = pl.scan_delta(store.delta_uri("features"), storage_options=store.delta_options()).collect()
    assert len(table) == len(expected)
    everything = b"".join(store.read(name) for name in store.list_files())
    assert SECRET.encode() not in everything
    assert KEY.encode() not in everything


def test_each_side_has_storage_options_of_its_own(
    config_of: Any, collection: str, s3_folder: str, s3_server: SeaweedFS, expected: Features, tmp_path: Path
) -> None:
    reader, writer = s3_server.options(READ_ONLY_KEY, READ_ONLY_SECRET), s3_server.options()
    source = {"uri": f"{collection}/ct", "storage_options": reader}
    output = {"uri": s3_folder, "storage_options": writer}
    featray.extract(config_of(source=source))
    assert_same(features(Store(str(tmp_path / "out"))), expected)
    featray.extract(config_of(source=source, output=output))
    assert_same(features(Store(s3_folder, writer)), expected)
    featray.extract(config_of(output={"uri": f"{s3_folder}-2", "storage_options": writer}))
    assert_same(features(Store(f"{s3_folder}-2", writer)), expected)


@pytest.mark.parametrize(
    "faults",
    [Faults(unavailable=0.1, reset=0.05), Faults(forget=0.05, truncate=0.05, delay_s=0.02)],
    ids=["busy-and-reset", "lost-cut-and-slow"],
)
def test_a_store_that_misbehaves_changes_nothing(
    faults: Faults,
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_server: SeaweedFS,
    proxy: FaultyProxy,
    expected: Features,
) -> None:
    proxy.faults = faults
    config = on_s3(config_of, collection, s3_folder, s3_server.options(port=proxy.port))
    summary = featray.extract(config)
    proxy.faults = Faults()
    assert (summary.ok, summary.failed, summary.exit_code) == (12, 0, 0)
    assert sum(proxy.met.values()) - proxy.met["ok"] >= 10
    store = Store(s3_folder, s3_server.options())
    assert_same(features(store), expected)
    assert_tidy(store)


@pytest.fixture
def own_server(tmp_path: Path, phantoms: Path) -> Iterator[SeaweedFS]:
    """Start a server that a test may kill, with the phantoms on it."""
    server = SeaweedFS(tmp_path / "server")
    server.start()
    fs = fsspec.filesystem("s3", **server.options())
    fs.mkdir(BUCKET)
    fs.put(f"{phantoms}/", f"{BUCKET}/collection/ct/", recursive=True)
    yield server
    server.kill()


def when_written(proxy: FaultyProxy, act: Callable[[], None]) -> threading.Thread:
    """Act in the background as soon as the first features are on their way to the store."""

    def wait() -> None:
        while not any(r.startswith("PUT") and "/features/layer" in r for r in list(proxy.requests)):
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_server_that_is_killed_and_comes_back_costs_time_only(
    config_of: Any, s3_folder: str, own_server: SeaweedFS, expected: Features
) -> None:
    def outage() -> None:
        own_server.kill()
        time.sleep(2)
        own_server.start()

    with FaultyProxy(own_server.port, Faults(delay_s=0.02)) as proxy:
        options = own_server.options(port=proxy.port)
        config = on_s3(config_of, f"s3://{BUCKET}/collection", s3_folder, options)
        killer = when_written(proxy, outage)
        summary = featray.extract(config)
        killer.join(60)
    assert (summary.ok, summary.failed, summary.exit_code) == (12, 0, 0)
    store = Store(s3_folder, own_server.options())
    assert_same(features(store), expected)
    assert_tidy(store)


_IMPATIENT = """
import sys
from featray import retry
from featray.cli.main import main

retry.OUTPUT_DEADLINE_S = retry.SOURCE_DEADLINE_S = 2.0
sys.exit(main(["extract", sys.argv[1]]))
"""


def test_a_server_that_stays_away_ends_the_run_and_the_next_completes_it(
    config_of: Any, s3_folder: str, own_server: SeaweedFS, expected: Features, tmp_path: Path
) -> None:
    with FaultyProxy(own_server.port, Faults(delay_s=0.02)) as proxy:
        output = {"uri": s3_folder, "storage_options": own_server.options(port=proxy.port)}
        config = config_of(output=output)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        killer = when_written(proxy, own_server.kill)
        argv = [sys.executable, "-c", _IMPATIENT, str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
        killer.join(60)
        assert done.returncode == 1
        assert "What is committed is kept: run the same command again, and it resumes." in done.stderr
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
        own_server.start()
        summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    store = Store(s3_folder, own_server.options())
    assert_same(features(store), expected)
    assert_tidy(store)


_CREATE = """
import sys
from concurrent.futures import ThreadPoolExecutor
import yaml
from featray.storage import Store

folder, options, own = sys.argv[1], yaml.safe_load(sys.argv[2]), sys.argv[3]
with ThreadPoolExecutor(4) as pool:
    for name in "abcd":
        tries = [pool.submit(Store(folder, options).create, name, f"{own}-{n}".encode()) for n in range(4)]
        print(name, *(f"{own}-{n}" for n, one in enumerate(tries) if one.result()))
"""


def test_of_many_processes_and_threads_that_create_one_object_one_wins(
    s3_folder: str, s3_options: dict[str, Any]
) -> None:
    argv = [sys.executable, "-c", _CREATE, s3_folder, yaml.safe_dump(s3_options)]
    racers = [subprocess.Popen([*argv, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
    lines = [line.split() for racer in racers for line in racer.communicate(timeout=120)[0].splitlines()]
    assert len(lines) == 3 * 4
    store = Store(s3_folder, s3_options)
    for name in "abcd":
        winners = [winner for key, *won in lines if key == name for winner in won]
        assert winners == [store.read(name).decode()]


def test_a_create_whose_answer_is_lost_is_known_as_ones_own(
    s3_folder: str, s3_server: SeaweedFS, proxy: FaultyProxy
) -> None:
    store = Store(s3_folder, s3_server.options(port=proxy.port))
    store.write("warm", b"")  # so that the connection is one that the client asks again on by itself
    proxy.faults = Faults(forget=0.5, only="PUT")
    assert [store.create(f"{n}", b"same bytes") for n in range(12)] == [True] * 12
    assert proxy.met["forget"] >= 4
    assert [store.create(f"{n}", b"same bytes") for n in range(12)] == [False] * 12


def test_two_drivers_that_race_leave_one_exact_result(
    config_of: Any, collection: str, s3_folder: str, s3_options: dict[str, Any], expected: Features
) -> None:
    config = on_s3(config_of, collection, s3_folder, s3_options)
    outcomes = race(config)
    assert sorted(outcomes) in (["12 ok", "busy"], ["12 ok", "12 ok"])
    store = Store(s3_folder, s3_options)
    assert_same(features(store), expected)
    assert_tidy(store)


def test_two_drivers_with_a_broken_lease_are_kept_apart_by_the_log(
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_options: dict[str, Any],
    expected: Features,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featray.checks.raise_if_locked", lambda store: None)
    monkeypatch.setattr(Lease, "__enter__", lambda self: self)
    monkeypatch.setattr(Lease, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(Lease, "check", lambda self: None)
    config = on_s3(config_of, collection, s3_folder, s3_options)
    race(config)
    monkeypatch.undo()
    summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    store = Store(s3_folder, s3_options)
    assert_same(features(store), expected)
    assert_tidy(store)


def race(config: dict[str, Any]) -> list[str]:
    """Run two drivers at once and return how each ended."""

    def drive(_: int) -> str:
        try:
            return f"{featray.extract(config).ok} ok"
        except OutputBusyError:
            return "busy"
        except FileNotFoundError:  # without a lease the other one sweeps what is not committed
            return "swept"

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(drive, range(2)))


def test_thousands_of_objects_are_listed_and_deleted(
    s3_folder: str, s3_options: dict[str, Any], s3_server: SeaweedFS
) -> None:
    store, count = Store(s3_folder, s3_options), 2_100  # the server gives a thousand a page
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: store.write(f"ct/{n:05}.nii.gz", b"%d" % n), range(count)))
    sizes = store.list_file_sizes("ct")
    assert len(sizes) == count
    assert sizes["ct/02099.nii.gz"] == 4
    scans = list_scans(SourceConfig(uri=f"{s3_folder}/ct", storage_options=s3_options)).scans
    assert [scan.scan_id for scan in scans] == [f"{n:05}.nii.gz" for n in range(count)]
    store.delete(store.list_files("ct"))
    assert store.list_files() == []


ODD = [
    "with space.nii.gz",
    "percent%20and%2Fmore.nii.gz",
    "plus+plus.nii.gz",
    "hash#1.nii.gz",
    "equals=1/layer=x.nii.gz",
    "question?.nii.gz",
    "brackets[1]{2}(3).nii.gz",
    "ümläut-日本.nii.gz",
    "quote'\"&;,@$!.nii.gz",
]


def test_scans_with_odd_names_are_read_under_these_names(
    config_of: Any, phantoms: Path, s3_folder: str, s3_options: dict[str, Any]
) -> None:
    fs = fsspec.filesystem("s3", **s3_options)
    phantom = next(phantoms.rglob("*.nii.gz")).read_bytes()
    for name in ODD:
        fs.pipe_file(f"{s3_folder}/ct/{name}", phantom)
    config = on_s3(config_of, s3_folder, f"{s3_folder}/out", s3_options)
    summary = featray.extract(config)
    assert (summary.ok, summary.found) == (len(ODD), len(ODD))
    found = features(Store(f"{s3_folder}/out", s3_options))
    assert {scan_id for scan_id, _ in found} == set(ODD)


@pytest.mark.parametrize("side", ["source", "output", "model"])
def test_a_wrong_secret_is_exit_2_and_shown_nowhere(
    side: str,
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_server: SeaweedFS,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = on_s3(config_of, collection, s3_folder, s3_server.options())
    config["model"]["uri"] = f"{collection}/vae.keras"
    config["model"]["storage_options"] = s3_server.options()
    config[side]["storage_options"] = s3_server.options(secret="PLANTED-WRONG-SECRET")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["extract", str(path)]) == 2
    out, err = capsys.readouterr()
    assert f"{side}.uri" in err or side == "model"
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4
    for text in (out, err, caplog.text):
        assert "PLANTED" not in text


def test_an_output_that_may_only_be_read_is_refused_before_work(
    config_of: Any, s3_folder: str, s3_server: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"uri": s3_folder, "storage_options": s3_server.options(READ_ONLY_KEY, READ_ONLY_SECRET)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(output=output)))
    assert main(["extract", str(path)]) == 2
    err = capsys.readouterr().err
    assert "refuses to be written: check key, secret and permissions" in err
    assert "PLANTED" not in err


def test_a_glob_on_s3_lists_what_it_matches(collection: str, s3_options: dict[str, Any]) -> None:
    source = SourceConfig(uri=f"{collection}/ct/**/phantom_00[12]*.nii.gz", storage_options=s3_options)
    scans = list_scans(source).scans
    assert [scan.scan_id for scan in scans] == ["nifti/phantom_001.nii.gz", "nifti/phantom_002.nii.gz"]
    assert scans[0].uri == f"{collection}/ct/nifti/phantom_001.nii.gz"
    assert scans[0].content != scans[1].content
