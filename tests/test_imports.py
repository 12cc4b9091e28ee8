"""The layers of the code: who may import what, and that nothing heavy is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import featray
from featray.ct import readers

PACKAGE = Path(featray.__file__).parent


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
    }


def test_ray_is_imported_by_the_engine_and_by_reading_back_with_it() -> None:
    assert importers("ray") == {
        "engines/ray_cluster.py",
        "engines/ray_data.py",
        "engines/ray_metrics.py",
        "engines/ray_stages.py",
        "ray_reading.py",
    }


def test_keras_and_tensorflow_are_imported_below_model_and_in_the_demos_vae() -> None:
    for path in importers("keras") | importers("tensorflow"):
        assert path.startswith("model/") or path == "vae.py"


def test_delta_is_imported_in_one_file() -> None:
    assert importers("deltalake") == {"deltalog.py"}


def test_ct_code_knows_nothing_above_it() -> None:
    allowed = ("featray.ct", "featray.errors")
    for path in (PACKAGE / "ct").glob("*.py"):
        above = {
            name for name in imports(path) if name.startswith("featray") and not name.startswith(allowed)
        }
        assert not above, f"{path.name}: {above}"


def test_stages_import_each_other_only_where_decode_joins_two_and_the_report_names_a_listing() -> None:
    joins = {"decode.py": {"locate", "read", "preprocess"}, "report.py": {"list"}}
    for path in (PACKAGE / "stages").glob("*.py"):
        others = {name.split(".")[2] for name in imports(path) if name.startswith("featray.stages.")}
        assert others <= joins.get(path.name, set()), path.name


@pytest.mark.parametrize(
    "module",
    [
        "featray",
        "featray.cli.main",
        "featray.config",
        "featray.pipeline",
        "featray.model",
        "featray.output.read_ray",
    ],
)
def test_importing_featray_imports_neither_tensorflow_nor_ray(module: str) -> None:
    code = f"import sys, {module}; assert not {{'tensorflow', 'keras', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_driver_imports_no_reader_and_no_pandas_before_scans_are_begun(config_of: Any) -> None:
    code = (
        "import sys\n"
        "import featray.job\n"
        "from featray import pipeline\n"
        "def prepare(*_):\n"
        "    sys.exit(str({'nibabel', 'pydicom', 'nrrd', 'pandas', 'tensorflow'} & set(sys.modules)))\n"
        "featray.job.Job.prepare = prepare\n"
        f"pipeline.extract({config_of()!r}, ['run.decode.workers=1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_what_may_be_missing_is_imported_before_a_scan_is_read() -> None:
    users = importers("pydicom") | importers("nibabel") | importers("nrrd")
    readers_of_scans = {Path(path).stem for path in users if path.startswith("ct/")} - {"phantom"}
    assert readers_of_scans <= set(readers.__all__)


def test_every_public_name_can_be_had() -> None:
    for name in featray.__all__:
        assert getattr(featray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'extrakt'"):
        _ = featray.extrakt
