"""Load the model of an output again: as it was trained, and with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featray.commands.report.inputs.model_features import LayerModel, choose_layers
from featray.config import Config
from featray.errors import FeatrayError
from featray.job import load_extractor
from featray.model.random_weights import load_random_model

Recipes = Mapping[str, str]
"""Layer → recipe id of its features in the output."""


def load_trained_model(config: Config, recipes: Recipes) -> tuple[LayerModel | None, tuple[str, ...]]:
    """Return the trained model with the layers to compute, and sentences about everything that is left out.

    The model is None if it cannot be loaded, or if it has none of the layers.
    """
    try:
        model, others = choose_layers(config, load_extractor(config), recipes)
    except FeatrayError as error:
        return None, (f"The stability was not measured: {_end(error)}",)
    cautions = _describe_other_layers("The stability of", others)
    return (model if model.layers else None), cautions


def load_random_models(
    config: Config, recipes: Recipes, seeds: Sequence[int]
) -> tuple[dict[int, LayerModel], tuple[str, ...]]:
    """Return models with random weights by seed, and sentences about anything left out or unexpected."""
    models, cautions = {}, list[str]()
    for seed in seeds:
        try:
            random = load_random_model(config.model, seed, input_zyx=config.input_zyx)
        except FeatrayError as error:
            return {}, (f"There is no baseline of random weights: {_end(error)}",)
        model, others = choose_layers(config, random.extractor, recipes)
        cautions += _describe_other_layers("A baseline of random weights for", others)
        if random.permuted:
            count, name = len(random.permuted), random.permuted[0]
            cautions.append(
                "Weights that are permutations of their trained values in the models with random weights, "
                f"because no seed controls their initializer: {count}, e.g. {name}."
            )
        if model.layers:
            models[seed] = model
    return models, tuple(dict.fromkeys(cautions))


def _describe_other_layers(what: str, layers: Sequence[str]) -> tuple[str, ...]:
    if not layers:
        return ()
    return (
        f"{what} {', '.join(layers)} is left out, because the config does not name these layers as the "
        "output holds them: with the same model, place in the model and pooling.",
    )


def _end(error: FeatrayError) -> str:
    """Return the text of an error as the end of a sentence."""
    return f"{str(error).rstrip('.')}."
