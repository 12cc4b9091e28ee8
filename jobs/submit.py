"""Submit a command of featray as a Ray job, follow its log, and exit with its exit code.

python jobs/submit.py --address http://HEAD:8265 --working-dir . -- \
    python jobs/refresh.py configs/s3_ct_vae.yaml
python jobs/submit.py --submission-id nightly-2026-11-29 --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY \
    --working-dir . -- python jobs/refresh.py configs/s3_ct_vae.yaml

Needs only `pip install 'ray[default]'`, in the version of the cluster. The exit code is that of the command,
which `ray job submit` does not give: 0 done, 2 wrong config, 3 too many failed scans, 4 another run holds the
output, 1 unexpected. It is 130 if the job was stopped, or if this program is interrupted; the job then goes
on. It is 2 if the job cannot be submitted.

A submission id that exists already is not submitted again: a running job is followed, and a finished one
gives its log and its code. So a scheduler can repeat the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

UNEXPECTED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes of `featray.errors.ExitCode`; this program runs also where featray is not installed."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
LOST_S = 120.0
"""Seconds for which the cluster may be unreachable while a job is followed."""
_POLL_S = 1.0
_NO_AGENT = "No available agent"
"""Part of Ray's answer while no process that runs jobs has registered."""
_MIN_SECRET = 6
"""Shorter values of variables are not masked, because they are parts of ordinary words."""
_MAX_CAUSE = 600

T = TypeVar("T")


class SubmitError(Exception):
    """The job cannot be submitted or followed; the text says what to do."""

    def __init__(self, text: str, code: int = USAGE) -> None:
        super().__init__(text)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Submit or find the job, follow it, and return the exit code."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job: Job | None = None
    try:
        variables = read_variables(args.env, args.grace)
        job = Job(connect(args.address), args.submission_id, secrets=list(variables.values()))
        job.submit(args, variables)
        if args.wait:
            return job.follow()
        print(job.id)
        return 0
    except SubmitError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say(f"interrupted; {'no job was submitted' if job is None else job.describe_state()}")
        return INTERRUPTED


class Job:
    """One job of the cluster, under its submission id.

    Args:
        client: Connection to the cluster.
        submission_id: Id; None for one that the cluster makes.
        secrets: Values that are masked in messages.

    Attributes:
        id: The submission id; empty until it is known.
        is_submitted: Whether the cluster has the job.
    """

    def __init__(
        self, client: JobSubmissionClient, submission_id: str | None, secrets: Sequence[str] = ()
    ) -> None:
        self._client, self.id, self.is_submitted = client, submission_id or "", False
        self._secrets = [secret for secret in secrets if len(secret) >= _MIN_SECRET]
        self._shown = 0

    def describe_state(self) -> str:
        """Return whether the job goes on without this program, and how to follow and to stop it."""
        if not self.is_submitted:
            return "perhaps the job was submitted; `ray job list` shows whether it was"
        return (
            f"job {self.id} goes on; run the same command with --submission-id {self.id} to follow it, or "
            f"`ray job stop {self.id}` to stop it"
        )

    def submit(self, args: argparse.Namespace, variables: dict[str, str]) -> None:
        """Submit the job, unless the cluster has one with its id.

        Raises:
            SubmitError: The cluster refuses it, or the id belongs to another command.
        """
        entrypoint = shlex.join(args.command)
        if self._find(entrypoint):
            return
        runtime_env: dict[str, Any] = {"env_vars": variables}
        if args.working_dir:
            runtime_env["working_dir"] = args.working_dir
        if args.pip:
            runtime_env["pip"] = read_packages(args.pip)
        try:
            self.id = self._submit_when_ready(
                entrypoint=entrypoint,
                runtime_env=runtime_env,
                submission_id=args.submission_id,
                entrypoint_num_cpus=args.cpus,
                entrypoint_memory=args.memory,
            )
        except Exception as error:  # Ray raises errors of many types
            if not (args.submission_id and self._find(entrypoint)):  # another submitter was faster
                raise SubmitError(f"the job cannot be submitted ({self._describe(error)})") from None
            return
        self.is_submitted = True
        say(f"submitted job {self.id}")

    def _submit_when_ready(self, **job: Any) -> str:
        """Submit the job and return its id; a head node that has just started takes jobs after a while."""
        end = time.monotonic() + LOST_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)

    def follow(self) -> int:
        """Print the log until the job has ended, and return its exit code.

        Raises:
            SubmitError: The cluster was unreachable for too long.
        """
        while not (info := self._retry(self._follow_once)).status.is_terminal():
            time.sleep(_POLL_S)
        self._retry(self._print_rest)
        return self._make_exit_code(info)

    def _find(self, entrypoint: str) -> bool:
        """Return whether the cluster has a job with this id.

        Raises:
            SubmitError: It has one, with another command.
        """
        if not self.id:
            return False
        try:
            info = self._client.get_job_info(self.id)
        except Exception as error:  # Ray raises RuntimeError for an unknown id
            if "404" in str(error) or "does not exist" in str(error):
                return False
            raise SubmitError(f"the cluster does not answer ({self._describe(error)})") from None
        if info.entrypoint != entrypoint:
            raise SubmitError(f"job {self.id} exists and has another command; choose another --submission-id")
        self.is_submitted = True
        state = "has ended" if info.status.is_terminal() else "is running"
        say(f"job {self.id} was submitted before and {state}")
        return True

    def _follow_once(self) -> JobDetails:
        """Print the log until Ray ends it, and return the state of the job."""
        asyncio.run(self._print_log())
        return self._client.get_job_info(self.id)

    async def _print_log(self) -> None:
        """Print what the job writes until it ends. After a lost connection, begin where printing ended."""
        position = 0
        async for text in self._client.tail_job_logs(self.id):
            self._print_from(position, text)
            position += len(text)

    def _print_rest(self) -> None:
        """Print the end of the log, of which following may have missed the last lines."""
        self._print_from(0, self._client.get_job_logs(self.id))

    def _print_from(self, position: int, text: str) -> None:
        """Print the part of a text, which is at a position of the log, that was not printed yet."""
        new = text[max(0, self._shown - position) :]
        if new:
            self._shown = position + len(text)
            try:
                print(new, end="", flush=True)
            except BrokenPipeError:  # nobody reads the log any more; the exit code still matters
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _make_exit_code(self, info: JobDetails) -> int:
        """Return the exit code of the ended job, and print why it has none of its own."""
        if info.status == "STOPPED":
            say(f"job {self.id} was stopped; run the same command with another id to resume")
            return INTERRUPTED
        code = info.driver_exit_code
        if code is None:
            if info.status == "SUCCEEDED":
                return 0
            say(f"job {self.id} failed before its command ended: {self._describe(info.message or '')}")
            return UNEXPECTED
        if code < 0:
            say(f"signal {-code} ended the command of job {self.id}; the log has no summary")
            return 128 - int(code)
        say(f"job {self.id} ended with exit code {code}")
        return int(code)

    def _retry(self, operation: Callable[[], T]) -> T:
        """Return the result of an operation; repeat it while the cluster is unreachable, up to `LOST_S`."""
        end = time.monotonic() + LOST_S
        while True:
            shown = self._shown
            try:
                return operation()
            except Exception as error:  # of requests, aiohttp, and Ray
                if self._shown > shown:
                    end = time.monotonic() + LOST_S
                if time.monotonic() > end:
                    silence = f"the cluster has not answered for {LOST_S:.0f} s ({self._describe(error)})"
                    raise SubmitError(f"{silence}; perhaps {self.describe_state()}", UNEXPECTED) from None
                time.sleep(_POLL_S)

    def _describe(self, error: Exception | str) -> str:
        """Return a short text of an error in which values of variables are masked."""
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
        return kind + (text if len(text) <= _MAX_CAUSE else f"… {text[-_MAX_CAUSE:]}")


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the job server at an address.

    Raises:
        SubmitError: Ray is not installed as needed, nothing answers, or the cluster wants another token.
    """
    if address:  # Ray would prefer RAY_ADDRESS to the argument
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    shown = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(address)
    except Exception as error:  # Ray raises errors of many types
        raise SubmitError(explain_connection_error(shown, error)) from None
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports closed sockets
    return client


def explain_connection_error(address: str, error: Exception) -> str:
    """Return what to do after the cluster could not be reached."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ImportError) or "ray[default]" in text:
        return f"{text}; install what submits jobs: pip install 'ray[default]', in the version of the cluster"
    if type(error).__name__ == "AuthenticationError" or "authentication" in text.lower():
        return (
            f"the cluster at {address} wants its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file "
            "with it; `ray get-auth-token` prints it on the head node"
        )
    return (
        f"no job server answers at {address} ({type(error).__name__}: {text[:_MAX_CAUSE]}). Give the address "
        "of the dashboard, such as http://HEAD:8265; the head node needs `ray[default]` and must let this "
        "machine reach it (--dashboard-host)"
    )


