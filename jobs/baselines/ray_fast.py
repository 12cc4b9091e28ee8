"""Ray Data with the fast decoder, which runs in other tasks than the model.

python jobs/benchmark.py --baselines ray_fast

The benchmark passes one JSON document on stdin, and compares speed and features with those of featray. The
script prints nothing.
"""

from __future__ import annotations

from typing import Any

import common
import ray
from ray_data import Predictor


def main() -> None:
    """Run the pipeline with one scan per block; the CPU requests keep decoding and model apart."""
    document = common.read_document()
    files = [{"index": index, "path": path} for index, path in enumerate(document["files"])]
    ray.init(log_to_driver=False)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "volume": common.decode_fast(row["path"], document)}

    rows = (
        ray.data.from_items(files, override_num_blocks=len(files))
        .map(decode, num_cpus=0.75)
        .map_batches(
            Predictor,
            fn_constructor_args=[document],
            batch_size=document["batch_size"],
            num_cpus=0.5,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["index"])
    common.save(
        [{name: value[None] for name, value in row.items() if name != "index"} for row in rows], document
    )


if __name__ == "__main__":
    main()
