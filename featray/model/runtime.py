"""TensorFlow's process-wide settings: threads, GPU memory, quiet start.

Call `configure` before anything else touches TensorFlow; most settings freeze at its first op.
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

# TensorFlow 2.21 prints these through a logger that reads no environment variable until later.
_CHATTER = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog|[IW]\d{4} [\d:.]+ +\d+ \S+\.cc:"
    rb"|To enable the following instructions:)"
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STACK = re.compile(r"Graph execution error:|Detected at node | *File \".*\", line \d+|<stack traces unable")


def configure(threads: ModelThreads = DEFAULT_THREADS, gpu: bool = True) -> None:
    """Import TensorFlow quietly and set what can only be set before its first operation.

    Args:
        threads: CPU threads; TensorFlow ignores OMP_NUM_THREADS.
        gpu: Grow GPU memory on demand instead of taking all of it, so that actors can share one.

    A setting that comes too late is only logged: the numbers stay the same.

    Raises:
        ModelError: Keras runs on another backend than TensorFlow.
    """
    _require_backend()
    _import_quietly()
    if threads.each is not None:
        _set_threads(threads.each, threads.calls)
    if gpu:
        _grow_gpu_memory()


def list_gpu_names() -> list[str]:
    """Return the GPUs that TensorFlow sees on this machine."""
    configure()
    import tensorflow as tf

    details = [
        tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")
    ]
    return [str(found.get("device_name", "a GPU without a name")) for found in details]


def summarize_error(error: BaseException) -> str:
    """Return kind and first words of an error, without colours, stack and line breaks."""
    lines = [line for line in _COLOUR.sub("", str(error)).splitlines() if not _STACK.match(line)]
    text = " ".join(" ".join(lines).split())
    return f"{type(error).__name__}: {text[:240]}{'…' if len(text) > 240 else ''}"


def _require_backend() -> None:
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if "keras" in sys.modules:  # too late for the environment: ask what it runs on
        import keras

        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ModelError(f"Keras runs on {backend} here; set KERAS_BACKEND=tensorflow in the environment")


def _set_threads(each: int, calls: int) -> None:
    import tensorflow as tf

    # Operations of an encoder run one after the other: more than one for each call would only compete.
    wanted = {"intra": each, "inter": max(calls, min(each, 2))}
    for kind, count in wanted.items():
        if getattr(tf.config.threading, f"get_{kind}_op_parallelism_threads")() == count:
            continue
        try:
            getattr(tf.config.threading, f"set_{kind}_op_parallelism_threads")(count)
        except RuntimeError:
            log.info("TensorFlow already runs: its %s-op threads stay as they are, not %d", kind, count)


def _grow_gpu_memory() -> None:
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:
            log.warning("TensorFlow already runs: it may take all memory of %s", device.name)


def _import_quietly() -> None:
    if "tensorflow" in sys.modules:
        return
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:  # the user chose what to see
        import tensorflow
    else:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        with filter_stderr(_CHATTER):
            import tensorflow  # noqa: F401 - imported for its effect
