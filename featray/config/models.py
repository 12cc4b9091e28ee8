"""The sections and keys of the configuration, as frozen pydantic models.

The sections are those of the YAML file. The docstring under a field documents its key; the default of a field
is the documented default. Nothing here opens the source, the output or the model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from featray.storage.expand import escape_path, expand_path

Text = Annotated[str, Field(min_length=1)]
_EXPANSION = (AfterValidator(expand_path), PlainSerializer(escape_path, return_type=str))
PathText = Annotated[str, Field(min_length=1), *_EXPANSION]
"""A path or URL in which `~` and environment variables are expanded."""
CodeText = Annotated[str, *_EXPANSION]
"""`package.module:name` or `file.py:name`, expanded in the same way."""
SIZES_ZYX = Annotated[tuple[int, int, int], Field(min_length=3, max_length=3)]
_ORIENTATION = "LPS"
SPACING_ZYX = Annotated[tuple[float, float, float], Field(min_length=3, max_length=3)]


class _Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceConfig(_Section):
    """The collection of scans."""

    uri: PathText
    """Folder, glob, single file, or manifest (.csv or .parquet with a column `uri`); a path or any fsspec
    URL."""
    format: Literal["auto", "nifti", "dicom", "nrrd", "mha", "npy"] = "auto"
    """Format of the scans; auto accepts all kinds of volumes, but no arrays (npy)."""
    rows: bool = False
    """npy only: true if the first axis of a file enumerates samples; the patch is then the row number."""
    id_column: str | None = None
    """Column of the manifest that is the scan_id; null = the path relative to the source."""
    center_frame: Literal["LPS", "RAS"] = "LPS"
    """Frame of the columns center_x, center_y and center_z (mm) of the manifest."""
    volume: int | None = Field(default=None, ge=0)
    """Index, from 0, of the volume to read from a file with several volumes (4-D NIfTI, NRRD or MetaImage);
    null refuses such files."""
    fingerprint: Literal["store", "bytes"] = "store"
    """How a changed scan is detected: by the store's version of its files, or by their bytes, which are all
    read."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Options for fsspec; never written to logs, tables or run files."""


class PolicyConfig(_Section):
    """How unusual scans are handled. Keys that change values are part of the recipe."""

    gantry_tilt: Literal["refuse", "resample"] = "refuse"
    """Slices that are shifted sideways: refuse the scan, or resample it to an upright grid."""
    irregular_spacing: Literal["refuse", "resample"] = "refuse"
    """Unequal steps between slices without a missing slice: refuse the scan, or resample it to equal steps.
    """
    oblique: Literal["warn", "resample"] = "warn"
    """Voxel axes that are not parallel to the patient's axes: use the nearest axes and warn, or resample."""
    not_hu: Literal["warn", "refuse"] = "warn"
    """Values that do not look like HU: warn, or refuse the scan."""
    not_ct: Literal["exclude", "warn"] = "exclude"
    """MR, PET, and secondary captures with the geometry of CT slices: exclude them, or read them and warn."""
    duplicates: Literal["warn", "exclude"] = "warn"
    """The second of two scans with the same SeriesInstanceUID or the same bytes: warn, or exclude it."""


