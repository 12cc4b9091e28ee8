"""Public CT of the Imaging Data Commons: the manifest, and a run without an account on a public bucket."""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from job_modules import import_job
from servers.seaweedfs import PUBLIC_BUCKET, SeaweedFS

import featray
from featray.config import load
from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_phantom, write_dicom_series

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "idc_ct.yaml"
MakeManifest = Callable[..., int]


def make_uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


def make_series(name: str, **values: Any) -> dict[str, Any]:
    """Return the row of a series in the index of IDC."""
    version = make_uuid(values.pop("state", name))
    return {
        "collection_id": "lidc_idri",
        "analysis_result_id": None,
        "PatientID": "JANE-DOE",
        "SeriesInstanceUID": f"1.2.{name}",
        "source_DOI": "10.7937/k9",
        "Modality": "CT",
        "sop_class_name": "CT Image Storage",
        "SeriesDescription": "Lung 1.0",
        "instanceCount": 120,
        "license_short_name": "CC BY 3.0",
        "crdc_series_uuid": version,
        "series_aws_url": f"s3://{PUBLIC_BUCKET}/{version}/*",
        "series_size_MB": 63.5,
        **values,
    }


SERIES = [
    make_series("2", PatientID="p2", license_short_name="CC BY-NC 4.0", collection_id="nlst"),
    make_series("1"),
    make_series("mr", Modality="MR", sop_class_name="MR Image Storage"),
    make_series("capture", sop_class_name="Secondary Capture Image Storage"),
    make_series("localizer", instanceCount=2),
    make_series("derived", analysis_result_id="lidc_annotations"),
    make_series("3", sop_class_name="Enhanced CT Image Storage", instanceCount=1, collection_id="nlst"),
]


def write_index(path: Path, *series: dict[str, Any]) -> Path:
    names = list(series[0])
    text = dict.fromkeys(names, pa.large_string()) | {
        "instanceCount": pa.int64(),
        "series_size_MB": pa.float64(),
    }
    pq.write_table(pa.Table.from_pylist(list(series), pa.schema(text.items())), path)
    return path


@pytest.fixture(scope="module")
def job() -> Any:
    """Return the module jobs/idc_manifest.py."""
    return import_job("idc_manifest")


