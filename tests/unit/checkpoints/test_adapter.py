"""Reading adapter folders: the forms of their files, and options and methods that cannot be merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters import LINEAR, assert_refused, assert_same, fold, make_adapter, make_base, plan, rewrite


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fold") / "base")


@pytest.fixture
def plain_adapter(plain_base: Path, tmp_path: Path) -> Path:
    return make_adapter(plain_base, tmp_path / "adapter", target_modules=["q_proj"])


def test_tensor_names_may_contain_the_adapter_name(tmp_path: Path) -> None:
    def with_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for end in ("lora_A.weight", "lora_B.weight"):
                name = name.replace(end, end.replace(".", ".default."))
            if name.endswith(("trainable_tokens_delta", "lora_magnitude_vector")):
                name += ".default"
            if ".mlp." in name and "lora" not in name:
                name = name.replace(".mlp.", ".mlp.modules_to_save.default.")
            renamed[name] = tensor
        return renamed

    base = make_base(tmp_path / "base")
    options = {"use_dora": True, "modules_to_save": ["mlp"], "trainable_token_indices": [1, 2]}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **options)
    expected = fold(base, adapter)
    before = load_file(adapter / "adapter_model.safetensors")
    rewrite(adapter, with_name)
    assert not before.keys() & load_file(adapter / "adapter_model.safetensors").keys()
    assert_same(fold(base, adapter), expected)


def test_pickled_adapter_equals_safetensors_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    expected = fold(base, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_same(fold(base, adapter), expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 0.1}),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 3}),
        ("target_parameters", ["mlp.weight"]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"scale": 1.0}),
        ("an_unknown_option", "on"),
    ],
)
def test_unsupported_option_is_refused_by_name(
    plain_base: Path, plain_adapter: Path, option: str, value: object
) -> None:
    rewrite(plain_adapter, **{option: value})
    assert_refused(plain_base, plain_adapter, rf"adapter_config\.json: the option {option} \(")
    rewrite(plain_adapter, **{option: None})
    plan(plain_base, plain_adapter)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisation_that_changes_the_base_is_refused(plain_base: Path, plain_adapter: Path, init: str) -> None:
    rewrite(plain_adapter, init_lora_weights=init)
    assert_refused(plain_base, plain_adapter, rf"init_lora_weights {init} trains on a changed copy of the base")


def test_method_other_than_lora_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    for method in ("ADALORA", "PROMPT_TUNING", "TRAINABLE_TOKENS", None):
        rewrite(plain_adapter, peft_type=method)
        assert_refused(plain_base, plain_adapter, rf"peft_type {method} cannot be merged.*Only LORA")


def test_folder_without_adapter_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    (plain_adapter / "adapter_model.safetensors").unlink()
    assert_refused(
        plain_base, plain_adapter, r"adapter holds no weights \(adapter_model\.safetensors or adapter_model\.bin"
    )
    save_file({}, plain_adapter / "adapter_model.safetensors")
    assert_refused(plain_base, plain_adapter, "holds an adapter without tensors")
    assert_refused(plain_base, plain_base, r"^--adapter .*base holds no adapter_config\.json")
