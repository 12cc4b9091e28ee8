"""A DICOM file and keywords in, their values as text out: the only way other header values get out."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pydicom
from pydicom.config import disable_value_validation
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from featray.errors import Reason, ScanError

_BINARY = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UN"})


def named_values(data: bytes, keywords: Sequence[str]) -> dict[str, str]:
    """Return the values of top-level elements by keyword, several values joined by a backslash.

    Keywords that DICOM does not know, elements that are missing, and sequences or binary values
    (which may hold anything) are left out.

    Raises:
        ScanError: `unreadable` if pydicom cannot parse them.
    """
    unknown = find_unknown_keywords(keywords)
    known = [keyword for keyword in keywords if keyword not in unknown]
    if not known:
        return {}
    try:
        with disable_value_validation():
            dataset = pydicom.dcmread(
                io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=known
            )
            return {keyword: _text(dataset[keyword].value) for keyword in known if _is_text(dataset, keyword)}
    except Exception as error:  # pydicom raises nearly anything on damaged bytes; texts may quote them
        raise ScanError(
            Reason.UNREADABLE, f"the tags of privacy.dicom_tags do not parse ({type(error).__name__})"
        ) from None


def find_unknown_keywords(keywords: Sequence[str]) -> list[str]:
    """Return the keywords that DICOM does not know, such as misspelt ones."""
    return [keyword for keyword in keywords if tag_for_keyword(keyword) is None]


def _is_text(dataset: pydicom.Dataset, keyword: str) -> bool:
    return keyword in dataset and dataset[keyword].VR not in _BINARY


def _text(value: object) -> str:
    if isinstance(value, MultiValue):
        return "\\".join(str(part) for part in value)
    return "" if value is None else str(value)
