"""Damaged and hostile DICOM files give a volume or a reason, in limited time and memory, without a crash."""

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
MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]

TRANSFER_SYNTAXES = ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "ExplicitVRBigEndian", "RLELossless"]
TRANSFER_SYNTAXES += [
    "DeflatedExplicitVRLittleEndian",
    "JPEGLosslessProcess14_1",
    "JPEGLSLossless",
    "JPEG2000Lossless",
]
SHAPE = (3, 24, 20)
SECONDS_PER_FILE, EXTRA_BYTES = 5, 2**29
MUTATIONS = 1500


def transcode(dataset: Dataset, syntax: str) -> bytes:
    """Return the file content after GDCM has changed the transfer syntax; `syntax` is GDCM's name for it."""
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


def make_smooth_files(make_series: MakeSeries, syntax: str) -> Files:
    """Return the files of three slices of 12 bits whose values compress well."""
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    slices = make_series(
        SHAPE[0], Rows=SHAPE[1], Columns=SHAPE[2], BitsStored=12, HighBit=11, PixelRepresentation=0
    )
    for z, dataset in enumerate(slices.values()):
        dataset.PixelData = ((x * y * 3 + 40 * z + x % 3) % 4096).astype(np.uint16).tobytes()
    return [(name, transcode(dataset, syntax)) for name, dataset in slices.items()]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the file with a few random changes: bytes or lengths changed, pieces deleted or inserted."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        offset = rng.randrange(rng.choice((len(data), min(len(data), 1200))))
        change = rng.randrange(6)
        if change < 2:
            changed[offset % len(changed)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        elif change == 2:
            changed[offset % len(changed)] ^= 1 << rng.randrange(8)
        elif change == 3:
            changed[offset : offset + 4] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**16)).to_bytes(4, "little")
        elif change == 4:
            del changed[offset : offset + rng.randrange(1, 40)]
        else:
            changed[offset:offset] = rng.randbytes(rng.randrange(1, 20))
        if len(changed) < 2:
            break
    return bytes(changed)


def read_outcome(files: Files) -> str:
    group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])
    try:
        volume = read_series(files, max_voxels=10**6)
    except ScanError as caught:
        return caught.reason.value
    assert volume.voxels_zyx.shape == SHAPE
    assert np.isfinite(volume.affine_lps).all()
    return "ok"


def run_mutations(number: int, seed: int) -> dict[str, int]:
    """Read a number of damaged series and count the outcomes.

    Runs in a separate process, which every outcome except a volume and a ScanError ends.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import make_datasets

    series = [make_smooth_files(make_datasets, syntax) for syntax in TRANSFER_SYNTAXES]
    for files in series:
        assert read_outcome(files) == "ok"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES,) * 2)
    rng, counts = random.Random(seed), Counter[str]()
    for _ in range(number):
        files = list(rng.choice(series))
        index = rng.randrange(3)
        files[index] = (files[index][0], mutate(files[index][1], rng))
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_FILE)
        counts[read_outcome(files)] += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    return dict(counts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit works only on Linux")
def test_thousands_of_damaged_files_give_a_volume_or_a_reason_and_no_crash() -> None:
    run = subprocess.run(
        [sys.executable, __file__, str(MUTATIONS), "20"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert run.returncode == 0, run.stderr[-2000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == MUTATIONS
    assert set(outcomes) - {"ok"} <= set(Reason)
    assert {"ok", "unreadable", "truncated"} <= set(outcomes)


def read_refusal_reason(files: Files, max_voxels: int = 10**9) -> Reason:
    with pytest.raises(ScanError) as caught:
        read_series(files, max_voxels=max_voxels)
    return caught.value.reason


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**31, 2**32 - 2, 2**32 - 1])
def test_a_wrong_length_at_any_offset_gives_a_volume_or_a_reason(
    make_series: MakeSeries, encode_file: EncodeFile, length: int
) -> None:
    slices = make_series(3)
    slices["002.dcm"].add_new(0x00091001, "OB", b"private!")
    files = [(name, encode_file(dataset)) for name, dataset in slices.items()]
    data = files[1][1]
    outcomes = Counter[str]()
    for offset in range(132, len(data) - 4, 2):
        files[1] = ("002.dcm", data[:offset] + length.to_bytes(4, "little") + data[offset + 4 :])
        try:
            volume = read_series(files, max_voxels=10**6)
        except ScanError as caught:
            outcomes[caught.reason.value] += 1
        else:
            assert volume.voxels_zyx.shape == (3, 6, 4)
            outcomes["ok"] += 1
    assert outcomes["truncated"] or outcomes["unreadable"]


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
def test_large_claims_in_a_header_allocate_no_memory(
    make_series: MakeSeries, encode_file: EncodeFile, tags: dict[str, int], reason: Reason
) -> None:
    files = [(name, encode_file(dataset)) for name, dataset in make_series(1, **tags).items()]
    tracemalloc.start()

    assert read_refusal_reason(files) == reason
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.slow
def test_a_deflate_bomb_is_inflated_only_up_to_the_header_limit(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    dataset = make_series(1)["001.dcm"]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.PixelData = bytes(300_000_000)
    data = encode_file(dataset)
    del dataset
    tracemalloc.start()

    read_refusal_reason([("001.dcm", data)])
    assert tracemalloc.get_traced_memory()[1] < 2.5 * MAX_HEADER_BYTES
    tracemalloc.stop()


def test_a_deeply_nested_sequence_is_unreadable(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    data = encode_file(make_series(1)["001.dcm"])
    offset = data.index(b"\x28\0\x02\0")
    deep = b"\x09\0\x01\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 20_000

    assert read_refusal_reason([("1", data[:offset] + deep + data[offset:])]) == Reason.UNREADABLE


@pytest.mark.slow
def test_no_message_repeats_text_from_a_header(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    """Put identifiers into all text elements, of intact and of damaged files, and search all messages."""
    slices = make_series(4)
    for dataset in slices.values():
        dataset.PatientBirthDate, dataset.AccessionNumber = "19010203", "ACC0815"
    good = [(f"folder/{name}", encode_file(dataset)) for name, dataset in slices.items()]
    rng, texts = random.Random(6), set()
    for _ in range(1500):
        data = bytearray(good[1][1])
        tag, secret = rng.choice(TEXT_TAGS), b"OTTOKAR4711"
        offset = data.find(tag)
        if offset > 0:
            length = data[offset + 6]
            data[offset + 8 : offset + 8 + length] = (secret * 9)[:length]
        files = [good[0], (good[1][0], mutate(bytes(data), rng)), *good[2:]]
        texts |= collect_messages(files)
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


def collect_messages(files: Files) -> set[str]:
    """Return the messages of grouping and reading the files."""
    texts = {
        scan.message for scan in group_into_scans([read_header(io.BytesIO(d), name) for name, d in files])
    }
    try:
        read_series(files, max_voxels=10**6, dicom_tags=["Manufacturer"])
    except ScanError as caught:
        texts.add(str(caught))
    return texts - {""}


if __name__ == "__main__":
    counts = run_mutations(int(sys.argv[1]), int(sys.argv[2]))
    os.write(1, ("\n" + json.dumps(counts) + "\n").encode())
