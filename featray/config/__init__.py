"""The configuration: its sections and keys, loading with checks, and the messages for mistakes.

Every package may import the sections. Nothing here opens storage, loads a model or knows a stage.
"""

from featray.config.load import (
    ConfigInput,
    get_name,
    is_config_file,
    load,
    load_model_section,
    load_partly,
    mask_secrets,
)
from featray.config.models import (
    ActorsConfig,
    CacheConfig,
    Config,
    DecodeConfig,
    LayerConfig,
    LimitsConfig,
    ModelConfig,
    OutputConfig,
    PolicyConfig,
    PreprocessConfig,
    PrivacyConfig,
    RunConfig,
    SourceConfig,
)

__all__ = [
    "ActorsConfig",
    "CacheConfig",
    "Config",
    "ConfigInput",
    "DecodeConfig",
    "LayerConfig",
    "LimitsConfig",
    "ModelConfig",
    "OutputConfig",
    "PolicyConfig",
    "PreprocessConfig",
    "PrivacyConfig",
    "RunConfig",
    "SourceConfig",
    "get_name",
    "is_config_file",
    "load",
    "load_model_section",
    "load_partly",
    "mask_secrets",
]
