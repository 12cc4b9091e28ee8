"""The one typed configuration: YAML and `--set` in, frozen models out, every problem listed at once.

Sections mirror the YAML. Each field's default is the documented default. Nothing here opens
the source, the output or the model; checks that need those live where they are opened.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from featray.errors import ConfigError
from featray.storage.urls import mask_url

Text = Annotated[str, Field(min_length=1)]
SIZES_ZYX = Annotated[tuple[int, int, int], Field(min_length=3, max_length=3)]
_ORIENTATION = "LPS"
SPACING_ZYX = Annotated[tuple[float, float, float], Field(min_length=3, max_length=3)]


class _Section(BaseModel):
    """Frozen and strict about names: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceConfig(_Section):
    """Where the scans are."""

    uri: Text
    """Folder, glob, one file, or a manifest (.csv or .parquet with a `uri` column); any fsspec URL."""
    format: Literal["auto", "nifti", "dicom", "nrrd", "mha", "npy"] = "auto"
    """What to look for; auto takes every kind of volume, but no arrays (npy)."""
    rows: bool = False
    """npy only: the first axis of a file enumerates samples (patch = row number)."""
    id_column: str | None = None
    """Manifest column to use as scan_id; else the path below the source root."""
    center_frame: Literal["LPS", "RAS"] = "LPS"
    """Frame of the manifest columns center_x, center_y, center_z (mm)."""
    volume: int | None = Field(default=None, ge=0)
    """Which volume of a file with several (4-D NIfTI) to take, counted from 0; null refuses such files."""
    fingerprint: Literal["store", "bytes"] = "store"
    """What tells that a scan changed: the store's version of its files, or their bytes, all of them read."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to fsspec; never written anywhere."""


class PolicyConfig(_Section):
    """What to do with a scan that is odd. What changes values is part of the recipe."""

    gantry_tilt: Literal["refuse", "resample"] = "refuse"
    """Slices that shift sideways: refuse the scan, or resample it to an upright grid."""
    irregular_spacing: Literal["refuse", "resample"] = "refuse"
    """Unequal steps between slices, none missing: refuse, or resample to equal steps."""
    oblique: Literal["warn", "resample"] = "warn"
    """Voxel axes away from the patient's: turn to the nearest axes with a warning, or resample onto them."""
    not_hu: Literal["warn", "refuse"] = "warn"
    """Values that do not look like HU."""
    not_ct: Literal["exclude", "warn"] = "exclude"
    """DICOM images of another modality."""
    duplicates: Literal["warn", "exclude"] = "warn"
    """The second of two scans with one SeriesInstanceUID, or with the same bytes."""


class PreprocessConfig(_Section):
    """From a CT volume to the model's input; the order of the fields is the order of the steps."""

    orientation: str = _ORIENTATION
    """Directions in which x, y and z grow; the array itself has axes (z, y, x)."""
    window: tuple[float, float] | None = (-1000.0, 1000.0)
    """HU, clipped before any interpolation; null leaves values as they are."""
    scale: tuple[float, float] = (0.0, 1.0)
    """The window is mapped linearly onto this range."""
    spacing: SPACING_ZYX | None = None
    """Millimetres (z, y, x) to resample to first; null keeps the scan's own."""
    margin: float = Field(default=0, ge=0)
    """Millimetres kept around the bounding box of a manifest's `mask`."""
    size: SIZES_ZYX | None = (32, 256, 256)
    """Voxels (z, y, x) of the model's input; null keeps the native size."""
    fit: Literal["stretch", "crop_pad", "patches"] = "stretch"
    """How a volume of another size becomes `size`."""
    stride: SIZES_ZYX | None = None
    """patches: step in voxels (z, y, x); null = size."""
    interpolation: Literal["linear", "area", "nearest", "cubic"] = "linear"
    """Kernel of `spacing` and `stretch`."""
    align_corners: bool = False
    """false: half-pixel centres; true: corner voxels onto corner voxels."""

    @field_validator("orientation")
    @classmethod
    def _three_directions(cls, value: str) -> str:
        if len(value) != 3 or not all(set(value) & set(pair) for pair in ("LR", "PA", "SI")):
            raise ValueError(f"{value!r} is no orientation; give one each of L/R, P/A and S/I, e.g. LPS")
        return value

    @field_validator("window")
    @classmethod
    def _lower_first(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"[{value[0]:g}, {value[1]:g}] is upside down; the lower HU comes first")
        return value

    @field_validator("scale")
    @classmethod
    def _not_a_point(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] == value[1]:
            raise ValueError(f"both ends are {value[0]:g}; every voxel would become one value")
        return value

    @field_validator("size", "stride", "spacing")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value) <= 0:
            raise ValueError(f"{list(value)} must be positive along z, y and x")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessConfig:
        if self.fit == "patches" and self.size is None:
            raise ValueError("fit: patches needs size, the (z, y, x) of one patch")
        if self.stride is not None and self.fit != "patches":
            raise ValueError(f"stride: only used with fit: patches, not with fit: {self.fit}")
        return self