@pytest.fixture
def make_manifest(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeManifest:
    """Return a function that runs the program with the index SERIES and returns its exit code."""
    index = write_index(tmp_path / "index.parquet", *SERIES)

    def run(path: Path, *arguments: str, index: Path = index) -> int:
        monkeypatch.setattr(sys, "argv", ["idc_manifest.py", str(path), "--index", str(index), *arguments])
        code: int = job.main()
        return code

    return run


def test_each_original_ct_series_is_a_row_with_its_folder_and_its_version(
    make_manifest: MakeManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_manifest(tmp_path / "m.parquet") == 0
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [row["SeriesInstanceUID"] for row in rows] == ["1.2.1", "1.2.2", "1.2.3"]
    assert rows[0] == {
        "uri": f"s3://idc-open-data/{make_uuid('1')}/",
        "version": make_uuid("1"),
        "patient": hashlib.sha256(b"lidc_idri\nJANE-DOE").hexdigest()[:16],
        "SeriesInstanceUID": "1.2.1",
        "collection_id": "lidc_idri",
        "license_short_name": "CC BY 3.0",
        "source_DOI": "10.7937/k9",
        "instanceCount": 120,
        "series_size_MB": 63.5,
    }
    text = capsys.readouterr().out
    assert "3 CT series of 3 patients, 0.2 GB" in text
    assert "licenses: CC BY 3.0 (2), CC BY-NC 4.0 (1)" in text
    assert "JANE" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--collection", "nlst"], ["1.2.2", "1.2.3"]),
        (["--collection", "nlst", "--license", "CC BY 3.0"], ["1.2.3"]),
        (["--min-slices", "2"], ["1.2.1", "1.2.2", "1.2.3", "1.2.localizer"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_the_arguments_choose_series(
    make_manifest: MakeManifest, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    assert make_manifest(tmp_path / "m.csv", *arguments, "--columns", "SeriesDescription") == 0
    table = pacsv.read_csv(tmp_path / "m.csv")
    assert table["SeriesInstanceUID"].to_pylist() == expected
    assert set(table["SeriesDescription"].to_pylist()) == {"Lung 1.0"}


def test_a_sample_is_spread_over_all_series_and_a_larger_one_contains_it(
    make_manifest: MakeManifest, tmp_path: Path
) -> None:
    index = write_index(tmp_path / "many.parquet", *(make_series(f"{number:03d}") for number in range(100)))
    samples = []
    for count in ("10", "20", "1000"):
        assert make_manifest(tmp_path / "m.parquet", "--sample", count, index=index) == 0
        samples.append(pq.read_table(tmp_path / "m.parquet")["SeriesInstanceUID"].to_pylist())
    assert [len(sample) for sample in samples] == [10, 20, 100]
    assert set(samples[0]) < set(samples[1])
    assert min(samples[0]) < "1.2.050" < max(samples[0])


@pytest.mark.parametrize("kind", ["uuid.csv", "uid.parquet", "s5cmd"])
def test_a_selection_of_idc_index_or_of_the_portal_chooses_series(
    make_manifest: MakeManifest, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, chosen = tmp_path / f"selection.{kind}", [SERIES[1], SERIES[2]]
    if kind == "uuid.csv":
        pacsv.write_csv(pa.table({"crdc_series_uuid": [row["crdc_series_uuid"] for row in chosen]}), path)
    elif kind == "uid.parquet":
        pq.write_table(pa.table({"SeriesInstanceUID": [row["SeriesInstanceUID"] for row in chosen]}), path)
    else:
        path.write_text("".join(f"cp {row['series_aws_url']} .\n" for row in chosen))
    assert make_manifest(tmp_path / "m.parquet", "--selection", str(path)) == 0
    assert pq.read_table(tmp_path / "m.parquet")["SeriesInstanceUID"].to_pylist() == ["1.2.1"]
    assert "1 selected series are not original CT" in capsys.readouterr().out


def test_series_that_the_index_does_not_have_are_refused(
    make_manifest: MakeManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selection = tmp_path / "selection.txt"
    selection.write_text(f"cp s3://idc-open-data/{make_uuid('gone')}/* .\ncp {SERIES[0]['series_aws_url']} .")
    assert make_manifest(tmp_path / "m.csv", "--selection", str(selection)) == 2
    assert "1 of 2 series are not in this index" in capsys.readouterr().err
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collection", "lidc-idri"], "no 'lidc-idri'; similar names: lidc_idri"),
        (["--columns", "PatientName"], "no 'PatientName'; similar names: PatientID"),
        (["--license", "CC BY-NC 4.0", "--collection", "lidc_idri"], "no series is left"),
        (["--selection", "nothing.csv"], "nothing.csv: cannot be read"),
        (["--index", "nothing.parquet"], "nothing.parquet: cannot be read"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_reported_with_exit_code_2(
    make_manifest: MakeManifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert make_manifest(tmp_path / "m.csv", *arguments) == 2
    assert message in capsys.readouterr().err
    assert make_manifest(tmp_path / "m.txt") == 2
    assert "must end in .csv or .parquet" in capsys.readouterr().err


def test_the_installed_index_has_the_columns_that_are_needed(job: Any, tmp_path: Path) -> None:
    pytest.importorskip("idc_index_data", reason="the index of IDC is large; pip install 'featray[idc]'")
    index = job.read_index(None, ())
    lidc = index.filter(pa.compute.equal(index["collection_id"], "lidc_idri"))
    assert len(lidc) > 1000
    assert len(job.make_manifest(lidc, ())) == len(lidc)


def test_series_in_a_public_bucket_are_extracted_without_an_account_and_revised_ones_again(
    make_manifest: MakeManifest, tmp_path: Path, vae_file: Path, s3_server: SeaweedFS
) -> None:
    series = [make_series(name) for name in ("41", "42")]
    revised = make_series("42", state="42 revised")
    for number, row in enumerate([*series, revised]):
        store_series(s3_server, tmp_path / "dicom", row["crdc_series_uuid"], number)
    manifest, index = tmp_path / "idc_ct.parquet", tmp_path / "idc.parquet"
    assert make_manifest(manifest, index=write_index(index, *series)) == 0
    config = make_config(manifest, vae_file, s3_server, tmp_path / "out")
    summary = featray.extract(config)
    assert (summary.exit_code, summary.ok) == (0, 2)
    rows = read_scans(tmp_path / "out")
    assert rows["1.2.42"]["uri"] == f"s3://idc-open-data/{make_uuid('42')}/"
    assert (rows["1.2.41"]["collection_id"], rows["1.2.41"]["format"]) == ("lidc_idri", "dicom")
    before = featray.read(tmp_path / "out", "z_mean").array
    assert make_manifest(manifest, index=write_index(index, series[0], revised)) == 0
    assert featray.refresh(config).done == 1
    after = featray.read(tmp_path / "out", "z_mean").array
    assert (before[0] == after[0]).all()
    assert (before[1] != after[1]).any()
    assert read_scans(tmp_path / "out")["1.2.42"]["uri"] == f"s3://idc-open-data/{make_uuid('42 revised')}/"


def store_series(server: SeaweedFS, local: Path, version: str, seed: int) -> None:
    """Put a DICOM series into the public bucket, one object `VERSION/UUID.dcm` per slice, as IDC does."""
    fs = fsspec.filesystem("s3", **server.options())
    if not fs.exists(PUBLIC_BUCKET):
        fs.mkdir(PUBLIC_BUCKET)
    write_dicom_series(make_phantom(seed, (8, 32, 32)), local / version, name=version)
    for file in (local / version).iterdir():
        fs.pipe_file(f"{PUBLIC_BUCKET}/{version}/{make_uuid(version + file.name)}.dcm", file.read_bytes())


def make_config(manifest: Path, model: Path, server: SeaweedFS, output: Path) -> dict[str, Any]:
    """Return configs/idc_ct.yaml for a small model and the test server, with the file's anonymous access."""
    config = load(CONFIG).model_dump(by_alias=True, exclude_unset=True)
    assert config["source"]["storage_options"] == {"anon": True}
    config["source"]["uri"] = str(manifest)
    config["source"]["storage_options"]["endpoint_url"] = f"http://127.0.0.1:{server.port}"
    config["preprocess"]["size"] = [8, 32, 32]
    config["model"] |= {
        "uri": str(model),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "layers": [{"layer": "encoder/z_mean", "as": "z_mean"}],
    }
    config["output"]["uri"] = str(output)
    config["run"] = {"engine": "inline", "decode": {"workers": 0}}
    return config


def read_scans(output: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the table scans by scan_id."""
    columns = ["scan_id", "uri", "format", "status", "collection_id"]
    rows = Dataset(Store(str(output))).open_snapshot().read_scans(columns).to_pylist()
    return {row["scan_id"]: row for row in rows}