class PreprocessConfig(_Section):
    """How a CT volume becomes the model input.

    The steps are: crop to the mask (with `margin`), orient, clip to `window`, resample to `spacing`, bring to
    `size` by `fit`, and map onto `scale`.
    """

    orientation: str = _ORIENTATION
    """Directions in which x, y and z increase; the array itself has the axes (z, y, x)."""
    window: tuple[float, float] | None = (-1000.0, 1000.0)
    """Range in HU to which values are clipped before any interpolation; null keeps the values."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Range onto which the window is mapped linearly."""
    spacing: SPACING_ZYX | None = None
    """Voxel spacing (z, y, x) in mm to which the volume is resampled first; null keeps the native spacing."""
    margin: float = Field(default=0, ge=0)
    """Margin in mm around the bounding box of the manifest's `mask`."""
    size: SIZES_ZYX | None = (32, 256, 256)
    """Number of voxels (z, y, x) of the model input; null keeps the native size."""
    fit: Literal["stretch", "crop_pad", "patches"] = "stretch"
    """How a volume of another size is brought to `size`."""
    stride: SIZES_ZYX | None = None
    """Step between patches in voxels (z, y, x); null = size."""
    interpolation: Literal["linear", "area", "nearest", "cubic"] = "linear"
    """Interpolation kernel of `spacing` and of `fit: stretch`."""
    align_corners: bool = False
    """false: half-pixel centers (MONAI, torch, OpenCV); true: corner voxels are mapped onto corner voxels."""

    @field_validator("orientation")
    @classmethod
    def _check_orientation(cls, value: str) -> str:
        if len(value) != 3 or not all(set(value) & set(pair) for pair in ("LR", "PA", "SI")):
            raise ValueError(f"{value!r} is not an orientation; give one of L/R, of P/A and of S/I, e.g. LPS")
        return value

    @field_validator("window")
    @classmethod
    def _check_window(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"[{value[0]:g}, {value[1]:g}] is reversed; give the lower HU first")
        return value

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] == value[1]:
            raise ValueError(f"both ends are {value[0]:g}, so every voxel would get the same value")
        return value

    @field_validator("size", "stride", "spacing")
    @classmethod
    def _check_positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value) <= 0:
            raise ValueError(f"{list(value)} must be positive along z, y and x")
        return value

    @model_validator(mode="after")
    def _check_fit(self) -> PreprocessConfig:
        if self.fit == "patches" and self.size is None:
            raise ValueError("fit: patches needs size, the size (z, y, x) of one patch")
        if self.stride is not None and self.fit != "patches":
            raise ValueError(f"stride: only used with fit: patches, not with fit: {self.fit}")
        return self


class LayerConfig(_Section):
    """One layer to extract."""

    layer: Text
    """Name, path (`encoder/z_mean`) or glob of layers."""
    pool: Literal["none", "avg", "max", "avgmax", "grid"] | None = None
    """Pooling over the spatial axes; null = none for rank-2 outputs, avg for feature maps."""
    grid: tuple[int, ...] | None = None
    """Number of cells (z, y, x), or (y, x) for 2-D maps, for pool: grid, e.g. [4, 4, 4]."""
    as_: Text | None = Field(default=None, alias="as")
    """Name of the layer in the output; null = the path with `/` replaced by `.`."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _check_grid(self) -> LayerConfig:
        if self.pool == "grid" and not self.grid:
            raise ValueError("pool: grid needs grid, the number of cells (z, y, x), e.g. grid: [4, 4, 4]")
        if self.grid and self.pool != "grid":
            raise ValueError(f"grid: only used with pool: grid, not with pool: {self.pool}")
        if self.grid and min(self.grid) < 1:
            raise ValueError(f"grid {list(self.grid)} must be at least 1 along each axis")
        return self


def _parse_layer(value: Any) -> Any:
    return {"layer": value} if isinstance(value, str) else value


_LayerInput = Annotated[LayerConfig, BeforeValidator(_parse_layer, json_schema_input_type=Text | LayerConfig)]


class ModelConfig(_Section):
    """The trained model, and the layers to extract."""

    uri: PathText
    """.keras, .h5 or SavedModel folder; any fsspec URL."""
    builder: CodeText | None = None
    """Function that returns the model, for weights-only files: `package.module:function` or
    `file.py:function`."""
    architecture: PathText | None = None
    """Description of the model, for weights-only files: `model.json` or YAML, as `model.to_json()`
    writes it."""
    custom_objects: tuple[CodeText, ...] = ()
    """Custom classes and functions of the model: `file.py:Sampling` or `package.module:Class`; and functions
    in the place of code inside the file: `LAYER=file.py:function`."""
    submodel: str | None = None
    """Attribute or layer of the model that is used as the model, e.g. encoder."""
    trust: bool = False
    """true allows Lambda layers and other code that is stored in the model file to run."""
    input_shape: tuple[int | None, ...] | None = None
    """Shape of one array (source.format: npy), for models that do not declare their input shape."""
    layers: tuple[_LayerInput, ...] = Field(min_length=1)
    """Layers to extract, all in one pass; a text is short for {layer: text}."""
    constants: dict[str, Any] = Field(default_factory=dict)
    """Values of the model's other inputs by input name, without batch axis; the same for every scan."""
    compute: Literal["float32", "float16", "bfloat16"] | None = None
    """Type in which layers compute (weights keep their type); null = the type set in the model."""
    jit_compile: bool = False
    """true compiles the model with XLA, for GPUs; many times slower on CPUs. Part of the recipe."""
    batch_size: int = Field(default=4, ge=1)
    """Model inputs per call of the model; it is halved for the rest of a process if memory is too short."""
    allow_stochastic: bool = False
    """true accepts layers whose values differ from call to call."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Options for fsspec to open `uri`; never written to logs, tables or run files."""

    @model_validator(mode="after")
    def _check_source_of_the_model(self) -> ModelConfig:
        if self.architecture and self.builder:
            raise ValueError("architecture and builder both describe the model; use one of them")
        return self


