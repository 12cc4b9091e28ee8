"""Outputs have every name that all libraries read alike; other names are refused before work begins."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as pads
import pytest
from stages.test_commit import make_committer, make_decoded, read_values, write_receipt

from featray.commands.export import export
from featray.commands.verify import verify
from featray.errors import ConfigError, ModelError
from featray.job import _refuse_long_names
from featray.output.dataset import Dataset
from featray.output.read import read
from featray.storage.names import find_name_problem
from featray.storage.store import Store


@pytest.mark.parametrize(
    "name", ["a b", " a ", "äöü 日本", "a#b", "a?b", "a%b", "100%", "a*b", "[a]", "a:b", "a;b'\"", "ä" * 127]
)
def test_an_output_with_an_unusual_name_is_found_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    dataset = Dataset(Store(str(folder)))
    dataset.store.check_writable()
    make_committer(dataset).commit([write_receipt(dataset, make_decoded("a", 1))])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    opened = Dataset(Store(str(folder)))
    assert read_values(opened) == {"a": 1}
    assert verify(opened).exit_code == 0
    assert read(str(folder), "z_mean").scan_ids.tolist() == ["a"]
    export(opened, str(tmp_path / "plain"))
    files = list((folder / "features" / "layer=z_mean").glob("*.parquet"))
    assert pads.dataset(files, format="parquet").count_rows() == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a%20b", "contains %20"),
        ("a%2520b", "contains %25"),
        ("a\\b", r"contains \\"),
        ("a\tb", "control character"),
        ("a\nb", "control character"),
        ("a\x7fb", "control character"),
        ("a::b", "contains `::`"),
        ("ä" * 128, "a name of 256 bytes, but file systems allow 255"),
        ("/".join(["x" * 200] * 20), "leave room for the files in it"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_name_that_libraries_read_differently_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"output.uri: the path .*{message}"):
        Store(str(tmp_path / name)).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a\\b", "a\tb"])
def test_a_url_that_libraries_read_differently_is_refused(name: str) -> None:
    assert "contains" in find_name_problem(f"s3://bucket/{name}/out", f"bucket/{name}/out", is_local=False)


@pytest.mark.parametrize("name", ["a b", "äöü", "a%b", "a&b=c", "x" * 300])
def test_other_urls_are_accepted(name: str) -> None:
    assert find_name_problem(f"s3://bucket/{name}", f"bucket/{name}", is_local=False) == ""


def test_a_layer_whose_folder_would_have_a_longer_name_than_file_systems_allow_is_refused() -> None:
    _refuse_long_names(["x" * 249, "日" * 27])
    for name in ("x" * 250, "日" * 28):
        with pytest.raises(ModelError, match=r"25\d bytes, but file systems allow 255; .* as: NAME"):
            _refuse_long_names([name])
