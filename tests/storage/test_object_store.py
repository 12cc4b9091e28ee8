"""Source, model and output on a real S3 server, with and without faults: same values, no secret shown."""

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
from featray.config import SourceConfig, load
from featray.errors import OutputBusyError
from featray.output.dataset import FEATURES, Dataset
from featray.output.lease import Lease
from featray.stages.input_cache import InputCache, is_entry, make_room
from featray.stages.list import list_scans
from featray.storage.store import Store

Features = dict[tuple[str, str], list[float]]


@pytest.fixture(scope="module")
def collection(s3_server: SeaweedFS, phantoms: Path, vae_file: Path) -> str:
    """Upload the phantoms and the model to the server; return the URL of their folder."""
    folder = f"s3://{BUCKET}/collection"
    fs = fsspec.filesystem("s3", **s3_server.options())
    fs.put(f"{phantoms}/", f"{folder}/ct/", recursive=True)
    fs.put(str(vae_file), f"{folder}/vae.keras")
    return folder


@pytest.fixture
def expected(config_of: Any, tmp_path: Path) -> Features:
    """Return the features that the same job writes to local disk."""
    config = config_of(output={"uri": str(tmp_path / "expected")})
    assert featray.extract(config).ok == 12
    return read_features(Store(config["output"]["uri"]))


def read_features(store: Store) -> Features:
    """Return (scan_id, layer) → feature; check that each pair has one row."""
    rows = Dataset(store).read(FEATURES, ("scan_id", "layer", "feature")).to_pylist()
    features = {(row["scan_id"], row["layer"]): row["feature"] for row in rows}
    assert len(features) == len(rows)
    return features


def assert_same(actual: Features, expected: Features) -> None:
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-5, atol=1e-6)


def assert_no_leftovers(store: Store) -> None:
    """Check that a run has left neither a lease nor a data file that no table refers to."""
    names = store.list_files()
    assert not [name for name in names if "lease" in name or "write-check" in name]
    snapshot = Dataset(store).open_snapshot()
    live = {f"{table}/{file.path}" for table in ("features", "scans") for file in snapshot.files(table)}
    data = {name for name in names if name.startswith(("features/", "scans/")) and "_delta_log" not in name}
    assert data == live


def make_s3_config(config_of: Any, collection: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
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
    config = make_s3_config(config_of, collection, s3_folder, s3_options)
    config["model"] |= {"uri": f"{collection}/vae.keras", "storage_options": s3_options}
    config["run"]["decode"]["workers"] = 2
    summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    assert featray.extract(config).done == 0
    store = Store(s3_folder, s3_options)
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)
    table = pl.scan_delta(store.delta_uri("features"), storage_options=store.delta_options()).collect()
    assert len(table) == len(expected)
    everything = b"".join(store.read(name) for name in store.list_files())
    assert SECRET.encode() not in everything
    assert KEY.encode() not in everything


def test_an_input_cache_on_s3_is_filled_marked_and_limited(
    config_of: Any, s3_folder: str, s3_options: dict[str, Any], expected: Features, tmp_path: Path
) -> None:
    cache = {"uri": f"{s3_folder}-cache", "storage_options": s3_options}

    def extract(name: str, **more: Any) -> int:
        output = {"uri": str(tmp_path / name)}
        summary = featray.extract(config_of(output=output, cache={**cache, **more}))
        assert_same(read_features(Store(output["uri"])), expected)
        return summary.from_cache

    store = Store(cache["uri"], s3_options)
    assert extract("cold") == 0
    entries = store.list_file_sizes()
    assert len(entries) == 12
    assert extract("warm") == 12
    marks = store.list_file_sizes().keys() - entries.keys()
    assert {f"{name.removesuffix('.used')}.input" for name in marks} == entries.keys()
    cache_of_run = InputCache.from_config(load(config_of(cache=cache)))
    assert cache_of_run is not None
    assert make_room(cache_of_run.store, sum(entries.values()) - 1, started=time.time() + 1)
    kept = {name for name in store.list_files() if is_entry(name)}
    assert 0 < len(kept) < 12
    assert extract("after") == len(kept)


def test_source_and_output_have_separate_storage_options(
    config_of: Any, collection: str, s3_folder: str, s3_server: SeaweedFS, expected: Features, tmp_path: Path
) -> None:
    reader, writer = s3_server.options(READ_ONLY_KEY, READ_ONLY_SECRET), s3_server.options()
    source = {"uri": f"{collection}/ct", "storage_options": reader}
    output = {"uri": s3_folder, "storage_options": writer}
    featray.extract(config_of(source=source))
    assert_same(read_features(Store(str(tmp_path / "out"))), expected)
    featray.extract(config_of(source=source, output=output))
    assert_same(read_features(Store(s3_folder, writer)), expected)
    featray.extract(config_of(output={"uri": f"{s3_folder}-2", "storage_options": writer}))
    assert_same(read_features(Store(f"{s3_folder}-2", writer)), expected)


