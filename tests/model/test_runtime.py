"""TensorFlow is set up before its first operation, quietly, and late settings are told."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from featray.hardware import ModelThreads
from featray.model import runtime


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_threads_are_set_and_the_start_is_quiet() -> None:
    done = _run(
        "import os, sys; os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)\n"
        "from featray.hardware import ModelThreads\n"
        "from featray.model import runtime; runtime.configure(ModelThreads(1))\n"
        "import tensorflow as tf; tf.add(1, 2)\n"
        "assert tf.config.threading.get_intra_op_parallelism_threads() == 1\n"
        "assert tf.config.threading.get_inter_op_parallelism_threads() == 1\n"
        "print('kept', file=sys.stderr)"
    )
    assert done.stderr == "kept\n"


def test_what_others_write_to_stderr_meanwhile_is_passed_on() -> None:
    done = _run(
        "import os\nfrom featray.model import runtime\n"
        "from featray.terminal.native_stderr import filter_stderr\n"
        "with filter_stderr(runtime._CHATTER):\n"
        "    os.write(2, b'I0000 00:00:1.5 12 port.cc:153] chatter\\nE0000 00:00:1.5 12 a.cc:1] fault\\n')"
    )
    assert done.stderr == "E0000 00:00:1.5 12 a.cc:1] fault\n"


def test_threads_that_come_too_late_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    import tensorflow as tf

    tf.add(1, 2)
    with caplog.at_level(logging.INFO):
        runtime.configure(ModelThreads(tf.config.threading.get_intra_op_parallelism_threads() + 1))
    assert "TensorFlow already runs" in caplog.text


def test_another_backend_is_refused_before_anything_is_imported() -> None:
    _run(
        "import os, sys; os.environ['KERAS_BACKEND'] = 'jax'\n"
        "from featray.errors import ModelError\nfrom featray.model import runtime\n"
        "try:\n    runtime.configure()\nexcept ModelError as error:\n"
        "    assert 'KERAS_BACKEND=tensorflow' in str(error)\n"
        "else:\n    raise SystemExit('accepted')\n"
        "assert 'keras' not in sys.modules"
    )
