"""Whatever bytes a DICOM file has: the right volume or a reason, soon, small, and the process lives."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from featray.ct.dicom.elements import MAX_HEADER_BYTES
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.errors import Reason, ScanError

Files = list[tuple[str, bytes]]
SeriesOf = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]

SYNTAXES = ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "ExplicitVRBigEndian", "RLELossless"]
SYNTAXES += [
    "DeflatedExplicitVRLittleEndian",
    "JPEGLosslessProcess14_1",
    "JPEGLSLossless",
    "JPEG2000Lossless",
]
SHAPE = (3, 24, 20)
SECONDS_EACH, BYTES_MORE = 5, 2**29


def transcoded(dataset: Dataset, syntax: str) -> bytes:
    """The slice in another transfer syntax, named as GDCM does, written by GDCM."""
    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/source", f"{folder}/target"
        dataset.save_as(source)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(source)
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(target)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return Path(target).read_bytes()


def smooth_series(series_of: SeriesOf, syntax: str) -> Files:
    """Three slices of 12 bits that compress."""
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    slices = series_of(
        SHAPE[0], Rows=SHAPE[1], Columns=SHAPE[2], BitsStored=12, HighBit=11, PixelRepresentation=0
    )
    for z, dataset in enumerate(slices.values()):
        dataset.PixelData = ((x * y * 3 + 40 * z + x % 3) % 4096).astype(np.uint16).tobytes()
    return [(name, transcoded(dataset, syntax)) for name, dataset in slices.items()]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The file with a few bytes changed, a piece lost or put in, or a length that lies."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        place = chance.randrange(chance.choice((len(data), min(len(data), 1200))))
        kind = chance.randrange(6)
        if kind < 2:
            changed[place % len(changed)] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        elif kind == 2:
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 3:
            changed[place : place + 4] = chance.choice((0, 1, 2**31, 2**32 - 1, 2**16)).to_bytes(4, "little")
        elif kind == 4:
            del changed[place : place + chance.randrange(1, 40)]
        else:
            changed[place:place] = chance.randbytes(chance.randrange(1, 20))
        if len(changed) < 2:
            break
    return bytes(changed)


def outcome(files: Files) -> str:
    group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])
    try:
        volume = read_series(files, max_voxels=10**6)
    except ScanError as refused:
        return refused.reason.value
    assert volume.voxels_zyx.shape == SHAPE
    assert np.isfinite(volume.affine_lps).all()
    return "ok"


def mutate_for(seconds: float, seed: int) -> dict[str, int]:
    """Run in a process of its own: anything but a volume or a ScanError ends it."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import _series

    series = [smooth_series(_series, syntax) for syntax in SYNTAXES]
    for files in series:
        assert outcome(files) == "ok"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES_MORE,) * 2)
    chance, found = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        files = list(chance.choice(series))
        which = chance.randrange(3)
        files[which] = (files[which][0], mutated(files[which][1], chance))
        signal.alarm(SECONDS_EACH)
        found[outcome(files)] += 1
    signal.alarm(0)
    return dict(found)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_thousands_of_damaged_files_give_a_volume_or_a_reason_and_no_crash() -> None:
    run = subprocess.run(
        [sys.executable, __file__, "8", "20"], capture_output=True, text=True, timeout=120, check=False
    )

    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert sum(found.values()) > 1000
    assert set(found) - {"ok"} <= set(Reason)
    assert {"ok", "unreadable", "truncated"} <= set(found)


def refusal(files: Files, max_voxels: int = 10**9) -> Reason:
    with pytest.raises(ScanError) as refused:
        read_series(files, max_voxels=max_voxels)
    return refused.value.reason


