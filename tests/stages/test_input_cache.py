"""Test that the input cache gives the same inputs as decoding, and that its faults cost no scan."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import featray
from featray.cli.main import main
from featray.commands.cache import show_cache
from featray.config import Config, load
from featray.errors import ConfigError
from featray.output.dataset import SCANS, Dataset
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.stages.input_cache import InputCache, delete_oldest, is_entry
from featray.stages.list import list_scans
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

TIMES = {"read_s", "decode_s", "preprocess_s", "infer_s", "bytes_read"}


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
    decode = pickle.loads(pickle.dumps(Decoder.from_config(config, use_cache=True)))
    return {scan.scan_id: decode(scan) for scan in list_scans(config.source, config.policy).scans}


def list_entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.parquet"))


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
        facts = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
        assert facts[0] == facts[1]


def test_columns_and_warnings_of_the_listing_are_those_of_the_present_listing(config: Config) -> None:
    decode = Decoder.from_config(config, use_cache=True)
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
    decode = Decoder.from_config(config, use_cache=True)
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
    decode_all(config)
    entries = list_entries(tmp_path)
    for age, entry in enumerate(entries):
        os.utime(entry, (1000 - age, 1000 - age))
    sizes = [entry.stat().st_size for entry in entries]
    delete_oldest(Store(str(tmp_path / "cache")), sum(sizes) - 1)
    assert list_entries(tmp_path) == entries[:-1]


def test_use_makes_an_entry_young(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    entries = list_entries(tmp_path)
    for entry in entries:
        os.utime(entry, (1000, 1000))
    decode_all(config)
    assert all(entry.stat().st_mtime > 1e9 for entry in entries)


def test_a_full_cache_stays_below_its_limit(config: Config, scans: Path, tmp_path: Path) -> None:
    decode_all(config)
    total = sum(entry.stat().st_size for entry in list_entries(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    limit = 0.6 * total
    cache = {"uri": str(tmp_path / "cache"), "max_gb": limit / 1e9}
    decode_all(make_config(scans, tmp_path, cache=cache))
    kept = sum(entry.stat().st_size for entry in list_entries(tmp_path))
    assert 0 < kept <= limit


def test_other_files_in_the_folder_are_never_deleted(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    other = tmp_path / "cache" / "00" / "mine.parquet"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"mine")
    delete_oldest(Store(str(tmp_path / "cache")), 0)
    show_cache(config, clear=True)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [other]


def test_what_a_killed_process_left_is_deleted_with_the_entries(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    name = f"{list_entries(tmp_path)[0].relative_to(tmp_path / 'cache')}.{'0' * 32}.tmp"
    assert is_entry(name)
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


def test_the_command_shows_and_clears_the_cache(config: Config, tmp_path: Path) -> None:
    decode_all(config)
    total = sum(entry.stat().st_size for entry in list_entries(tmp_path))
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
    Decoder.from_config(config, use_cache=True)(scan)
    assert list_entries(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_warm_cache_gives_the_same_features(
    workers: int, config_of: Any, tmp_path: Path
) -> None:
    run = {"engine": "inline", "decode": {"workers": workers}}
    cache = {"uri": str(tmp_path / "cache")}

    def extract(name: str, **sections: Any) -> Any:
        output = str(tmp_path / name)
        featray.extract({**config_of(**sections), "output": {"uri": output}, "run": run})
        return featray.read(output, "encoder.z_mean"), Dataset(Store(output)).read(SCANS)

    (cold, _), (warm, rows) = extract("a", cache=cache), extract("b", cache=cache)
    plain, _ = extract("c")
    assert set(rows["bytes_read"].to_pylist()) == {0}
    for other in (cold, warm):
        assert list(other.scan_ids) == list(plain.scan_ids)
        np.testing.assert_array_equal(other.array, plain.array)


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
