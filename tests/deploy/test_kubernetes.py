"""The manifests in deploy/kubernetes are valid, their pods are restricted, and their names agree.

The custom resource definitions of KubeRay are not part of this repository. They are in the folder
`ray-operator/config/crd/bases` of KubeRay.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deploy_files
import pytest
import yaml
from deploy_files import KUBERNETES, OVERLAYS, REPOSITORY, Mapping

VERSIONS = ["1.31", "1.37"]
"""The first version of Kubernetes in which pod failure policies are stable, and the newest with a schema."""
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
MANIFESTS = deploy_files.list_manifests()
BUILTIN = [path for path in MANIFESTS if "\napiVersion: ray.io/" not in path.read_text(encoding="utf-8")]
USER = 10001


def read_version(package: str) -> str:
    pins = (REPOSITORY / "deploy" / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{package}==(.+)$", pins, re.MULTILINE)
    return str(version)


def check_builtin_kind(manifest: Mapping, version: str) -> None:
    """Validate an object against the schema of Kubernetes in which no unknown key is allowed."""
    reason = "kubernetes-validate is not installed: pip install -e '.[test]'"
    validator = pytest.importorskip("kubernetes_validate", reason=reason)
    validator.validate(manifest, version, strict=True)


@pytest.fixture(scope="session")
def ray_schemas() -> Mapping:
    """Return the schema of each kind of KubeRay, with unknown keys forbidden."""
    default = REPOSITORY.parent / "shared" / "kuberay"
    folder = Path(os.environ.get("FEATRAY_TEST_KUBERAY", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set FEATRAY_TEST_KUBERAY to the folder with KubeRay's CRDs")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schemas = {}
    for kind, plural in RAY_KINDS.items():
        definition = yaml.load((folder / f"ray.io_{plural}.yaml").read_bytes(), Loader=loader)
        (version,) = [item for item in definition["spec"]["versions"] if item["name"] == "v1"]
        schemas[kind] = forbid_unknown_keys(version["schema"]["openAPIV3Schema"])
    return schemas


def forbid_unknown_keys(schema: Any) -> Any:
    """Set `additionalProperties: false` where the schema lists the properties of an object."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            forbid_unknown_keys(value)
    elif isinstance(schema, list):
        for value in schema:
            forbid_unknown_keys(value)
    return schema


def check_ray_kind(manifest: Mapping, schemas: Mapping) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator(schemas[manifest["kind"]]).validate(manifest)


