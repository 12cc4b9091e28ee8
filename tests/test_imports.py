"""The layers of the code: which part may import which, and which libraries are imported late."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import featray

PACKAGE = Path(featray.__file__).parent
FLOORS = (
    {"errors", "hardware", "synthetic"},
    {"schema", "ct", "storage"},
    {"config", "terminal"},
    {"recipe"},
    {"collection", "model", "output"},
    {"stages"},
    {"engines"},
    {"job"},
    {"checks"},
    {"pipeline"},
    {"commands", "benchmark"},
    {"cli"},
    {"__main__", "__init__"},
)
"""The parts of the package from the ground up. A part may import only parts of lower floors."""
MAX_ENTRIES = 24
"""Files and folders of `featray/`, so that its listing fits on a screen."""


def module_name(path: Path) -> str:
    name = ".".join(("featray", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imported_names(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside of functions, and the names imported from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def imported_modules(module: str) -> set[str]:
    """Return the modules of featray that a module imports; a package counts only for its own names."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if name in MODULES else node.module for name in names}
    return modules & MODULES.keys() - {module}


def find_importers(package: str) -> set[str]:
    """Return the files that import a package."""
    return {
        str(path.relative_to(PACKAGE))
        for path in MODULES.values()
        if any(name.split(".")[0] == package for name in imported_names(path))
    }


def floor_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    (floor,) = [number for number, parts in enumerate(FLOORS) if part in parts]
    return floor


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_the_package_has_few_entries_and_each_stands_on_a_floor() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= MAX_ENTRIES
    parts = {Path(name).stem for name in entries if not name.endswith((".md", ".typed"))}
    assert parts == set().union(*FLOORS)


def test_no_module_imports_a_part_of_the_same_or_a_higher_floor() -> None:
    upward = {
        f"{module} imports {imported}"
        for module in MODULES
        for imported in imported_modules(module)
        if part_of(imported) not in (part_of(module), "__init__") and floor_of(imported) >= floor_of(module)
    }
    assert not upward


def find_cycle(module: str, path: tuple[str, ...], finished: set[str]) -> Iterator[tuple[str, ...]]:
    """Yield the import cycles that a depth-first search from `module` meets."""
    if module in path:
        yield (*path[path.index(module) :], module)
        return
    if module in finished:
        return
    for imported in sorted(imported_modules(module)):
        yield from find_cycle(imported, (*path, module), finished)
    finished.add(module)


def test_no_modules_import_each_other_in_a_cycle() -> None:
    finished: set[str] = set()
    cycles = [
        cycle for module in MODULES for cycle in find_cycle(module, (), finished) if "featray" not in cycle
    ]
    assert not cycles


def test_every_package_says_what_belongs_there() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        assert "TODO" not in docstring, path


def test_ray_is_imported_by_its_engine_and_by_reading_with_ray() -> None:
    for path in find_importers("ray"):
        assert path.startswith("engines/ray/") or path == "output/read_ray.py", path


def test_keras_and_tensorflow_are_imported_in_model_and_by_the_demo_model() -> None:
    for path in find_importers("keras") | find_importers("tensorflow"):
        assert path.startswith("model/") or path == "synthetic/vae.py", path


def test_the_delta_library_is_imported_in_one_file() -> None:
    assert find_importers("deltalake") == {"output/delta_log.py"}


def test_ct_code_imports_only_ct_code_and_errors() -> None:
    others = {
        f"{module} imports {imported}"
        for module in MODULES
        for imported in imported_modules(module)
        if part_of(module) == "ct" and part_of(imported) not in ("ct", "errors")
    }
    assert not others


def test_stages_import_each_other_only_to_join_decoding_and_to_name_the_listing_and_the_plan() -> None:
    allowed = {
        "decode": {"input_cache", "locate", "preprocess", "read"},
        "input_cache": {"input_entry"},
        "plan": {"list"},
        "report": {"list", "plan"},
    }
    for module in MODULES:
        stage = module.removeprefix("featray.stages.").split(".")[0]
        others = {
            name.split(".")[2] for name in imported_modules(module) if name.startswith("featray.stages.")
        } - {stage}
        if part_of(module) == "stages":
            assert others <= allowed.get(stage, set()), module


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
def test_importing_a_part_imports_neither_tensorflow_nor_ray(module: str) -> None:
    code = f"import sys, {module}; assert not {{'tensorflow', 'keras', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_driver_imports_no_reader_and_no_pandas_before_it_prefetches_scans(config_of: Any) -> None:
    code = (
        "import sys\n"
        "from featray import job, pipeline\n"
        "def prepare(*_):\n"
        "    sys.exit(str({'nibabel', 'pydicom', 'nrrd', 'pandas', 'tensorflow'} & set(sys.modules)))\n"
        "job.Job.prepare = prepare\n"
        f"pipeline.extract({config_of()!r}, ['run.decode.workers=1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_all_modules_that_need_a_library_of_a_format_are_imported_with_the_readers() -> None:
    users = find_importers("pydicom") | find_importers("nibabel") | find_importers("nrrd")
    modules = {module_name(PACKAGE / path) for path in users if path.startswith("ct/")}
    assert modules
    code = f"import sys, featray.ct.readers; print(sorted({modules!r} - set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in featray.__all__:
        assert getattr(featray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'extrakt'"):
        _ = featray.extrakt
