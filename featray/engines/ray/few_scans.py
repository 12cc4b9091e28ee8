"""Runs of a few scans on one machine: the driver processes them as engine `inline` does, and starts no Ray.

A local Ray, whose actor loads the model too, takes 9 CPU seconds and 8 s to start, and the driver computes
the few scans in a part of that time. The values are the same. A run uses Ray from its first scan on if it has
more scans, a cluster, actors with GPUs, or `run.address: local`.
"""

from __future__ import annotations

import logging
import os

from featray.config import RunConfig
from featray.engines.base import Decoding
from featray.engines.ray import cluster
from featray.hardware import count_usable_cores

log = logging.getLogger(__name__)

MAX_SCANS = 24
"""Starting Ray takes about as long as this number of scans of full size in the driver."""


def is_without_ray(run: RunConfig, decoding: Decoding, scans: int) -> bool:
    """Return whether the driver processes a run of `scans` scans itself, instead of starting a local Ray.

    Args:
        run: Address and claims. A claim of memory is Ray's to meet.
        decoding: How scans are decoded. If each scan keeps its own size, the model may need any amount of
            memory for one of them, and the driver must not be killed for it.
        scans: Number of scans.

    Raises:
        ConfigError: A local Ray would lack the CPUs that the run claims.
    """
    is_local = cluster.is_to_start(run) and not (run.address or os.environ.get("RAY_ADDRESS"))
    is_small = scans <= MAX_SCANS and not (run.actors.num_gpus or run.decode.memory)
    if not (is_local and is_small and decoding.decoder.preprocess.size is not None):
        return False
    cluster.check_claims(run, {"CPU": max(2, count_usable_cores())}, grows=False)
    log.info(
        "the driver processes %d scans, because a local Ray pays only for more; run.address: local starts it",
        scans,
    )
    return True