class OutputConfig(_Section):
    """The place and the form of the output."""

    uri: PathText
    """Folder of the output: a local path or any fsspec URL."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Options for fsspec and for the Delta log; never written to logs, tables or run files."""
    partition_by: tuple[str, ...] = ("layer",)
    """Partition columns of `features`: `layer` first, then columns of `scans` or of the manifest."""
    keep_versions_days: float = Field(default=0, ge=0)
    """Days for which superseded files are kept; 0 deletes them right after each commit."""

    @model_validator(mode="after")
    def _check_layer_is_first(self) -> OutputConfig:
        if not self.partition_by or self.partition_by[0] != "layer":
            raise ValueError(f"partition_by {list(self.partition_by)} must begin with layer")
        return self


_STANDARD_RESOURCES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "decode.memory"}
"""Resources that have keys of their own."""
_LABEL_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_CONDITION = rf"^!?(?:{_LABEL_VALUE}|in\({_LABEL_VALUE}(?:, ?{_LABEL_VALUE})*\))$"


def _refuse_standard_resources(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in _STANDARD_RESOURCES:
            raise ValueError(f"{name} is not a custom resource; use {_STANDARD_RESOURCES[name]}")
    return resources


CustomResources = Annotated[
    dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_refuse_standard_resources)
]
LabelSelector = dict[str, Annotated[str, Field(pattern=_LABEL_CONDITION)]]


