"""The description of a saved model gives the custom code that it needs."""

from __future__ import annotations

from featray.model.loading import model_file


def test_custom_entries_give_their_layer_and_exclude_keras_and_compile_settings() -> None:
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
    entries = model_file.list_custom_entries(config, lambda name: name == "relu")
    assert [(entry.layer, entry.class_name, entry.registered_name) for entry in entries] == [
        ("d", "mine", "mine"),
        ("Sequential", "Mix", "pkg>Mix"),
    ]
