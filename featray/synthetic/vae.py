"""Build and train a 3-D variational autoencoder (VAE) of CT volumes, for the demo and the tests.

In: sizes, and volumes (n, z, y, x) float32 in [0, 1]. Out: Keras models with explicit layer names. Import
this module only inside functions that make a model: it defines a layer and therefore imports Keras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SizeZYX = tuple[int, int, int]

BATCH_SIZE = 4
"""Number of volumes in a training step."""

LEARNING_RATE = 1e-3
"""Learning rate of the Adam optimizer."""


@keras.saving.register_keras_serializable(package="featray")
class Sampling(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """Draw z from N(z_mean, exp(z_log_var)); every call draws new values, also at inference."""

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        """Create the layer; `seed` determines the sequence of draws in one process."""
        super().__init__(**kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs: tuple[Any, Any]) -> Any:
        """Return z (n, latent) for the inputs z_mean and z_log_var, both (n, latent)."""
        mean, log_variance = inputs
        noise = keras.random.normal(keras.ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + keras.ops.exp(0.5 * log_variance) * noise

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of `__init__`."""
        return {**super().get_config(), "seed": self.seed}


def build_vae(
    input_zyx: SizeZYX = (32, 256, 256),
    filters: tuple[int, ...] = (16, 32, 64, 32, 16),
    dense: int = 256,
    latent: int = 32,
    seed: int = 0,
) -> Any:
    """Return the functional model `vae`: `encoder`, followed by `decoder` on its output z.

    Equal seeds give equal weights.

    Args:
        input_zyx: Size of the input volumes in voxels.
        filters: Number of filters of each block of the encoder. A block is a convolution with ReLU and a max
            pooling by 2 along each axis whose size is even and above 1. The decoder mirrors the blocks.
        dense: Width of the dense layer before z_mean and z_log_var, and of the dense layer after z.
        latent: Width of z_mean, z_log_var and z.
        seed: Seed of the weights and of the sampling layer.
    """
    encoder = build_encoder(input_zyx, filters, dense, latent, seed)
    decoder = _build_decoder(input_zyx, filters, dense, latent, seed)
    volume = keras.Input((*input_zyx, 1), name="volume")
    _, _, z = encoder(volume)
    return keras.Model(volume, decoder(z), name="vae")


