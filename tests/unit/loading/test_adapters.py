"""LoRA adapters: which embeddings train with them and why, which layers have one, and continuing a saved one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from errors import ConfigError
from loading.adapters import (
    EmbeddingsPolicy,
    LoraSettings,
    attach_lora,
    continue_lora,
    drawn_once,
    embeddings_policy,
    keep_input_dtype,
)
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from tests.commands import Recorder, finetune_here, read_json
from tests.models import TINY, copy_checkpoint, copy_tied, write_conversations, write_later_checkpoint

# Linear layers of a block.
QWEN_LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
LATER_LAYERS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def build(checkpoint: Checkpoint, embeddings: str = "auto", **settings: Any) -> Any:
    """Load the model and attach a new adapter with these ``LoraSettings``."""
    policy = embeddings_policy(embeddings, checkpoint)
    return attach_lora(load_model(checkpoint, torch.float32), checkpoint, LoraSettings(**settings), policy)


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def lora_names(layers: list[str], blocks: str) -> set[str]:
    """Names of both LoRA matrices of the layers in both blocks."""
    return {
        f"{blocks}.{block}.{layer}.lora_{matrix}.default.weight"
        for block in (0, 1) for layer in layers for matrix in "AB"
    }  # fmt: skip


def finetune(model: Path, output: Path, *flags: object) -> Recorder:
    data = write_conversations(output.parent / "train.json")
    return finetune_here(
        "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--use_lora", "--save_strategy",
        "no", "--max_steps", 3, "--learning_rate", 1e-2, "--logging_steps", 1, "--lora_dropout", 0, *flags,
    )  # fmt: skip


def test_attaching_to_a_relative_folder_warns_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    copy_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    build(load_checkpoint("base"))
    assert not [str(warning.message) for warning in recwarn if "base_model_name_or_path" in str(warning.message)]


# --------------------------------------------------------------------------------------------------- embeddings policy


@pytest.mark.parametrize(
    ("name", "chat_format", "mode", "reason"),
    [
        ("base", "chatml", "none", "auto: chat_format in generation_config.json is chatml: a chat model"),
        (
            "chat", "raw", "full",
            "auto: chat_format in generation_config.json is 'raw': a base model, not trained on the ChatML "
            "tokens",
        ),
    ],
)  # fmt: skip
def test_qwen_v1_embeddings_train_unless_it_is_a_chat_model(
    tmp_path: Path, name: str, chat_format: str, mode: str, reason: str
) -> None:
    """The folder names suggest the opposite."""
    checkpoint = load_checkpoint(str(copy_checkpoint(tmp_path / name, chat_format=chat_format)))
    assert embeddings_policy("auto", checkpoint) == EmbeddingsPolicy(mode, reason)


def test_checkpoint_without_chat_format_is_a_base_model(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "chat")
    (folder / "generation_config.json").unlink()
    policy = embeddings_policy("auto", load_checkpoint(str(folder)))
    assert policy.mode == "full"
    assert "base model" in policy.reason


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_later_families_are_trained_on_chatml(tmp_path: Path, model_type: str) -> None:
    write_later_checkpoint(tmp_path / "model", model_type)
    policy = embeddings_policy("auto", load_checkpoint(str(tmp_path / "model")))
    assert policy == EmbeddingsPolicy(
        "none", f"auto: {model_type.capitalize()} checkpoints are trained on the ChatML tokens"
    )


@pytest.mark.parametrize("mode", ["full", "chatml_tokens", "none"])
@pytest.mark.parametrize("chat_format", ["raw", "chatml"])
def test_explicit_flag_overrides_auto(tmp_path: Path, mode: str, chat_format: str) -> None:
    checkpoint = load_checkpoint(str(copy_checkpoint(tmp_path / "model", chat_format=chat_format)))
    assert embeddings_policy(mode, checkpoint) == EmbeddingsPolicy(mode, f"--trainable_embeddings {mode}")


# ------------------------------------------------------------------------------------------------- trained parameters

QWEN_EMBEDDINGS = {
    "none": set(),
    "full": {"transformer.wte.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"},
    "chatml_tokens": {
        "transformer.wte.token_adapter.trainable_tokens_delta.default",
        "lm_head.token_adapter.trainable_tokens_delta.default",
    },
}


@pytest.mark.parametrize("mode", ["none", "full", "chatml_tokens"])
def test_trained_parameters_of_qwen_v1(mode: str) -> None:
    model = build(load_checkpoint(str(TINY)), mode)
    assert trained_names(model) == lora_names(QWEN_LAYERS, "transformer.h") | QWEN_EMBEDDINGS[mode]


def test_trained_parameters_of_qwen_v1_with_auto(tmp_path: Path) -> None:
    for chat_format, mode in (("chatml", "none"), ("raw", "full")):
        model = build(load_checkpoint(str(copy_checkpoint(tmp_path / mode, chat_format=chat_format))))
        assert trained_names(model) == lora_names(QWEN_LAYERS, "transformer.h") | QWEN_EMBEDDINGS[mode]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_trained_parameters_of_later_families(tmp_path: Path, model_type: str) -> None:
    write_later_checkpoint(tmp_path / "model", model_type)
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    layers = lora_names(LATER_LAYERS, "model.layers")
    assert trained_names(build(checkpoint)) == layers
    full = {"model.embed_tokens.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"}
    assert trained_names(build(checkpoint, "full")) == layers | full


def test_chatml_tokens_trains_only_their_two_rows(tmp_path: Path) -> None:
    run = finetune(TINY, tmp_path / "out", "--trainable_embeddings", "chatml_tokens")
    merged = run.model.merge_and_unload()
    stored = load_file(TINY / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        changed = (merged.get_parameter(name) != stored[name].float()).any(dim=1).nonzero().flatten().tolist()
        assert changed == [701, 702], name


@pytest.mark.parametrize("mode", ["full", "chatml_tokens"])
def test_tied_embeddings_stay_tied(tmp_path: Path, mode: str) -> None:
    run = finetune(copy_tied(tmp_path / "tied"), tmp_path / "out", "--trainable_embeddings", mode)
    embedding, head = run.model.get_input_embeddings(), run.model.get_output_embeddings()
    if mode == "full":
        assert embedding.weight is head.weight
    merged = run.model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    stored = load_file(tmp_path / "tied" / "model.safetensors")["transformer.wte.weight"]
    changed = (merged.get_input_embeddings().weight != stored).any(dim=1).nonzero().flatten().tolist()
    assert (changed == [701, 702]) == (mode == "chatml_tokens")
    assert len(changed) >= 2


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str) -> None:
    """Of Qwen v1's linear layers only c_attn has a bias."""
    model = build(load_checkpoint(str(TINY)), bias=bias)
    biases = {name for name in trained_names(model) if name.endswith(".bias")}
    assert biases == {f"transformer.h.{block}.attn.c_attn.base_layer.bias" for block in (0, 1)}


