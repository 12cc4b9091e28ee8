"""Header values that identify a patient reach no file, message or log, also if a scan fails."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml

from featray.cli.main import main
from featray.synthetic.phantom import make_phantom, write_dicom_series

PLANTED = {
    "PatientName": "Quixote^Planted",
    "PatientID": "PID-7788-PLANTED",
    "PatientBirthDate": "19470229",
    "AccessionNumber": "ACC5566PLANTED",
    "InstitutionName": "Nowhere General",
    "ReferringPhysicianName": "Sancho^Planted",
    "StudyDate": "20190331",
    "SeriesDescription": "PLANTED of Quixote",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.777000111",
    "OtherPatientIDs": "OTHER-9-PLANTED",
}
SHAPE = (8, 24, 24)


def write_series(folder: Path, seed: int, **changed: Any) -> Path:
    """Write a series with the planted values in each header, and `changed` in the header of one slice."""
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(path)
        for keyword, value in {**PLANTED, **(changed if number == 3 else {})}.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Return a folder of good, unusual, damaged and excluded series, all with the planted identifiers."""
    root = tmp_path / "ct"
    write_series(root / "good", 1)
    write_series(root / "moved", 2, ImagePositionPatient=[0, 0, 999])
    write_series(root / "unscaled", 3, RescaleSlope="0")
    write_series(root / "other", 4, Modality="MR")
    for path in write_series(root / "excluded", 9).iterdir():
        dataset = pydicom.dcmread(path)
        dataset.Modality = "MR"
        dataset.save_as(path)
    write_series(root / "rows", 5, Rows=9999)
    for path in sorted(write_series(root / "cut", 6).iterdir())[2:4]:
        path.write_bytes(path.read_bytes()[:-400])
    for path in sorted(write_series(root / "garbled", 7).iterdir())[2:3]:
        data = bytearray(path.read_bytes())
        offset = data.index(b"Quixote")
        data[offset - 8 : offset - 2] = b"\xff" * 6  # the tag, VR and length of the patient name
        path.write_bytes(data)
    packed = write_series(tmp_path / "packed", 8)
    with zipfile.ZipFile(root / "packed.zip", "w") as archive:
        for path in sorted(packed.iterdir())[1:]:
            archive.write(path, path.name)
    shutil.copytree(root / "good", root / "copy")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "tags", [(), ("InstitutionName",)], ids=["no tag in the config", "one tag in the config"]
)
def test_no_planted_identifier_is_in_any_file_message_or_log(
    collection: Path,
    vae_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    tags: tuple[str, ...],
) -> None:
    config = {
        "source": {"uri": str(collection)},
        "preprocess": {"size": [8, 32, 32]},
        "model": {
            "uri": str(vae_file),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": ["encoder/z_mean"],
        },
        "output": {"uri": str(tmp_path / "out")},
        "run": {"engine": "inline", "decode": {"workers": 1}},
        "limits": {"max_failed_fraction": 1},
        "privacy": {"dicom_tags": list(tags)},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["extract", str(path), "--json"]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (summary["ok"] >= 3, summary["failed"] >= 4, summary["excluded"] >= 1) == (True, True, True)
    for command in (["doctor", str(path)], ["plan", str(path)], ["failures", str(tmp_path / "out")]):
        main([*command, "--json"])
        main(command)
    main(["preview", str(path), "--scan", "good", "--out", str(tmp_path / "out" / "preview")])
    captured = capfd.readouterr()
    printed = (captured.out + captured.err).encode()
    allowed = {PLANTED[tag] for tag in tags}
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    texts = [(str(file.relative_to(tmp_path)).encode() + read_content(file)) for file in files] + [printed]
    for value in PLANTED.values():
        for part in value.split("^"):
            matches = [text for text in texts if part.encode() in text]
            assert bool(matches) == (value in allowed), part


def read_content(file: Path) -> bytes:
    """Return the bytes of a file; for a Parquet file, whose values are compressed, its rows as text."""
    if file.suffix != ".parquet":
        return file.read_bytes()
    import pyarrow.parquet as pq

    return repr(pq.read_table(file, partitioning=None).to_pylist()).encode()