def read_variables(texts: Sequence[str], grace_s: int) -> dict[str, str]:
    """Return the environment variables of the job.

    Args:
        texts: NAME=VALUE, or NAME for the value that it has here, so that no secret is in a command line.
        grace_s: Seconds between SIGTERM and SIGKILL when the job is stopped; Ray's default is 3.

    Raises:
        SubmitError: A variable is not set here.
    """
    variables = {STOP_WAIT: str(grace_s)}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator and name not in os.environ:
            raise SubmitError(f"--env {name}: the variable is not set here; set it, or give {name}=VALUE")
        variables[name] = value if separator else os.environ[name]
    return variables


def read_packages(texts: Sequence[str]) -> list[str]:
    """Return requirements for pip, from requirements and from files of requirements.

    Raises:
        SubmitError: A file cannot be read.
    """
    packages: list[str] = []
    for text in texts:
        if not text.endswith(".txt"):
            packages.append(text)
            continue
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise SubmitError(f"--pip: cannot read {text} ({error.strerror})") from None
        packages += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return packages


def say(text: str) -> None:
    """Print a message on stderr; the log of the job goes to stdout."""
    print(f"submit: {text}", file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments; the command of the job follows `--`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], usage="%(prog)s [OPTIONS] -- COMMAND ..."
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="dashboard of the cluster, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)",
    )
    parser.add_argument(
        "--working-dir",
        metavar="DIR",
        help="folder that is sent to the cluster, in which the command starts; .gitignore and .rayignore "
        "say what is left out (default: none)",
    )
    parser.add_argument(
        "--submission-id",
        metavar="ID",
        help="name of the job; one that exists is followed, not submitted again (default: a new one)",
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="follow the log and exit with the code of the command; or print the id and exit with 0",
    )
    _add_job_options(parser)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the job gets."""
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="environment variable of the job; without VALUE, the one that it has here; may be repeated",
    )
    parser.add_argument(
        "--pip",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package that Ray installs on each node for this job, or a .txt file of packages; may be "
        "repeated",
    )
    parser.add_argument(
        "--memory", type=parse_bytes, metavar="BYTES", help="memory that the command claims, for example 4G"
    )
    parser.add_argument(
        "--cpus", type=float, metavar="N", help="CPUs that the command claims (default: none)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=120,
        metavar="SECONDS",
        help="time to commit scans in progress when the job is stopped (default: %(default)s)",
    )


def parse_bytes(text: str) -> int:
    """Return a number of bytes from digits and an optional K, M, G or T (powers of 1000)."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4G, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
