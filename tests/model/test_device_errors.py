"""Which errors of TensorFlow mean that memory is short, and which that the GPU has failed."""

from __future__ import annotations

import pytest
import tensorflow as tf

from featray.model.device_errors import DeviceProblem, classify_error

MEMORY, FAULT = DeviceProblem.MEMORY, DeviceProblem.FAULT
errors = tf.errors


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (
            "ResourceExhaustedError",
            "OOM when allocating tensor with shape[8,64] by allocator GPU_0_bfc",
            MEMORY,
        ),
        ("ResourceExhaustedError", "Out of memory while trying to allocate 5368709120 bytes.", MEMORY),
        ("InternalError", "Failed to allocate request for 2.0GiB on device ordinal 0", MEMORY),
        ("InternalError", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", MEMORY),
        ("UnknownError", "CUDNN_STATUS_ALLOC_FAILED in tensorflow/stream_executor", MEMORY),
        ("NotFoundError", "No algorithm worked! Error messages: RESOURCE_EXHAUSTED: Out of memory", MEMORY),
        ("NotFoundError", "No algorithm worked!", FAULT),
        ("InternalError", "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", FAULT),
        ("InternalError", "CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered", FAULT),
        ("InternalError", "CUDA_ERROR_DEVICE_UNAVAILABLE: device is busy or unavailable", FAULT),
        ("InternalError", "failed to enqueue async memcpy from host to device", FAULT),
        ("InternalError", "cuDNN launch failure : input shape ([4,1,8,8])", FAULT),
        ("InternalError", "Blas GEMM launch failed : a.shape=(4, 8)", FAULT),
        ("FailedPreconditionError", "DNN library initialization failed. Look at the errors above", FAULT),
        ("UnknownError", "CUDNN_STATUS_EXECUTION_FAILED in cuda_dnn.cc", FAULT),
        ("InternalError", "CUDNN_STATUS_NOT_INITIALIZED", FAULT),
        ("InternalError", "CUDNN_STATUS_BAD_PARAM in cuda_dnn.cc", None),
        ("InternalError", "Unsupported shape of the kernel", None),
        ("InvalidArgumentError", "CUDA_ERROR_ILLEGAL_ADDRESS is the name of a class of this data set", None),
    ],
)
def test_an_error_of_tensorflow_is_classified(kind: str, text: str, problem: DeviceProblem | None) -> None:
    assert classify_error(getattr(errors, kind)(None, None, text)) is problem


def test_python_errors_are_classified_by_their_type() -> None:
    assert classify_error(MemoryError()) is MEMORY
    assert classify_error(ValueError("CUDA_ERROR_ILLEGAL_ADDRESS")) is None
