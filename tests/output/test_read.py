"""Reading features: one layer of exactly one version as an array, scan ids and a table, from any store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import yaml

import featray
from featray.errors import ConfigError, FeatrayError, Reason, ScanError, UsageError
from featray.output import features as features_module
from featray.output.dataset import FEATURES, SCANS, Dataset, Snapshot
from featray.schema import Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LAYERS = ("enc.z_mean", "map", "native", "one")


def compute_layers(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Replace a model: values show from which input they are, and `native` has the shape of the input."""
    first = batch[:, 0, 0, 0]
    counted = first[:, None, None] + np.arange(6, dtype=np.float32).reshape(2, 3)
    values = (np.stack([first, first + 1], axis=1), counted, batch, first)
    return dict(zip(LAYERS, values, strict=True))


def make_decoded(scan_id: str, value: float, patches: int = 1, width: int = 2) -> Decoded:
    record = ScanRecord(scan_id, f"/data/{scan_id}", "nifti", content="c0", warnings=["oblique"])
    record.shape, record.columns = [9, 9, width], {"site": f"site of {scan_id}"}
    return Decoded(
        record, np.full((patches, 2, 2, width), value, np.float32), np.zeros((patches, 3), np.int32)
    )


def make_failed_receipt(scan_id: str) -> Receipt:
    record = make_decoded(scan_id, 0).record
    record.fail("read", ScanError(Reason.TRUNCATED, "gone"))
    return Receipt((), (record,))


