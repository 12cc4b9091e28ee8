"""The documents are true: their commands run, and their tables, trees and links match the code."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import commits
import generated_docs
import pytest
import yaml
from test_imports import FLOORS

import featray
from featray.cli.main import main
from featray.commands.demo import make_demo_config
from featray.config import load
from featray.errors import Reason
from featray.output.dataset import Dataset
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS
from featray.storage.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
ARCHITECTURE = REPOSITORY / "featray" / "ARCHITECTURE.md"
DOCUMENTS = [
    README,
    ARCHITECTURE,
    *(REPOSITORY / folder / "README.md" for folder in ("configs", "jobs", "deploy")),
    REPOSITORY / "deploy" / "reading.md",
    *(REPOSITORY / ".github" / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
TOP_LEVEL = {"pyproject.toml", "jobs", "featray", "configs", "tests", "deploy", "README.md", "LICENSE"}


def name_document(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def read_blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def read_section(document: Path, title: str) -> str:
    return document.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def find_commands(document: Path, program: str) -> Iterator[list[str]]:
    """Yield the words of each command line of a program, in blocks and in inline code."""
    text = document.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [
        line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    for code in [*inline, *lines]:
        if found := re.search(rf"(?:^|[\s/]){re.escape(program)} (?=[a-z-])(.*)", " ".join(code.split())):
            yield [word.strip("',.:[]") for word in found[1].split()]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the scans, model and configs that the README's first real run starts from."""
    import keras

    from featray.synthetic.phantom import make_collection
    from featray.synthetic.vae import build_encoder

    folder = tmp_path_factory.mktemp("first-run")
    make_collection(folder / "data" / "ct", 3, shape_zyx=(32, 64, 64), dicom_count=0)
    shutil.copy(folder / "data" / "ct" / "labels.csv", folder)
    (folder / "models").mkdir()
    build_encoder((16, 64, 64)).save(folder / "models" / "vae.keras")
    shutil.copy(REPOSITORY / "featray" / "synthetic" / "vae.py", folder / "models" / "sampling.py")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for config in (folder / "configs").glob("*.yaml"):  # a small model, because each command runs it
        config.write_text(config.read_text().replace("size: [32, 256, 256]", "size: [16, 64, 64]"))
    keras.utils.clear_session()
    return folder


