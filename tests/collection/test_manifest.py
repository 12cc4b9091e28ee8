"""A manifest to columns: what the rows say, whatever writes them, and the same by either CSV reader."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featray.collection import manifest
from featray.collection.manifest import ManifestRow, read_manifest
from featray.config import SourceConfig
from featray.errors import ConfigError


def rows(text: str | bytes, **more: str) -> list[ManifestRow]:
    data = text.encode() if isinstance(text, str) else text
    found = read_manifest(data, SourceConfig.model_validate({"uri": "s3://bucket/lists/m.csv", **more}))
    return [found.get_row(at) for at in range(len(found))]


def test_relative_uris_and_masks_are_below_the_manifests_folder_and_others_are_as_they_are() -> None:
    found = rows("uri,mask\na/x.nii,m.nii\n/y.nii,\nfile:///z.nii,gs://b/m.nii\n")
    assert [(row.uri, row.mask) for row in found] == [
        ("s3://bucket/lists/a/x.nii", "s3://bucket/lists/m.nii"),
        ("/y.nii", ""),
        ("file:///z.nii", "gs://b/m.nii"),
    ]


def test_ids_are_uris_as_written_or_the_id_column_and_further_columns_are_carried() -> None:
    text = "site,uri,version,case\nA,x.nii,v1,7\n"
    (plain,), (named,) = rows(text), rows(text, id_column="case")
    assert (plain.scan_id, plain.version, plain.columns) == ("x.nii", "v1", {"site": "A", "case": "7"})
    assert (named.scan_id, named.columns) == ("7", {"site": "A"})


def test_short_rows_are_filled_up_and_long_ones_are_told() -> None:
    short, good, long = rows("uri,site\nx.nii\ny.nii,B\nz.nii,C,extra\n")
    assert (short.columns, short.problem) == ({"site": ""}, "")
    assert (good.columns, good.problem) == ({"site": "B"}, "")
    assert "more values than the manifest has columns" in long.problem
    assert long.columns == {"site": "C"}


def test_a_row_without_uri_and_one_with_half_a_centre_are_told() -> None:
    found = rows("uri,center_x,center_y,center_z\n,1,2,3\nx.nii,1,,3\ny.nii, , ,\nz.nii,1,-0,1e1\n")
    assert "names no uri" in found[0].problem
    assert "three numbers" in found[1].problem
    assert (found[2].problem, found[2].center_lps) == ("", None)
    assert (found[3].problem, found[3].center_lps) == ("", (1.0, 0.0, 10.0))


def test_parquet_values_are_texts_as_python_spells_them() -> None:
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
    found = read_manifest(sink.getvalue().to_pybytes(), SourceConfig(uri="m.parquet"))
    assert [found.get_row(at).version for at in (0, 1)] == ["7", ""]
    assert [found.get_row(at).columns for at in (0, 1)] == [
        {"age": "61.0", "smoker": "True"},
        {"age": "", "smoker": ""},
    ]


@pytest.mark.parametrize("text", ["", "\n", "\nuri\nx\n", "uri\n", "uri\n\n\n"])
def test_a_manifest_without_header_or_rows_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no column uri|has no rows"):
        rows(text)


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    assert [row.uri for row in rows("\ufeffuri\r\n/x.nii\r\n")] == ["/x.nii"]


_VALUES = st.text(st.sampled_from('ab ,"\n\r\té;#\\\0'), max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(st.lists(_VALUES, min_size=1, max_size=3), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
@example(table=[["a"], [""], ["b"]], quoting=csv.QUOTE_ALL, end="\n")
@example(table=[["a"], [""], ["b"]], quoting=csv.QUOTE_NONE, end="\n")
@example(table=[["a", "b"], ["x\ny", "z"]], quoting=csv.QUOTE_ALL, end="\r\n")
def test_both_csv_readers_find_the_same(table: list[list[str]], quoting: int, end: str) -> None:
    if quoting == csv.QUOTE_NONE:
        text = end.join(",".join(row) for row in table)
    else:
        sink = io.StringIO(newline="")
        csv.writer(sink, quoting=quoting, lineterminator=end).writerows(table)  # type: ignore[arg-type]
        text = sink.getvalue()
    data = text.encode()
    try:
        names = next(manifest._read_csv_rows(data), [])
        expected = manifest._parse_any_csv(data, names, {})
    except csv.Error:
        return
    found = manifest._parse_plain_csv(data, names)
    if found is not None:
        assert [column.to_pylist() for column in found] == [column.to_pylist() for column in expected]
