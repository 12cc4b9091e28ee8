"""Test that the input cache gives the same inputs as decoding, and that its faults cost no scan."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import featray
from featray.cli.main import main
from featray.commands.cache import show_cache
from featray.config import Config, load
from featray.errors import ConfigError, StorageError
from featray.output.dataset import SCANS, Dataset
from featray.schema import STAGE_TIMES, Decoded, Scan
from featray.stages import input_cache
from featray.stages.decode import Decoder
from featray.stages.input_cache import InputCache, is_cache_file, make_room
from featray.stages.input_entry import unpack
from featray.stages.list import list_scans
from featray.stages.report import Summary
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

MAY_DIFFER = {*STAGE_TIMES, "bytes_read", "is_from_cache"}
"""Fields of a record that say how its scan was read."""


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "ct"
    make_collection(folder, 4, shape_zyx=(12, 20, 16), seed=5, dicom_count=1)
    return folder


@pytest.fixture
def config(scans: Path, tmp_path: Path) -> Config:
    return make_config(scans, tmp_path)


def make_config(scans: Path, tmp_path: Path, **sections: dict[str, Any]) -> Config:
    return load(
        {
            "source": {"uri": str(scans)},
            "preprocess": {"size": [8, 16, 16], "fit": "patches"},
            "cache": {"uri": str(tmp_path / "cache")},
            "model": {"uri": "m.keras", "layers": ["z"]},
            "output": {"uri": str(tmp_path / "out")},
            "privacy": {"dicom_tags": ["Modality"]},
            **sections,
        }
    )


def decode_all(config: Config) -> dict[str, Decoded]:
    decode = pickle.loads(pickle.dumps(Decoder.from_config(config, InputCache.from_config(config))))
    return {scan.scan_id: decode(scan) for scan in list_scans(config.source, config.policy).scans}


def list_entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.input"))


def sum_sizes(entries: list[Path]) -> int:
    return sum(entry.stat().st_size for entry in entries)


def fill_with_ages(config: Config, tmp_path: Path) -> list[Path]:
    """Store all scans, and return their entries; the last entry was not used for the longest time."""
    decode_all(config)
    entries = list_entries(tmp_path)
    for age, entry in enumerate(entries):
        os.utime(entry, (1000 - age, 1000 - age))
    return entries


def open_cache(config: Config) -> InputCache:
    cache = InputCache.from_config(config)
    assert cache is not None
    return cache


def was_read(decoded: Decoded) -> bool:
    """Return whether the files of the scan were read."""
    return decoded.record.bytes_read > 0


def test_a_second_run_reads_no_scan_and_has_the_same_inputs_and_records(config: Config) -> None:
    first, second = decode_all(config), decode_all(config)
    assert first.keys() == second.keys()
    assert all(map(was_read, first.values()))
    assert not any(map(was_read, second.values()))
    for scan_id, decoded in first.items():
        again = second[scan_id]
        np.testing.assert_array_equal(again.tensor.view(np.uint32), decoded.tensor.view(np.uint32))
        np.testing.assert_array_equal(again.origins, decoded.origins)
        assert (again.tensor.dtype, again.tensor.flags.writeable) == (np.float32, True)
        assert again.origins.dtype == np.int32
        records = [dataclasses.asdict(item.record) for item in (decoded, again)]
        facts = [{name: record[name] for name in record.keys() - MAY_DIFFER} for record in records]
        assert facts[0] == facts[1]


def test_columns_and_warnings_of_the_listing_are_those_of_the_present_listing(config: Config) -> None:
    decode = Decoder.from_config(config, InputCache.from_config(config))
    scan = next(scan for scan in list_scans(config.source).scans if scan.format == "dicom")
    before = decode(dataclasses.replace(scan, columns={"site": "A"}, warnings=("oblique",)))
    after = decode(dataclasses.replace(scan, columns={"site": "B"}, warnings=()))
    assert before.record.columns == {"site": "A", "Modality": "CT"}
    assert after.record.columns == {"site": "B", "Modality": "CT"}
    assert "oblique" not in after.record.warnings


@pytest.mark.parametrize(
    "section",
    [
        {"preprocess": {"size": [8, 16, 16], "fit": "patches", "window": [-500, 500]}},
        {"policy": {"oblique": "resample"}},
        {"limits": {"max_voxels": 10_000}},
        {"privacy": {"dicom_tags": []}},
    ],
)
def test_whatever_decides_the_input_decides_the_entry(
    section: dict[str, Any], config: Config, scans: Path, tmp_path: Path
) -> None:
    decode_all(config)
    assert all(map(was_read, decode_all(make_config(scans, tmp_path, **section)).values()))


def test_another_model_and_another_output_share_the_entries(
    config: Config, scans: Path, tmp_path: Path
) -> None:
    decode_all(config)
    other = {"model": {"uri": "other.keras", "layers": ["y"]}, "output": {"uri": str(tmp_path / "b")}}
    assert not any(map(was_read, decode_all(make_config(scans, tmp_path, **other)).values()))


def test_a_process_with_another_working_directory_uses_the_same_cache(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = InputCache.from_config(make_config(scans, tmp_path, cache={"uri": "cache"}))
    sent = pickle.dumps(cache)
    monkeypatch.chdir(scans)
    assert pickle.loads(sent).store.root == str(tmp_path / "cache")


def list_manifest_scan(folder: Path, options: dict[str, Any]) -> tuple[Config, Scan]:
    """Return the config of a manifest with a relative path and a version, and its only scan."""
    manifest = folder / "scans.csv"
    manifest.write_text("uri,version\na.nii.gz,1\n")
    config = make_config(folder, folder, source={"uri": manifest.name, "storage_options": options})
    return config, list_scans(config.source).scans[0]


@pytest.mark.parametrize("difference", ["folder", "endpoint"])
def test_scans_of_one_relative_uri_and_version_in_other_places_have_other_entries(
    difference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for place in ("a", "b"):
        folder = tmp_path / (place if difference == "folder" else "same")
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        config, scan = list_manifest_scan(folder, {})
        if difference == "endpoint":
            source = {"uri": "s3://bucket/ct", "storage_options": {"endpoint_url": f"http://{place}:9000"}}
            config = make_config(folder, folder, source=source)
        cache = open_cache(config)
        names.add(cache._make_name(scan))
    assert len(names) == 2


def test_other_credentials_find_the_same_entries(tmp_path: Path) -> None:
    options = [{"key": key, "secret": f"secret of {key}", "endpoint_url": "http://a:9000"} for key in "ab"]
    sources = [{"uri": "s3://bucket/ct", "storage_options": each} for each in options]
    decoding = [open_cache(make_config(tmp_path, tmp_path, source=source)).decoding for source in sources]
    assert decoding[0] == decoding[1]
    assert "secret" not in json.dumps(decoding)


def test_a_changed_scan_is_read_again(config: Config, scans: Path) -> None:
    decode_all(config)
    changed, other = sorted((scans / "nifti").iterdir())[:2]
    shutil.copy(other, changed)
    os.utime(changed, (1, 1))
    read = {scan_id for scan_id, decoded in decode_all(config).items() if was_read(decoded)}
    assert read == {str(changed.relative_to(scans))}


@pytest.mark.parametrize("position", [100, 1000, -600, -5])
def test_a_damaged_entry_is_noticed_and_replaced(
    position: int, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = decode_all(config)
    entry = list_entries(tmp_path)[0]
    data = bytearray(entry.read_bytes())
    data[position] ^= 0x11
    entry.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = decode_all(config)
    assert sum(map(was_read, again.values())) == 1
    assert "an entry of the input cache is damaged" in caplog.text
    for scan_id, decoded in expected.items():
        np.testing.assert_array_equal(again[scan_id].tensor, decoded.tensor)
    assert not any(map(was_read, decode_all(config).values()))


@pytest.mark.slow
def test_every_changed_bit_of_an_entry_is_noticed_or_has_no_effect(config: Config, tmp_path: Path) -> None:
    scan = list_scans(config.source).scans[0]
    decode = Decoder.from_config(config, InputCache.from_config(config))
    expected = decode(scan)
    (entry,) = list_entries(tmp_path)
    data = entry.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 200).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        entry.write_bytes(damaged)
        decoded = decode(scan)
        np.testing.assert_array_equal(decoded.tensor, expected.tensor)
        assert decoded.record.warnings == expected.record.warnings


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_torn_entry_is_noticed(size: int, config: Config, tmp_path: Path) -> None:
    decode_all(config)
    entry = list_entries(tmp_path)[0]
    entry.write_bytes(entry.read_bytes()[:size])
    assert sum(map(was_read, decode_all(config).values())) == 1


@pytest.mark.slow
def test_a_reader_sees_whole_entries_only_also_if_writers_are_killed(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scan = list_scans(config.source, config.policy).scans[0]
    decoded = Decoder.from_config(config)(scan)
    tensor = np.tile(decoded.tensor[:1], (64, 1, 1, 1))  # large enough for a kill to come while it is written
    decoded = dataclasses.replace(decoded, tensor=tensor, origins=np.zeros((64, 3), np.int32))
    cache = open_cache(config)
    cache.save(scan, decoded)
    (entry,) = list_entries(tmp_path)
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        first_file = entry.stat().st_ino
        writers = [context.Process(target=save_forever, args=(cache, scan, decoded)) for _ in range(2)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 60
        while entry.stat().st_ino == first_file:
            assert time.monotonic() < deadline, "no writer writes"
        end = time.monotonic() + 1
        while time.monotonic() < end:
            found = cache.load(scan)
            assert found is not None
            np.testing.assert_array_equal(found.tensor, tensor)
        assert all(writer.is_alive() for writer in writers)
        for writer in writers:
            writer.kill()
            writer.join()
        assert cache.load(scan) is not None
    assert "damaged" not in caplog.text
    assert list_entries(tmp_path) == [entry]


def save_forever(cache: InputCache, scan: Scan, decoded: Decoded) -> None:
    while True:
        cache.save(scan, decoded)


def test_failed_scans_are_not_kept(config: Config, scans: Path, tmp_path: Path) -> None:
    broken = sorted((scans / "nifti").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    outcomes = decode_all(config)
    assert [decoded.record.status for decoded in outcomes.values()].count("failed") == 1
    assert len(list_entries(tmp_path)) == len(outcomes) - 1


def test_arrays_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.ones((3, 4), np.float32))
    source = {"uri": str(tmp_path / "arrays"), "format": "npy"}
    config = make_config(tmp_path, tmp_path, source=source, preprocess={})
    assert all(map(was_read, decode_all(config).values()))
    assert list_entries(tmp_path) == []


def test_the_entries_that_were_not_used_for_the_longest_time_are_deleted(
    config: Config, tmp_path: Path
) -> None:
    entries = fill_with_ages(config, tmp_path)
    size = sum_sizes(entries)
    assert make_room(Store(str(tmp_path / "cache")), size - 1, started=2000.0)
    assert list_entries(tmp_path) == entries[:-1]


def test_an_entry_of_the_present_run_is_deleted_only_if_it_does_not_fit_in(
    config: Config, tmp_path: Path
) -> None:
    entries = fill_with_ages(config, tmp_path)
    size = sum_sizes(entries)
    store = Store(str(tmp_path / "cache"))
    assert make_room(store, size, started=0.0)
    assert not make_room(store, size - 1, started=0.0)
    assert list_entries(tmp_path) == entries[1:]  # the entry that was used last is gone


def test_entries_of_an_earlier_run_make_room_for_those_of_the_present_run(
    config: Config, scans: Path, tmp_path: Path
) -> None:
    decode_all(config)
    earlier = list_entries(tmp_path)
    for entry in earlier:
        os.utime(entry, (1000, 1000))
    size = sum_sizes(earlier)
    sections = {
        "preprocess": {"size": [8, 16, 16], "fit": "patches", "orientation": "RAS"},
        "cache": {"uri": str(tmp_path / "cache"), "max_gb": 1.02 * size / 1e9},
    }
    later = make_config(scans, tmp_path, **sections)
    decode_all(later)
    assert not set(earlier) & set(list_entries(tmp_path))
    assert not any(map(was_read, decode_all(later).values()))


def test_a_collection_that_does_not_fit_in_finds_its_first_scans_again(
    config: Config, scans: Path, tmp_path: Path
) -> None:
    decode_all(config)
    size = sum_sizes(list_entries(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    small = make_config(scans, tmp_path, cache={"uri": str(tmp_path / "cache"), "max_gb": 0.6 * size / 1e9})
    decode_all(small)
    kept = list_entries(tmp_path)
    for _ in range(2):
        read = [was_read(decoded) for decoded in decode_all(small).values()]
        assert read == sorted(read)
        assert not read[0]
        assert read[-1]
        assert list_entries(tmp_path) == kept


def test_a_read_only_cache_changes_nothing(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    damaged, *others = list_entries(tmp_path)
    damaged.write_bytes(b"damaged")
    others[0].unlink()
    for entry in list_entries(tmp_path):
        os.utime(entry, (1000, 1000))
    decode = Decoder.from_config(config, InputCache.from_config(config, is_read_only=True))
    read = [was_read(decode(scan)) for scan in list_scans(config.source, config.policy).scans]
    assert sum(read) == 2
    assert list_entries(tmp_path) == [damaged, *others[1:]]
    assert {entry.stat().st_mtime for entry in list_entries(tmp_path)} == {1000}
    assert damaged.read_bytes() == b"damaged"


def test_in_an_object_store_the_last_use_of_an_entry_counts(
    config: Config, scans: Path, tmp_path: Path
) -> None:
    uri = f"memory://{tmp_path.name}"
    in_memory = make_config(scans, tmp_path, cache={"uri": uri})
    cache = open_cache(in_memory)
    decode = Decoder.from_config(in_memory, cache)
    listed = list_scans(in_memory.source, in_memory.policy).scans
    decoded = {scan.scan_id: decode(scan) for scan in listed}
    used = decode(listed[0])  # the entry that was written first
    assert used.record.is_from_cache
    np.testing.assert_array_equal(used.tensor, decoded[listed[0].scan_id].tensor)
    size = show_cache(in_memory).bytes
    assert make_room(cache.store, size - 1, started=time.time() + 1)
    assert [decode(scan).record.is_from_cache for scan in listed] == [True, False, True, True]
    cleared = show_cache(in_memory, clear=True)
    assert (cleared.entries, cache.store.list_files()) == (0, [])


def test_use_makes_an_entry_young(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    entries = list_entries(tmp_path)
    for entry in entries:
        os.utime(entry, (1000, 1000))
    decode_all(config)
    assert all(entry.stat().st_mtime > 1e9 for entry in entries)


def test_a_full_cache_stays_below_its_limit(config: Config, scans: Path, tmp_path: Path) -> None:
    decode_all(config)
    total = sum_sizes(list_entries(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    limit = 0.6 * total
    cache = {"uri": str(tmp_path / "cache"), "max_gb": limit / 1e9}
    decode_all(make_config(scans, tmp_path, cache=cache))
    kept = sum_sizes(list_entries(tmp_path))
    assert 0 < kept <= limit


def test_other_files_in_the_folder_are_never_deleted(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    other = tmp_path / "cache" / "00" / "mine.input"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"mine")
    make_room(Store(str(tmp_path / "cache")), 0, started=0.0)
    show_cache(config, clear=True)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [other]


def test_what_a_killed_process_left_is_deleted_with_the_entries(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    name = f"{list_entries(tmp_path)[0].relative_to(tmp_path / 'cache')}.{'0' * 32}.tmp"
    assert is_cache_file(name)
    (tmp_path / "cache" / name).write_bytes(b"half")
    show_cache(config, clear=True)
    assert not (tmp_path / "cache" / name).exists()


def test_a_cache_that_fails_costs_no_scan_and_is_asked_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(self: Store, name: str) -> bytes:
        calls.append(name)
        raise PermissionError(name)

    monkeypatch.setattr(Store, "read", fail)
    with caplog.at_level(logging.WARNING):
        outcomes = decode_all(config)
    assert {decoded.record.status for decoded in outcomes.values()} == {"ok"}
    assert len(calls) == 1
    assert "the input cache is not used any more" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("error during blosc compression")])
def test_too_little_memory_for_an_entry_costs_no_scan(
    error: Exception, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(input_cache, "pack", fail)
        assert {decoded.record.status for decoded in decode_all(config).values()} == {"ok"}
    assert list_entries(tmp_path) == []
    decode_all(config)
    monkeypatch.setattr(input_cache, "unpack", fail if isinstance(error, MemoryError) else unpack)
    assert {decoded.record.status for decoded in decode_all(config).values()} == {"ok"}
    assert len(list_entries(tmp_path)) == 4


def test_a_cache_that_cannot_be_written_is_still_read(
    config: Config,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decode_all(config)
    list_entries(tmp_path)[0].unlink()
    calls = []

    def fail(self: Store, name: str, data: bytes, **options: bool) -> None:
        calls.append(name)
        raise StorageError("no space is left")

    monkeypatch.setattr(Store, "write", fail)
    decode = Decoder.from_config(config, InputCache.from_config(config))
    listed = list_scans(config.source, config.policy).scans
    with caplog.at_level(logging.WARNING):
        read = [was_read(decode(scan)) for scan in (*listed, *listed)]
    assert sum(read) == 2
    assert len(calls) == 1
    assert "the input cache stores no more inputs: no space is left" in caplog.text


def test_the_command_shows_and_clears_the_cache(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    total = sum_sizes(list_entries(tmp_path))
    shown = show_cache(config)
    assert (shown.entries, shown.bytes, shown.deleted) == (4, total, 0)
    assert "4 model inputs" in shown.text()
    cleared = show_cache(config, clear=True)
    assert (cleared.entries, cleared.deleted) == (0, 4)


def test_the_command_answers_in_json(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode_all(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    assert main(["cache", str(path), "--clear", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["entries"], answer["deleted"], answer["max_bytes"]) == (0, 4, 100 * 10**9)


def test_without_a_cache_the_command_says_what_to_set(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set cache\.uri to a folder or URL"):
        show_cache(make_config(scans, tmp_path, cache={}))


def test_a_scan_without_a_known_content_is_not_kept(config: Config, tmp_path: Path) -> None:
    scan: Scan = dataclasses.replace(list_scans(config.source).scans[0], content="", files_version="")
    Decoder.from_config(config, InputCache.from_config(config))(scan)
    assert list_entries(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_warm_cache_gives_the_same_features(
    workers: int, config_of: Any, tmp_path: Path
) -> None:
    run = {"engine": "inline", "decode": {"workers": workers}}
    cache = {"uri": str(tmp_path / "cache")}

    def extract(name: str, **sections: Any) -> tuple[Summary, Any]:
        output = str(tmp_path / name)
        summary = featray.extract({**config_of(**sections), "output": {"uri": output}, "run": run})
        return summary, featray.read(output, "encoder.z_mean")

    (first, cold), (second, warm) = extract("a", cache=cache), extract("b", cache=cache)
    _, plain = extract("c")
    assert (first.from_cache, second.from_cache) == (0, second.done)
    assert f"{second.done} of {second.done} model inputs came from the input cache" in second.text()
    assert set(Dataset(Store(str(tmp_path / "b"))).read(SCANS)["bytes_read"].to_pylist()) == {0}
    for other in (cold, warm):
        assert list(other.scan_ids) == list(plain.scan_ids)
        np.testing.assert_array_equal(other.array, plain.array)


@pytest.mark.slow
def test_a_plan_counts_on_the_inputs_that_the_cache_has(config_of: Any, tmp_path: Path) -> None:
    sections = config_of(cache={"uri": str(tmp_path / "cache")}, run={"engine": "inline"})
    before = featray.plan(sections).estimate
    assert (before.sampled > 0, before.from_cache) == (True, 0)
    assert list_entries(tmp_path) == []
    featray.extract(sections)
    after = featray.plan({**sections, "output": {"uri": str(tmp_path / "other")}})
    assert after.estimate.from_cache == after.estimate.sampled > 0
    assert f"({after.estimate.sampled} of them in the input cache)" in after.text()


def test_an_unwritable_cache_is_refused_before_the_run(config_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cache\.uri: .* is a file, not a folder"):
        featray.extract(config_of(cache={"uri": str(tmp_path / "file")}))


def test_options_of_the_cache_are_masked_in_the_files_of_a_run(config: Config) -> None:
    from featray.config import mask_secrets

    options = config.cache.model_copy(
        update={"uri": "s3://key:secret@b/c", "storage_options": {"key": "K3Y"}}
    )
    text = json.dumps(mask_secrets(config.model_copy(update={"cache": options})))
    assert "secret" not in text
    assert "K3Y" not in text
