"""Tests of `featray config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from featray.cli.main import main
from featray.config import load
from featray.config.json_schema import make_json_schema

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "s3_ct_vae.yaml"


def test_config_prints_the_config_with_all_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(CONFIG), "--set", "model.batch_size=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["batch_size"] == 7
    assert load(printed) == load(CONFIG, ["model.batch_size=7"])


def test_config_masks_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    secrets = ["source.storage_options.key=hunter2", "output.uri=s3://user:hunter2@features/ct"]
    for as_json in ([], ["--json"]):
        assert main(["config", str(CONFIG), *as_json, *(f"--set={secret}" for secret in secrets)]) == 0
        out = capsys.readouterr().out
        assert "***" in out
        assert "hunter2" not in out


def test_config_refuses_an_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(CONFIG), "--set", "model.batchsize=7"]) == 2
    assert "did you mean batch_size?" in capsys.readouterr().err


def test_config_schema_prints_the_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text) == make_json_schema()
    assert main(["config", "--schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == make_json_schema()


def test_config_without_a_file_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    assert "give a config file, or --schema" in capsys.readouterr().err