@pytest.mark.parametrize(
    "faults",
    [Faults(unavailable=0.1, reset=0.05), Faults(lose_answer=0.05, truncate=0.05, delay_s=0.02)],
    ids=["unavailable-and-reset", "lost-truncated-and-slow"],
)
def test_faults_of_the_store_do_not_change_the_result(
    faults: Faults,
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_server: SeaweedFS,
    proxy: FaultyProxy,
    expected: Features,
) -> None:
    proxy.faults = faults
    config = make_s3_config(config_of, collection, s3_folder, s3_server.options(port=proxy.port))
    summary = featray.extract(config)
    proxy.faults = Faults()
    assert (summary.ok, summary.failed, summary.exit_code) == (12, 0, 0)
    assert sum(proxy.counts.values()) - proxy.counts["ok"] >= 10
    store = Store(s3_folder, s3_server.options())
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)


@pytest.fixture
def own_server(tmp_path: Path, phantoms: Path) -> Iterator[SeaweedFS]:
    """Start a server with the phantoms on it that only this test uses, so the test may kill it."""
    server = SeaweedFS(tmp_path / "server")
    server.start()
    fs = fsspec.filesystem("s3", **server.options())
    fs.mkdir(BUCKET)
    fs.put(f"{phantoms}/", f"{BUCKET}/collection/ct/", recursive=True)
    yield server
    server.kill()


def start_on_first_write(proxy: FaultyProxy, action: Callable[[], None]) -> threading.Thread:
    """Run an action in a thread as soon as the first features are being written to the store."""

    def wait() -> None:
        while not any(r.startswith("PUT") and "/features/layer" in r for r in list(proxy.requests)):
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_survives_a_server_that_is_killed_and_restarted(
    config_of: Any, s3_folder: str, own_server: SeaweedFS, expected: Features
) -> None:
    def restart_server() -> None:
        own_server.kill()
        time.sleep(2)
        own_server.start()

    with FaultyProxy(own_server.port, Faults(delay_s=0.02)) as proxy:
        options = own_server.options(port=proxy.port)
        config = make_s3_config(config_of, f"s3://{BUCKET}/collection", s3_folder, options)
        killer = start_on_first_write(proxy, restart_server)
        summary = featray.extract(config)
        killer.join(60)
    assert (summary.ok, summary.failed, summary.exit_code) == (12, 0, 0)
    store = Store(s3_folder, own_server.options())
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)


_EXTRACT_WITH_SHORT_DEADLINES = """
import sys
from featray.cli.main import main
from featray.storage import retry

retry.OUTPUT_DEADLINE_S = retry.SOURCE_DEADLINE_S = 2.0
sys.exit(main(["extract", sys.argv[1]]))
"""


def test_a_server_that_stays_unreachable_ends_the_run_and_the_next_run_completes_it(
    config_of: Any, s3_folder: str, own_server: SeaweedFS, expected: Features, tmp_path: Path
) -> None:
    with FaultyProxy(own_server.port, Faults(delay_s=0.02)) as proxy:
        output = {"uri": s3_folder, "storage_options": own_server.options(port=proxy.port)}
        config = config_of(output=output)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        killer = start_on_first_write(proxy, own_server.kill)
        argv = [sys.executable, "-c", _EXTRACT_WITH_SHORT_DEADLINES, str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
        killer.join(60)
        assert done.returncode == 1
        assert "Committed results are kept; run the same command again to resume." in done.stderr
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
        own_server.start()
        summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    store = Store(s3_folder, own_server.options())
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)


_CREATE = """
import sys
from concurrent.futures import ThreadPoolExecutor
import yaml
from featray.storage.store import Store

folder, options, own = sys.argv[1], yaml.safe_load(sys.argv[2]), sys.argv[3]
with ThreadPoolExecutor(4) as pool:
    for name in "abcd":
        futures = [pool.submit(Store(folder, options).create, name, f"{own}-{n}".encode()) for n in range(4)]
        print(name, *(f"{own}-{n}" for n, future in enumerate(futures) if future.result()))
"""


def test_of_many_processes_and_threads_that_create_the_same_object_exactly_one_succeeds(
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


def test_a_create_whose_answer_was_lost_recognizes_its_own_object(
    s3_folder: str, s3_server: SeaweedFS, proxy: FaultyProxy
) -> None:
    store = Store(s3_folder, s3_server.options(port=proxy.port))
    store.write("warm", b"")  # opens the connection: on an open connection, the client retries by itself
    proxy.faults = Faults(lose_answer=0.5, only="PUT")
    assert [store.create(f"{n}", b"same bytes") for n in range(12)] == [True] * 12
    assert proxy.counts["lose_answer"] >= 4
    assert [store.create(f"{n}", b"same bytes") for n in range(12)] == [False] * 12


def test_two_drivers_that_start_together_leave_one_correct_result(
    config_of: Any, collection: str, s3_folder: str, s3_options: dict[str, Any], expected: Features
) -> None:
    config = make_s3_config(config_of, collection, s3_folder, s3_options)
    outcomes = run_two_drivers(config)
    assert sorted(outcomes) in (["12 ok", "busy"], ["12 ok", "12 ok"])
    store = Store(s3_folder, s3_options)
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)


