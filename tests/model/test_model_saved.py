"""A saved file is understood without TensorFlow, and doubt gives None."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from featray.model import ModelPeek, peek, saved


def test_peek_reads_input_and_layers_without_importing_tensorflow(small_vae_file: Path) -> None:
    program = (
        "import sys; from featray.model import peek; found = peek(sys.argv[1]); "
        "assert found.input_shapes == ((None, 8, 16, 16, 1),), found; "
        "assert found.layers[0] == 'encoder' and 'encoder/z_mean' in found.layers, found; "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(small_vae_file)], check=True)


def test_peek_is_none_for_what_it_cannot_be_sure_of(tmp_path: Path, small_vae: Any) -> None:
    small_vae.save(tmp_path / "vae.h5")
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "cut.keras").write_bytes(b"PK\x03\x04 cut off")
    names = ("vae.h5", "text.keras", "cut.keras", "missing.keras")
    assert [peek(tmp_path / name) for name in names] == [None] * 4


def test_peek_of_the_encoder_alone_has_flat_names(small_vae: Any, tmp_path: Path) -> None:
    small_vae.get_layer("encoder").save(tmp_path / "e.keras")
    found = peek(tmp_path / "e.keras")
    assert isinstance(found, ModelPeek)
    assert found.layers[:2] == ("conv_1", "pool_1")


def test_custom_entries_name_the_layer_and_leave_keras_and_compile_settings_out() -> None:
    own = {"module": "keras.layers", "class_name": "Dense", "registered_name": None}
    function = {
        "module": "builtins",
        "class_name": "function",
        "config": "mine",
        "registered_name": "function",
    }
    custom = {"module": None, "class_name": "Mix", "registered_name": "pkg>Mix", "config": {"name": "mix"}}
    config = {
        "class_name": "Sequential",
        "module": "keras",
        "config": {
            "layers": [
                {**own, "config": {"name": "d", "trainable": True, "activation": function}},
                custom,
                custom,
            ]
        },
        "compile_config": {
            "loss": {"module": None, "class_name": "Loss", "registered_name": "Loss", "config": {}}
        },
    }
    found = saved.custom_entries(config, lambda name: name == "relu")
    assert [(entry.layer, entry.class_name, entry.registered_name) for entry in found] == [
        ("d", "mine", "mine"),
        ("Sequential", "Mix", "pkg>Mix"),
    ]
