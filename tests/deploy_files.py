"""Read the files below deploy/: manifests, pods, and the command lines of featray in all of them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["cronjob", "raycluster", "rayjob", "raycronjob"]
MOUNTED_CONFIG = "/etc/featray/featray.yaml"
"""The place of deploy/kubernetes/base/featray.yaml in a pod."""
DOCUMENTS = {"README.md", "reading.md", "constraints.txt"}

Mapping = dict[str, Any]


def list_files() -> list[Path]:
    """Return the files that people deploy with."""
    return sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name not in DOCUMENTS)


def name_file(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def list_manifests() -> list[Path]:
    """Return the files below deploy/kubernetes that describe objects of Kubernetes."""
    return [
        path
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path.name not in ("kustomization.yaml", "featray.yaml")
    ]


def load_manifest(name: str) -> Mapping:
    """Return the one object of a file below deploy/kubernetes."""
    loaded: Mapping = yaml.safe_load((KUBERNETES / name).read_text(encoding="utf-8"))
    return loaded


def find_pods(value: Any) -> Iterator[Mapping]:
    """Yield every pod template in an object: each mapping with a `spec` that has `containers`."""
    if isinstance(value, dict):
        if "containers" in (value.get("spec") or {}):
            yield value
        for item in value.values():
            yield from find_pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from find_pods(item)


def load_airflow_arguments() -> Mapping:
    """Return the arguments of the pod in the Airflow DAG: literals as values, others as source text."""
    tree = ast.parse((DEPLOY / "airflow" / "featray_nightly.py").read_text(encoding="utf-8"))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "KubernetesPodOperator"
    ]
    return {str(keyword.arg): _evaluate(keyword.value) for keyword in call.keywords}


def read_command_lines() -> dict[str, list[str]]:
    """Return the words behind `featray` of each command line that a file runs, by the name of the file."""
    (cron_pod,) = find_pods(load_manifest("cronjob/cronjob.yaml"))
    entrypoint = load_manifest("rayjob/rayjob.yaml")["spec"]["entrypoint"]
    service = (DEPLOY / "systemd" / "featray.service").read_text(encoding="utf-8")
    (started,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    return {
        "cronjob": cron_pod["spec"]["containers"][0]["args"],
        "rayjob": _split_command(entrypoint),
        "systemd": _split_command(started),
        "airflow": load_airflow_arguments()["arguments"],
        "one_node": _read_slurm_command("one_node.sbatch"),
        "several_nodes": _read_slurm_command("several_nodes.sbatch"),
    }


def read_command_lines_of_comments() -> dict[str, list[str]]:
    """Return the words behind `featray` or `featray:VERSION` of each example in a comment."""
    found = {}
    for path in list_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = re.search(r"featray(?::\S+)? ((?:doctor|plan|extract|refresh) \S+\.yaml.*)", line)
            if match and line.lstrip().startswith("#"):
                found[f"{name_file(path)}:{number}"] = shlex.split(match[1])
    return found


def _split_command(text: str) -> list[str]:
    program, *words = shlex.split(text)
    assert Path(program).name == "featray"
    return words


def _read_slurm_command(name: str) -> list[str]:
    """Return the command of a batch script, with the arguments of its first comment in the place of "$@"."""
    text = (DEPLOY / "slurm" / name).read_text(encoding="utf-8")
    example = re.search(rf"^# sbatch deploy/slurm/{re.escape(name)} (.*)$", text, re.MULTILINE)
    command = re.search(r'\bfeatray (\w+) "\$@" (.*)$', text, re.MULTILINE)
    assert example, "the script says how it is submitted"
    assert command
    return [
        command[1],
        *shlex.split(example[1].replace("[", " ").replace("]", " ")),
        *shlex.split(command[2]),
    ]


def _evaluate(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
