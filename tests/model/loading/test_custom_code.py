"""A reference to Python code gives the object and the sha256 that stands for the code in a recipe."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest

from featray.errors import ModelError
from featray.model.loading.custom_code import VAE_SHA256, import_object


@pytest.mark.parametrize("module", ["featray.vae", "featray.synthetic.vae"])
def test_the_sampling_layer_has_the_digest_of_version_0_1_0_under_its_old_and_new_name(module: str) -> None:
    from featray.synthetic.vae import Sampling

    imported = import_object(f"{module}:Sampling", config_key="custom_objects", storage_options={})
    assert imported == (Sampling, VAE_SHA256)
    assert VAE_SHA256 == "af69a146b65168de7078ba2517cb2f4e614597666f596f1d178207a8786edf28"


def test_the_digest_of_any_other_module_is_that_of_its_file() -> None:
    found, sha256 = import_object("json.decoder:JSONDecoder", config_key="builder", storage_options={})
    source = inspect.getsourcefile(found)
    assert source is not None
    assert sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()


def test_a_name_that_is_missing_in_a_module_or_a_file_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text("")
    for location, kind in (("json.decoder", "the module"), (tmp_path / "layers.py", "the file")):
        with pytest.raises(ModelError, match=f"{kind} has no Sampling"):
            import_object(f"{location}:Sampling", config_key="custom_objects", storage_options={})
