"""Read header values by DICOM keyword, as text, for `privacy.dicom_tags`.

This is the only module that copies header values that the user chooses.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pydicom
from pydicom.config import disable_value_validation
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from featray.errors import Reason, ScanError

_EXCLUDED_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UN"})
"""Value representations of sequences and binary values, which may contain anything."""


def read_tags(data: bytes, keywords: Sequence[str]) -> dict[str, str]:
    """Return the values of top-level elements as text, by keyword; multiple values are joined by a backslash.

    Keywords that DICOM does not define, missing elements, sequences and binary values are omitted.

    Args:
        data: Content of a DICOM file.
        keywords: DICOM keywords such as `Manufacturer`.

    Raises:
        ScanError: `unreadable` if pydicom cannot parse the elements.
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
            return {
                keyword: _format_value(dataset[keyword].value)
                for keyword in known
                if _has_text(dataset, keyword)
            }
    except Exception as error:  # pydicom raises errors of any type; their texts may quote the file
        raise ScanError(
            Reason.UNREADABLE,
            f"the elements named in privacy.dicom_tags do not parse ({type(error).__name__})",
        ) from None


def find_unknown_keywords(keywords: Sequence[str]) -> list[str]:
    """Return the keywords that DICOM does not define, such as misspelled ones."""
    return [keyword for keyword in keywords if tag_for_keyword(keyword) is None]


def _has_text(dataset: pydicom.Dataset, keyword: str) -> bool:
    return keyword in dataset and dataset[keyword].VR not in _EXCLUDED_VRS


def _format_value(value: object) -> str:
    if isinstance(value, MultiValue):
        return "\\".join(str(part) for part in value)
    return "" if value is None else str(value)