@pytest.mark.parametrize("lie", [0, 1, 2**16, 2**31, 2**32 - 2, 2**32 - 1])
def test_every_length_may_lie(series_of: SeriesOf, file_bytes: ToBytes, lie: int) -> None:
    slices = series_of(3)
    slices["002.dcm"].add_new(0x00091001, "OB", b"private!")
    files = [(name, file_bytes(dataset)) for name, dataset in slices.items()]
    data = files[1][1]
    found = Counter[str]()
    for place in range(132, len(data) - 4, 2):
        files[1] = ("002.dcm", data[:place] + lie.to_bytes(4, "little") + data[place + 4 :])
        try:
            volume = read_series(files, max_voxels=10**6)
        except ScanError as refused:
            found[refused.reason.value] += 1
        else:
            assert volume.voxels_zyx.shape == (3, 6, 4)
            found["ok"] += 1
    assert found["truncated"] or found["unreadable"]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Rows": 40_000, "Columns": 20_000}, Reason.TRUNCATED),
        ({"Rows": 65_535, "Columns": 65_535}, Reason.TOO_LARGE),
        ({"NumberOfFrames": 2**30}, Reason.TOO_LARGE),
        ({"NumberOfFrames": 10**7}, Reason.UNSUPPORTED),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, Reason.TRUNCATED),
    ],
)
def test_claims_cost_no_memory(
    series_of: SeriesOf, file_bytes: ToBytes, tags: dict[str, int], reason: Reason
) -> None:
    files = [(name, file_bytes(dataset)) for name, dataset in series_of(1, **tags).items()]
    tracemalloc.start()

    assert refusal(files) == reason
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_deflated_bomb_is_inflated_no_further_than_its_header_claims(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    dataset = series_of(1)["001.dcm"]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.PixelData = bytes(300_000_000)
    data = file_bytes(dataset)
    del dataset
    tracemalloc.start()

    refusal([("001.dcm", data)])
    assert tracemalloc.get_traced_memory()[1] < 2.5 * MAX_HEADER_BYTES
    tracemalloc.stop()


def test_a_sequence_nested_without_end_is_refused(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    data = file_bytes(series_of(1)["001.dcm"])
    place = data.index(b"\x28\0\x02\0")
    deep = b"\x09\0\x01\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 20_000

    assert refusal([("1", data[:place] + deep + data[place:])]) == Reason.UNREADABLE


def test_no_message_repeats_what_a_header_says(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    """Identifiers stand wherever text may stand, in whole and in damaged files."""
    slices = series_of(4)
    for dataset in slices.values():
        dataset.PatientBirthDate, dataset.AccessionNumber = "19010203", "ACC0815"
    good = [(f"folder/{name}", file_bytes(dataset)) for name, dataset in slices.items()]
    chance, texts = random.Random(6), set()
    for _ in range(1500):
        data = bytearray(good[1][1])
        tag, secret = chance.choice(TEXT_TAGS), b"OTTOKAR4711"
        place = data.find(tag)
        if place > 0:
            length = data[place + 6]
            data[place + 8 : place + 8 + length] = (secret * 9)[:length]
        files = [good[0], (good[1][0], mutated(bytes(data), chance)), *good[2:]]
        texts |= messages(files)
    assert len(texts) > 15
    secrets = ("OTTOK", "TOKAR", "4711", "Quirin", "1901", "0815", "Nirgends", "folder/")
    assert not [text for text in texts if any(secret in text for secret in secrets)]


TEXT_TAGS = [
    number.to_bytes(2, "little") + element.to_bytes(2, "little")
    for number, element in (
        (0x0002, 0x0010), (0x0008, 0x0008), (0x0008, 0x0016), (0x0008, 0x0060), (0x0020, 0x000E),
        (0x0020, 0x0013), (0x0020, 0x0032), (0x0020, 0x0037), (0x0028, 0x0004), (0x0028, 0x0030),
        (0x0028, 0x1052), (0x0028, 0x1053),
    )
]  # fmt: skip


def messages(files: Files) -> set[str]:
    """What grouping and reading say of the files."""
    said = {
        found.message for found in group_into_scans([read_header(io.BytesIO(d), name) for name, d in files])
    }
    try:
        read_series(files, max_voxels=10**6, dicom_tags=["Manufacturer"])
    except ScanError as refused:
        said.add(str(refused))
    return said - {""}


if __name__ == "__main__":
    counts = mutate_for(float(sys.argv[1]), int(sys.argv[2]))
    os.write(1, ("\n" + json.dumps(counts) + "\n").encode())