def run_line(line: str) -> None:
    """Run a command line of featray in this process, which has TensorFlow imported already."""
    words = shlex.split(line)[1:]
    redirected = words.pop() if words[-2:-1] == [">"] else None
    with open(redirected or os.devnull, "w") as file, contextlib.redirect_stdout(file):
        assert main([word for word in words if word != ">"]) == 0, line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_documents_run_as_written(
    first_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first_run)
    counts = {}
    for document in DOCUMENTS:
        blocks = read_blocks(document, "bash")
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("featray ")]
        counts[name_document(document)] = len(lines)
        for line in lines:
            run_line(line)
    assert counts["README.md"] == 9
    assert counts["configs/README.md"] == 2
    assert counts["deploy/README.md"] == 4
    assert counts["deploy/reading.md"] == 1
    snippets = read_blocks(README, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=first_run, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "phantom_001.nii.gz" in done.stdout


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with vectors of three scans, where the recipes of deploy/reading.md read them."""
    folder = tmp_path_factory.mktemp("vectors")
    dataset = Dataset(Store(str(folder / "out" / "features")))
    scans = [commits.make_decoded(f"phantom_{number}", number) for number in range(3)]
    commits.make_committer(dataset).commit([commits.write_receipt(dataset, *scans)])
    featray.export_vectors(dataset, folder / "out" / "vectors", columns=["spacing", "warnings"])
    return folder


RECIPES = re.findall(
    r"```python\n(.*?)```",
    read_section(REPOSITORY / "deploy" / "reading.md", "Use vectors in other libraries"),
    re.DOTALL,
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda code: re.findall(r"(?:import|from) (\w+)", code)[0])
def test_the_recipes_for_vectors_run_as_written(vectors: Path, recipe: str) -> None:
    for library in re.findall(r"^(?:import|from) (\w+)", recipe, re.MULTILINE):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed; it is not in the extra `test`, because it is large")
    environment = {**os.environ, "HF_HOME": str(vectors / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", recipe],
        cwd=vectors,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "phantom_" in done.stdout or "torch.Size([3, 2])" in done.stdout


def test_ci_runs_exactly_the_test_command_of_the_readme() -> None:
    lines = [line for block in read_blocks(README, "bash") for line in block.splitlines()]
    (command,) = [line for line in lines if line.endswith("pytest")]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_the_readme_has_at_most_220_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220


def test_the_tables_of_the_readme_name_every_column_and_no_other() -> None:
    features, scans = read_section(README, "What comes out").split("`scans`, one row per scan ever found:")
    columns = [
        {
            name
            for row in re.findall(r"^\| ([^|]+) \| [^|]+ \|", part, re.MULTILINE)
            for name in row.split(", ")
        }
        - {"column", "---"}
        for part in (features, scans)
    ]
    assert columns[0] == {*FEATURE_COLUMNS.names, "layer"}
    assert columns[1] == set(SCAN_COLUMNS.names)


def test_the_tree_names_every_file_of_the_package_and_no_other() -> None:
    files, parents = set(), [Path()]
    for line in read_blocks(ARCHITECTURE, "")[-1].splitlines()[1:]:
        indent, name, description = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert description
        depth = len(indent) // 2
        path = parents[depth - 1] / name
        parents[depth:] = [path]
        files.add(path / "__init__.py" if name.endswith("/") else path)
    package = Path(featray.__file__).parent
    present = {path.relative_to(package) for path in package.rglob("*.*") if path.is_file()}
    expected = {path for path in present if path.suffix in (".py", ".typed", ".md")} - {Path("__init__.py")}
    assert {str(path) for path in files} == {str(path) for path in expected}


def test_the_floors_in_the_architecture_are_those_that_the_tests_check() -> None:
    (block,) = [text for text in read_blocks(ARCHITECTURE, "") if text.startswith(" 1  cli")]
    floors = [set(line.split(maxsplit=1)[1].split(", ")) for line in block.splitlines()]
    assert floors == list(reversed(FLOORS[:-1])), "the last floor of FLOORS is `__main__` and `__init__`"


def test_the_commands_in_the_readme_are_those_of_the_command_line() -> None:
    listed = re.findall(r"^\| `featray (\w+)", read_section(README, "Commands"), re.MULTILINE)
    assert set(listed) == set(read_command_options())


def read_command_options() -> dict[str, set[str]]:
    """Return the options of each command of the command line."""
    from featray.cli.main import make_parser

    (commands,) = [action for action in make_parser()._actions if action.dest == "==SUPPRESS=="]
    return {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in commands.choices.items()  # type: ignore[union-attr]
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_every_command_and_option_in_a_document_exists(document: Path) -> None:
    options = read_command_options()
    for command, *words in find_commands(document, "featray"):
        if command.startswith("--"):  # an option of featray itself
            continue
        assert command in options, f"featray {command}"
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= options[command], f"featray {command}: {used - options[command]}"


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_option_of_a_job_in_a_document_exists(job: Path) -> None:
    source = job.read_text(encoding="utf-8")
    options = set(re.findall(r'"(--[\w-]+)"', source))
    if "featray.cli.main" in source:
        options |= read_command_options()[job.stem]
    for document in DOCUMENTS:
        for words in find_commands(document, f"python jobs/{job.name}"):
            own = words[: words.index("--")] if "--" in words else words  # a job's command follows `--`
            assert {word for word in own if word.startswith("--")} <= options, document


def test_the_table_of_keys_is_up_to_date() -> None:
    text = generated_docs.CONFIGS_README.read_text(encoding="utf-8")
    assert generated_docs.insert_keys(text) == text, "run `poe docs` (python tests/generated_docs.py)"


def test_every_metric_in_the_documents_exists() -> None:
    source = (REPOSITORY / "featray" / "engines" / "ray" / "metrics.py").read_text(encoding="utf-8")
    section = read_section(REPOSITORY / "deploy" / "README.md", "Watch a run")
    metrics = set(re.findall(r"ray_(featray_\w+)", section))
    assert {metric.removesuffix("_total") for metric in metrics} == set(
        re.findall(r'"(featray_\w+)"', source)
    )


def test_every_reason_is_explained_once() -> None:
    section = read_section(REPOSITORY / "deploy" / "README.md", "What each failure means")
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(Reason)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_every_path_in_a_document_exists(document: Path) -> None:
    folders = "featray|configs|jobs|deploy|tests"
    text = document.read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|md|txt|toml))`", text):
        assert "NAME" in name or (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load(path)
    assert config.model.layers
    assert path.read_text().startswith("# ")


def test_configs_readme_names_every_config() -> None:
    text = generated_docs.CONFIGS_README.read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.yaml)\)", text)) == {path.name for path in CONFIGS}


def test_jobs_readme_names_every_job() -> None:
    text = (REPOSITORY / "jobs" / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in JOBS} <= set(re.findall(r"\]\((\w+\.py)\)", text))


def test_the_config_of_the_demo_is_the_one_in_configs() -> None:
    written = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    assert written == make_demo_config(Path("featray-demo"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_opens_with_how_to_run_it(path: Path) -> None:
    head = path.read_text()[:600]
    assert f"python jobs/{path.name}" in head
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_only_what_it_may() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} <= TOP_LEVEL