@pytest.fixture(scope="session")
def built() -> dict[str, list[Mapping]]:
    """Return the objects that `kubectl apply -k` would apply, by overlay."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, which builds the overlays, is not installed")
    return {name: build_overlay(name) for name in OVERLAYS}


def build_overlay(name: str) -> list[Mapping]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def get_object(objects: list[Mapping], kind: str) -> Mapping:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def list_pods() -> Iterator[tuple[str, Mapping]]:
    for path in MANIFESTS:
        for number, pod in enumerate(deploy_files.find_pods(yaml.safe_load(path.read_text()))):
            yield f"{path.stem}-{number}", pod


PODS = dict(list_pods())


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", BUILTIN, ids=deploy_files.name_file)
def test_every_manifest_of_a_builtin_kind_is_valid(path: Path, version: str) -> None:
    check_builtin_kind(yaml.safe_load(path.read_text(encoding="utf-8")), version)


@pytest.mark.slow
def test_every_manifest_of_a_kind_of_ray_is_valid(ray_schemas: Mapping) -> None:
    manifests = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in MANIFESTS if path not in BUILTIN
    ]
    assert {manifest["kind"] for manifest in manifests} == set(RAY_KINDS)
    for manifest in manifests:
        check_ray_kind(manifest, ray_schemas)


@pytest.mark.slow
def test_every_object_that_an_overlay_applies_is_valid(
    built: dict[str, list[Mapping]], ray_schemas: Mapping
) -> None:
    for manifest in [item for objects in built.values() for item in objects]:
        if manifest["kind"] in RAY_KINDS:
            check_ray_kind(manifest, ray_schemas)
        else:
            check_builtin_kind(manifest, VERSIONS[-1])


@pytest.mark.slow
def test_a_key_that_kubernetes_does_not_know_is_refused() -> None:
    manifest = deploy_files.load_manifest("cronjob/cronjob.yaml")
    (pod,) = deploy_files.find_pods(manifest)
    pod["spec"]["containers"][0]["arg"] = ["refresh"]
    with pytest.raises(Exception, match="'arg' was unexpected"):
        check_builtin_kind(manifest, VERSIONS[0])


@pytest.mark.slow
def test_a_key_that_kuberay_does_not_know_is_refused(ray_schemas: Mapping) -> None:
    manifest = copy.deepcopy(deploy_files.load_manifest("raycluster/raycluster.yaml"))
    manifest["spec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(Exception, match="'maxReplica' was unexpected"):
        check_ray_kind(manifest, ray_schemas)


def test_the_overlays_differ_only_in_what_starts_the_run(built: dict[str, list[Mapping]]) -> None:
    kinds = {name: {item["kind"] for item in objects} for name, objects in built.items()}
    shared = {"ServiceAccount", "NetworkPolicy", "ConfigMap"}
    assert {name: found - shared for name, found in kinds.items()} == {
        "cronjob": {"CronJob"},
        "raycluster": {"RayCluster"},
        "rayjob": {"RayJob"},
        "raycronjob": {"RayCronJob"},
    }
    cluster = get_object(built["raycluster"], "RayCluster")["spec"]
    job = get_object(built["rayjob"], "RayJob")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert get_object(built["raycronjob"], "RayCronJob")["spec"]["jobTemplate"] == job


def test_the_pods_find_what_they_refer_to(built: dict[str, list[Mapping]]) -> None:
    for objects in built.values():
        config = get_object(objects, "ConfigMap")
        account = get_object(objects, "ServiceAccount")["metadata"]["name"]
        policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
        labels = policies[0]["spec"]["podSelector"]["matchLabels"]
        for pod in deploy_files.find_pods(objects):
            mapped = [item["configMap"]["name"] for item in pod["spec"]["volumes"] if "configMap" in item]
            assert set(mapped) <= {config["metadata"]["name"]}
            assert pod["spec"]["serviceAccountName"] == account
            assert labels.items() <= pod["metadata"]["labels"].items()
        assert config["data"]["featray.yaml"] == (KUBERNETES / "base" / "featray.yaml").read_text()


def test_the_images_have_the_version_of_this_package(built: dict[str, list[Mapping]]) -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    images = {
        container["image"]
        for objects in built.values()
        for pod in deploy_files.find_pods(objects)
        for container in pod["spec"]["containers"]
    }
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert images == {f"featray:{version}", f"featray:{version}-gpu"}
    assert images == set(re.findall(r"-t (\S+)", dockerfile))
    assert deploy_files.load_airflow_arguments()["image"] == "IMAGE"
    airflow = (REPOSITORY / "deploy" / "airflow" / "featray_nightly.py").read_text(encoding="utf-8")
    assert f'IMAGE = "featray:{version}"\n' in airflow


def test_the_ray_cluster_names_the_version_of_ray_in_the_image() -> None:
    cluster = deploy_files.load_manifest("raycluster/raycluster.yaml")
    assert cluster["spec"]["rayVersion"] == read_version("ray")


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_every_pod_has_the_least_rights(pod: Mapping) -> None:
    # These are the rules of the Pod Security Standard "restricted", and a file system that is read only.
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == USER
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
    for volume in pod["spec"]["volumes"]:
        assert volume.keys() - {"name"} <= {"configMap", "emptyDir"}
    for container in pod["spec"]["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {item["mountPath"] for item in container["volumeMounts"]} >= {"/tmp"}
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


def test_the_image_runs_as_the_user_of_the_pods() -> None:
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert f"\nUSER {USER}:{USER}\n" in dockerfile


def test_only_the_head_of_a_ray_cluster_talks_to_the_kubernetes_api() -> None:
    account = deploy_files.load_manifest("base/service_account.yaml")
    assert account["automountServiceAccountToken"] is False
    heads = [name for name, pod in PODS.items() if pod["spec"].get("automountServiceAccountToken")]
    assert heads == ["raycluster-0"]


def test_secrets_come_only_from_a_secret_object() -> None:
    containers = [container for pod in PODS.values() for container in pod["spec"]["containers"]]
    assert all("env" not in container for container in containers)
    sources = [source for container in containers for source in container.get("envFrom", [])]
    assert sources
    assert all(source["secretRef"]["name"] == "featray-store" for source in sources)


def test_the_pod_of_airflow_is_the_pod_of_the_cron_job() -> None:
    (pod,) = deploy_files.find_pods(deploy_files.load_manifest("cronjob/cronjob.yaml"))
    (container,) = pod["spec"]["containers"]
    arguments = deploy_files.load_airflow_arguments()
    assert arguments["arguments"] == container["args"]
    assert arguments["labels"] == pod["metadata"]["labels"]
    assert arguments["service_account_name"] == pod["spec"]["serviceAccountName"]
    assert arguments["termination_grace_period"] == pod["spec"]["terminationGracePeriodSeconds"]
    for volume in pod["spec"]["volumes"]:
        assert f"name='{volume['name']}'" in arguments["volumes"]
    for mount in container["volumeMounts"]:
        assert f"mount_path='{mount['mountPath']}'" in arguments["volume_mounts"]
    assert "featray-config" in arguments["volumes"]
    assert "featray-store" in arguments["env_from"]
    for amount in container["resources"]["limits"].values():
        assert f"'{amount}'" in arguments["container_resources"]
