"""From the names, paths and globs of a config to the taps of a model.

In: `model.layers` and every tap there is. Out: one choice per output, or what is wrong, with
near matches. Knows names only, not Keras.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from featray.config import LayerConfig, ModelConfig
from featray.errors import ModelError, find_similar_names
from featray.model.trace import Tap

Pool = Literal["none", "avg", "max", "avgmax"]


@dataclass(frozen=True)
class Choice:
    """One output asked for, and the tap that answers.

    Attributes:
        name: Of the output.
        tap: Where the model is tapped.
        pool: Pooling over the spatial axes.
    """

    name: str
    tap: Tap
    pool: Pool


def choose(spec: ModelConfig, taps: list[Tap], problems: list[str]) -> list[Choice]:
    """Return one choice per output of `spec.layers`; append to `problems` what cannot be had."""
    choices: list[Choice] = []
    for layer in spec.layers:
        text = _below(layer.layer, spec.submodel, taps)
        try:
            choices += _answers(layer, text, taps)
        except ModelError as error:
            problems += error.problems
    twice = [name for name, count in Counter(choice.name for choice in choices).items() if count > 1]
    problems += [f"layers: two outputs are named {name!r}; tell them apart with `as`" for name in twice]
    return list({choice.name: choice for choice in choices}.values())


def find(text: str, taps: list[Tap]) -> list[Tap]:
    """Return the taps that a name, path or glob stands for, in model order.

    A path is tried from the model's top; failing that, a path without wildcards may also be the
    end of a longer one (`z_mean` for `encoder/z_mean`). `*` does not cross `/`.
    """
    asked = text.split("/")
    exact = [tap for tap in taps if len(tap.parts) == len(asked) and _matches(asked, tap)]
    if exact or _is_glob(text):
        return exact
    return [tap for tap in taps if len(tap.parts) > len(asked) and _matches(asked, tap)]


def default_pool(tap: Tap) -> Pool:
    """Return `avg` for feature maps, `none` for what has no spatial axes."""
    return "avg" if len(tap.shape) > 2 else "none"


def channels_first(tap: Tap) -> bool:
    """Return whether the layer says that axis 1, not the last, holds the channels."""
    return getattr(tap.layer, "data_format", None) == "channels_first"


def _below(text: str, submodel: str | None, taps: list[Tap]) -> str:
    """Return the path relative to the submodel; full paths are welcome too."""
    inside = f"{submodel}/" if submodel else ""
    is_full = bool(inside) and text.startswith(inside) and not find(text, taps)
    return text[len(inside) :] if is_full else text


def _answers(layer: LayerConfig, text: str, taps: list[Tap]) -> list[Choice]:
    found = find(text, taps)
    many = _is_glob(text)
    if not found:
        raise ModelError(f"layers: {layer.layer!r} is not in the model{_near(text, taps)}")
    if len(found) > 1 and not many:
        paths = ", ".join(tap.path for tap in found)
        raise ModelError(f"layers: {layer.layer!r} stands for {len(found)} values; name one of: {paths}")
    if len(found) > 1 and layer.as_:
        raise ModelError(
            f"layers: as: {layer.as_!r} names one output, but {layer.layer!r} matches {len(found)} layers"
        )
    if layer.as_ and "/" in layer.as_:
        raise ModelError(f"layers: as: {layer.as_!r} must not contain '/'")
    problems = [line for tap in found if (line := _unusable(tap, layer, taps))]
    if problems:
        raise ModelError(problems)
    names = [layer.as_ or (tap.path if many else layer.layer).replace("/", ".") for tap in found]
    return [
        Choice(name, tap, layer.pool or default_pool(tap)) for name, tap in zip(names, found, strict=True)
    ]


def _unusable(tap: Tap, layer: LayerConfig, taps: list[Tap]) -> str:
    if tap.problem:
        return f"layers: {tap.path!r} {tap.problem}"
    pools = (layer.pool or default_pool(tap)) != "none"
    if pools and not hasattr(tap.layer, "data_format") and any(channels_first(other) for other in taps):
        return (
            f"layers: {tap.path!r} does not say which axis holds the channels, and the model has "
            "channels_first layers; set pool: none, or take the convolution or pooling layer beside it"
        )
    if layer.pool not in (None, "none") and len(tap.shape) <= 2:
        return (
            f"layers: pool: {layer.pool} of {tap.path!r} needs a feature map, but it gives "
            f"{list(tap.shape[1:])} values without spatial axes; leave pool out"
        )
    return ""


def _matches(asked: list[str], tap: Tap) -> bool:
    """Compare from the end; `name` also stands for its calls `name#2` and outputs `name:0`."""
    parts = tap.parts[-len(asked) :]
    return all(
        any(fnmatchcase(name, one) or (name.startswith(one) and name[len(one)] in "#:") for name in names)
        for one, names in zip(asked, parts, strict=True)
    )


def _is_glob(text: str) -> bool:
    return any(letter in text for letter in "*?[")


def _near(text: str, taps: list[Tap]) -> str:
    paths = list(dict.fromkeys(tap.path for tap in taps if not tap.problem))
    ends = {path.rpartition("/")[2]: path for path in reversed(paths)}
    close = find_similar_names(text, paths, limit=3, min_ratio=0.6)
    close_ends = find_similar_names(text.rpartition("/")[2], ends, limit=3, min_ratio=0.6)
    close += [ends[end] for end in close_ends]
    if close:
        return f"; did you mean {', '.join(list(dict.fromkeys(close))[:3])}?"
    around = text.rpartition("/")[0]
    if around and find(around, taps):
        return f"; nothing of that name inside {around!r} runs as a layer of its own; take {around!r}"
    more = ", …" if len(paths) > 12 else ""
    return f"; it has: {', '.join(paths[:12])}{more} (`featray layers` lists all)"
