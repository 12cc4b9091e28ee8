"""A tf.data pipeline: parallel map over a Python decoder, batches, prefetch, one predict over all.

python jobs/benchmark.py --baselines tf_data      (reads its document from stdin)
"""

from __future__ import annotations

import common
import tensorflow as tf


def main() -> None:
    """Let tf.data decode in parallel while the model runs."""
    asked = common.given()
    model = common.load_model(asked)

    def decode(path: tf.Tensor) -> tf.Tensor:
        volume = tf.numpy_function(lambda name: common.decode_usual(name.decode(), asked), [path], tf.float32)
        return tf.ensure_shape(volume, (*asked["size"], 1))

    volumes = (
        tf.data.Dataset.from_tensor_slices(asked["files"])
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(asked["batch_size"])
        .prefetch(tf.data.AUTOTUNE)
    )
    common.save([model.predict(volumes, verbose=0)], asked)


if __name__ == "__main__":
    main()
