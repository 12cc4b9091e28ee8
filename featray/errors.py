"""The errors that featray raises on purpose, and the codes with which a scan can end.

FeatrayError                base class: `except featray.FeatrayError` catches all of these
├── UsageError              exit 2: wrong usage, config or model, found before work begins
│   ├── ConfigError         the YAML, a --set value, the source or the output location
│   └── ModelError          the model file, its custom code, or a layer of the model
├── OutputBusyError         exit 4: another run holds or has changed the output
│   └── HeldOutputError     another run holds the output, so this one has not begun
├── InterruptedWaitError    exit 130: stopped while waiting for an output that another run holds
├── StorageError            exit 1: a store does not answer, or the output was deleted during the run
│   ├── DeletedOutputError  the output, or a part of it, was deleted during the run
│   └── MissingFileError    a file that was just written is not in the output
├── DeviceError             exit 1: a GPU has failed, or memory for the model has become short
├── InputShapeError         a batch with a shape that the truncated model cannot take
├── InputMemoryError        one input for which the model needs more memory than there is
└── ScanError               does not end the run: one bad scan, which becomes a row of `scans`
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Exit codes of the process, on which a scheduler can act."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    TOO_MANY_FAILED = 3
    BUSY = 4
    INTERRUPTED = 130


class Reason(StrEnum):
    """Reasons why a scan is not `ok`. The values are stable, because users filter and retry by them."""

    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    UNSUPPORTED = "unsupported"
    EMPTY = "empty"
    NOT_A_VOLUME = "not_a_volume"
    NOT_CT = "not_ct"
    MISSING_SLICES = "missing_slices"
    DUPLICATE_SLICES = "duplicate_slices"
    IRREGULAR_SPACING = "irregular_spacing"
    GANTRY_TILT = "gantry_tilt"
    TOO_LARGE = "too_large"
    NON_FINITE = "non_finite"
    DUPLICATE_ID = "duplicate_id"
    STORAGE = "storage"
    PREPROCESS = "preprocess"
    MODEL = "model"
    NON_FINITE_FEATURES = "non_finite_features"
    TIMEOUT = "timeout"
    WORKER_CRASH = "worker_crash"


class WarningCode(StrEnum):
    """Warnings about unusual scans that were accepted; the `warnings` column holds them.

    The column also holds codes of `Reason` if the policy accepts such scans.
    """

    NOT_HU = "not_hu"
    OBLIQUE = "oblique"
    ANISOTROPIC = "anisotropic"
    QFORM_ONLY = "qform_only"
    SFORM_QFORM_DIFFER = "sform_qform_differ"
    PADDING_VALUE = "padding_value"
    RESAMPLED_STEPS = "resampled_steps"
    LOCALIZER_REMOVED = "localizer_removed"
    ORIENTATION_UNKNOWN = "orientation_unknown"


class FeatrayError(Exception):
    """Base class of featray's own errors; the text names the remedy."""

    exit_code = ExitCode.UNEXPECTED


class UsageError(FeatrayError):
    """Wrong usage, config or model, found before any work begins.

    Attributes:
        problems: Every problem, not only the first.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, problems: str | list[str], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(_join_problems(where, self.problems))


class ConfigError(UsageError):
    """A run with this config is not possible."""


class ModelError(UsageError):
    """The model cannot be loaded, or cannot be truncated as configured."""


class OutputBusyError(FeatrayError):
    """Another run holds the output, or has changed it after this run was planned."""

    exit_code = ExitCode.BUSY


class HeldOutputError(OutputBusyError):
    """Another run holds the output, so this one has not begun and may try again later.

    Attributes:
        holder: Which run, on which host, since when, as a clause.
    """

    def __init__(self, holder: str, advice: str) -> None:
        self.holder, self._advice = holder, advice
        super().__init__(f"{holder}. {advice}")

    def add_wait(self, wait_s: float) -> HeldOutputError:
        """Return the error of a command that has waited in vain for the output to become free."""
        return HeldOutputError(f"{self.holder}, and did not end within {wait_s:g} s", self._advice)


class InterruptedWaitError(FeatrayError):
    """The command was stopped while it waited for an output that another run holds."""

    exit_code = ExitCode.INTERRUPTED


class StorageError(FeatrayError):
    """A store does not answer after retries. Committed scans are kept, and the same command resumes."""


class DeletedOutputError(StorageError):
    """The output, or a part of it, was deleted while a run was using it."""


class MissingFileError(StorageError, FileNotFoundError):
    """A file that a writer has written is not in the output when it is to be committed."""


class DeviceError(FeatrayError):
    """The device that runs the model has failed, or other processes have taken its memory.

    No scan is to blame, and the process cannot use the device any more. Committed scans are kept.
    """


class InputMemoryError(FeatrayError):
    """The model needs more memory for one input than there is, also in a call with no other input."""


class InputShapeError(FeatrayError, ValueError):
    """A batch has another shape or type than the truncated model takes; the text names both."""


class ScanError(FeatrayError):
    """One scan cannot be used. The pipeline stores its reason and message in `scans`, and continues.

    The message must contain no patient data and no absolute path.

    Attributes:
        reason: Why the scan cannot be used.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = Reason(reason)

    def __reduce__(self) -> tuple[type[ScanError], tuple[Reason, str]]:
        """Pickle both arguments; the default would lose `reason` between processes."""
        return type(self), (self.reason, str(self))


def find_similar_names(
    name: str, known: Iterable[str], *, limit: int = 1, min_ratio: float = 0.5
) -> list[str]:
    """Return the known names that are spelled most like `name`, for an error message. The best one is first.

    Args:
        name: The unknown name.
        known: Names that would have been accepted. Comparing more than about 10,000 names takes seconds.
        limit: Largest number of names to return.
        min_ratio: Smallest similarity, from 0 to 1, as `difflib.SequenceMatcher.ratio` defines it.
    """
    import difflib  # only needed after a mistake

    return difflib.get_close_matches(name, list(known), n=limit, cutoff=min_ratio)


def _join_problems(where: str, problems: list[str]) -> str:
    if not where and len(problems) == 1:
        return problems[0]
    noun = "problem" if len(problems) == 1 else "problems"
    prefix = f"{where}: " if where else ""
    return f"{prefix}{len(problems)} {noun}" + "".join(f"\n  - {line}" for line in problems)
