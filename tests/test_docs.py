"""What is written is true: README commands run, its tables and tree match the code, configs load."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from featray.commands.demo import make_demo_config
from featray.config import load
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TOP_LEVEL = {"pyproject.toml", "jobs", "featray", "configs", "tests", "deploy", "README.md", "LICENSE"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the README's first real run starts from."""
    import keras

    from featray.synthetic.phantom import make_collection
    from featray.synthetic.vae import build_encoder

    folder = tmp_path_factory.mktemp("first-run")
    make_collection(folder / "data" / "ct", 3, shape_zyx=(32, 64, 64), dicom_count=0)
    (folder / "models").mkdir()
    build_encoder().save(folder / "models" / "vae.keras")
    shutil.copy(REPOSITORY / "featray" / "vae.py", folder / "models" / "sampling.py")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    keras.utils.clear_session()
    return folder


def test_the_readmes_first_run_works_as_written(first_run: Path) -> None:
    commands = [
        line for block in blocks("bash") for line in block.splitlines() if line.startswith("featray ")
    ]
    assert len(commands) == 8
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=first_run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    snippets = blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=first_run, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "phantom_001.nii.gz" in done.stdout


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if line.endswith("pytest")]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_the_readmes_tables_name_every_column_and_no_other() -> None:
    features, scans = section("What comes out").split("`scans`, one row per scan ever found:")
    named = [
        {
            name
            for row in re.findall(r"^\| ([^|]+) \| [^|]+ \|", part, re.MULTILINE)
            for name in row.split(", ")
        }
        - {"column", "---"}
        for part in (features, scans)
    ]
    assert named[0] == {*FEATURE_COLUMNS.names, "layer"}
    assert named[1] == set(SCAN_COLUMNS.names)


def test_the_readmes_tree_names_every_file_of_the_package() -> None:
    tree = section("The files")
    for path in (REPOSITORY / "featray").glob("*.py"):
        assert path.name in tree or path.name.startswith("__"), path
    for folder in ("stages", "engines"):
        for path in (REPOSITORY / "featray" / folder).glob("*.py"):
            assert f"{folder}/{path.name}" in tree or path.name.startswith("__"), path
    for name in re.findall(r"^  (\S+\.py)", tree, re.MULTILINE):
        assert (REPOSITORY / "featray" / name).exists(), name


def test_the_readmes_commands_are_those_of_the_command_line() -> None:
    from featray.cli.main import make_parser

    usage = make_parser().format_help()
    listed = set(re.findall(r"^\| `featray (\w+)", section("Commands"), re.MULTILINE))
    assert listed == set(re.findall(r"^    (\w+)(?: |$)", usage, re.MULTILINE))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load(path)
    assert config.model.layers
    assert path.read_text().startswith("# ")


def test_the_demos_config_is_the_one_in_configs() -> None:
    written = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    assert written == make_demo_config(Path("featray-demo"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_every_job_opens_with_how_to_run_it(path: Path) -> None:
    head = path.read_text()[:600]
    assert f"python jobs/{path.name}" in head
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_what_it_may_and_nothing_else() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} <= TOP_LEVEL
