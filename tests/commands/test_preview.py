"""What a person is shown of one scan: the tensor's own values, the right letters, no name, no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from featray.cli.main import main
from featray.commands import montage as pictures
from featray.commands.montage import montage, spread_indices
from featray.commands.preview import preview
from featray.config import PreprocessConfig, load
from featray.ct.volume import Volume
from featray.errors import ConfigError, UsageError
from featray.schema import ScanRecord
from featray.stages.preprocess import preprocess
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SIZE = [8, 20, 24]
CORNER = (slice(pictures._LINE + pictures._MARGIN, None), slice(pictures._MARGIN, None))
"""Where the first panel begins below the caption, when it fills its cell."""


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Return a folder with a broken, a whole, a nested and a DICOM scan; the model named is not there."""
    folder = tmp_path / "ct"
    (folder / "b").mkdir(parents=True)
    (folder / "a.nii").write_bytes(b"no NIfTI")
    write_nifti(make_phantom(1, (6, 16, 16)), folder / "b" / "1.nii.gz")
    write_nifti(make_phantom(2, (6, 16, 16)), folder / "b_1.nii.gz")
    write_dicom_series(make_phantom(3, (6, 16, 16)), folder / "series", name="Quirinius Ottokar")
    return folder


@pytest.fixture
def config(collection: Path) -> dict[str, Any]:
    """Return a config for the collection."""
    return {
        "source": {"uri": str(collection)},
        "preprocess": {"size": SIZE},
        "model": {"uri": "nowhere.keras", "layers": ["z"]},
        "output": {"uri": str(collection.parent / "out")},
    }


def caption_rows(picture: NDArray[np.uint8], cells: int) -> int:
    """Return how many rows of the picture lie above its cells."""
    return picture.shape[0] - cells * (pictures.PANEL + 2 * pictures._MARGIN + pictures._LINE)


def test_the_tensor_is_what_preprocessing_gives_and_the_picture_is_there(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = preview(config, scan="b/1.nii.gz", directory=tmp_path / "shown")
    phantom = make_phantom(1, (6, 16, 16))
    volume = Volume(phantom.voxels_zyx, phantom.affine_lps)
    want = preprocess(volume, PreprocessConfig(size=SIZE)).tensor  # type: ignore[arg-type]
    tensor = np.load(found.tensor or "", allow_pickle=False)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, want)
    assert found.shape == (1, *SIZE)
    assert (found.minimum, found.maximum) == (tensor.min(), tensor.max())
    assert cv2.imread(found.montage or "", cv2.IMREAD_GRAYSCALE).std() > 10


