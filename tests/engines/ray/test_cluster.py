"""The Ray cluster of a run: claims that it can never meet, and usage statistics."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import ray

from featray.config import LimitsConfig, RunConfig
from featray.engines.ray import cluster
from featray.errors import ConfigError


@pytest.mark.parametrize(
    ("actors", "fits"),
    [({"num_cpus": 2}, True), ({"min": 2, "num_cpus": 2}, False), ({"num_cpus": 2, "num_gpus": 1}, False)],
    ids=["one actor takes all CPUs", "too many actors", "no CPU left to decode"],
)
def test_claims_that_a_local_ray_can_never_meet_are_refused(actors: dict[str, Any], fits: bool) -> None:
    run = RunConfig.model_validate({"actors": actors})
    refused = contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"min times num_cpus")
    with refused:
        cluster.check_claims(run, {"CPU": 2.0, "GPU": 1.0}, grows=False)


def test_labels_and_custom_resources_that_a_local_ray_lacks_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 2.0, "memory": 1e9}, "Labels": {"pool": "cpu"}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    run = RunConfig.model_validate({"actors": {"resources": {"ct": 1}, "label_selector": {"pool": "gpu"}}})
    with pytest.raises(ConfigError, match=r"run\.actors\.resources\.ct: 1 is claimed, Ray has 0 ct"):
        cluster.check_claims(run, {"CPU": 2.0}, grows=False)
    with pytest.raises(ConfigError, match=r"run\.actors\.label_selector: no node of Ray has such labels"):
        cluster._check_labels(run, grows=False)
    cluster._check_labels(run, grows=True)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")  # its resources are compared with the claims of the run
@pytest.mark.parametrize(("setting", "is_sent"), [(None, False), ("1", True)])
def test_a_local_ray_sends_usage_statistics_only_if_the_environment_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, is_sent: bool
) -> None:
    from ray._common.usage import usage_lib

    sent = []
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    if setting:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", setting)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: sent.append(usage_lib.usage_stats_enabled()))
    assert cluster.connect(RunConfig(), LimitsConfig())
    assert sent == [is_sent]