def test_first_values_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Linear draws values of its own, which peft would replace."""
    drawn, draw = list[torch.Size](), torch.nn.init.kaiming_uniform_

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(tensor.shape)
        return draw(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", count)
    model = build(load_checkpoint(str(TINY)), "none", rank=3)
    pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
             for layer in model.modules() if hasattr(layer, "lora_A") and len(layer.lora_A)]  # fmt: skip
    assert [shape for shape in drawn if 3 in shape] == [first.shape for first, _ in pairs]
    for first, second in pairs:
        bound = first.shape[1] ** -0.5
        assert not second.any() and first.any() and first.abs().max() <= bound * 1.01
    assert torch.nn.Linear(4, 4).weight.any(), "other layers draw their values again"


@pytest.mark.parametrize("init", ["true", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_first_values_are_those_that_peft_rounds_to_the_bits_of_the_base(init: str, dora: bool) -> None:
    checkpoint = load_checkpoint(str(TINY))
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "use_dora": dora, "lora_dropout": 0.05}
    values: Any = {"true": True}.get(init, init)
    models: list[Any] = []
    for attach in (
        lambda base: get_peft_model(base, LoraConfig(target_modules=QWEN_LAYERS, init_lora_weights=values, **settings)),
        lambda base: attach_lora(
            base, checkpoint, LoraSettings(2, 4, init=init, dora=dora), EmbeddingsPolicy("none", "")
        ),
    ):
        base = load_model(checkpoint, torch.bfloat16)
        torch.manual_seed(1)
        with drawn_once():
            models.append(attach(base))
    theirs, ours = ({name: value for name, value in model.named_parameters() if "lora_" in name} for model in models)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == torch.float32
        if "magnitude" not in name:  # peft computes norms in 16 bits
            assert torch.equal(ours[name], value) and ours[name].requires_grad, name


def test_chosen_layers_rank_alpha_and_dropout() -> None:
    targets = ["w1", "attn.c_proj"]
    model = build(load_checkpoint(str(TINY)), rank=3, alpha=6, dropout=0.25, target_modules=targets)
    assert trained_names(model) == lora_names(["mlp.w1", "attn.c_proj"], "transformer.h")
    layer = model.base_model.model.transformer.h[0].mlp.w1
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (2.0, 0.25)


def test_unknown_target_modules(tmp_path: Path) -> None:
    for model_type, targets, missing, layers in (
        ("qwen", "c_attn q_proj up_proj", "q_proj up_proj", "c_attn c_proj lm_head w1 w2"),
        ("qwen2", "c_attn", "c_attn", "down_proj gate_proj k_proj lm_head o_proj q_proj up_proj v_proj"),
    ):
        folder = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / model_type, model_type)
        message = f"--lora_target_modules {missing}: the model has no such layers. It has {layers}"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            build(load_checkpoint(str(folder)), target_modules=targets.split())


# ---------------------------------------------------------------------------------------------- continuing an adapter


@pytest.mark.parametrize("mode", ["none", "full", "chatml_tokens"])
def test_continued_adapter_starts_from_the_saved_weights(tmp_path: Path, mode: str) -> None:
    first = finetune(TINY, tmp_path / "first", "--trainable_embeddings", mode, "--lora_r", 4)
    names = trained_names(first.model)
    saved = {name: p.detach().clone() for name, p in first.model.named_parameters()}

    checkpoint = load_checkpoint(str(TINY))
    assert embeddings_policy("auto", checkpoint, str(tmp_path / "first")).mode == mode
    continued = continue_lora(load_model(checkpoint, torch.float32), str(tmp_path / "first"))
    assert trained_names(continued) == names
    for name, parameter in continued.named_parameters():
        assert torch.equal(parameter, saved[name]), name

    second = finetune(
        TINY, tmp_path / "second", "--trainable_embeddings", mode, "--lora_weight_path", tmp_path / "first"
    )
    assert second.losses()[0] < first.losses()[0] - 0.1  # it starts from the end of the first run
    changed = {
        name.removeprefix("base_model.model.")
        for name, p in second.model.named_parameters()
        if not torch.equal(p, saved[name])
    }
    assert changed == names
    assert read_json(tmp_path / "second" / "adapter_config.json")["r"] == 4
    before, after = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
    assert before.keys() == after.keys()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter without embeddings. Shared: do not change it."""
    output = tmp_path_factory.mktemp("adapter") / "out"
    finetune(TINY, output)
    return output


