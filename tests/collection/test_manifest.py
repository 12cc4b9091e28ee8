"""Manifest parsing: CSV and Parquet give the same rows, and both CSV readers give the same columns."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featray.collection import manifest as manifest_module
from featray.collection.manifest import ManifestRow, read_manifest
from featray.config import SourceConfig
from featray.errors import ConfigError


def read_rows(text: str | bytes, **more: str) -> list[ManifestRow]:
    data = text.encode() if isinstance(text, str) else text
    manifest = read_manifest(data, SourceConfig.model_validate({"uri": "s3://bucket/lists/m.csv", **more}))
    return [manifest.get_row(number) for number in range(len(manifest))]


def test_relative_uris_and_masks_are_joined_to_the_manifests_folder_and_absolute_ones_are_kept() -> None:
    rows = read_rows("uri,mask\na/x.nii,m.nii\n/y.nii,\nfile:///z.nii,gs://b/m.nii\n")
    assert [(row.uri, row.mask) for row in rows] == [
        ("s3://bucket/lists/a/x.nii", "s3://bucket/lists/m.nii"),
        ("/y.nii", ""),
        ("file:///z.nii", "gs://b/m.nii"),
    ]


def test_ids_are_uris_as_written_or_the_id_column_and_other_columns_are_kept() -> None:
    text = "site,uri,version,case\nA,x.nii,v1,7\n"
    (plain,), (named,) = read_rows(text), read_rows(text, id_column="case")
    assert (plain.scan_id, plain.version, plain.columns) == ("x.nii", "v1", {"site": "A", "case": "7"})
    assert (named.scan_id, named.columns) == ("7", {"site": "A"})


def test_short_rows_are_padded_and_long_rows_have_a_problem() -> None:
    short, good, long = read_rows("uri,site\nx.nii\ny.nii,B\nz.nii,C,extra\n")
    assert (short.columns, short.problem) == ({"site": ""}, "")
    assert (good.columns, good.problem) == ({"site": "B"}, "")
    assert "more values than the manifest has columns" in long.problem
    assert long.columns == {"site": "C"}


def test_a_row_without_uri_and_a_row_with_half_a_center_have_a_problem() -> None:
    rows = read_rows("uri,center_x,center_y,center_z\n,1,2,3\nx.nii,1,,3\ny.nii, , ,\nz.nii,1,-0,1e1\n")
    assert "names no uri" in rows[0].problem
    assert "three numbers" in rows[1].problem
    assert (rows[2].problem, rows[2].center_lps) == ("", None)
    assert (rows[3].problem, rows[3].center_lps) == ("", (1.0, 0.0, 10.0))


def test_parquet_values_become_texts_as_python_spells_them() -> None:
    table = pa.table(
        {
            "uri": pa.array(["x.nii", "y.nii"]).dictionary_encode(),
            "version": pa.array([7, None]),
            "age": [61.0, None],
            "smoker": [True, None],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    parsed = read_manifest(sink.getvalue().to_pybytes(), SourceConfig(uri="m.parquet"))
    assert [parsed.get_row(number).version for number in (0, 1)] == ["7", ""]
    assert [parsed.get_row(number).columns for number in (0, 1)] == [
        {"age": "61.0", "smoker": "True"},
        {"age": "", "smoker": ""},
    ]


@pytest.mark.parametrize("text", ["", "\n", "\nuri\nx\n", "uri\n", "uri\n\n\n"])
def test_a_manifest_without_header_or_rows_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no column uri|has no rows"):
        read_rows(text)


def test_a_byte_order_mark_is_not_part_of_the_first_column_name() -> None:
    assert [row.uri for row in read_rows("\ufeffuri\r\n/x.nii\r\n")] == ["/x.nii"]


_VALUES = st.text(st.sampled_from('ab ,"\n\r\té;#\\\0'), max_size=5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(st.lists(_VALUES, min_size=1, max_size=3), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
@example(table=[["a"], [""], ["b"]], quoting=csv.QUOTE_ALL, end="\n")
@example(table=[["a"], [""], ["b"]], quoting=csv.QUOTE_NONE, end="\n")
@example(table=[["a", "b"], ["x\ny", "z"]], quoting=csv.QUOTE_ALL, end="\r\n")
def test_both_csv_readers_give_the_same_columns(table: list[list[str]], quoting: int, end: str) -> None:
    if quoting == csv.QUOTE_NONE:
        text = end.join(",".join(row) for row in table)
    else:
        sink = io.StringIO(newline="")
        csv.writer(sink, quoting=quoting, lineterminator=end).writerows(table)  # type: ignore[arg-type]
        text = sink.getvalue()
    data = text.encode()
    try:
        names = next(manifest_module._read_csv_rows(data), [])
        expected = manifest_module._parse_any_csv(data, names, {})
    except csv.Error:
        return
    columns = manifest_module._parse_plain_csv(data, names)
    if columns is not None:
        assert [column.to_pylist() for column in columns] == [column.to_pylist() for column in expected]