class LayerConfig(_Section):
    """One layer to extract."""

    layer: Text
    """Name, path (`encoder/z_mean`) or glob."""
    pool: Literal["none", "avg", "max", "avgmax"] | None = None
    """Over the spatial axes; null = none for rank-2 outputs, avg for feature maps."""
    as_: Text | None = Field(default=None, alias="as")
    """Name in the output; null = the path with `/` as `.`."""

    model_config = ConfigDict(populate_by_name=True)


def _layer_from_text(value: Any) -> Any:
    return {"layer": value} if isinstance(value, str) else value


class ModelConfig(_Section):
    """The trained model and where it is cut."""

    uri: Text
    """.keras, .h5 or SavedModel folder; any fsspec URL."""
    builder: str | None = None
    """`package.module:function` or `file.py:function` that returns the model, for weights-only files."""
    custom_objects: tuple[str, ...] = ()
    """`file.py:Sampling` or `package.module:Class`."""
    submodel: str | None = None
    """Attribute or layer name to cut in, e.g. encoder."""
    trust: bool = False
    """true runs Lambda layers and other code stored inside the model file."""
    input_shape: tuple[int | None, ...] | None = None
    """Shape of one array (source.format: npy), for models that do not declare what they take."""
    layers: tuple[Annotated[LayerConfig, BeforeValidator(_layer_from_text)], ...] = Field(min_length=1)
    """The layers to extract, all in one pass."""
    constants: dict[str, Any] = Field(default_factory=dict)
    """Values of the model's further inputs, by input name and without batch axis; the same for every scan."""
    compute: Literal["float32", "float16", "bfloat16"] | None = None
    """Type that layers compute in, weights staying as they are; null = what the model says."""
    jit_compile: bool = False
    """true compiles the cut model with XLA: for GPUs; on CPUs many times slower. Part of the recipe."""
    batch_size: int = Field(default=4, ge=1)
    """Model inputs per call."""
    allow_stochastic: bool = False
    """true accepts layers that differ from call to call."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to fsspec for `uri`; never written anywhere."""


class OutputConfig(_Section):
    """Where the tables go."""

    uri: Text
    """Local path or any fsspec URL."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to fsspec and to the Delta log; never written anywhere."""
    partition_by: tuple[str, ...] = ("layer",)
    """`layer` first; then columns of `scans` or of the manifest."""
    keep_versions_days: float = Field(default=0, ge=0)
    """0: superseded files go right after the commit."""

    @model_validator(mode="after")
    def _layer_first(self) -> OutputConfig:
        if not self.partition_by or self.partition_by[0] != "layer":
            raise ValueError(f"partition_by {list(self.partition_by)} must begin with layer")
        return self


