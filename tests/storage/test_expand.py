"""Home folders and environment variables in paths are expanded, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featray.cli.main import make_parser
from featray.config import load
from featray.errors import ConfigError
from featray.storage.expand import escape_path, expand_path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/ct", "/home/someone/ct"),
        ("~", "/home/someone"),
        ("~root/ct", "/root/ct"),
        ("file://~/ct", "file:///home/someone/ct"),
        ("$HOME/ct", "/home/someone/ct"),
        ("${DATA}/ct/*.nii", "/data/ct/*.nii"),
        ("s3://bucket$DATA/~x", "s3://bucket/data/~x"),
        ("a/~b", "a/~b"),
        ("$$HOME/$1", "$HOME/$1"),
        ("./~b", "./~b"),
    ],
)
def test_paths_are_expanded_as_a_shell_does(path: str, expanded: str) -> None:
    assert expand_path(path) == expanded
    assert expand_path(escape_path(expanded)) == expanded


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$UNSET/x", "the environment variable UNSET is not set"),
        ("${UNSET}/x", "the environment variable UNSET is not set"),
        ("${}/x", "is not the name of an environment variable"),
        ("${DATA:-x}", "is not the name of an environment variable"),
        (
            "~nobody-here/x",
            "~nobody-here names no user; for a file or folder of this name write ./~nobody-here",
        ),
    ],
)
def test_what_cannot_be_expanded_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("$", r"\$")):
        expand_path(path)


def make_config(**uris: str) -> dict[str, Any]:
    return {
        "source": {"uri": uris.get("source", "a")},
        "model": {"uri": "$DATA/m.keras", "custom_objects": ["~/x.py:Y"], "layers": ["z"]},
        "output": {"uri": uris.get("output", "b")},
    }


def test_all_paths_of_a_config_are_expanded_once() -> None:
    config = load(make_config(source="~/ct", output="$DATA/$$x"))
    paths = (config.source.uri, config.model.uri, config.model.custom_objects, config.output.uri)
    assert paths == ("/home/someone/ct", "/data/m.keras", ("/home/someone/x.py:Y",), "/data/$x")
    assert load(config, ["model.batch_size=2"]).output.uri == "/data/$x"


def test_a_config_with_an_unset_variable_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"output\.uri: the environment variable UNSET is not set"):
        load(make_config(output="$UNSET/x"))


def test_paths_on_the_command_line_are_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    args = make_parser().parse_args(["export", "$DATA/out", "~/plain"])
    assert (args.output, args.directory) == ("/data/out", "/home/someone/plain")
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["demo", "$UNSET/demo"])
    assert caught.value.code == 2
    assert "the environment variable UNSET is not set" in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_variable_is_never_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    from featray.output.dataset import Dataset

    Dataset.open(load(make_config(output="$DATA/out")).output).store.write("x", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
