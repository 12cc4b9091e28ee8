"""The bucket policies in deploy/aws grant what featray needs, and nothing more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from deploy_files import DEPLOY, REPOSITORY
from servers.fixtures import BUCKET
from servers.policy import PolicyProxy
from servers.seaweedfs import SeaweedFS
from small_model import save_small_model

import featray
from featray.cli.main import main
from featray.config import SourceConfig
from featray.errors import ConfigError
from featray.stages.list import list_scans
from featray.synthetic.phantom import make_collection

READ = {"s3:GetObject", "s3:ListBucket"}
WRITE = {"s3:PutObject", "s3:DeleteObject"}
ABORT = {"s3:AbortMultipartUpload"}
PART_BYTES = 5 * 2**20
"""Smallest size of a part of a multipart upload."""
PARAMETERS = {
    "AWS::Partition": "aws",
    "SourceBucket": BUCKET,
    "SourcePrefix": "source/",
    "ModelBucket": BUCKET,
    "ModelPrefix": "model/",
    "OutputBucket": BUCKET,
    "OutputPrefix": "output/",
}
Statements = list[dict[str, Any]]


class TemplateLoader(yaml.SafeLoader):
    """Reads a template of CloudFormation, with PARAMETERS in the place of `${NAME}`."""


def substitute(loader: TemplateLoader, _tag: str, node: yaml.ScalarNode) -> str:
    return re.sub(r"\$\{(.+?)\}", lambda match: PARAMETERS[match[1]], str(loader.construct_scalar(node)))


TemplateLoader.add_multi_constructor("!", substitute)


def load_statements(name: str) -> Statements:
    text = (DEPLOY / "aws" / "policies.yaml").read_text(encoding="utf-8")
    template = yaml.load(text, Loader=TemplateLoader)
    statements: Statements = template["Resources"][name]["Properties"]["PolicyDocument"]["Statement"]
    return statements


def list_actions(statements: Statements) -> set[str]:
    actions = [statement["Action"] for statement in statements]
    return {name for item in actions for name in ([item] if isinstance(item, str) else item)}


def test_the_source_is_read_only_and_the_output_is_not() -> None:
    assert list_actions(load_statements("ReadPolicy")) == READ
    assert list_actions(load_statements("OutputPolicy")) == READ | WRITE | ABORT


def test_the_table_of_object_stores_names_the_actions_of_the_output_policy() -> None:
    text = (REPOSITORY / "configs" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| S3 |")]
    named = {f"s3:{name}" for name in re.findall(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+", row)}
    assert named == list_actions(load_statements("OutputPolicy"))


@pytest.fixture
def store(s3_server: SeaweedFS) -> Iterator[PolicyProxy]:
    """Return the S3 server as the identity sees it that has both policies."""
    with PolicyProxy(
        s3_server.port, [*load_statements("ReadPolicy"), *load_statements("OutputPolicy")]
    ) as proxy:
        yield proxy


@pytest.fixture
def config(s3_server: SeaweedFS, store: PolicyProxy, tmp_path: Path) -> dict[str, Any]:
    """Upload a collection and a model without the policies; return a config that has to keep to them."""
    owner = fsspec.filesystem("s3", **s3_server.options())
    make_collection(tmp_path / "ct", 3, shape_zyx=(12, 32, 32), dicom_count=1)
    owner.put(f"{tmp_path / 'ct'}/", f"{BUCKET}/source/", recursive=True)
    owner.put(str(save_small_model(tmp_path / "small.keras", 1)), f"{BUCKET}/model/small.keras")
    options = s3_server.options(port=store.port)
    return {
        "source": {"uri": f"s3://{BUCKET}/source", "storage_options": options},
        "preprocess": {"size": [8, 32, 32]},
        "model": {
            "uri": f"s3://{BUCKET}/model/small.keras",
            "layers": ["z_mean"],
            "storage_options": options,
        },
        "output": {"uri": f"s3://{BUCKET}/output/run", "storage_options": options},
        "run": {"engine": "inline", "decode": {"workers": 0}},
    }


@pytest.mark.slow
def test_the_policies_suffice_for_all_commands_and_every_right_is_used(
    config: dict[str, Any],
    store: PolicyProxy,
    s3_server: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    assert featray.extract(config).exit_code == 0
    owner = fsspec.filesystem("s3", **s3_server.options())
    owner.rm(next(name for name in owner.find(f"{BUCKET}/source") if name.endswith(".nii.gz")))
    owner.invalidate_cache()
    assert featray.refresh(config).exit_code == 0
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    for words in (["doctor"], ["status"], ["verify", "--repair"], ["vacuum"]):
        assert main([words[0], str(file), *words[1:]]) == 0, words
    assert main(["export", str(file), str(tmp_path / "plain")]) == 0
    # Only objects below the folder of the collection can be read, not one with the name of the folder.
    assert set(store.refused) == {("s3:GetObject", f"arn:aws:s3:::{BUCKET}/source")}
    assert store.used == READ | WRITE


@pytest.mark.slow
def test_a_folder_that_does_not_exist_is_reported_as_such(config: dict[str, Any]) -> None:
    config["source"]["uri"] = f"s3://{BUCKET}/sources"
    with pytest.raises(ConfigError, match="does not exist"):
        list_scans(SourceConfig(**config["source"]))


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_no_folder(config: dict[str, Any], s3_server: SeaweedFS) -> None:
    fsspec.filesystem("s3", **s3_server.options()).pipe_file(f"{BUCKET}/secret.nii.gz", b"x")
    config["source"]["uri"] = f"s3://{BUCKET}/secret.nii.gz"
    with pytest.raises(ConfigError, match="no permission"):
        list_scans(SourceConfig(**config["source"]))


@pytest.mark.slow
def test_an_upload_of_several_parts_can_be_given_up(store: PolicyProxy, s3_server: SeaweedFS) -> None:
    fs = fsspec.filesystem("s3", **s3_server.options(port=store.port), skip_instance_cache=True)
    file = fs.open(f"{BUCKET}/output/large", "wb", block_size=PART_BYTES)
    file.write(bytes(2 * PART_BYTES))
    file.flush()
    file.discard()
    file.closed = True  # otherwise the garbage collector closes the file, and s3fs completes the upload
    assert store.used >= ABORT
    assert store.refused == []
    assert not fs.exists(f"{BUCKET}/output/large")


@pytest.mark.slow
def test_nothing_can_be_written_to_the_source_or_beside_the_output(
    store: PolicyProxy, s3_server: SeaweedFS
) -> None:
    fs = fsspec.filesystem("s3", **s3_server.options(port=store.port), skip_instance_cache=True)
    for name in ("source/new.nii.gz", "model/new.keras", "output-of-others/part"):
        with pytest.raises(PermissionError):
            fs.pipe_file(f"{BUCKET}/{name}", b"x")
    assert {action for action, _ in store.refused} == {"s3:PutObject"}
