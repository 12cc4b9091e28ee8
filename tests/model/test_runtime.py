"""TensorFlow is configured before its first operation, prints nothing, and late settings are logged."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys

import pytest

from featray.hardware import ModelThreads
from featray.model import runtime


def _run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_threads_are_set_and_startup_messages_are_dropped() -> None:
    process = _run_python(
        "import os, sys; os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)\n"
        "from featray.hardware import ModelThreads\n"
        "from featray.model import runtime; runtime.configure(ModelThreads(1))\n"
        "import tensorflow as tf; tf.add(1, 2)\n"
        "assert tf.config.threading.get_intra_op_parallelism_threads() == 1\n"
        "assert tf.config.threading.get_inter_op_parallelism_threads() == 1\n"
        "print('kept', file=sys.stderr)"
    )
    assert process.stderr == "kept\n"


@pytest.mark.slow
def test_other_lines_on_stderr_are_passed_on_during_the_import() -> None:
    process = _run_python(
        "import os\nfrom featray.model import runtime\n"
        "from featray.terminal.native_stderr import filter_stderr\n"
        "with filter_stderr(runtime._STARTUP_MESSAGES):\n"
        "    os.write(2, b'I0000 00:00:1.5 12 port.cc:153] chatter\\nE0000 00:00:1.5 12 a.cc:1] fault\\n')"
    )
    assert process.stderr == "E0000 00:00:1.5 12 a.cc:1] fault\n"


def test_threads_that_cannot_be_set_any_more_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    import tensorflow as tf

    tf.add(1, 2)
    with caplog.at_level(logging.INFO):
        runtime.configure(ModelThreads(tf.config.threading.get_intra_op_parallelism_threads() + 1))
    assert "TensorFlow already runs" in caplog.text


@pytest.mark.parametrize(
    ("machine", "before", "after"), [("x86_64", None, "1"), ("x86_64", "0", "0"), ("aarch64", None, None)]
)
def test_onednn_is_used_on_every_x86_cpu_unless_the_environment_forbids_it(
    machine: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.delenv(runtime.ONEDNN_VARIABLE, raising=False)
    if before:
        monkeypatch.setenv(runtime.ONEDNN_VARIABLE, before)
    runtime.use_onednn()
    assert os.environ.get(runtime.ONEDNN_VARIABLE) == after


@pytest.mark.slow
def test_another_backend_is_refused_before_keras_is_imported() -> None:
    _run_python(
        "import os, sys; os.environ['KERAS_BACKEND'] = 'jax'\n"
        "from featray.errors import ModelError\nfrom featray.model import runtime\n"
        "try:\n    runtime.configure()\nexcept ModelError as error:\n"
        "    assert 'KERAS_BACKEND=tensorflow' in str(error)\n"
        "else:\n    raise SystemExit('accepted')\n"
        "assert 'keras' not in sys.modules"
    )


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            "<class 'A'> could not be deserialized.\n\nconfig={'a': 1}.\n\nException encountered: Error when "
            "deserializing class 'Dense' using config={'b': 2}.\n\nException encountered: Unrecognized "
            "keyword arguments: {'c': 3}",
            "Unrecognized keyword arguments: {'c': 3}",
        ),
        (
            "Exception encountered when calling Lambda.call().\n\n\x1b[1mname 'tf' is not defined\x1b[0m\n\n"
            "Arguments received by Lambda.call():\n  • inputs=…",
            "name 'tf' is not defined",
        ),
        ("Could not locate class 'A'. Full object config: {'a': 1}", "Could not locate class 'A'."),
        (
            "indices[0] = 7 is not in [0, 3)\n\t [[{{node GatherV2}}]] [Op:f]",
            "indices[0] = 7 is not in [0, 3)",
        ),
        ("no file '/home/who ever/private/model.py' or /srv/x/y.h5", "no file 'model.py' or y.h5"),
        ("see https://keras.io/a/b for encoder/conv_1", "see https://keras.io/a/b for encoder/conv_1"),
        ("begin " + "x" * 500 + " end", "begin " + "x" * 194 + " … " + "x" * 196 + " end"),
    ],
)
def test_the_cause_of_an_error_is_kept_without_configs_arguments_and_folders(
    message: str, cause: str
) -> None:
    assert runtime.summarize_error(ValueError(message)) == f"ValueError: {cause}"


@pytest.mark.slow
@pytest.mark.parametrize(("level", "is_filtered"), [("2", True), ("0", False)])
def test_startup_messages_are_shown_only_if_the_user_asks_for_them(level: str, is_filtered: bool) -> None:
    process = _run_python(
        f"import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '{level}'\n"
        f"os.environ.pop('{runtime.ONEDNN_VARIABLE}', None)\n"
        "from featray.model import runtime; runtime.configure()"
    )
    assert ("port.cc" in process.stderr or "cudart" in process.stderr) != is_filtered
    if platform.machine() in ("x86_64", "AMD64") and not is_filtered:
        assert "oneDNN custom operations are on" in process.stderr
