"""Layers of means and log-variances are recognized by their names and their place in the model."""

from __future__ import annotations

import pytest

from featray.commands.report.describe.latent_names import LatentPair, Role, find_latents, find_role
from featray.commands.report.feature_set import View


def make_view(path: str, units: int = 8, view: str = "vector", is_sampling: bool | None = None) -> View:
    return View(path.rpartition("/")[2], view, path, units, (units,), "recipe", is_sampling)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("z_mean", Role.MEAN),
        ("encoder/mu", Role.MEAN),
        ("vae/encoder/fc_mu", Role.MEAN),
        ("zMean", Role.MEAN),
        ("z_mean_1", Role.MEAN),
        ("z_log_var", Role.LOG_VARIANCE),
        ("logvar", Role.LOG_VARIANCE),
        ("z_logvar_2", Role.LOG_VARIANCE),
        ("log_variance", Role.LOG_VARIANCE),
        ("zLogVar", Role.LOG_VARIANCE),
        ("mean_log_var", Role.LOG_VARIANCE),
        ("z_log_sigma", Role.SPREAD),
        ("log_std", Role.SPREAD),
        ("z_sigma", Role.SPREAD),
        ("encoder/sampling", Role.SAMPLE),
        ("z_sample", Role.SAMPLE),
        ("up_sampling3d", Role.OTHER),
        ("downsampling", Role.OTHER),
        ("UpSampling3D", Role.OTHER),
        ("conv3d_2", Role.OTHER),
        ("batch_mean", Role.OTHER),
        ("attention_scale", Role.OTHER),
        ("multihead", Role.OTHER),
    ],
)
def test_a_name_says_what_the_layer_holds(name: str, role: Role) -> None:
    assert find_role(make_view(name)) is role


def test_what_is_known_of_sampling_matters_more_than_the_name() -> None:
    assert find_role(make_view("z", is_sampling=True)) is Role.SAMPLE
    assert find_role(make_view("sampling", is_sampling=False)) is Role.OTHER
    assert find_latents([make_view("z_mean", is_sampling=True)]) == []


def test_the_path_in_the_model_decides_instead_of_the_name_in_the_output() -> None:
    view = View("features", "vector", "encoder/z_mean", 8, (8,), "recipe")
    assert find_role(view) is Role.MEAN


@pytest.mark.parametrize(
    ("mean", "log_variance"),
    [
        ("z_mean", "z_log_var"),
        ("mu", "logvar"),
        ("encoder/mean", "encoder/log_variance"),
        ("mu", "z_log_var"),
    ],
)
def test_means_and_log_variances_of_one_parent_are_a_pair(mean: str, log_variance: str) -> None:
    views = [make_view("conv"), make_view(log_variance), make_view(mean)]
    assert find_latents(views) == [LatentPair(2, 1, None)]


@pytest.mark.parametrize(
    "other",
    [
        make_view("decoder/z_log_var"),
        make_view("encoder/z_log_var", units=16),
        make_view("encoder/z_log_var", view="mean"),
    ],
)
def test_log_variances_of_another_part_or_size_are_no_pair(other: View) -> None:
    assert find_latents([make_view("encoder/z_mean"), other]) == [LatentPair(0, None, None)]


def test_of_several_latents_each_gets_its_own_log_variances() -> None:
    names = ["style_mean", "content_mean", "content_log_var", "style_log_var"]
    assert find_latents([make_view(name) for name in names]) == [
        LatentPair(0, 3, None),
        LatentPair(1, 2, None),
    ]


def test_no_pair_is_guessed_between_two_log_variances() -> None:
    names = ["mu", "prior_log_var", "z_log_var", "q_log_var"]
    assert find_latents([make_view(name) for name in names]) == [LatentPair(0, None, None)]


def test_logarithms_of_standard_deviations_are_no_log_variances() -> None:
    assert find_latents([make_view("z_mean"), make_view("z_log_sigma")]) == [LatentPair(0, None, 1)]


def test_a_pooled_or_unusual_mean_is_no_latent() -> None:
    assert find_latents([make_view("z_mean", view="mean"), make_view("batch_mean")]) == []