def test_summary_records_the_embeddings_of_a_continued_adapter(tmp_path: Path, adapter: Path) -> None:
    """The adapter decides what trains, not the flag's default."""
    base = copy_checkpoint(tmp_path / "base", chat_format="raw")  # auto would be: full
    run = finetune(base, tmp_path / "out", "--lora_weight_path", adapter)
    assert trained_names(run.model) == lora_names(QWEN_LAYERS, "transformer.h")
    assert read_json(tmp_path / "out" / "run_summary.json")["trainable_embeddings"]["mode"] == "none"


def copy_adapter(adapter: Path, folder: Path, weights: bytes | None) -> Path:
    """Copy an adapter's config, with these weights or without any."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_unusable_adapters_are_refused(tmp_path: Path, adapter: Path) -> None:
    checkpoint = load_checkpoint(str(TINY))
    write_later_checkpoint(tmp_path / "other", "qwen2")
    (tmp_path / "empty").mkdir()
    for base, folder in (
        (checkpoint, tmp_path / "nowhere"),
        (checkpoint, tmp_path / "empty"),
        (checkpoint, copy_adapter(adapter, tmp_path / "lost", None)),
        (checkpoint, copy_adapter(adapter, tmp_path / "broken", bytes(20))),
        (load_checkpoint(str(tmp_path / "other")), adapter),
    ):
        with pytest.raises(ConfigError, match=f"^--lora_weight_path {re.escape(str(folder))}(: | holds)") as caught:
            continue_lora(load_model(base, torch.float32), str(folder))
        assert re.search(r"\. (Give|Copy|Point) ", str(caught.value))
        assert "\n" not in str(caught.value)


def test_adapter_that_lacks_a_matrix_is_refused(tmp_path: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.transformer.h.0.mlp.w1.lora_A.weight"]
    folder = copy_adapter(adapter, tmp_path / "lacking", None)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.mlp\.w1\.lora_A"):
        continue_lora(load_model(load_checkpoint(str(TINY)), torch.float32), str(folder))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_read_their_input_without_a_wider_copy_of_it(dropout: float) -> None:
    """peft would copy it to float32 under autocast: the gradients are the same, bit for bit."""
    checkpoint = load_checkpoint(str(TINY))
    settings = LoraSettings(rank=4, dropout=dropout)
    model: Any = attach_lora(
        load_model(checkpoint, torch.bfloat16), checkpoint, settings, EmbeddingsPolicy("none", "")
    ).train()
    layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    read: set[torch.dtype] = set()
    for layer in layers:
        layer.lora_dropout["default"].register_forward_pre_hook(lambda _, inputs: read.add(inputs[0].dtype))
    found = []
    for is_copied in (False, True):
        if is_copied:
            for layer in layers:
                layer.cast_input_dtype_enabled = True
        torch.manual_seed(0)
        read.clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.tensor([[5, 6, 7, 8]])).logits.square().sum().backward()
        assert read == {torch.float32 if is_copied else torch.bfloat16}
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) == 2 * len(layers) and all(map(torch.equal, *found))
    with torch.no_grad():  # and without autocast the copy is needed
        assert model.eval()(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16


def test_dora_keeps_the_wider_copy() -> None:
    """Its magnitudes are divided by norms, which 16 bits would round."""
    layers = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    adapted = get_peft_model(layers, LoraConfig(target_modules=["layer"], use_dora=True))  # type: ignore[arg-type]
    keep_input_dtype(adapted.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted.base_model.model.layer.cast_input_dtype_enabled  # type: ignore[union-attr]
