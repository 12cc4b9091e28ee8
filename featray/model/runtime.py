"""Set TensorFlow's options for this process: CPU threads, GPU memory, and which messages it prints.

Call `configure` before any other use of TensorFlow: most options can only be set before its first operation.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from featray.errors import ModelError
from featray.hardware import DEFAULT_THREADS, ModelThreads
from featray.terminal.native_stderr import filter_stderr

log = logging.getLogger(__name__)

# TensorFlow 2.21 logs these lines before it reads the environment variable that would turn them off.
_STARTUP_MESSAGES = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog|[IW]\d{4} [\d:.]+ +\d+ \S+\.cc:"
    rb"|To enable the following instructions:)"
)

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_STACK_LINE = re.compile(
    r"Graph execution error:|Detected at node | *File \".*\", line \d+|<stack traces unable"
)


def configure(threads: ModelThreads = DEFAULT_THREADS) -> None:
    """Import TensorFlow without its startup messages and set the options of this process.

    GPU memory is allocated on demand instead of all at once, so that several actors can share one GPU. An
    option that can no longer be set is only logged, because no option changes a computed value.

    Args:
        threads: CPU threads for the model. TensorFlow ignores OMP_NUM_THREADS.

    Raises:
        ModelError: Keras runs on another backend than TensorFlow.
    """
    _require_tensorflow_backend()
    _import_tensorflow()
    if threads.each is not None:
        _set_threads(threads.each, threads.calls)
    _allocate_gpu_memory_on_demand()


def list_gpu_names() -> list[str]:
    """Return the names of the GPUs that TensorFlow finds on this machine."""
    configure()
    import tensorflow as tf

    all_details = [
        tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")
    ]
    return [str(details.get("device_name", "a GPU without a name")) for details in all_details]


def summarize_error(error: BaseException) -> str:
    """Return the type and the first 240 characters of an error, without colors, stack and line breaks."""
    lines = [line for line in _ANSI_COLOR.sub("", str(error)).splitlines() if not _STACK_LINE.match(line)]
    text = " ".join(" ".join(lines).split())
    return f"{type(error).__name__}: {text[:240]}{'…' if len(text) > 240 else ''}"


def _require_tensorflow_backend() -> None:
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if "keras" in sys.modules:  # Keras reads the variable when it is imported, so ask Keras itself
        import keras

        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ModelError(f"Keras runs on {backend} here; set KERAS_BACKEND=tensorflow in the environment")


def _set_threads(each: int, calls: int) -> None:
    """Set TensorFlow's thread pools; see `ModelThreads` for the arguments."""
    import tensorflow as tf

    # The operations of an encoder run one after the other: more inter-op threads than calls would compete
    # for the cores.
    counts = {"intra": each, "inter": max(calls, min(each, 2))}
    for pool, count in counts.items():
        if getattr(tf.config.threading, f"get_{pool}_op_parallelism_threads")() == count:
            continue
        try:
            getattr(tf.config.threading, f"set_{pool}_op_parallelism_threads")(count)
        except RuntimeError:
            log.info(
                "TensorFlow already runs, so its number of %s-op threads cannot be set to %d", pool, count
            )


def _allocate_gpu_memory_on_demand() -> None:
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(device, enable=True)
        except RuntimeError:
            log.warning("TensorFlow already runs: it may take all memory of %s", device.name)


def _import_tensorflow() -> None:
    """Import TensorFlow and drop its startup messages, unless TF_CPP_MIN_LOG_LEVEL is set."""
    if "tensorflow" in sys.modules:
        return
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:  # the user chose which messages to see
        import tensorflow
    else:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        with filter_stderr(_STARTUP_MESSAGES):
            import tensorflow  # noqa: F401 - imported for its side effects