class Output:
    """An output with a committer; each call of `add` writes one file per layer."""

    def __init__(
        self, uri: str, options: dict[str, Any] | None = None, keep_versions_days: float = 0
    ) -> None:
        self.dataset = Dataset(Store(uri, options))
        self.uri, self._keep_versions_days = uri, keep_versions_days

    def add(self, *scans: Decoded, recipe: str = "r0", partition_by: Sequence[str] = ("layer",)) -> int:
        """Commit scans with one recipe for every layer, and return the version of the output."""
        recipes, extracted = dict.fromkeys(LAYERS, recipe), extract(compute_layers, scans, recipe=recipe)
        receipt = write(extracted, self.dataset, partition_by, recipes, RUN)
        receipt.set_run("i0", recipes, RUN)
        return self.commit(receipt, partition_by)

    def commit(self, receipt: Receipt, partition_by: Sequence[str] = ("layer",)) -> int:
        days = self._keep_versions_days
        committer = Committer(self.dataset, partition_by, ["site"], run_id=RUN, keep_versions_days=days)
        committer.commit([receipt])
        return self.dataset.open_snapshot().version


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Return an output with three scans in two overlapping files per layer, and one failed scan."""
    output = Output(str(tmp_path / "out"))
    output.add(make_decoded("c", 3), make_decoded("a", 1))
    output.add(make_decoded("b", 2, patches=2))
    output.commit(make_failed_receipt("x"))
    return output


def get_address(array: np.ndarray | pa.Array) -> int:
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.flatten().buffers()[1].address) + 4 * array.flatten().offset


def test_ids_array_and_table_have_the_same_rows_sorted_by_scan_and_patch(output: Output) -> None:
    found = featray.read(output.uri, "map")
    assert found.scan_ids.tolist() == ["a", "b", "b", "c"]
    assert (found.array.shape, found.array.dtype) == ((4, 2, 3), np.float32)
    assert found.array[:, 0, 0].tolist() == [1, 2, 2, 3]
    assert found.array[3].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert found.table["patch"].to_pylist() == [0, 0, 1, 0]
    assert found.table["feature"].to_pylist() == [row.ravel().tolist() for row in found.array]
    assert set(found.table.column_names) == {*output.dataset.open_snapshot().schema(FEATURES).names}
    assert (found.version, found.recipe, found.layer) == (output.dataset.open_snapshot().version, "r0", "map")
    assert (len(found), found.missing) == (4, [])


@pytest.mark.parametrize("name", ["enc/z_mean", "enc.z_mean"])
def test_a_layer_can_be_named_with_slashes_or_dots(output: Output, name: str) -> None:
    assert featray.read(output.uri, name).array.tolist() == [[1, 2], [2, 3], [2, 3], [3, 4]]


def test_an_output_can_be_given_as_url_path_config_file_or_dataset(output: Output, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    model = {"uri": "m.keras", "layers": ["map"]}
    config.write_text(
        yaml.safe_dump({"source": {"uri": "ct"}, "model": model, "output": {"uri": output.uri}})
    )
    for reference in (output.uri, Path(output.uri), str(config), output.dataset):
        assert len(featray.read(reference, "map")) == 4


def test_a_single_file_is_read_without_a_copy(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.add(make_decoded("a", 1), make_decoded("b", 2))
    found = featray.read(output.uri, "map")
    (chunk,) = found.table["feature"].chunks
    assert get_address(found.array) == get_address(chunk)
    assert not found.array.flags.writeable


def test_array_and_table_share_memory_if_there_are_several_files(output: Output) -> None:
    found = featray.read(output.uri, "map")
    (chunk,) = found.table["feature"].chunks
    assert get_address(found.array) == get_address(chunk)
    assert not found.array.flags.writeable


def test_more_values_than_an_arrow_array_can_hold_become_one_array_and_several_chunks(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "MAX_ITEMS", 13)
    found = featray.read(output.uri, "map")
    assert [len(chunk) for chunk in found.table["feature"].chunks] == [2, 2]
    assert [get_address(chunk) for chunk in found.table["feature"].chunks] == [
        get_address(found.array),
        get_address(found.array[2:]),
    ]
    assert found.table["feature"].to_pylist() == [row.ravel().tolist() for row in found.array]


@pytest.mark.slow
def test_reading_needs_little_more_memory_than_the_array(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    for number in range(16):  # 16 files of 8 MiB
        output.add(*(make_decoded(f"s{number:02}{half}", number, width=2**18) for half in "ab"))
    code = (
        "import resource, sys, featray\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "featray.read(sys.argv[1], 'map')\n"
        "before = peak()\n"
        "array = featray.read(sys.argv[1], 'native').array\n"
        "assert array.nbytes == 128 * 2**20, array.nbytes\n"
        "print(peak() - before - array.nbytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, output.uri], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 * 2**20


def test_only_requested_scans_are_read_and_only_from_files_that_may_contain_them(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = Snapshot.make_fragments

    def record_and_make(self: Snapshot, table: str, files: Any = None) -> Any:
        opened.extend(file.path for file in files or () if table == FEATURES)
        return original(self, table, files)

    monkeypatch.setattr(Snapshot, "make_fragments", record_and_make)
    found = featray.read(output.uri, "map", scan_ids=["c", "x", "a"])
    assert found.scan_ids.tolist() == ["a", "c"]
    assert found.array[:, 0, 0].tolist() == [1, 3]
    assert found.missing == ["x"]
    (file,) = set(opened)
    assert file.startswith("layer=map/")


def make_large_dictionary_array(ids: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([*ids, None], pa.large_string()).dictionary_encode()])


@pytest.mark.parametrize(
    "kind",
    [list, tuple, set, pa.array, np.array, iter, make_large_dictionary_array],
    ids=lambda kind: kind.__name__,
)
def test_scan_ids_can_be_any_iterable_or_array(output: Output, kind: Any) -> None:
    assert featray.read(output.uri, "map", scan_ids=kind(["b", "a"])).scan_ids.tolist() == ["a", "b", "b"]


def test_without_matching_scans_the_array_is_empty_and_has_the_layers_shape(output: Output) -> None:
    for scan_ids in (["nobody"], ["aa"], []):
        found = featray.read(output.uri, "map", scan_ids=scan_ids, scans=["site"])
        assert (found.array.shape, found.arrays, found.recipe) == ((0, 2, 3), [], None)
        assert found.missing == scan_ids
        assert {"feature", "site"} <= set(found.table.column_names)


def test_only_requested_columns_are_in_the_table(output: Output) -> None:
    found = featray.read(output.uri, "map", columns=["feature", "origin"])
    assert found.table.column_names == ["scan_id", "patch", "feature", "origin"]
    assert found.array.shape == (4, 2, 3)
    without = featray.read(output.uri, "map", columns=["layer"])
    assert without.table.to_pylist()[0] == {"scan_id": "a", "patch": 0, "layer": "map"}
    with pytest.raises(UsageError, match="add 'feature' to columns"):
        _ = without.array


def test_columns_of_scans_are_added_to_each_row(output: Output) -> None:
    found = featray.read(output.uri, "map", columns=[], scans=["site", "warnings", "shape"])
    assert found.table.column_names == ["scan_id", "patch", "site", "warnings", "scan_shape"]
    assert found.table["site"].to_pylist() == ["site of a", "site of b", "site of b", "site of c"]
    assert found.table["warnings"].to_pylist() == [["oblique"]] * 4
    assert found.table["scan_shape"].to_pylist() == [[9, 9, 2]] * 4


def test_additional_partition_columns_are_columns_of_the_table(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.add(make_decoded("a", 1), make_decoded("b", 2), partition_by=("layer", "site"))
    found = featray.read(output.uri, "map")
    assert found.table["site"].to_pylist() == ["site of a", "site of b"]
    assert found.array[:, 0, 0].tolist() == [1, 2]


def test_a_layer_with_one_number_per_row_is_a_flat_array(output: Output) -> None:
    assert featray.read(output.uri, "one").array.tolist() == [1, 2, 2, 3]


def test_values_of_different_shapes_are_a_list_of_arrays(output: Output) -> None:
    output.add(make_decoded("d", 4, width=3))
    output.add(make_decoded("bb", 5, width=5), make_decoded("e", 6, width=1))
    found = featray.read(output.uri, "native")
    with pytest.raises(UsageError, match=r"4 different shapes \(2x2x2, 2x2x5, 2x2x3, …\).*\.arrays"):
        _ = found.array
    shapes = [(2, 2, 2)] * 3 + [(2, 2, 5), (2, 2, 2), (2, 2, 3), (2, 2, 1)]
    assert [array.shape for array in found.arrays] == shapes
    assert [set(array.ravel().tolist()) for array in found.arrays] == [{v} for v in (1, 2, 2, 5, 3, 4, 6)]
    assert [len(row) for row in found.table["feature"].to_pylist()] == [int(np.prod(s)) for s in shapes]
    assert featray.read(output.uri, "native", scan_ids=["d"]).array.shape == (1, 2, 2, 3)


def test_two_recipes_are_an_error_until_one_is_chosen(output: Output) -> None:
    output.add(make_decoded("d", 4), recipe="r1")
    with pytest.raises(UsageError, match=r"2 recipes.*r0 \(3 scans\), r1 \(1 scans\).*recipe="):
        featray.read(output.uri, "map")
    assert featray.read(output.uri, "map", recipe="r1").scan_ids.tolist() == ["d"]
    assert featray.read(output.uri, "map", recipe="r0").scan_ids.tolist() == ["a", "b", "b", "c"]
    assert featray.read(output.uri, "map", scan_ids=["a", "b"]).recipe == "r0"
    with pytest.raises(UsageError, match=r"no row of recipe 'r9'.*r0 \(3 scans\), r1 \(1 scans\)"):
        featray.read(output.uri, "map", recipe="r9")


def test_messages_about_unknown_names_suggest_known_names(output: Output) -> None:
    with pytest.raises(
        UsageError, match=r"'enc/z_men'; did you mean 'enc.z_mean'\? Known names: enc.z_mean, map"
    ):
        featray.read(output.uri, "enc/z_men")
    with pytest.raises(UsageError, match=r"columns: no column 'featur'; did you mean 'feature'\?"):
        featray.read(output.uri, "map", columns=["featur"])
    with pytest.raises(UsageError, match=r"scans: no column 'spacings'; did you mean 'spacing'\?"):
        featray.read(output.uri, "map", scans=["spacings"])
    with pytest.raises(UsageError, match="put it into a list"):
        featray.read(output.uri, "map", scan_ids="a")
    with pytest.raises(UsageError, match="put it into a list"):
        featray.read(output.uri, "map", columns="feature")
    with pytest.raises(UsageError, match="expected strings"):
        featray.read(output.uri, "map", scan_ids=[1, 2])  # type: ignore[list-item]


def test_a_missing_output_or_version_is_a_config_error(output: Output, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is this a featray output"):
        featray.read(tmp_path / "nowhere", "map")
    with pytest.raises(ConfigError, match="no version 99"):
        featray.read(output.uri, "map", 99)


def test_a_version_given_by_number_does_not_change(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), keep_versions_days=1)
    before = output.add(make_decoded("a", 1), make_decoded("b", 2))
    after = output.add(make_decoded("a", 7), recipe="r0")
    for version, values in ((before, [1, 2]), (after, [7, 2]), (None, [7, 2])):
        found = featray.read(output.uri, "one", version)
        assert (found.array.tolist(), found.version) == (values, version or after)


def test_a_version_whose_files_were_deleted_is_a_config_error(output: Output) -> None:
    before = output.dataset.open_snapshot().version
    output.add(make_decoded("a", 7))
    with pytest.raises(ConfigError, match=r"kept for 0 days .*Leave the version out"):
        featray.read(output.uri, "map", before)


@pytest.mark.slow
def test_reading_starts_again_with_the_newest_version_if_files_are_deleted(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([10, 11, 12])
    original = Dataset.open_snapshot

    def open_then_commit(self: Dataset, version: int | None = None) -> Snapshot:
        snapshot = original(self, version)
        with monkeypatch.context() as unpatched:
            unpatched.setattr(Dataset, "open_snapshot", original)
            if (value := next(values, None)) is not None:
                output.add(make_decoded("a", value))
        return snapshot

    monkeypatch.setattr(Dataset, "open_snapshot", open_then_commit)
    found = featray.read(output.uri, "one")
    assert found.array.tolist() == [12, 2, 2, 3]


@pytest.mark.slow
def test_every_read_during_a_refresh_shows_one_commit(tmp_path: Path) -> None:
    output, generations = Output(str(tmp_path / "out")), 12
    output.add(*(make_decoded(scan_id, 0) for scan_id in "abc"))

    def refresh() -> None:
        for value in range(1, generations):
            output.add(*(make_decoded(scan_id, value) for scan_id in "abc"))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(refresh)
        seen = []
        while not future.done():
            found = featray.read(output.uri, "one", scans=["status"])
            assert found.scan_ids.tolist() == ["a", "b", "c"]
            assert found.table["status"].to_pylist() == ["ok"] * 3
            assert len(set(found.array.tolist())) == 1
            seen.append(found.array[0])
        future.result()
    assert seen == sorted(seen)
    assert featray.read(output.uri, "one").array.tolist() == [generations - 1] * 3


def test_the_message_about_a_missing_or_damaged_file_says_what_to_do(output: Output) -> None:
    (path,) = [file.path for file in output.dataset.open_snapshot().files(FEATURES) if "map" in file.path][:1]
    file = Path(output.uri) / FEATURES / path
    content = file.read_bytes()
    for broken in (content[:-20], content[:40] + b"\xff" * 200 + content[240:]):
        file.write_bytes(broken)
        with pytest.raises(FeatrayError, match=r"part-.*parquet is damaged .*featray verify"):
            featray.read(output.uri, "map")
    file.unlink()
    with pytest.raises(FeatrayError, match="is missing; `featray verify`"):
        featray.read(output.uri, "map")
    assert len(featray.read(output.uri, "one")) == 4


def test_a_row_whose_width_does_not_match_its_shape_is_an_error(output: Output) -> None:
    snapshot = output.dataset.open_snapshot()
    rows = snapshot.read(FEATURES, None, pads.field("layer") == "map")
    short = pa.array([[1.0]] * len(rows), rows.schema.field("feature").type)
    rows = rows.set_column(rows.schema.get_field_index("feature"), "feature", short).drop_columns(["layer"])
    rows = rows.set_column(0, "scan_id", pa.array([f"w{row}" for row in range(len(rows))]))
    file = output.dataset.write_file(FEATURES, {"layer": "map"}, rows, RUN)
    output.commit(Receipt((file,), (make_decoded("w0", 0).record,)))
    with pytest.raises(FeatrayError, match="number of values of a row does not match its shape"):
        featray.read(output.uri, "map")
    with pytest.raises(FeatrayError, match="number of values of a row does not match its shape"):
        featray.read(output.uri, "map", scan_ids=["w0"])


def test_a_commit_that_was_killed_between_the_tables_is_read_completely(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.output.delta_log import TableLog

    original = TableLog.append

    def append_or_die(self: TableLog, *args: Any, **kwargs: Any) -> None:
        if self.table == SCANS:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    monkeypatch.setattr(TableLog, "append", append_or_die)
    with pytest.raises(KeyboardInterrupt):
        output.add(make_decoded("d", 4))
    found = featray.read(output.uri, "map", scans=["site"])
    assert found.table["site"].to_pylist()[-1] == "site of d"


def test_an_output_in_an_object_store_is_read_like_a_local_one(
    s3_folder: str, s3_options: dict[str, Any]
) -> None:
    remote = Output(s3_folder, s3_options)
    remote.add(make_decoded("a", 1), make_decoded("c", 3))
    remote.add(make_decoded("b", 2, patches=2))
    found = featray.read(s3_folder, "map", scans=["site"], storage_options=s3_options)
    assert found.array[:, 0, 0].tolist() == [1, 2, 2, 3]
    remote.add(make_decoded("a", 7))
    again = featray.read(s3_folder, "map", storage_options=s3_options)
    assert again.array[:, 0, 0].tolist() == [7, 2, 2, 3]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_reads_the_same_rows_as_numpy_arrays(output: Output) -> None:
    expected = featray.read(output.uri, "map", scans=["site", "warnings"])
    rows = featray.read_ray(output.uri, "map", scans=["site", "warnings"]).take_all()
    rows.sort(key=lambda row: (row["scan_id"], row["patch"]))
    assert [row["scan_id"] for row in rows] == expected.scan_ids.tolist()
    np.testing.assert_array_equal(np.stack([row["feature"] for row in rows]), expected.array)
    assert rows[0]["feature"].dtype == np.float32
    assert [row["site"] for row in rows] == expected.table["site"].to_pylist()
    assert set(rows[0]) == set(expected.table.column_names)
    assert rows[0]["origin"].tolist() == [0, 0, 0]

    def halve(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"half": batch["feature"] / 2}  # (rows, 2, 3)

    features = featray.read_ray(output.uri, "map", scan_ids=["b", "c"], columns=["feature"])
    batches = features.map_batches(halve).iter_batches(batch_size=None, batch_format="numpy")
    assert sorted(value for batch in batches for value in batch["half"][:, 0, 0]) == [1, 1, 1.5]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_gives_each_value_its_own_shape_if_shapes_differ(output: Output) -> None:
    output.add(make_decoded("d", 4, width=3))
    output.add(make_decoded("e", 5, width=5), make_decoded("f", 6, width=1))
    rows = featray.read_ray(output.uri, "native", columns=["feature", "shape"]).take_all()
    shapes = {row["scan_id"]: row["feature"].shape for row in rows}
    assert shapes == {s: (2, 2, width) for s, width in zip("abcdef", (2, 2, 2, 3, 5, 1), strict=True)}
    assert all(tuple(row["shape"]) == row["feature"].shape for row in rows)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_read_ray_raises_the_errors_of_read_before_it_reads_values(output: Output) -> None:
    output.add(make_decoded("d", 4), recipe="r1")
    with pytest.raises(UsageError, match=r"2 recipes.*r0 \(3 scans\), r1 \(1 scans\)"):
        featray.read_ray(output.uri, "one")
    with pytest.raises(UsageError, match="did you mean 'one'"):
        featray.read_ray(output.uri, "on")
    with pytest.raises(UsageError, match="no row of recipe 'r9'"):
        featray.read_ray(output.uri, "one", recipe="r9")
    rows = featray.read_ray(output.uri, "one", recipe="r1", scan_ids=["a", "d"])
    assert [(row["scan_id"], float(row["feature"])) for row in rows.take_all()] == [("d", 4.0)]
    assert featray.read_ray(output.uri, "one", scan_ids=["nobody"]).take_all() == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_read_ray_reads_the_requested_version(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), keep_versions_days=1)
    before = output.add(make_decoded("a", 1), make_decoded("b", 2))
    lazy = featray.read_ray(output.uri, "one", before)
    output.add(make_decoded("a", 7))
    assert sorted(float(row["feature"]) for row in lazy.take_all()) == [1, 2]