def test_the_first_usable_scan_is_shown_and_the_skipped_ones_are_named(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = preview(config, directory=tmp_path / "shown")
    assert (found.scan_id, found.status) == ("b/1.nii.gz", "ok")
    assert found.skipped == (("a.nii", "unreadable"),)
    assert "skipped   a.nii (unreadable)" in found.text()


def test_a_scan_that_cannot_be_used_says_why_and_writes_nothing(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = preview(config, scan="a.nii", directory=tmp_path / "shown")
    assert (found.status, found.reason, found.exit_code) == ("failed", "unreadable", 3)
    assert "not NIfTI" in found.text()
    assert not (tmp_path / "shown").exists()


def test_an_unknown_id_names_those_near_it(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'b/2\.nii\.gz'; near it: b[/_]1\.nii\.gz"):
        preview(config, scan="b/2.nii.gz", directory=tmp_path)
    with pytest.raises(UsageError, match=r"near it: series$"):
        preview(config, scan="serie", directory=tmp_path)


def test_ids_that_differ_only_in_a_slash_get_files_of_their_own(
    config: dict[str, Any], tmp_path: Path
) -> None:
    first, second = (preview(config, scan=name, directory=tmp_path) for name in ("b/1.nii.gz", "b_1.nii.gz"))
    assert Path(first.montage or "").parent == Path(second.montage or "").parent == tmp_path
    assert first.montage != second.montage
    assert Path(second.montage or "").name == "b_1.nii.gz.png"


@pytest.mark.parametrize(
    "scan_id", ["../../up", "/root", "..", "a/../../b", "x" * 300, "ä/ö", "-rf", ".hidden"]
)
def test_no_id_leads_out_of_the_folder(scan_id: str) -> None:
    from featray.commands.preview import _stem

    stem = _stem(scan_id)
    assert Path(stem).name == stem
    assert stem.isascii()
    assert stem[0] not in ".-"
    assert len(stem) < 120


def test_a_folder_that_cannot_be_made_is_a_wrong_usage(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="--out"):
        preview(config, scan="b/1.nii.gz", directory=tmp_path / "file")


@pytest.mark.parametrize("shape", [(7,), (6, 7), (4, 6, 7), (4, 6, 7, 2)], ids=str)
def test_arrays_of_every_rank_are_shown_as_the_model_gets_them(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).random(shape, np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", values)
    found = preview(
        {
            "source": {"uri": str(tmp_path / "in"), "format": "npy"},
            "model": {"uri": "nowhere.keras", "layers": ["z"]},
            "output": {"uri": str(tmp_path / "out")},
        },
        directory=tmp_path / "shown",
    )
    assert (found.status, found.orientation, found.voxel_mm) == ("ok", None, None)
    np.testing.assert_array_equal(np.load(found.tensor or ""), values[np.newaxis])
    assert "array (" in found.text()


def test_nothing_of_the_patient_is_shown(config: dict[str, Any], tmp_path: Path) -> None:
    found = preview(config, scan="series", directory=tmp_path / "shown")
    assert found.status == "ok"
    shown = repr(found) + found.text()
    files = [path.read_bytes() for path in (tmp_path / "shown").iterdir()]
    assert "Ottokar" not in shown
    assert not any(b"Ottokar" in data for data in files)


def test_no_model_is_loaded_and_neither_tensorflow_nor_ray_imported(
    config: dict[str, Any], tmp_path: Path
) -> None:
    code = (
        "import json, sys; from featray.commands.preview import preview; "
        "found = preview(json.loads(sys.argv[1]), scan='b/1.nii.gz', directory=sys.argv[2]); "
        "assert found.status == 'ok'; assert not {'tensorflow', 'keras', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(config), str(tmp_path / "shown")], check=True)


def test_the_command_answers_in_words_and_in_json_with_its_exit_codes(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "config.yaml", str(tmp_path / "shown")
    file.write_text(json.dumps(config))
    assert main(["preview", str(file), "--out", out, "--set", "preprocess.size=[4,8,8]"]) == 0
    assert "model input (1, 4, 8, 8)" in capsys.readouterr().out
    assert main(["preview", str(file), "--out", out, "--json", "--scan", "series"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["shape"] == [1, *SIZE]
    assert Path(answer["montage"]).is_file()
    assert main(["preview", str(file), "--out", out, "--scan", "a.nii"]) == 3
    assert main(["preview", str(file), "--out", out, "--scan", "nobody"]) == 2


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, (5, 0.5, 2)),  # native: LPS from SRP is (x of S) 5, (y of R) 0.5, (z of P) 2
        ({"size": (6, 8, 10)}, (5 * 12 / 6, 0.5 * 8 / 8, 2 * 4 / 10)),
        ({"size": (6, 8, 10), "align_corners": True}, (5 * 11 / 5, 0.5, 2 * 3 / 9)),
        ({"size": (6, 8, 10), "align_corners": True, "interpolation": "area"}, (10, 0.5, 0.8)),
        ({"spacing": (1, 1, 1)}, (1, 1, 1)),
        ({"spacing": (1, 1, 1), "size": (6, 4, 4)}, (10, 1, 2)),
        ({"spacing": (1, 1, 1), "size": (6, 4, 4), "fit": "crop_pad"}, (1, 1, 1)),
    ],
)
def test_the_voxels_of_the_input_are_measured_in_mm_along_its_own_axes(
    options: dict[str, Any], want: tuple[float, float, float]
) -> None:
    from featray.commands.preview import _voxel_mm

    # stored along z: right to left, 4 voxels of 2 mm; y: back to front, 8 of 0.5; x: up, 12 of 5 mm
    record = ScanRecord("id", "", "nifti", shape=[4, 8, 12], spacing=[2, 0.5, 5], orientation="SAL")
    sections = {"source": {"uri": "ct"}, "model": {"uri": "m", "layers": ["z"]}, "output": {"uri": "out"}}
    config = load({**sections, "preprocess": {"size": None, **options}})
    assert _voxel_mm(record, config) == pytest.approx(want)


def test_the_letters_follow_the_orientation() -> None:
    panels = list(
        pictures._panels(
            np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 3), np.int32), (1, 1, 1), "LPS", (0, 1)
        )
    )
    assert [panel.title for panel in panels] == ["axial z=0", "axial z=1", "coronal y=1", "sagittal x=2"]
    assert [panel.edges for panel in panels] == ["RLAP", "RLAP", "RLSI", "APSI"]  # left, right, top, bottom


def test_letters_turn_with_an_array_of_other_axes() -> None:
    tensor = np.zeros((1, 2, 3, 4), np.float32)
    panels = list(pictures._panels(tensor, np.zeros((1, 3), np.int32), (1, 1, 1), "SAR", (0, 1)))
    assert [panel.title for panel in panels][1:] == ["sagittal z=1", "coronal y=1", "axial x=2"]
    assert [panel.edges for panel in panels][1:] == ["ISPA", "ISRL", "PARL"]


def test_planes_hold_the_tensors_own_rows_and_columns_with_z_upwards() -> None:
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    panels = list(pictures._planes(volume, (3, 2, 1), ""))
    np.testing.assert_array_equal(panels[1].values, volume[1])
    np.testing.assert_array_equal(panels[2].values, volume[::-1, 1])
    np.testing.assert_array_equal(panels[3].values, volume[::-1, :, 2])
    assert [panel.proportions for panel in panels[1:]] == [(2, 1), (3, 1), (3, 2)]


def test_grays_run_over_the_scale_and_proportions_are_those_of_the_patient() -> None:
    tensor = np.zeros((1, 1, 2, 2), np.float32)
    tensor[..., 1] = [0.5, 2]
    picture = montage(
        tensor, np.zeros((1, 3), np.int32), gray=(0, 1), caption=["a"], voxel_mm=(1, 0.5, 1), orientation=None
    )
    panel = picture[caption_rows(picture, 1) + pictures._LINE + pictures._MARGIN :, pictures._MARGIN :]
    upper, lower = pictures.PANEL // 4 + 10, 3 * pictures.PANEL // 4 - 10  # rows are half as high as wide
    assert [panel[upper, 10], panel[upper, pictures.PANEL - 10]] == [0, 128]
    assert [panel[lower, 10], panel[lower, pictures.PANEL - 10]] == [0, 255]
    assert panel[10, 10] == pictures._BACKGROUND


@pytest.mark.parametrize(
    ("shape", "panels"),
    [
        ((1, 9), 1),
        ((5, 9), 5),
        ((1, 1), 1),
        ((2, 6, 7), 2),
        ((1, 4, 5, 6), 6),
        ((3, 4, 5, 6), 3),
        ((1, 40, 5, 6), 14),
        ((100, 2, 2, 2), 24),
        ((1, 4, 5, 6, 2), 6),
        ((1, 1, 1, 1), 3),
        ((1, 2, 2, 5000), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("constant", [False, True])
def test_every_rank_of_tensor_gives_a_picture(shape: tuple[int, ...], panels: int, constant: bool) -> None:
    tensor = np.random.default_rng(0).random(shape, np.float32) * (not constant)
    gray = (float(tensor.min()), float(tensor.max()))
    picture = montage(tensor, np.zeros((shape[0], 3), np.int32), gray=gray, caption=["ü" * 400])
    columns = min(6, max(3, panels))
    assert picture.dtype == np.uint8
    assert picture.shape[1] == columns * (pictures.PANEL + 2 * pictures._MARGIN)
    assert caption_rows(picture, -(-panels // columns)) > 0


def test_patches_are_titled_with_their_origins() -> None:
    tensor, origins = np.zeros((2, 2, 2, 2), np.float32), np.array([[0, 0, 0], [0, 16, 8]], np.int32)
    titles = [panel.title for panel in pictures._panels(tensor, origins, (1, 1, 1), "LPS", (0, 1))]
    assert titles == ["patch 0: z=0 y=0 x=0", "patch 1: z=0 y=16 x=8"]


def test_indices_are_spread_from_the_first_to_the_last() -> None:
    assert spread_indices(3, 5) == [0, 1, 2]
    assert spread_indices(9, 3) == [0, 4, 8]
