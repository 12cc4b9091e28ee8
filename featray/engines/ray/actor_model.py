"""The model of one actor, and the actor's reaction to a fault of its device.

After a fault of the device, every later call in the same process would fail too. The actor therefore returns
the scans of the task to the engine without a result, and ends its process when it gets the next task. Ray
starts the actor again and repeats that task, and the engine tries the returned scans again in the next pass.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from featray.errors import DeviceError
from featray.model import gpus
from featray.schema import Decoded
from featray.stages.extract import LayerExtractor, extract, return_scans

log = logging.getLogger(__name__)

_EXIT_CODE = 1
_NO_TASK = "no scans were returned"
_ANSWER_S = 2.0
"""Seconds in which Ray takes the answers of other calls; it would lose them with the process."""


@dataclass(frozen=True)
class ModelLoading:
    """How an actor gets the model; travels to the actor.

    Attributes:
        load_extractor: Loads the model.
        recipe: Recipe id from which the seeds of random layers are made (`RecipeIds.seed`).
        num_gpus: GPUs that the actor claims.
    """

    load_extractor: Callable[[], LayerExtractor]
    recipe: str
    num_gpus: float


class ActorModel:
    """The model of an actor; see the module. Threads may call it at the same time once it is loaded."""

    def __init__(self, loading: ModelLoading) -> None:
        if not loading.num_gpus:
            # Before TensorFlow is imported, because Ray shows all GPUs to an actor that claims none.
            os.environ.update(gpus.HIDDEN)
        self._loading, self._id = loading, uuid.uuid4().hex
        self._extractor: LayerExtractor | None = None
        self._fault = ""
        self._returning_task: str | None = _NO_TASK

    def load(self) -> None:
        """Load the model; keep a fault of the device for the first task, so that the engine learns of it."""
        try:
            self._extractor = self._loading.load_extractor()
        except DeviceError as error:
            self._fault = str(error)

    def begin_batch(self, task: str | None) -> None:
        """End this process if scans of an earlier task were returned; Ray repeats this task in a new one.

        Args:
            task: Id of the task to which the batch belongs; None if the batch is a task of its own.
        """
        if self._returning_task is not _NO_TASK and (task is None or task != self._returning_task):
            time.sleep(_ANSWER_S)
            os._exit(_EXIT_CODE)

    def extract(self, decoded: Sequence[Decoded], task: str | None = None) -> pa.Table:
        """Return one row per scan: with its features, or marked as returned if the device has failed.

        Args:
            decoded: The scans of one batch.
            task: As for `begin_batch`.
        """
        if self._extractor is not None and not self._fault:
            try:
                return extract(self._extractor, decoded, recipe=self._loading.recipe)
            except DeviceError as error:
                self._fault = str(error)
        log.error("%d scans are returned: %s", len(decoded), self._fault)
        self._returning_task = task
        return return_scans(decoded, self._fault, self._id)
