"""Write a manifest of public CT series of the NCI Imaging Data Commons (IDC); nothing is downloaded.

python jobs/idc_manifest.py idc_ct.parquet [--collection lidc_idri] [--license "CC BY 4.0"] [--sample 10000]
    [--selection FILE] [--min-slices 20] [--columns NAMES] [--index FILE]

Then `featray extract configs/idc_ct.yaml` reads the series from IDC's public bucket, without an account. The
index of IDC comes with `pip install 'featray[s3,idc]'` (79 MB); a newer release of it lists newer data.

The manifest has one row per series of original CT images: `uri` (the folder of the series in the bucket),
`version` (the id of this state of the series, so a revised series counts as changed), SeriesInstanceUID (the
scan_id), and columns for the table scans. Its column `patient` is a hash, for splits by patient. --selection
takes what was chosen with idc-index or in IDC's portal: a CSV or Parquet file with the column
crdc_series_uuid or SeriesInstanceUID, or a manifest for s5cmd. Prints how many series there are, their size
and their licenses. The exit code is 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from featray.errors import ExitCode, UsageError, find_similar_names

ID, VERSION = "SeriesInstanceUID", "crdc_series_uuid"
SHOWN = ("collection_id", "license_short_name", "source_DOI", "instanceCount", "series_size_MB")
"""Columns of the index that each manifest has; they become columns of the table scans."""
USED = ("analysis_result_id", "PatientID", "Modality", "sop_class_name", "series_aws_url")
"""Columns of the index that are needed to choose series and to make other columns."""
FOLDER = re.compile(r"s3://[a-z0-9.-]+/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/")
"""Folder of a series in a public bucket of IDC, with the id of this state of the series."""


def main() -> int:
    """Write the manifest, print what is in it, and return the exit code."""
    args = _parse_arguments()
    try:
        series = choose_series(read_index(args.index, args.columns), args)
        write_manifest(make_manifest(series, args.columns), args.manifest)
    except UsageError as error:
        print(f"idc_manifest: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    print(describe(series, args.manifest))
    return int(ExitCode.OK)


def read_index(path: str | None, columns: Sequence[str]) -> pa.Table:
    """Return the columns of the index that are needed.

    Args:
        path: Parquet file of the index; None for that of the package idc-index-data.
        columns: Further columns that the user wants.

    Raises:
        UsageError: There is no index, or it has no such column.
    """
    if path is None:
        try:
            import idc_index_data
        except ImportError:
            raise UsageError(
                "install the index with `pip install 'featray[idc]'`, or name it by --index"
            ) from None
        path = str(idc_index_data.IDC_INDEX_PARQUET_FILEPATH)
    try:
        known = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"--index {path}: cannot be read as Parquet ({type(error).__name__})") from None
    _check_names("--columns", columns, known)
    needed = (ID, VERSION, *SHOWN, *USED)
    if missing := sorted(set(needed) - set(known)):
        raise UsageError(
            f"{path} is not an index of IDC as of idc-index-data 25: it lacks {', '.join(missing)}"
        )
    return pq.read_table(path, columns=list(dict.fromkeys((*needed, *columns))))


def choose_series(index: pa.Table, args: argparse.Namespace) -> pa.Table:
    """Return the rows of the index that the arguments choose, sorted by SeriesInstanceUID.

    Raises:
        UsageError: No series is left, or a name is unknown.
    """
    choices = {"collection_id": args.collection, "license_short_name": args.license}
    for option, column in (("--collection", "collection_id"), ("--license", "license_short_name")):
        _check_names(option, choices[column], pc.unique(index[column]).to_pylist())
    for column, wanted in choices.items():
        if wanted:
            index = index.filter(pc.is_in(index[column], value_set=pa.array(wanted, index[column].type)))
    if args.selection:
        index = _filter_selection(index, args.selection)
    series = index.filter(_is_original_ct(index, args.min_slices))
    if args.selection and len(series) < len(index):
        print(f"{len(index) - len(series)} selected series are not original CT with enough images")
    if args.sample is not None:
        series = _take_sample(series, args.sample)
    if not len(series):
        raise UsageError("no series is left; choose other collections or licenses, or lower --min-slices")
    return series.sort_by(ID)


def make_manifest(series: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return the manifest of some series.

    Raises:
        UsageError: The folder of a series in the bucket is not known.
    """
    rows = zip(series["series_aws_url"].to_pylist(), series[VERSION].to_pylist(), strict=True)
    uris = [_get_folder(url, version) for url, version in rows]
    patients = zip(series["collection_id"].to_pylist(), series["PatientID"].to_pylist(), strict=True)
    hashes = [
        hashlib.sha256(f"{collection}\n{patient}".encode()).hexdigest()[:16]
        for collection, patient in patients
    ]
    names = dict.fromkeys((ID, *SHOWN, *columns))
    fixed = {"uri": uris, "version": series[VERSION], "patient": hashes}
    return pa.table(fixed | {name: series[name] for name in names})


def write_manifest(manifest: pa.Table, path: str) -> None:
    """Write the manifest as CSV or Parquet, by the suffix of the path.

    Raises:
        UsageError: The path has another suffix, or cannot be written.
    """
    if not path.endswith((".csv", ".parquet")):
        raise UsageError(f"{path}: the name of the manifest must end in .csv or .parquet")
    write = pacsv.write_csv if path.endswith(".csv") else pq.write_table
    try:
        write(manifest, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or type(error).__name__})") from None


