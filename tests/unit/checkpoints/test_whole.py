"""The text model within a larger one: its names, its config, and the parts that are left out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.files import load_json
from checkpoints.shards import open_checkpoint, open_left_out
from checkpoints.whole import load_text_config, text_config
from errors import ConfigError
from tests.models import change_json
from tests.whole_folders import copy_whole_folder, write_whole_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_folder(tmp_path_factory.mktemp("whole"), tied=True)


def test_text_model_has_its_own_names_and_the_rest_is_apart(whole: Path) -> None:
    stored, text, others = load_file(whole / "model.safetensors"), open_checkpoint(whole), open_left_out(whole)
    assert {text.stored_name(name) for name in text.names()} | set(others.names()) == stored.keys()
    assert not {text.stored_name(name) for name in text.names()} & set(others.names())
    assert {name.split(".")[0] for name in others.names()} == {"model", "mtp"}
    assert not [name for name in text.names() if "visual" in name or "mtp" in name or "language_model" in name]
    for name in text.names():
        assert torch.equal(text.read(name), stored[text.stored_name(name)])
        assert text.path_of(name) == whole / "model.safetensors"


def test_a_tensor_under_both_names_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = copy_whole_folder(whole, tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.language_model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has both model\.\S*norm\.weight and model\.\S*norm\.weight"):
        open_checkpoint(folder)


def test_whole_config_decides_what_it_declares() -> None:
    own = {"model_type": "qwen3_5_text", "vocab_size": 8, "dtype": "bfloat16", "tie_word_embeddings": False}
    whole = {"model_type": "qwen3_5", "tie_word_embeddings": True, "torch_dtype": "float16", "text_config": own}
    assert text_config(whole) == {**own, "tie_word_embeddings": True}
    assert text_config({"model_type": "qwen3_5", "dtype": "float32", "text_config": {}}) == {
        "model_type": "qwen3_5_text", "dtype": "float32",
    }  # fmt: skip
    assert text_config({"model_type": "qwen2", "text_config": own}) == {"model_type": "qwen2", "text_config": own}


@pytest.mark.parametrize(
    ("value", "fault"),
    [(None, "text_config is missing"), ({"num_hidden_layers": "two"}, 'text_config.num_hidden_layers is "two"')],
)
def test_faulty_text_config_is_named(whole: Path, tmp_path: Path, value: object, fault: str) -> None:
    folder = copy_whole_folder(whole, tmp_path / "faulty")
    change_json(folder / "config.json", text_config=value)
    with pytest.raises(ConfigError, match=fault):
        load_text_config(folder)


def test_any_other_config_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert load_text_config(tmp_path) == load_json(tmp_path / "config.json")
