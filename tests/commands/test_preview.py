"""`featray preview`: values of the tensor, planes and letters of the picture, privacy, and no model."""

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
from featray.commands import montage
from featray.commands.montage import VoxelGrid, draw_montage, spread_indices
from featray.commands.preview import preview
from featray.config import PreprocessConfig, load
from featray.ct.volume import Volume
from featray.errors import ConfigError, UsageError
from featray.schema import ScanRecord
from featray.stages.preprocess import preprocess
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SIZE = [8, 20, 24]
NO_ORIGINS = np.zeros((1, 3), np.int32)


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Return a folder with a damaged file, two NIfTI files of similar ids, and a DICOM series."""
    folder = tmp_path / "ct"
    (folder / "b").mkdir(parents=True)
    (folder / "a.nii").write_bytes(b"no NIfTI")
    write_nifti(make_phantom(1, (6, 16, 16)), folder / "b" / "1.nii.gz")
    write_nifti(make_phantom(2, (6, 16, 16)), folder / "b_1.nii.gz")
    write_dicom_series(make_phantom(3, (6, 16, 16)), folder / "series", name="Quirinius Ottokar")
    return folder


@pytest.fixture
def config(collection: Path) -> dict[str, Any]:
    """Return a config for the collection; its model file does not exist."""
    return {
        "source": {"uri": str(collection)},
        "preprocess": {"size": SIZE},
        "model": {"uri": "nowhere.keras", "layers": ["z"]},
        "output": {"uri": str(collection.parent / "out")},
    }


def count_caption_rows(picture: NDArray[np.uint8], cell_rows: int) -> int:
    """Return the height of the caption in pixels, for a picture with this number of rows of cells."""
    return picture.shape[0] - cell_rows * (montage.PANEL_PIXELS + 2 * montage._MARGIN + montage._LINE_HEIGHT)


def test_the_tensor_equals_the_preprocessed_volume_and_the_picture_is_not_blank(
    config: dict[str, Any], tmp_path: Path
) -> None:
    result = preview(config, scan="b/1.nii.gz", directory=tmp_path / "preview")
    phantom = make_phantom(1, (6, 16, 16))
    volume = Volume(phantom.voxels_zyx, phantom.affine_lps)
    expected = preprocess(volume, PreprocessConfig(size=SIZE)).tensor  # type: ignore[arg-type]
    tensor = np.load(result.tensor or "", allow_pickle=False)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, expected)
    assert result.shape == (1, *SIZE)
    assert (result.minimum, result.maximum) == (tensor.min(), tensor.max())
    assert cv2.imread(result.montage or "", cv2.IMREAD_GRAYSCALE).std() > 10


def test_the_first_usable_scan_is_shown_and_skipped_scans_are_named(
    config: dict[str, Any], tmp_path: Path
) -> None:
    result = preview(config, directory=tmp_path / "preview")
    assert (result.scan_id, result.status) == ("b/1.nii.gz", "ok")
    assert result.skipped == (("a.nii", "unreadable"),)
    assert "skipped   a.nii (unreadable)" in result.text()


def test_an_unusable_scan_gives_its_reason_and_no_files(config: dict[str, Any], tmp_path: Path) -> None:
    result = preview(config, scan="a.nii", directory=tmp_path / "preview")
    assert (result.status, result.reason, result.exit_code) == ("failed", "unreadable", 3)
    assert "not NIfTI" in result.text()
    assert not (tmp_path / "preview").exists()


def test_an_unknown_id_is_an_error_that_names_similar_ids(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'b/2\.nii\.gz'; similar ids: b[/_]1\.nii\.gz"):
        preview(config, scan="b/2.nii.gz", directory=tmp_path)
    with pytest.raises(UsageError, match=r"similar ids: series$"):
        preview(config, scan="serie", directory=tmp_path)


def test_ids_that_differ_only_in_a_slash_get_different_files(config: dict[str, Any], tmp_path: Path) -> None:
    first, second = (preview(config, scan=name, directory=tmp_path) for name in ("b/1.nii.gz", "b_1.nii.gz"))
    assert Path(first.montage or "").parent == Path(second.montage or "").parent == tmp_path
    assert first.montage != second.montage
    assert Path(second.montage or "").name == "b_1.nii.gz.png"


@pytest.mark.parametrize(
    "scan_id", ["../../up", "/root", "..", "a/../../b", "x" * 300, "ä/ö", "-rf", ".hidden"]
)
def test_no_id_gives_a_path_outside_the_folder(scan_id: str) -> None:
    from featray.commands.preview import _make_stem

    stem = _make_stem(scan_id)
    assert Path(stem).name == stem
    assert stem.isascii()
    assert stem[0] not in ".-"
    assert len(stem) < 120


def test_a_folder_that_cannot_be_created_is_wrong_usage(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="--out"):
        preview(config, scan="b/1.nii.gz", directory=tmp_path / "file")


@pytest.mark.parametrize("shape", [(7,), (6, 7), (4, 6, 7), (4, 6, 7, 2)], ids=str)
def test_arrays_of_every_rank_are_written_as_the_model_receives_them(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).random(shape, np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", values)
    result = preview(
        {
            "source": {"uri": str(tmp_path / "in"), "format": "npy"},
            "model": {"uri": "nowhere.keras", "layers": ["z"]},
            "output": {"uri": str(tmp_path / "out")},
        },
        directory=tmp_path / "preview",
    )
    assert (result.status, result.orientation, result.voxel_mm) == ("ok", None, None)
    np.testing.assert_array_equal(np.load(result.tensor or ""), values[np.newaxis])
    assert "array (" in result.text()


def test_the_patient_name_appears_nowhere(config: dict[str, Any], tmp_path: Path) -> None:
    result = preview(config, scan="series", directory=tmp_path / "preview")
    assert result.status == "ok"
    text = repr(result) + result.text()
    files = [path.read_bytes() for path in (tmp_path / "preview").iterdir()]
    assert "Ottokar" not in text
    assert not any(b"Ottokar" in data for data in files)


@pytest.mark.slow
def test_no_model_is_loaded_and_neither_tensorflow_nor_ray_is_imported(
    config: dict[str, Any], tmp_path: Path
) -> None:
    code = (
        "import json, sys; from featray.commands.preview import preview; "
        "result = preview(json.loads(sys.argv[1]), scan='b/1.nii.gz', directory=sys.argv[2]); "
        "assert result.status == 'ok'; assert not {'tensorflow', 'keras', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(config), str(tmp_path / "preview")], check=True)


def test_the_command_prints_text_or_json_and_returns_its_exit_codes(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "config.yaml", str(tmp_path / "preview")
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
    ("options", "expected"),
    [
        ({}, (5, 0.5, 2)),  # native spacing, reordered from SAL to LPS
        ({"size": (6, 8, 10)}, (5 * 12 / 6, 0.5 * 8 / 8, 2 * 4 / 10)),
        ({"size": (6, 8, 10), "align_corners": True}, (5 * 11 / 5, 0.5, 2 * 3 / 9)),
        ({"size": (6, 8, 10), "align_corners": True, "interpolation": "area"}, (10, 0.5, 0.8)),
        ({"spacing": (1, 1, 1)}, (1, 1, 1)),
        ({"spacing": (1, 1, 1), "size": (6, 4, 4)}, (10, 1, 2)),
        ({"spacing": (1, 1, 1), "size": (6, 4, 4), "fit": "crop_pad"}, (1, 1, 1)),
    ],
)
def test_the_voxel_spacing_of_the_input_follows_its_axes(
    options: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    from featray.commands.input_view import compute_voxel_mm

    # array axis z runs from right to left: 4 voxels of 2 mm; y from back to front: 8 of 0.5 mm;
    # x upwards: 12 of 5 mm
    record = ScanRecord("id", "", "nifti", shape=[4, 8, 12], spacing=[2, 0.5, 5], orientation="SAL")
    sections = {"source": {"uri": "ct"}, "model": {"uri": "m", "layers": ["z"]}, "output": {"uri": "out"}}
    config = load({**sections, "preprocess": {"size": None, **options}})
    assert compute_voxel_mm(record, config.preprocess) == pytest.approx(expected)


def test_titles_and_letters_follow_the_orientation() -> None:
    panels = list(
        montage._make_panels(
            np.zeros((1, 2, 3, 4), np.float32), NO_ORIGINS, VoxelGrid((1, 1, 1), "LPS"), (0, 1)
        )
    )
    assert [panel.title for panel in panels] == ["axial z=0", "axial z=1", "coronal y=1", "sagittal x=2"]
    assert [panel.edges for panel in panels] == ["RLAP", "RLAP", "RLSI", "APSI"]  # left, right, top, bottom


def test_titles_and_letters_follow_another_axis_order() -> None:
    tensor = np.zeros((1, 2, 3, 4), np.float32)
    panels = list(montage._make_panels(tensor, NO_ORIGINS, VoxelGrid((1, 1, 1), "SAR"), (0, 1)))
    assert [panel.title for panel in panels][1:] == ["sagittal z=1", "coronal y=1", "axial x=2"]
    assert [panel.edges for panel in panels][1:] == ["ISPA", "ISRL", "PARL"]


def test_planes_hold_rows_and_columns_of_the_tensor_with_z_upwards() -> None:
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    panels = list(montage._make_planes(volume, VoxelGrid((3, 2, 1))))
    np.testing.assert_array_equal(panels[1].values, volume[1])
    np.testing.assert_array_equal(panels[2].values, volume[::-1, 1])
    np.testing.assert_array_equal(panels[3].values, volume[::-1, :, 2])
    assert [panel.proportions for panel in panels[1:]] == [(2, 1), (3, 1), (3, 2)]


def test_gray_values_cover_the_scale_and_panels_have_the_proportions_of_the_patient() -> None:
    tensor = np.zeros((1, 1, 2, 2), np.float32)
    tensor[..., 1] = [0.5, 2]
    picture = draw_montage(tensor, NO_ORIGINS, gray=(0, 1), caption=["a"], grid=VoxelGrid((1, 0.5, 1)))
    panel = picture[
        count_caption_rows(picture, 1) + montage._LINE_HEIGHT + montage._MARGIN :, montage._MARGIN :
    ]
    # voxels are half as high as wide, so the panel covers the middle half of its cell
    upper, lower = montage.PANEL_PIXELS // 4 + 10, 3 * montage.PANEL_PIXELS // 4 - 10
    assert [panel[upper, 10], panel[upper, montage.PANEL_PIXELS - 10]] == [0, 128]
    assert [panel[lower, 10], panel[lower, montage.PANEL_PIXELS - 10]] == [0, 255]
    assert panel[10, 10] == montage._BACKGROUND


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
def test_tensors_of_every_rank_give_a_picture(shape: tuple[int, ...], panels: int, constant: bool) -> None:
    tensor = np.random.default_rng(0).random(shape, np.float32) * (not constant)
    gray = (float(tensor.min()), float(tensor.max()))
    picture = draw_montage(tensor, np.zeros((shape[0], 3), np.int32), gray=gray, caption=["ü" * 400])
    columns = min(6, max(3, panels))
    assert picture.dtype == np.uint8
    assert picture.shape[1] == columns * (montage.PANEL_PIXELS + 2 * montage._MARGIN)
    assert count_caption_rows(picture, -(-panels // columns)) > 0


def test_titles_of_patches_show_their_origins() -> None:
    tensor, origins = np.zeros((2, 2, 2, 2), np.float32), np.array([[0, 0, 0], [0, 16, 8]], np.int32)
    titles = [
        panel.title for panel in montage._make_panels(tensor, origins, VoxelGrid((1, 1, 1), "LPS"), (0, 1))
    ]
    assert titles == ["patch 0: z=0 y=0 x=0", "patch 1: z=0 y=16 x=8"]


def test_indices_are_spread_from_the_first_to_the_last() -> None:
    assert spread_indices(3, 5) == [0, 1, 2]
    assert spread_indices(9, 3) == [0, 4, 8]
