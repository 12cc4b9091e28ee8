"""Match the layer names, paths and globs of a config with the taps of a model.

In: `model.layers` of the config, and all taps of the model. Out: one `OutputSpec` per output, or the problems
found, with similar names. Works on names only and does not import Keras.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from featray.config import LayerConfig, ModelConfig
from featray.errors import ModelError, find_similar_names
from featray.model.pooling import Pool
from featray.model.taps import Tap

_MAX_LISTED_PATHS = 12


@dataclass(frozen=True)
class OutputSpec:
    """One output that the config asks for.

    Attributes:
        name: Name of the output.
        tap: The tap that gives its values.
        pool: Pooling over the spatial axes.
        grid: For pool `grid`: number of cells along each spatial axis.
        channels_first: Whether axis 1 holds the channels, and not the last axis.
    """

    name: str
    tap: Tap
    pool: Pool
    grid: tuple[int, ...] = ()
    channels_first: bool = False


def match_layers(spec: ModelConfig, taps: list[Tap], problems: list[str]) -> list[OutputSpec]:
    """Return the outputs that `spec.layers` asks for; append those that cannot be extracted to `problems`."""
    outputs: list[OutputSpec] = []
    for layer in spec.layers:
        path = _strip_submodel(layer.layer, spec.submodel, taps)
        try:
            outputs += _match_layer(layer, path, taps)
        except ModelError as error:
            problems += error.problems
    counts = Counter(output.name for output in outputs)
    problems += [
        f"layers: two outputs are named {name!r}; give one of them another name with `as`"
        for name, count in counts.items()
        if count > 1
    ]
    return list({output.name: output for output in outputs}.values())


def find_taps(pattern: str, taps: list[Tap]) -> list[Tap]:
    """Return the taps that a name, path or glob matches, in order of computation.

    A path is first matched from the top of the model. If nothing matches, a path without wildcards is matched
    with the ends of longer paths: `z_mean` then matches `encoder/z_mean`. `*` does not match `/`.
    """
    pattern_parts = pattern.split("/")
    exact = [tap for tap in taps if len(tap.parts) == len(pattern_parts) and _is_match(pattern_parts, tap)]
    if exact or _is_glob(pattern):
        return exact
    return [tap for tap in taps if len(tap.parts) > len(pattern_parts) and _is_match(pattern_parts, tap)]


def get_default_pool(tap: Tap) -> Pool:
    """Return `avg` for feature maps, and `none` for values without spatial axes."""
    return "avg" if len(tap.shape) > 2 else "none"


def is_channels_first(tap: Tap) -> bool:
    """Return whether the layer declares that axis 1, not the last axis, holds the channels."""
    return getattr(tap.layer, "data_format", None) == "channels_first"


def _strip_submodel(path: str, submodel: str | None, taps: list[Tap]) -> str:
    """Return a path relative to the submodel; a full path that begins with the submodel is shortened."""
    prefix = f"{submodel}/" if submodel else ""
    is_full = bool(prefix) and path.startswith(prefix) and not find_taps(path, taps)
    return path[len(prefix) :] if is_full else path


def _match_layer(layer: LayerConfig, path: str, taps: list[Tap]) -> list[OutputSpec]:
    """Return the outputs that one entry of `layers` asks for; `path` is relative to the submodel.

    Raises:
        ModelError: Nothing matches, the entry is ambiguous, or a tap cannot be extracted.
    """
    matches = find_taps(path, taps)
    is_glob = _is_glob(path)
    if not matches:
        raise ModelError(f"layers: {layer.layer!r} is not in the model{_suggest_paths(path, taps)}")
    if len(matches) > 1 and not is_glob:
        paths = ", ".join(tap.path for tap in matches)
        raise ModelError(f"layers: {layer.layer!r} matches {len(matches)} values; name one of: {paths}")
    if len(matches) > 1 and layer.as_:
        raise ModelError(
            f"layers: as: {layer.as_!r} names one output, but {layer.layer!r} matches {len(matches)} layers"
        )
    if layer.as_ and "/" in layer.as_:
        raise ModelError(f"layers: as: {layer.as_!r} must not contain '/'")
    problems = [problem for tap in matches if (problem := _explain_unusable(tap, layer, taps))]
    if problems:
        raise ModelError(problems)
    names = [layer.as_ or (tap.path if is_glob else layer.layer).replace("/", ".") for tap in matches]
    return [
        OutputSpec(
            name,
            tap,
            layer.pool or get_default_pool(tap),
            layer.grid or (),
            channels_first=is_channels_first(tap),
        )
        for name, tap in zip(names, matches, strict=True)
    ]


def _explain_unusable(tap: Tap, layer: LayerConfig, taps: list[Tap]) -> str:
    """Return why a tap cannot be extracted with the pooling of `layer`; empty if it can."""
    if tap.problem:
        return f"layers: {tap.path!r} {tap.problem}"
    is_pooled = (layer.pool or get_default_pool(tap)) != "none"
    if (
        is_pooled
        and not hasattr(tap.layer, "data_format")
        and any(is_channels_first(other) for other in taps)
    ):
        return (
            f"layers: {tap.path!r} does not say which axis holds the channels, and the model has "
            "channels_first layers; set pool: none, or take the convolution or pooling layer next to it"
        )
    if layer.pool not in (None, "none") and len(tap.shape) <= 2:
        return (
            f"layers: pool: {layer.pool} of {tap.path!r} needs a feature map, but the layer returns values "
            f"of shape {list(tap.shape[1:])} without spatial axes; leave pool out"
        )
    if layer.grid and len(layer.grid) != len(tap.shape) - 2:
        return (
            f"layers: grid: {list(layer.grid)} has {len(layer.grid)} numbers, but {tap.path!r} has "
            f"{len(tap.shape) - 2} spatial axes (shape {list(tap.shape[1:])}); give one number for each"
        )
    return ""


def _is_match(pattern_parts: list[str], tap: Tap) -> bool:
    """Return whether the parts of a pattern match the last parts of the tap's path.

    `name` also matches its numbered calls (`name#2`) and its numbered outputs (`name:0`).
    """
    tap_parts = tap.parts[-len(pattern_parts) :]
    return all(
        any(fnmatchcase(name, part) or (name.startswith(part) and name[len(part)] in "#:") for name in names)
        for part, names in zip(pattern_parts, tap_parts, strict=True)
    )


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def _suggest_paths(path: str, taps: list[Tap]) -> str:
    """Return the end of the message for a path that is not in the model: paths to write instead."""
    known = list(dict.fromkeys(tap.path for tap in taps if not tap.problem))
    by_last_part = {known_path.rpartition("/")[2]: known_path for known_path in reversed(known)}
    last_parts = find_similar_names(path.rpartition("/")[2], by_last_part, limit=3, min_ratio=0.6)
    similar = find_similar_names(path, known, limit=3, min_ratio=0.6)
    similar += [by_last_part[part] for part in last_parts]
    if similar:
        return f"; did you mean {', '.join(list(dict.fromkeys(similar))[:3])}?"
    parent = path.rpartition("/")[0]
    if parent and find_taps(parent, taps):
        return f"; no layer of this name is called inside {parent!r}; take {parent!r}"
    more = ", …" if len(known) > _MAX_LISTED_PATHS else ""
    return f"; it has: {', '.join(known[:_MAX_LISTED_PATHS])}{more} (`featray layers` lists all)"
