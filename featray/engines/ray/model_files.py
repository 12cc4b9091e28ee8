"""Bring the model and the code of the user to every worker of a cluster, also without a shared disk.

The driver puts the bytes of its local files into Ray's object store once; a node that has no equal file
fetches them once, into a cache. Modules do not travel: a task on each node looks whether they are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from featray.config import ModelConfig
from featray.engines.base import Stages
from featray.errors import ModelError
from featray.model.loading.required_modules import (
    compute_module_digests,
    describe_differences,
    find_required_modules,
)
from featray.model.loading.sent_files import SentFile, find_local_files, read_members, use_sent_files
from featray.stages.extract import LayerExtractor

log = logging.getLogger(__name__)

_LOOKUP_TIMEOUT_S = 60.0
"""Seconds to wait for the nodes to look up modules; a node that does not answer is not judged."""


def send_model(stages: Stages) -> Stages:
    """Return the stages with a model that every worker of the cluster can load.

    Raises:
        ModelError: A node lacks a module that the model needs.
    """
    if stages.model is None:
        return stages
    _refuse_missing_modules(stages.model)
    files = {uri: _send(file.path, file.sha256) for uri, file in find_local_files(stages.model).items()}
    return replace(stages, load_extractor=partial(_load_with_files, files, stages.load_extractor))


def _send(path: Any, sha256: str) -> SentFile:
    import ray

    # As arrays, because Ray copies them neither when it stores them nor when it fetches them.
    members = {name: np.frombuffer(content, np.uint8) for name, content in read_members(path).items()}
    return SentFile(path.name, sha256, partial(_fetch, ray.put(members)))


def _fetch(reference: Any) -> dict[str, Any]:
    import ray

    members: dict[str, Any] = ray.get(reference)
    return members


def _load_with_files(files: Mapping[str, SentFile], load: Callable[[], LayerExtractor]) -> LayerExtractor:
    use_sent_files(files)
    return load()


def _refuse_missing_modules(model: ModelConfig) -> None:
    """Raise ModelError if a node cannot import the modules that the model needs."""
    required = find_required_modules(model)
    if not required:
        return
    problems = {
        problem
        for found in _look_up_modules(sorted(required))
        for problem in describe_differences(required, found)
    }
    if problems:
        raise ModelError(
            "model.builder, model.custom_objects: nodes of the cluster differ from this machine "
            f"({', '.join(sorted(problems))}). Files that the config names are sent to them, but not what "
            "they import. Put the code into one file and name it as file.py:NAME, or submit a job whose "
            "working directory holds it, or install it as a package on every node"
        )


def _look_up_modules(names: list[str]) -> list[dict[str, str]]:
    """Return the modules that each node with CPUs finds: module → sha256."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look_up = ray.remote(num_cpus=0, max_retries=0)(compute_module_digests)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    tasks = [
        look_up.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(names)
        for node in nodes
    ]
    if not tasks:
        return []
    done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_LOOKUP_TIMEOUT_S)
    found = []
    for task in done:
        try:
            found.append(ray.get(task))
        except ray.exceptions.RayError as error:  # the node has left
            log.debug("a node did not look up modules (%s)", type(error).__name__)
    return found