def build_encoder(
    input_zyx: SizeZYX = (32, 256, 256),
    filters: tuple[int, ...] = (16, 32, 64, 32, 16),
    dense: int = 256,
    latent: int = 32,
    seed: int = 0,
) -> Any:
    """Return the functional model `encoder`: volumes (n, z, y, x, 1) to [z_mean, z_log_var, z].

    Its layers are `conv_1`, `pool_1`, …, `flatten`, `pre_latent`, `z_mean`, `z_log_var` and `z`. The
    arguments are those of `build_vae`.
    """
    volume = keras.Input((*input_zyx, 1), name="volume")
    x, init = volume, _make_initializers(seed)
    pools = _choose_pools(input_zyx, len(filters))
    for number, (count, pool) in enumerate(zip(filters, pools, strict=True), 1):
        x = keras.layers.Conv3D(
            count, 3, padding="same", activation="relu", kernel_initializer=next(init), name=f"conv_{number}"
        )(x)
        x = keras.layers.MaxPool3D(pool, name=f"pool_{number}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(dense, activation="relu", kernel_initializer=next(init), name="pre_latent")(x)
    mean = keras.layers.Dense(latent, kernel_initializer=next(init), name="z_mean")(x)
    log_variance = keras.layers.Dense(latent, kernel_initializer=next(init), name="z_log_var")(x)
    z = Sampling(seed=seed, name="z")([mean, log_variance])
    return keras.Model(volume, [mean, log_variance, z], name="encoder")


def train_vae(
    vae: Any,
    volumes: NDArray[np.float32],
    *,
    epochs: int = 30,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model of `build_vae` in place, with the Adam optimizer and the negative evidence lower bound.

    The loss of a volume is its squared error, summed over the voxels and divided by 2 · 0.1² (a Gaussian
    likelihood with a standard deviation of 0.1), plus the Kullback-Leibler divergence of the latent
    distribution from N(0, 1). The weight of the divergence grows linearly to 1 over the first third of the
    epochs, because the full weight from the start would make the latent ignore the input.

    Args:
        vae: The model to train; its input size is (z, y, x) of `volumes`.
        volumes: float32 (n, z, y, x), values in [0, 1].
        epochs: Number of passes over all volumes.
        seed: Seed of the order of the volumes. Equal seeds here and in `build_vae` give equal weights up to
            rounding.
        on_epoch: Called after each epoch with its number (from 1) and its mean loss.

    Raises:
        ValueError: `volumes` does not have four axes, or holds no volume.
    """
    _check_volumes(volumes)
    _initialize_output_bias(vae, float(volumes.mean()))
    train_step = _make_train_step(vae, keras.optimizers.Adam(LEARNING_RATE))
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        shuffled = volumes[rng.permutation(len(volumes)), ..., np.newaxis]
        batches = [shuffled[start : start + BATCH_SIZE] for start in range(0, len(shuffled), BATCH_SIZE)]
        kl_weight = tf.constant(min(1.0, 3 * epoch / epochs), tf.float32)
        losses = [float(train_step(tf.constant(batch, tf.float32), kl_weight)) for batch in batches]
        if on_epoch:
            on_epoch(epoch, float(np.mean(losses)))


def _initialize_output_bias(vae: Any, mean: float) -> None:
    """Set the bias of the output so that the untrained decoder returns the mean of the volumes.

    The first training steps then learn the differences between volumes instead of their mean.
    """
    level = min(max(mean, 1e-3), 1 - 1e-3)
    vae.get_layer("decoder").get_layer("reconstruction").bias.assign([math.log(level / (1 - level))])


def _make_train_step(vae: Any, optimizer: Any) -> Any:
    """Return a function that trains on a batch (n, z, y, x, 1) and returns the mean loss of the batch."""
    encoder, decoder = vae.get_layer("encoder"), vae.get_layer("decoder")
    optimizer.build(vae.trainable_variables)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]  # TensorFlow ships no types
    def train_step(batch: Any, kl_weight: Any) -> Any:
        with tf.GradientTape() as tape:
            mean, log_variance, z = encoder(batch, training=True)
            error = tf.reduce_sum(tf.square(decoder(z, training=True) - batch), axis=(1, 2, 3, 4)) / (
                2 * 0.1**2
            )
            divergence = 0.5 * tf.reduce_sum(
                tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=1
            )
            loss = tf.reduce_mean(error + kl_weight * divergence)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, vae.trainable_variables), vae.trainable_variables, strict=True)
        )
        return loss

    return train_step


def _build_decoder(input_zyx: SizeZYX, filters: tuple[int, ...], dense: int, latent: int, seed: int) -> Any:
    """Return the functional model `decoder`: z (n, latent) to volumes (n, z, y, x, 1) in [0, 1]."""
    pools = _choose_pools(input_zyx, len(filters))
    smallest_zyx = [size // math.prod(pool[axis] for pool in pools) for axis, size in enumerate(input_zyx)]
    init = _make_initializers(seed + 1000)
    z = keras.Input((latent,), name="latent")
    x = keras.layers.Dense(dense, activation="relu", kernel_initializer=next(init), name="post_latent")(z)
    x = keras.layers.Dense(
        math.prod(smallest_zyx) * filters[-1],
        activation="relu",
        kernel_initializer=next(init),
        name="unflatten",
    )(x)
    x = keras.layers.Reshape((*smallest_zyx, filters[-1]), name="reshape")(x)
    for number, (count, pool) in enumerate(zip(reversed(filters), reversed(pools), strict=True), 1):
        x = keras.layers.UpSampling3D(pool, name=f"up_{number}")(x)
        x = keras.layers.Conv3D(
            count,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=next(init),
            name=f"deconv_{number}",
        )(x)
    x = keras.layers.Conv3D(
        1, 3, padding="same", activation="sigmoid", kernel_initializer=next(init), name="reconstruction"
    )(x)
    return keras.Model(z, x, name="decoder")


def _choose_pools(input_zyx: SizeZYX, blocks: int) -> list[SizeZYX]:
    """Return the pooling factors (z, y, x) per block: 2 along an axis that can still be halved, else 1."""
    pools, sizes = [], list(input_zyx)
    for _ in range(blocks):
        pool = [2 if size > 1 and size % 2 == 0 else 1 for size in sizes]
        sizes = [size // factor for size, factor in zip(sizes, pool, strict=True)]
        pools.append((pool[0], pool[1], pool[2]))
    return pools


def _make_initializers(seed: int) -> Iterator[Any]:
    """Yield initializers with different seeds, so that weights depend only on `seed` and the layer order."""
    for number in range(seed * 1_000, seed * 1_000 + 1_000):
        yield keras.initializers.GlorotUniform(seed=number)


def _check_volumes(volumes: NDArray[np.float32]) -> None:
    if volumes.ndim != 4 or not len(volumes):
        raise ValueError(f"expected volumes (n, z, y, x) with n > 0, got {volumes.shape}")
