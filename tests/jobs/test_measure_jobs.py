"""The jobs that measure: SIGTERM ends them like Ctrl-C, without their temporary files."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_modules import JOBS


@pytest.mark.slow
@pytest.mark.parametrize("job", ["measure_commits", "measure_planning", "measure_reading", "measure_report"])
def test_sigterm_deletes_the_temporary_files_of_a_measurement(job: str, tmp_path: Path) -> None:
    command = [sys.executable, str(JOBS / f"{job}.py"), "--directory", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no temporary folder within a minute"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err, "the job must have been stopped before its end"
    assert list(tmp_path.iterdir()) == []