def test_without_the_lease_the_log_keeps_the_commits_of_two_drivers_apart(
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
    config = make_s3_config(config_of, collection, s3_folder, s3_options)
    run_two_drivers(config)
    monkeypatch.undo()
    summary = featray.extract(config)
    assert (summary.ok, summary.exit_code) == (12, 0)
    store = Store(s3_folder, s3_options)
    assert_same(read_features(store), expected)
    assert_no_leftovers(store)


def run_two_drivers(config: dict[str, Any]) -> list[str]:
    """Run two drivers at the same time; return how each ended."""

    def run_driver(_: int) -> str:
        try:
            return f"{featray.extract(config).ok} ok"
        except OutputBusyError:
            return "busy"
        except FileNotFoundError:  # without a lease, each driver deletes the other's uncommitted files
            return "files deleted"

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_driver, range(2)))


def test_more_than_a_thousand_objects_are_listed_and_deleted(
    s3_folder: str, s3_options: dict[str, Any], s3_server: SeaweedFS
) -> None:
    store, count = Store(s3_folder, s3_options), 1_100  # the server lists a thousand per page
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: store.write(f"ct/{n:05}.nii.gz", b"%d" % n), range(count)))
    sizes = store.list_file_sizes("ct")
    assert len(sizes) == count
    assert sizes["ct/01099.nii.gz"] == 4
    scans = list_scans(SourceConfig(uri=f"{s3_folder}/ct", storage_options=s3_options)).scans
    assert [scan.scan_id for scan in scans] == [f"{n:05}.nii.gz" for n in range(count)]
    store.delete(store.list_files("ct"))
    assert store.list_files() == []


UNUSUAL_NAMES = [
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


def test_scans_with_unusual_names_are_read_and_keep_their_names(
    config_of: Any, phantoms: Path, s3_folder: str, s3_options: dict[str, Any]
) -> None:
    fs = fsspec.filesystem("s3", **s3_options)
    phantom = next(phantoms.rglob("*.nii.gz")).read_bytes()
    for name in UNUSUAL_NAMES:
        fs.pipe_file(f"{s3_folder}/ct/{name}", phantom)
    config = make_s3_config(config_of, s3_folder, f"{s3_folder}/out", s3_options)
    summary = featray.extract(config)
    assert (summary.ok, summary.found) == (len(UNUSUAL_NAMES), len(UNUSUAL_NAMES))
    features = read_features(Store(f"{s3_folder}/out", s3_options))
    assert {scan_id for scan_id, _ in features} == set(UNUSUAL_NAMES)


@pytest.mark.parametrize("section", ["source", "output", "model"])
def test_a_wrong_secret_ends_with_exit_code_2_and_is_never_shown(
    section: str,
    config_of: Any,
    collection: str,
    s3_folder: str,
    s3_server: SeaweedFS,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_s3_config(config_of, collection, s3_folder, s3_server.options())
    config["model"]["uri"] = f"{collection}/vae.keras"
    config["model"]["storage_options"] = s3_server.options()
    config[section]["storage_options"] = s3_server.options(secret="PLANTED-WRONG-SECRET")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["extract", str(path)]) == 2
    out, err = capsys.readouterr()
    assert f"{section}.uri" in err or section == "model"
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4
    for text in (out, err, caplog.text):
        assert "PLANTED" not in text


def test_a_read_only_output_is_refused_before_the_run_starts(
    config_of: Any, s3_folder: str, s3_server: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"uri": s3_folder, "storage_options": s3_server.options(READ_ONLY_KEY, READ_ONLY_SECRET)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(output=output)))
    assert main(["extract", str(path)]) == 2
    err = capsys.readouterr().err
    assert "denies write access: check key, secret and permissions" in err
    assert "PLANTED" not in err


def test_a_glob_on_s3_lists_exactly_the_matching_scans(collection: str, s3_options: dict[str, Any]) -> None:
    source = SourceConfig(uri=f"{collection}/ct/**/phantom_00[12]*.nii.gz", storage_options=s3_options)
    scans = list_scans(source).scans
    assert [scan.scan_id for scan in scans] == ["nifti/phantom_001.nii.gz", "nifti/phantom_002.nii.gz"]
    assert scans[0].uri == f"{collection}/ct/nifti/phantom_001.nii.gz"
    assert scans[0].content != scans[1].content
