"""Tell from an error of TensorFlow whether memory was short or the device has failed.

TensorFlow raises the same types for errors of a model and of a GPU, so most are recognized by their texts.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from featray.errors import DeviceError
from featray.model.runtime import summarize_error


class DeviceProblem(Enum):
    """Problem of the device that causes an error."""

    MEMORY = auto()
    """Its memory was too short for this call; a smaller call may succeed."""
    FAULT = auto()
    """It has failed, and fails in all further calls of this process."""


_MEMORY_TYPES = {"ResourceExhaustedError", "MemoryError"}
_MEMORY = re.compile(
    r"CUDA_ERROR_OUT_OF_MEMORY|CUDNN_STATUS_ALLOC_FAILED|CU\w+_STATUS_ALLOC_FAILED"
    r"|cudaErrorMemoryAllocation|ran out of memory|OOM when allocating|Out of memory (?:while|allocating)"
    r"|failed to allocate the scratch space|Failed to allocate (?:scratch|work|requested memory|request for)"
    r"|RESOURCE_EXHAUSTED"
)
_FAULT_TYPES = {
    "AbortedError",
    "FailedPreconditionError",
    "InternalError",
    "NotFoundError",
    "UnavailableError",
    "UnknownError",
    "XlaRuntimeError",
}
_FAULT = re.compile(
    r"CUDA_ERROR_\w+|HIP_ERROR_\w+|CUDA error|illegal memory access|uncorrectable ECC|device(?:'s)? lost"
    r"|unspecified launch failure|misaligned address|device-side assert"
    r"|CUDNN_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED|ARCH_MISMATCH"
    r"|\w*VERSION_MISMATCH|LICENSE_ERROR|RUNTIME_\w+)\w*"
    r"|CU(?:BLAS|SOLVER|FFT|SPARSE)_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED"
    r"|ARCH_MISMATCH)"
    r"|GPU sync failed|Failed to launch CUDA|Could not synchronize CUDA|Failed to synchronize GPU"
    r"|[Cc]ould not create cudnn handle|cudnn library could not create|DNN library initialization failed"
    r"|cuDNN failed to initialize|cuDNN launch failure|Blas (?:x?GEMM|GEMV) launch failed"
    r"|[Ff]ailed to (?:enqueue|synchronous memcpy|synchronize)|No algorithm worked"
)
"""Texts of faults that last in the process. CUDNN_STATUS_BAD_PARAM and _NOT_SUPPORTED are not among them,
because a model or an input causes them."""


def classify_error(error: BaseException) -> DeviceProblem | None:
    """Return the problem of the device that causes an error of a model call; None for other causes."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    if names & _MEMORY_TYPES or (names & _FAULT_TYPES and _MEMORY.search(text)):
        return DeviceProblem.MEMORY
    return DeviceProblem.FAULT if names & _FAULT_TYPES and _FAULT.search(text) else None


def make_fault_error(error: BaseException) -> DeviceError:
    """Return the error of a device that has failed."""
    return DeviceError(
        f"the GPU failed while it ran the model ({summarize_error(error)}). No scan is to blame. Check the "
        "GPU with nvidia-smi and the kernel's log (Xid messages); a fault that stays needs a reset of the "
        "GPU or of its node. Committed scans are kept; then run the same command again"
    )
