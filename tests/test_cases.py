"""Test inputs that an earlier version read wrongly or refused, if the folder of these cases is there.

Each case is a folder of CT, or a script that makes a Keras model. What is right is written here once more,
case by case. `pytest tests/test_cases.py` lists the cases that do not come out right, and thereby gives their
share.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from featray.config import Config, load
from featray.errors import Reason
from featray.schema import Decoded, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from featray.synthetic.phantom import make_phantom, write_nifti

pytestmark = pytest.mark.slow

CASES = Path(os.environ.get("FEATRAY_TEST_CASES", REPOSITORY.parent / "shared" / "cases"))
RESAMPLE = {"gantry_tilt": "resample", "irregular_spacing": "resample"}


@pytest.fixture(scope="module", autouse=True)
def _need_cases() -> None:
    if not (CASES / "README.md").is_file():
        pytest.skip(f"there are no cases in {CASES}; set FEATRAY_TEST_CASES to their folder")


def make_config(folder: Path, policy: dict[str, str]) -> Config:
    return load(
        {
            "source": {"uri": str(folder)},
            "policy": policy,
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def decode_all(folder: Path, **policy: str) -> list[Decoded]:
    """Return the outcomes of all scans in a folder, in Hounsfield units and with the voxels of the file."""
    config = make_config(folder, policy)
    decode = Decoder.from_config(config)
    return [decode(scan) for scan in list_scans(config.source, config.policy).scans]


def select_ok(outcomes: list[Decoded]) -> list[Decoded]:
    return [outcome for outcome in outcomes if outcome.record.status == "ok"]


def get_refused(outcomes: list[Decoded]) -> ScanRecord:
    """Return the row of the only scan; assert that it is refused with a reason of the contract."""
    (outcome,) = outcomes
    assert outcome.record.status != "ok"
    assert outcome.record.reason in {str(reason) for reason in Reason}
    assert outcome.record.message
    return outcome.record


def assert_equals_truth(outcome: Decoded, name: str) -> None:
    truth = np.load(CASES / "ct" / f"{name}.npy")
    assert outcome.tensor.shape == (1, *truth.shape)
    np.testing.assert_allclose(outcome.tensor[0], truth, atol=0.01)


@pytest.mark.parametrize("policy", [{}, RESAMPLE], ids=["default", "resample"])
@pytest.mark.parametrize("name", ["s1a_kernel", "s1b_acquisition"])
def test_two_volumes_that_interleave_are_two_scans_or_refused(name: str, policy: dict[str, str]) -> None:
    outcomes = decode_all(CASES / "ct" / name, **policy)
    ok = select_ok(outcomes)
    assert len(ok) in (0, 2)
    for outcome in ok:
        assert outcome.record.shape is not None
        assert outcome.record.shape[0] == 16
        assert outcome.record.spacing is not None
        assert outcome.record.spacing[0] == pytest.approx(5)
        assert outcome.record.warnings


@pytest.mark.parametrize("policy", [{}, RESAMPLE], ids=["default", "resample"])
def test_two_passes_that_overlap_are_never_blended(policy: dict[str, str]) -> None:
    ok = select_ok(decode_all(CASES / "ct" / "s2a_overlap_offgrid", **policy))
    assert len(ok) in (0, 2)
    for outcome in ok:
        assert len(np.unique(np.median(outcome.tensor[0], axis=(1, 2)))) == 1, "slices of both passes"


@pytest.mark.parametrize("name", ["s7q_split_folders_overlap", "s7m_two_study_uids_halves"])
def test_the_parts_of_a_series_are_one_scan_with_a_warning_or_all_fail(name: str) -> None:
    for outcome in select_ok(outcomes := decode_all(CASES / "ct" / name)):
        assert len(outcomes) == 1
        assert outcome.record.warnings
        assert_equals_truth(outcome, name)


def test_a_series_over_two_archives_is_one_scan_or_fails() -> None:
    for outcome in select_ok(decode_all(CASES / "ct" / "s10b_zip_parts_alternating")):
        assert outcome.record.shape is not None
        assert outcome.record.shape[0] == 12


@pytest.mark.parametrize("name", ["s13a_mr_class_end", "s13a_mr_class_middle"])
def test_a_slice_of_another_class_is_kept_with_a_warning_or_named_in_the_message(name: str) -> None:
    outcomes = decode_all(CASES / "ct" / name)
    ok = select_ok(outcomes)
    for outcome in ok:
        assert outcome.record.warnings
        assert_equals_truth(outcome, name)
    if not ok:
        assert any(re.search(r"\d{3}\.dcm", outcome.record.message or "") for outcome in outcomes)


def test_a_study_uid_for_each_slice_gives_one_scan_with_a_warning() -> None:
    (outcome,) = decode_all(CASES / "ct" / "s8a_sitk_processed_upper")
    assert outcome.record.warnings
    assert_equals_truth(outcome, "s8a_sitk_processed_upper")


@pytest.mark.parametrize(
    "name", ["s7a_j2k_garbage_pad", "s7a_jpll_garbage_pad", "s3y_rounded_positions_0p01"]
)
def test_a_sound_series_that_was_refused_is_read(name: str) -> None:
    (outcome,) = decode_all(CASES / "ct" / name)
    assert outcome.record.message is None
    assert_equals_truth(outcome, name)


@pytest.mark.parametrize("name", ["s5f2_quaternion_reported", "s6e_nrrd_int64"])
def test_a_sound_file_that_was_refused_is_read(name: str) -> None:
    (outcome,) = decode_all(CASES / "ct" / name)
    assert outcome.record.message is None


def test_a_gap_has_one_reason_with_every_policy() -> None:
    folder = CASES / "ct" / "s7j_gap_12p5"
    default, resample = get_refused(decode_all(folder)), get_refused(decode_all(folder, **RESAMPLE))
    assert default.reason == resample.reason
    assert "policy.irregular_spacing" not in (default.message or "")


def test_frames_without_rescale_among_frames_with_one_are_refused() -> None:
    record = get_refused(decode_all(CASES / "ct" / "s10a_enh_some_frames_no_rescale"))
    assert record.reason == "unreadable"
    assert "Rescale" in (record.message or "")


@pytest.mark.parametrize(
    ("name", "reason", "expected", "misleading"),
    [
        ("s7b_elscint_private_pixels", "unsupported", "private", "copy"),
        ("s7s_comma_spacing", "unreadable", "PixelSpacing", "copy the file again"),
        ("s5m_channel_first", None, "axis|axes|4-D|4D|dimension", "set source.volume"),
        ("s5v_meter_lie", None, "unit|xyzt_units|meter", "copy"),
        ("s6s_nrrd_time_spacings", None, "time|kind", "copy"),
    ],
)
def test_a_refusal_says_what_is_wrong(name: str, reason: str | None, expected: str, misleading: str) -> None:
    record = get_refused(decode_all(CASES / "ct" / name))
    assert reason in (None, record.reason)
    assert re.search(expected, record.message or "")
    assert misleading not in (record.message or "")


def test_an_archive_with_an_undecodable_name_fails_alone(tmp_path: Path) -> None:
    (archive,) = (CASES / "ct" / "zip_name_not_utf8").iterdir()
    (tmp_path / archive.name).write_bytes(archive.read_bytes())
    write_nifti(make_phantom(1, (5, 16, 12), (2.0, 1.5, 1.25)), tmp_path / "sound.nii.gz")
    outcomes = {outcome.record.scan_id: outcome.record for outcome in decode_all(tmp_path)}
    assert outcomes["sound.nii.gz"].status == "ok"
    assert len(outcomes) == 2


def is_right(line: str) -> bool:
    """Return whether a line that a script of a Keras case prints says that the case comes out right."""
    outcome = line.rpartition(" -> ")[2]
    if re.fullmatch(r"[-+.\de]+", outcome):
        return float(outcome) < 1e-4
    if line.startswith("c16"):
        errors = re.search(r"places (\S+) ; at masked (\S+) max (\S+) (\S+)", line)
        assert errors is not None
        unmasked, masked, ours, theirs = map(float, errors.groups())
        return unmasked < 1e-4 and (masked < 1e-4 or ours == theirs == 0)
    return outcome.startswith(("[", "(")) or "refused (right)" in outcome


EXPECTED_REFUSALS: dict[str, Callable[[str], bool]] = {
    "c15 extract embedding": lambda line: "embedding" in line and "is not in the model" not in line,
    "c15 layers": lambda line: True,
    "c15 stateful": lambda line: "l" in line,
    "c13 LSTM initial_state": lambda line: "model.constants" in line,
}
"""Beginning of a line → check of the message, for what cannot be computed."""


@pytest.fixture(scope="module")
def keras_lines() -> list[str]:
    """Return the lines that the scripts of the Keras cases print; each begins with the name of its script."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, "run_all.py"],
        cwd=CASES / "keras",
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.splitlines()


@pytest.mark.parametrize("script", sorted((CASES / "keras").glob("c*.py")), ids=lambda path: path.stem)
def test_a_keras_model_gives_the_values_of_its_own_keras(script: Path, keras_lines: list[str]) -> None:
    lines = [line for line in keras_lines if line.startswith((script.stem[:3] + " ", script.name))]
    assert lines
    wrong = []
    for line in lines:
        check = next((c for start, c in EXPECTED_REFUSALS.items() if line.startswith(start)), is_right)
        if not (is_right(line) or check(line)):
            wrong.append(line)
    assert not wrong
