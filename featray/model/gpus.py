"""Choose the GPUs of this process and the share of their memory, before TensorFlow uses them.

TensorFlow takes nearly all memory of every GPU that it sees, unless it is told otherwise. In Ray 2.60 an
actor that claims no GPU sees all of them, and a claim of half a GPU limits no memory.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any

log = logging.getLogger(__name__)

HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1"}
"""Environment variable that hides all GPUs from a process that has not used one yet."""

_MIB = 2**20
_RESERVED_BYTES = 1536 * _MIB
_MAX_RESERVED_SHARE = 0.25
"""Part of an actor's share that stays free for memory outside of TensorFlow's limit: CUDA itself, its
libraries and their kernels. TensorFlow leaves as much free on new GPUs (`MinSystemMemory`)."""


def hide() -> None:
    """Hide all GPUs from TensorFlow in this process. Other libraries and child processes still see them."""
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        if list_visible():
            log.warning(
                "TensorFlow already runs in this process, so it keeps its GPUs and their memory; engine ray "
                "needs none in this process"
            )


def list_visible() -> list[Any]:
    """Return the GPUs that TensorFlow may use in this process."""
    import tensorflow as tf

    return list(tf.config.get_visible_devices("GPU"))


def allocate_on_demand() -> None:
    """Let TensorFlow allocate GPU memory as it needs it, so that several processes can share a GPU."""
    import tensorflow as tf

    for gpu in list_visible():
        if tf.config.get_logical_device_configuration(gpu) is not None:
            continue  # its memory is limited, which excludes this option; see `limit_memory`
        try:
            tf.config.experimental.set_memory_growth(gpu, enable=True)
        except RuntimeError:
            log.warning("TensorFlow already runs: it may take all memory of %s", gpu.name)


def compute_in_full_precision() -> None:
    """Let GPUs multiply float32 as float32.

    By default new ones round the factors to TF32, with 10 bits instead of 23, which changes values by about
    1e-3. Neither the model nor the recipe would show it; `model.compute` is the way to lower precision.
    """
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(enabled=False)


def limit_memory(share: float) -> None:
    """Limit the memory of TensorFlow on every GPU that it sees to a share of the whole.

    Call it before the first operation, in a process that runs nothing else, because it sets an environment
    variable.
    """
    for number, gpu in enumerate(list_visible()):
        total = _read_total_memory(number)
        if total is None:
            log.warning("the memory of %s is unknown, so it is not limited to %g of it", gpu.name, share)
        else:
            limit_memory_to(gpu, compute_memory_limit(total, share))


def limit_memory_to(gpu: Any, limit: int) -> None:
    """Limit the memory of TensorFlow on one GPU to `limit` bytes; see `limit_memory`."""
    # A GPU with a limit takes no other option, and without this it would be filled up to the limit at once.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    import tensorflow as tf

    configuration = [tf.config.LogicalDeviceConfiguration(memory_limit=limit // _MIB)]
    tf.config.set_logical_device_configuration(gpu, configuration)


def compute_memory_limit(total: int, share: float) -> int:
    """Return the bytes that TensorFlow may allocate in a process that has claimed a share of a GPU.

    Args:
        total: Bytes of memory of the GPU.
        share: Share that the process has claimed, above 0 and below 1.
    """
    claimed = total * share
    return int(claimed - min(_RESERVED_BYTES, _MAX_RESERVED_SHARE * claimed))


def _read_total_memory(number: int) -> int | None:
    """Return the bytes of memory of a GPU, counted as TensorFlow does; None if CUDA does not say.

    The driver is asked, because TensorFlow does not say it, and because it knows CUDA_VISIBLE_DEVICES and
    parts of GPUs (MIG). This uses no memory of the GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, total = ctypes.c_int(), ctypes.c_size_t()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), number)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    )
    return None if failed else total.value
