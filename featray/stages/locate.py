"""Locate: one listed scan in, the same scan with the paths of its files out. Never raises for one scan.

Only scans that listing left open need this. They come from manifest rows that name a DICOM folder, a zip
archive, or another path that does not tell the format. Reads no voxels.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from featray.collection.manifest_row import find_files
from featray.config import PolicyConfig, SourceConfig
from featray.errors import Reason
from featray.schema import Scan

log = logging.getLogger(__name__)


def locate(scan: Scan, source: SourceConfig, policy: PolicyConfig) -> Scan:
    """Return the scan with its files, or with the reason why they cannot be found.

    Args:
        scan: A listed scan. A scan that has files or a reason is returned as it is.
        source: Configuration of the collection.
        policy: Decides, as in listing, which scans are left out.
    """
    try:
        return find_files(scan, source, policy)
    except Exception as error:  # an unexpected error costs one scan, not the run
        log.debug("unexpected error while looking for the files of a scan", exc_info=True)
        message = f"looking for the scan's files raised {type(error).__name__}"
        return replace(scan, reason=Reason.UNREADABLE, message=message)
