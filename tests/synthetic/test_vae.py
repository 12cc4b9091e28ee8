"""Test the shapes, the layer names, the seeds and the training of the synthetic VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SHAPE = (4, 32, 32)


def make_cylinders(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return volumes (n, z, y, x) with a bright cylinder, and the radius of each cylinder in voxels."""
    radii = np.linspace(2, 14, count)
    y, x = np.mgrid[-15.5:16:1, -15.5:16:1]
    discs = (x**2 + y**2 < radii[:, None, None] ** 2).astype(np.float32)
    return np.repeat(discs[:, None], SHAPE[0], axis=1), radii


@pytest.mark.slow
def test_the_default_encoder_reduces_32_slices_to_one() -> None:
    from featray.synthetic import vae

    encoder = vae.build_encoder()
    assert encoder.input_shape == (None, 32, 256, 256, 1)
    assert encoder.get_layer("pool_5").output.shape == (None, 1, 8, 8, 16)
    assert [output.shape for output in encoder.outputs] == [(None, 32)] * 3


@pytest.mark.parametrize("size", [(8, 16, 16), (1, 16, 16), (6, 20, 14)])
def test_the_decoder_restores_sizes_that_cannot_be_halved(size: tuple[int, int, int]) -> None:
    from featray.synthetic import vae

    model = vae.build_vae(size, (2, 2, 2), 4, 3)
    assert model.output_shape == (None, *size, 1)


def test_weights_are_equal_for_equal_seeds_and_differ_for_others() -> None:
    from featray.synthetic import vae

    def weights(seed: int) -> list[Any]:
        return [weight.numpy() for weight in vae.build_vae((4, 4, 4), (2,), 3, 2, seed).trainable_weights]

    assert all(np.array_equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_latent_encodes_the_radius() -> None:
    from featray.synthetic import vae

    volumes, radii = make_cylinders(16)
    losses: list[float] = []
    model = vae.build_vae(SHAPE, filters=(2, 4), dense=16, latent=2)
    vae.train_vae(model, volumes, epochs=60, on_epoch=lambda _, loss: losses.append(loss))
    mean = np.asarray(model.get_layer("encoder")(volumes[..., None], training=False)[0])
    assert losses[-1] < 0.5 * losses[0]
    design = np.column_stack([mean, np.ones(len(mean))])
    _, (unexplained,), _, _ = np.linalg.lstsq(design, radii)
    assert unexplained < 0.3 * ((radii - radii.mean()) ** 2).sum()


def test_volumes_of_another_rank_are_rejected() -> None:
    from featray.synthetic import vae

    with pytest.raises(ValueError, match=r"expected volumes \(n, z, y, x\)"):
        vae.train_vae(vae.build_vae((4, 4, 4), (2,), 3, 2), np.zeros((4, 4, 4), np.float32))
