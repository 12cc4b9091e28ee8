"""The one typed configuration: YAML and `--set` in, frozen models out, every problem listed at once.

Sections mirror the YAML. Each field's default is the documented default. Nothing here opens
the source, the output or the model; checks that need those live where they are opened.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

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