class ActorsConfig(_Section):
    """The pool that holds the model (engine ray)."""

    min: int = Field(default=1, ge=1)
    """Actors kept alive."""
    max: int | None = Field(default=None, ge=1)
    """Upper bound; null = one for every `num_cpus` CPUs; with GPUs what leaves nodes room to decode."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs each actor claims, TensorFlow threads it uses and, without GPUs, processes it decodes in."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs each actor claims; fractions share one."""

    @model_validator(mode="after")
    def _ordered(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min: {self.min}")
        return self


class DecodeConfig(_Section):
    """Reading and preprocessing."""

    num_cpus: float = Field(default=1, gt=0)
    """CPUs each decode task claims (engine ray with GPUs; without, actors decode for themselves)."""
    memory: int | None = Field(default=None, gt=0)
    """Bytes decoding one scan may take; more makes it `too_large`, and workers claim them (engine ray).
    null = most of the machine's memory; large scans claim what their listed sizes let expect."""
    workers: int | None = Field(default=None, ge=0)
    """Helper processes (engine inline); null = one per core; 0 = decode in this process, for a debugger."""


class RunConfig(_Section):
    """How to run."""

    engine: Literal["auto", "ray", "inline"] = "auto"
    """auto takes inline for a handful of scans and no cluster address."""
    address: str | None = None
    """Ray address; null = RAY_ADDRESS or a local Ray."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that holds the model."""
    decode: DecodeConfig = DecodeConfig()
    """Reading and preprocessing."""


class LimitsConfig(_Section):
    """What is too much."""

    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of failed scans above which the exit code is 3."""
    max_removed_fraction: float = Field(default=0.5, ge=0, le=1)
    """refresh: share of the stored scans (above 100) that may go at once; more looks like a lost mount."""
    max_voxels: int = Field(default=2_000_000_000, gt=0)
    """Checked from the header, before anything is allocated."""
    scan_timeout_s: float = Field(default=600, gt=0)
    """Seconds one scan may take to be read and preprocessed."""
    attempts: int = Field(default=3, ge=1)
    """Tries for a scan whose worker dies."""


class PrivacyConfig(_Section):
    """What may leave a header."""

    dicom_tags: tuple[str, ...] = ()
    """Further DICOM keywords to copy into the scans table."""


_NPY_DEFAULTS = {"window": None, "size": None}
"""Arrays go to the model as they are, unless the config says otherwise: their values are no HU."""


class Config(_Section):
    """A whole run, as checked; `load` makes one."""

    source: SourceConfig
    policy: PolicyConfig = PolicyConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    model: ModelConfig
    output: OutputConfig
    run: RunConfig = RunConfig()
    limits: LimitsConfig = LimitsConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @property
    def input_zyx(self) -> tuple[int | None, ...] | None:
        """Voxels (z, y, x) of a model input, None where each scan keeps its own; null: as the model says."""
        if self.preprocess.size is None:
            return self.model.input_shape if self.source.format == "npy" else (None, None, None)
        return self.preprocess.size

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_arrays(cls, values: Any) -> Any:
        sections = {
            key: section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section
            for key, section in (values.items() if isinstance(values, dict) else ())
        }
        source, preprocess = sections.get("source"), sections.get("preprocess") or {}
        is_npy = isinstance(source, dict) and source.get("format") == "npy"
        if not is_npy or not isinstance(preprocess, dict):
            return values
        return {**values, "preprocess": {**_NPY_DEFAULTS, **preprocess}}

    @model_validator(mode="after")
    def _fits_the_format(self) -> Config:
        is_npy, preprocess = self.source.format == "npy", self.preprocess
        if self.source.rows and not is_npy:
            raise ValueError(f"source.rows: only used with source.format: npy, not {self.source.format}")
        if self.source.rows and preprocess.fit == "patches":
            raise ValueError("preprocess.fit: patches and source.rows: true would both number the patches")
        if is_npy and (preprocess.spacing or preprocess.orientation != _ORIENTATION):
            raise ValueError("preprocess: arrays (source.format: npy) have no spacing and no orientation")
        if self.model.input_shape and (not is_npy or preprocess.size):
            raise ValueError("model.input_shape: only for arrays; for volumes set preprocess.size")
        return self


ConfigInput = str | os.PathLike[str] | dict[str, Any] | Config
"""What `load` takes: the path of a YAML file, its content, or a config made earlier."""


def load(config: ConfigInput, overrides: list[str] | None = None) -> Config:
    """Return the checked config.

    Args:
        config: Path of a YAML file, its content as a dict, or an earlier `Config`.
        overrides: `key.path=value` texts; values are YAML (`[1, 2]`, `null`, `true`).

    Relative paths in the file are relative to the working directory, as in a shell.

    Raises:
        ConfigError: Lists every unknown key (with the nearest known one), wrong type and
            contradiction found.
    """
    checked, problems = load_partly(config, overrides)
    if problems or checked is None:
        raise ConfigError(problems, name_of(config))
    return checked


def load_partly(config: ConfigInput, overrides: list[str] | None = None) -> tuple[Config | None, list[str]]:
    """Return what can be used of a config, and every problem found.

    Offending values are replaced by their defaults, so that a caller can go on to look for problems
    of the source and the model and report all at once. None when too little is left for that.

    Raises:
        ConfigError: The file cannot be read as YAML at all.
    """
    if isinstance(config, Config) and not overrides:
        return config, []
    values = _as_dict(config)
    for override in overrides or []:
        _apply(values, override)
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    for item in found:
        if item["loc"]:  # else two sections contradict each other, and nobody knows which is meant
            _drop(values, item["loc"])
    with contextlib.suppress(ValidationError):
        return Config.model_validate(values), _sentences(found)
    return None, _sentences(found)


def load_model_section(values: Mapping[str, Any]) -> ModelConfig:
    """Return a checked `model` section given on its own.

    Raises:
        ConfigError: As `load`.
    """
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        found = [{**item, "loc": ("model", *item["loc"])} for item in error.errors(include_url=False)]
        raise ConfigError(_sentences(found), "model") from None


def name_of(config: ConfigInput) -> str:
    """Return how messages call this config."""
    return str(config) if isinstance(config, str | os.PathLike) else "config"


def without_secrets(config: Config) -> dict[str, Any]:
    """Return the config as JSON-ready dict with every storage option and URL credential masked."""
    values: dict[str, Any] = json.loads(config.model_dump_json(by_alias=True))
    for section in ("source", "model", "output"):
        options = values[section].get("storage_options") or {}
        values[section]["storage_options"] = dict.fromkeys(options, "***")
        values[section]["uri"] = mask_url(values[section]["uri"])
    return values


def _as_dict(config: ConfigInput) -> dict[str, Any]:
    if isinstance(config, Config):
        dumped: dict[str, Any] = config.model_dump(by_alias=True)
        return dumped
    if isinstance(config, dict):
        copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(config)))
        return copied
    path = Path(config)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no sections; a config has source, model and output at least")
    return values


def _plain(value: Any) -> Any:
    """Return value with paths, tuples and the like as YAML-ready plain types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {key!r}: expected key.path=value, e.g. model.batch_size=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is not YAML") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section")
    values[last] = value


