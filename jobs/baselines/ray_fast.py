"""A straightforward Ray Data script with the fast decoder, in tasks of their own beside the model's actor.

python jobs/benchmark.py --baselines ray_fast      (reads its document from stdin)
"""

from __future__ import annotations

from typing import Any

import common
import ray
from ray_data import Predictor


def main() -> None:
    """Build the pipeline, one scan per block, with claims that keep decoding apart from the model."""
    asked = common.given()
    files = [{"at": at, "path": path} for at, path in enumerate(asked["files"])]
    ray.init(log_to_driver=False)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"at": row["at"], "volume": common.decode_fast(row["path"], asked)}

    rows = (
        ray.data.from_items(files, override_num_blocks=len(files))
        .map(decode, num_cpus=0.75)
        .map_batches(
            Predictor,
            fn_constructor_args=[asked],
            batch_size=asked["batch_size"],
            num_cpus=0.5,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["at"])
    common.save([{name: value[None] for name, value in row.items() if name != "at"} for row in rows], asked)


if __name__ == "__main__":
    main()
