"""Every error featray raises on purpose, and the codes a scan can end with.

FeatrayError                what `except featray.FeatrayError` catches
├── UsageError              exit 2: wrong usage, config or model, found before work began
│   ├── ConfigError         the YAML, a --set value, the source or the output location
│   └── ModelError          the model file, its custom code, or a layer in it
├── OutputBusyError         exit 4: another run holds or has changed the output
├── StorageError            exit 1: a store does not answer; the run is resumable
├── InputShapeError         a batch that the cut model cannot take
└── ScanError               never an exit: one bad scan, which becomes a row of `scans`
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Process exit codes; a scheduler decides by them."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    TOO_MANY_FAILED = 3
    BUSY = 4
    INTERRUPTED = 130


class Reason(StrEnum):
    """Why a scan is not `ok`. Stable: users filter and retry by these."""

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
    """What was odd about a scan but accepted; the `warnings` column holds these.

    Codes of `Reason` appear there too when the case was accepted.
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
    """Base of everything featray raises on purpose; its text says what to do next."""

    exit_code = ExitCode.UNEXPECTED


class UsageError(FeatrayError):
    """Wrong usage, config or model, found before any work began.

    `problems` lists every finding, not only the first; `where` names the file they are in.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, problems: str | list[str], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(_bullets(where, self.problems))


class ConfigError(UsageError):
    """The config cannot be run as it stands."""


class ModelError(UsageError):
    """The model cannot be loaded or cut as asked."""


class OutputBusyError(FeatrayError):
    """Another run holds the output, or changed it since this run planned its work."""

    exit_code = ExitCode.BUSY


class StorageError(FeatrayError):
    """A store does not answer, after retries; what is committed is kept, and the same command resumes."""


class InputShapeError(FeatrayError, ValueError):
    """A batch has another shape or type than the cut model takes; the text names both."""


class ScanError(FeatrayError):
    """One scan cannot be used. The pipeline turns it into a row and goes on.

    `reason` is one of `Reason`; the message must name no patient and no absolute path.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = Reason(reason)

    def __reduce__(self) -> tuple[type[ScanError], tuple[Reason, str]]:
        """Pickle with both arguments; the default would drop `reason` between processes."""
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


def _bullets(where: str, problems: list[str]) -> str:
    if not where and len(problems) == 1:
        return problems[0]
    plural = "problem" if len(problems) == 1 else "problems"
    prefix = f"{where}: " if where else ""
    return f"{prefix}{len(problems)} {plural}" + "".join(f"\n  - {line}" for line in problems)
