"""Set TensorFlow's options for this process: CPU threads, GPUs, and which messages it prints.

Call `configure` before any other use of TensorFlow: most options can only be set before its first operation.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys

from featray.errors import ModelError
from featray.hardware import DEFAULT_THREADS, ModelPlace, ModelThreads
from featray.model import gpus
from featray.model.deferred_wrappers import defer_wrappers
from featray.terminal.native_stderr import filter_stderr

log = logging.getLogger(__name__)

ONEDNN_VARIABLE = "TF_ENABLE_ONEDNN_OPTS"
"""Environment variable by which TensorFlow decides, when it is imported, whether to use oneDNN."""

# TensorFlow 2.21 logs these lines before it reads the environment variable that would turn them off.
_STARTUP_MESSAGES = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog|[IW]\d{4} [\d:.]+ +\d+ \S+\.cc:"
    rb"|To enable the following instructions:)"
)

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_STACK_LINE = re.compile(
    r"Graph execution error:|Detected at node | *File \".*\", line \d+|<stack traces unable"
)

_CAUSE_STARTS = (
    re.compile(r"Exception encountered: "),
    re.compile(r"Exception encountered when calling [^\n]*?\(\)\. "),
    re.compile(r"Original error: "),
)
"""Texts of Keras behind which the cause begins. The last one in a message belongs to the innermost error."""

_CAUSE_ENDS = (" Arguments received by ", " Full object config: ", " config={", " [[{{node", " [Op:")
"""Texts of Keras and TensorFlow behind the cause: arguments, and descriptions of layers and operations."""

_FOLDER = re.compile(
    r"(?<=')/[^']*/(?=[^/']*')|(?<=\")/[^\"]*/(?=[^/\"]*\")"  # a quoted path may contain spaces
    r"|(?<![\w:/.~])(?:~|[A-Za-z]:\\)?/(?:[^\s/'\"<>()\[\],;:]+/)+"
)
"""The folders of an absolute path; not part of a URL or of the name of a layer such as encoder/conv_1."""

_MAX_CAUSE = 400


def configure(threads: ModelThreads = DEFAULT_THREADS, place: ModelPlace = ModelPlace.ANY) -> None:
    """Import TensorFlow without its startup messages and set the options of this process.

    GPU memory is allocated on demand instead of all at once, so that several actors can share one GPU. An
    option that can no longer be set is only logged, because no option changes a computed value.

    Args:
        threads: CPU threads for the model. TensorFlow ignores OMP_NUM_THREADS.
        place: Where the model runs; TensorFlow keeps GPUs only for a model that may run on them here.

    Raises:
        ModelError: Keras runs on another backend than TensorFlow.
    """
    _require_tensorflow_backend()
    _import_tensorflow()
    if threads.each is not None:
        _set_threads(threads.each, threads.calls)
    gpus.compute_in_full_precision()
    if place is ModelPlace.ANY:
        gpus.allocate_on_demand()
    else:
        gpus.hide()


def claim_gpus(num_gpus: float) -> None:
    """Let TensorFlow use the GPUs that this process claimed: none, a share of one's memory, or whole ones.

    Ray shows a process the GPUs that it has claimed, but shows all GPUs to a process that has claimed none.
    """
    configure(place=ModelPlace.ANY if num_gpus else ModelPlace.CPU)
    if 0 < num_gpus < 1:
        gpus.limit_memory(num_gpus)


def list_gpu_names() -> list[str]:
    """Return the names of the GPUs that TensorFlow may use in this process."""
    configure()
    import tensorflow as tf

    all_details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus.list_visible()]
    return [str(details.get("device_name", "a GPU without a name")) for details in all_details]


def summarize_error(error: BaseException) -> str:
    """Return the type and the cause of an error, without colors, stack, line breaks and folders.

    Keras writes the cause behind the config of the model, or between the name of a method and its arguments;
    only the innermost cause is returned. A long cause loses its middle.
    """
    lines = [line for line in _ANSI_COLOR.sub("", str(error)).splitlines() if not _STACK_LINE.match(line)]
    text = " ".join(" ".join(lines).split())
    type_name = type(error).__name__
    for start in _CAUSE_STARTS:
        text = start.split(text)[-1] or text
    for end in _CAUSE_ENDS:
        text = text.partition(end)[0] or text
    text = _FOLDER.sub("", text).strip()
    if len(text) > _MAX_CAUSE:
        text = f"{text[: _MAX_CAUSE // 2]} … {text[-_MAX_CAUSE // 2 :]}"
    return f"{type_name}: {text}"


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


def use_onednn() -> None:
    """Let TensorFlow, before it is imported, use oneDNN on every x86-64 CPU if the environment allows it.

    Without this, TensorFlow uses it only on CPUs with AVX-512 VNNI or newer instructions. On the others, such
    as AMD's before Zen 4, a 3-D convolution takes seven times as long. Values differ by rounding only.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault(ONEDNN_VARIABLE, "1")


def _import_tensorflow() -> None:
    """Import TensorFlow; drop its startup messages unless TF_CPP_MIN_LOG_LEVEL asks for them (0 or 1)."""
    if "tensorflow" in sys.modules:
        return
    use_onednn()
    defer_wrappers()
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") in ("0", "1"):
        import tensorflow
    else:
        with filter_stderr(_STARTUP_MESSAGES):
            import tensorflow  # noqa: F401 - imported for its side effects
