"""The command line works with any stdout and stderr: not UTF-8, closed, or a pipe whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

SIGNS = "→ × ² − \udcff"


def run_python(code: str, shell_suffix: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python code, with redirections of the shell."""
    command = f'exec "$0" -c "$1" {shell_suffix}'
    environment: dict[str, Any] = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code], env=environment, capture_output=True, check=False
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_characters_that_a_terminal_lacks_are_replaced(encoding: str, stream: str) -> None:
    code = (
        "import sys\nfrom featray.terminal.streams import make_streams_robust\n"
        f"make_streams_robust()\nprint({SIGNS!r}, file=sys.{stream})"
    )
    done = run_python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert getattr(done, stream).decode(encoding).strip() == SIGNS.encode(encoding, "replace").decode(
        encoding
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_discards_and_no_file_takes_its_place(closed: str, tmp_path: Any) -> None:
    code = (
        "import sys\nfrom featray.terminal.streams import make_streams_robust\n"
        "make_streams_robust()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('answer'); print('message', file=sys.stderr)\n"
        "sys.exit(0 if file.fileno() > 2 else 9)"
    )
    assert run_python(code, closed).returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_error(stream: str) -> None:
    code = (
        "import os, sys\nfrom featray.terminal.streams import flush_streams, write_line\n"
        "reader, writer = os.pipe(); os.close(reader)\n"
        f"os.dup2(writer, sys.{stream}.fileno())\n"
        f"for _ in range(3): write_line(sys.{stream}, 'line')\n"
        f"sys.{stream}.write('rest'); flush_streams()"
    )
    assert run_python(code).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>&- >&-"])
def test_the_command_line_works_with_closed_streams(closed: str, tmp_path: Any) -> None:
    code = (
        f"import sys; sys.argv = ['featray', 'status', {str(tmp_path)!r}, '--json']\n"
        "from featray.cli.main import console; console()"
    )
    assert run_python(code, closed).returncode == 2


def test_libraries_may_be_silenced_in_a_process_without_stderr() -> None:
    code = (
        "import re\nfrom featray.terminal.native_stderr import filter_stderr\n"
        "with filter_stderr(re.compile(b'x')): pass\nprint('done')"
    )
    assert run_python(code, "2>&-").stdout == b"done\n"