def _drop(values: Any, path: tuple[int | str, ...]) -> None:
    """Remove the value at `path`, or the nearest key of a section above it."""
    holder, key = values, path[0]
    for part in path:
        if not isinstance(values, dict) or part not in values:
            break
        holder, key, values = values, part, values[part]
    if isinstance(holder, dict):
        holder.pop(key, None)


def _sentences(found: Sequence[Any]) -> list[str]:
    """Return one sentence per problem; what only follows from a problem inside a list is left out."""
    paths = [item["loc"] for item in found]
    inside = {path[:length] for path in paths for length in range(len(path))}
    kept = [item for item in found if item["type"] != "too_short" or item["loc"] not in inside]
    return [_sentence(item) for item in kept]


def _sentence(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        where = ".".join(str(part) for part in item["loc"][:-1])
        return f"{where}: too few values (got {list(item['input'])!r})"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key{_nearest(str(item['loc'][-1]), _known_keys(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{path}: missing; this key has no default"
    if item["type"] == "value_error":
        return f"{path}: {item['ctx']['error']}".removeprefix(": ")
    secret = isinstance(item["input"], dict) or {"storage_options", "uri"} & set(item["loc"])
    got = "" if secret else f" (got {item['input']!r})"
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}{got}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = _section_type(model.model_fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation such as `tuple[LayerConfig, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Annotated, Union, UnionType):
        found = (_section_type(inner) for inner in get_args(annotation))
        return next((section for section in found if section), None)
    return None