class ActorsConfig(_Section):
    """The actors that run the model (engine ray)."""

    min: int = Field(default=1, ge=1)
    """Minimum number of actors."""
    max: int | None = Field(default=None, ge=1)
    """Maximum number of actors; null = no limit on a cluster, whose pool grows with it; with a local Ray one
    per `num_cpus` CPUs; with GPUs as many as leave CPUs to decode."""
    num_cpus: float | None = Field(default=None, ge=0)
    """CPUs that each actor claims: its TensorFlow threads and, without GPUs, its worker processes for
    decoding. null = 1; with a local Ray and without GPUs, all cores that one process keeps busy, because each
    actor holds TensorFlow and the model."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that each actor claims; with a fraction, actors share a GPU and its memory. 0 hides all GPUs."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of Ray that each actor claims, for example `{ct_node: 0.01}`, to select nodes."""
    label_selector: LabelSelector = Field(default_factory=dict)
    """Labels of the Ray nodes on which actors run, for example `{pool: gpu}`; conditions `!spot`, `in(a, b)`
    and `!in(a, b)` as in Ray."""

    @property
    def cpus(self) -> float:
        """CPUs that each actor claims."""
        return 1 if self.num_cpus is None else self.num_cpus

    @model_validator(mode="after")
    def _check_order(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min: {self.min}")
        return self


class DecodeConfig(_Section):
    """Resources for reading and preprocessing."""

    num_cpus: float = Field(default=1, gt=0)
    """CPUs that each decode task claims (engine ray with GPUs; without GPUs, actors decode)."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of Ray that each decode task claims (engine ray with GPUs)."""
    label_selector: LabelSelector = Field(default_factory=dict)
    """Labels of the Ray nodes on which decode tasks run (engine ray with GPUs)."""
    memory: int | None = Field(default=None, gt=0)
    """Bytes of memory that decoding one scan may take; a scan that needs more is `too_large`. With engine
    ray, workers claim it. null = most of the machine's memory; large scans then claim memory by size."""
    workers: int | None = Field(default=None, ge=0)
    """Worker processes (engine inline), never more than scans; null = one per core; 0 = decode in this
    process, so that a debugger can follow."""


class RunConfig(_Section):
    """The engine and its resources."""

    engine: Literal["auto", "ray", "inline"] = "auto"
    """auto = ray if a cluster is named, in a Ray job, for several GPUs that actors.num_gpus claims, or above
    inline_max_cores; otherwise inline, for any number of scans."""
    inline_max_cores: int = Field(default=32, ge=1)
    """Largest number of cores on which auto takes inline; one process may not keep more of them busy."""
    address: str | None = None
    """Address of the Ray cluster; null = the variable RAY_ADDRESS, or a local Ray, which is started for more
    than 24 scans (the process itself computes fewer); local = a local Ray also for fewer scans."""
    actors: ActorsConfig = ActorsConfig()
    """The actors that run the model."""
    decode: DecodeConfig = DecodeConfig()
    """Resources for reading and preprocessing."""


class LimitsConfig(_Section):
    """Limits of a scan and of a run."""

    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of failed scans above which the exit code is 3."""
    max_removed_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of stored scans that a refresh may remove at once (100 scans are always allowed). A larger share
    is refused, because the collection is probably not all mounted."""
    max_voxels: int = Field(default=2_000_000_000, gt=0)
    """Voxels that a scan may have; checked from the header, before memory is allocated."""
    scan_timeout_s: float = Field(default=600, gt=0)
    """Seconds that reading and preprocessing one scan may take; time in which the run is suspended does not
    count."""
    attempts: int = Field(default=3, ge=1)
    """Attempts for a scan whose worker process dies."""


class CacheConfig(_Section):
    """The input cache: decoded model inputs, kept for another layer or another model."""

    uri: Text | None = None
    """Folder or fsspec URL of the cache, for several runs, models and outputs; it holds image data; null: no
    cache."""
    max_gb: float = Field(default=100, gt=0)
    """Largest size in GB (1e9 bytes); beyond it, the inputs that were not used for the longest time are
    deleted."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Options for fsspec to open `uri`; never written to logs, tables or run files."""


class PrivacyConfig(_Section):
    """Which values of a DICOM header may be copied."""

    dicom_tags: tuple[str, ...] = ()
    """DICOM keywords whose values are copied to the scans table; by default nothing that identifies a
    patient."""


_NPY_DEFAULTS = {"window": None, "size": None}
"""Defaults for arrays: they go to the model unchanged, because their values are not HU."""


class Config(_Section):
    """The checked configuration of a run; `load` makes it."""

    source: SourceConfig
    policy: PolicyConfig = PolicyConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    model: ModelConfig
    output: OutputConfig
    run: RunConfig = RunConfig()
    limits: LimitsConfig = LimitsConfig()
    cache: CacheConfig = CacheConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @property
    def input_zyx(self) -> tuple[int | None, ...] | None:
        """Voxels (z, y, x) of a model input: None along axes of any size, or None if the model decides."""
        if self.preprocess.size is None:
            return self.model.input_shape if self.source.format == "npy" else (None, None, None)
        return self.preprocess.size

    @model_validator(mode="before")
    @classmethod
    def _set_defaults_for_arrays(cls, values: Any) -> Any:
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
    def _check_format(self) -> Config:
        is_npy, preprocess = self.source.format == "npy", self.preprocess
        if self.source.rows and not is_npy:
            raise ValueError(f"source.rows: only used with source.format: npy, not {self.source.format}")
        if self.source.rows and preprocess.fit == "patches":
            raise ValueError(
                "preprocess.fit: patches and source.rows: true both number the patches; use one of them"
            )
        if is_npy and (preprocess.spacing or preprocess.orientation != _ORIENTATION):
            raise ValueError("preprocess: arrays (source.format: npy) have no spacing and no orientation")
        if self.model.input_shape and (not is_npy or preprocess.size):
            raise ValueError("model.input_shape: only for arrays; for volumes set preprocess.size")
        return self
