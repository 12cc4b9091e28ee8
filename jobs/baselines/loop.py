"""The usual loop: nibabel, scipy.ndimage.zoom, model.predict, and one table at the end.

python jobs/benchmark.py --baselines loop

The benchmark passes one JSON document on stdin, and compares speed and features with those of featray. The
script prints nothing.
"""

from __future__ import annotations

import common


def main() -> None:
    """Process one scan after the other."""
    document = common.read_document()
    model = common.load_model(document)
    values = [
        model.predict(common.decode_usual(path, document)[None], verbose=0) for path in document["files"]
    ]
    common.save(values, document)


if __name__ == "__main__":
    main()
