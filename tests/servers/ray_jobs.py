"""The job server of a Ray cluster, as tests wait for it."""

from __future__ import annotations

import time
import urllib.request

_PAUSE_S = 0.2


def takes_jobs(address: str, token: str) -> bool:
    """Return whether the job server at `address` answers; if it does not, pause before the next try."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/version", headers=headers), timeout=5)
    except OSError:
        time.sleep(_PAUSE_S)
        return False
    return True