def describe(series: pa.Table, path: str) -> str:
    """Return what the manifest holds, and what to do next, as text."""
    size = pc.sum(series["series_size_MB"]).as_py() / 1000
    patients = len(series.group_by(["collection_id", "PatientID"]).aggregate([]))
    lines = [f"{path}: {len(series)} CT series of {patients} patients, {size:.1f} GB in IDC's buckets"]
    for title, column in (("collections", "collection_id"), ("licenses", "license_short_name")):
        counts = Counter(series[column].to_pylist()).most_common(10)
        lines.append(f"  {title}: {', '.join(f'{name} ({count})' for name, count in counts)}")
    lines.append("  next: featray plan configs/idc_ct.yaml; cite the collections by their source_DOI")
    return "\n".join(lines)


def _filter_selection(index: pa.Table, path: str) -> pa.Table:
    """Return the series that a file of the user names.

    Raises:
        UsageError: The file cannot be read, names no series, or names series that the index does not have.
    """
    column, values = _read_selection(path)
    wanted = pa.array(sorted(set(values)), index[column].type)
    found = index.filter(pc.is_in(index[column], value_set=wanted))
    if unknown := len(wanted) - len(found):
        raise UsageError(
            f"--selection {path}: {unknown} of {len(wanted)} series are not in this index. Install the "
            "release of idc-index-data with which they were chosen, or choose them again with this one"
        )
    return found


def _read_selection(path: str) -> tuple[str, list[str]]:
    """Return the column of the index that a selection names, and its values."""
    try:
        if path.endswith((".csv", ".parquet")):
            table = pacsv.read_csv(path) if path.endswith(".csv") else pq.read_table(path)
            column = next((name for name in (VERSION, ID) if name in table.column_names), "")
            values = table[column].drop_null().to_pylist() if column else []
        else:
            with open(path, encoding="utf-8") as file:
                column, values = VERSION, FOLDER.findall(file.read())
    except (OSError, ValueError) as error:  # ArrowInvalid and UnicodeDecodeError are ValueErrors
        raise UsageError(f"--selection {path}: cannot be read ({type(error).__name__})") from None
    if not values:
        raise UsageError(
            f"--selection {path}: names no series. Expected a column {VERSION} or {ID} in a .csv or .parquet "
            "file, or a manifest for s5cmd"
        )
    return column, values


def _is_original_ct(index: pa.Table, min_slices: int) -> pa.ChunkedArray:
    """Return for each series whether it has CT images, is no analysis result, and has enough images.

    A file of enhanced CT has many frames, so the number of its images says nothing.
    """
    is_ct = pc.and_(
        pc.equal(index["Modality"], "CT"), pc.match_substring(index["sop_class_name"], "CT Image Storage")
    )
    is_single_frame = pc.equal(index["sop_class_name"], "CT Image Storage")
    is_long = pc.or_(pc.invert(is_single_frame), pc.greater_equal(index["instanceCount"], min_slices))
    return pc.and_(pc.and_(is_ct, is_long), pc.is_null(index["analysis_result_id"]))


def _take_sample(series: pa.Table, count: int) -> pa.Table:
    """Return some series, spread over all; the same ones if index and other arguments are the same."""
    keys = [hashlib.sha256(uid.encode()).hexdigest() for uid in series[ID].to_pylist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return series.take(pa.array(order[:count], pa.int64()))


def _get_folder(url: str | None, version: str) -> str:
    """Return the folder of a series in the bucket from its URL, which ends in `*`."""
    match = FOLDER.match(url or "")
    if match is None or match[1] != version:
        raise UsageError(f"the index has an unusual address for the series {version}: {url!r}; report it")
    return match[0]


def _check_names(option: str, names: Sequence[str], known: Sequence[Any]) -> None:
    for name in names:
        if name not in known:
            similar = find_similar_names(name, [text for text in known if text], limit=3)
            raise UsageError(
                f"{option}: the index has no {name!r}; similar names: {', '.join(similar) or 'none'}"
            )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("manifest", metavar="MANIFEST", help="file to write: .parquet or .csv")
    for name, text in (("collection", "collection_id"), ("license", "license, for example CC BY 4.0")):
        parser.add_argument(
            f"--{name}", action="append", default=[], help=f"{text}; may be repeated (default: all)"
        )
    parser.add_argument(
        "--selection",
        metavar="FILE",
        help="names the series: .csv, .parquet or a manifest for s5cmd (default: all)",
    )
    parser.add_argument(
        "--sample", type=_parse_count, metavar="N", help="take N series, spread over all (default: all)"
    )
    parser.add_argument(
        "--min-slices",
        type=_parse_count,
        default=20,
        metavar="N",
        help="smallest number of images of a series; localizers have one or two (default: %(default)s)",
    )
    parser.add_argument(
        "--columns",
        type=_split_names,
        default=[],
        metavar="NAMES",
        help="further columns of the index, for example SeriesDescription,Manufacturer (default: none)",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="Parquet file of the index (default: that of the installed package idc-index-data)",
    )
    return parser.parse_args()


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
