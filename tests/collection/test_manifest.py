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


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_separator_is_the_one_with_which_the_header_has_a_uri(separator: str, end: str) -> None:
    lines = [("case", "URI", "version"), ("7", "/x.nii", "v1"), ('"8"', '"/a b.nii"', "")]
    text = end.join(separator.join(line) for line in lines)
    for start in ("", "\ufeff", f"sep={separator}{end}", f"\ufeffsep={separator}{end}"):
        rows = read_rows(start + text, id_column="Case")
        assert [(row.scan_id, row.uri, row.version) for row in rows] == [
            ("7", "/x.nii", "v1"),
            ("8", "/a b.nii", ""),
        ]


def test_a_value_may_contain_other_separators() -> None:
    (row,) = read_rows("uri;center_x;center_y;center_z\na,b\tc.nii;1;2;3\n")
    assert (row.uri, row.center_lps) == ("s3://bucket/lists/a,b\tc.nii", (1, 2, 3))
    (row,) = read_rows("uri;center_x;center_y;center_z\na.nii;1,5;2,5;3,5\n")
    assert "must be three numbers" in row.problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,id\nx.nii,1\n", "has no column uri; its columns are 'path', 'id'"),
        ("path;id\nx.nii;1\n", "has no column uri; its columns are 'path;id'"),
        (" uri,id\nx.nii,1\n", "has no column uri; its columns are ' uri', 'id'"),
        (
            "patients/doe/x.nii\n/y.nii\n",
            "has no column uri; its first line looks like a scan. Put a line with",
        ),
        ("x.nii.gz,7\n", "has no column uri; its first line looks like a scan"),
        ("", "has no column uri; it is empty"),
        ("uri,uri\nx,y\n", "has the column uri twice"),
        ("uri,Mask\nx,y\n", "rename the manifest column Mask to mask"),
        ("uri,Center_X\nx,y\n", "rename the manifest column Center_X to center_x"),
        ("Uri,URI\nx,y\n", "has no column uri; its columns are 'Uri', 'URI'"),
    ],
)
def test_the_message_about_columns_says_which_were_found(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rows(text)
    assert message in str(caught.value)
    assert "doe" not in str(caught.value)


def test_utf_16_is_named_in_the_message() -> None:
    with pytest.raises(ConfigError, match="it is UTF-16: save it as `CSV UTF-8`"):
        read_rows("uri\n/x.nii\n".encode("utf-16"))


def test_a_column_without_a_name_is_dropped() -> None:
    (row,) = read_rows(",uri,site,\n0,/x.nii,A,\n")
    assert (row.uri, row.columns) == ("/x.nii", {"site": "A"})


def test_home_folders_are_expanded_in_local_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    data = b"uri\n~/x.nii\n~nobody-here/x.nii\n$HOME/x.nii\n"
    parsed = read_manifest(data, SourceConfig(uri="/lists/m.csv"))
    assert parsed.uri.to_pylist() == [
        "/home/someone/x.nii",
        "/lists/~nobody-here/x.nii",
        "/lists/$HOME/x.nii",
    ]


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
