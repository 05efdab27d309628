"""Members of libraries that the product overrides, replaces or reads though their documentation does not promise them.

Each is listed once, with its parameters and the file that uses it, and is compared with the installed version. These
tests run on both ends of the version ranges, so a release that changes a member fails here, and names the file to look
at. Tests also search the sources for private members that are not listed.

Only libraries of requirements_unit.txt are listed; DeepSpeed's ``ds_id`` and ``ds_numel`` (loading/) are covered by
tests/recipe/test_engines.py.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.golden import REPO
from tests.unit.test_imports import PACKAGES, sources_of

TRAINER = "training/trainer.py"
CHECKPOINTS = "training/trainer_checkpoints.py"
REHEARSAL = "planning/fake_run.py"
MEMORY = "training/trainer_memory.py"
ATTENTION = "transformers:PreTrainedConfig._attn_implementation"


class Member(NamedTuple):
    """A member of a library.

    Attributes:
        path: ``module:Class.member``; an attribute may be one that the class sets on ``self``.
        used_in: the file that uses it.
        parameters: names of a function's parameters, in order; ``None`` for an attribute.
    """

    path: str
    used_in: str
    parameters: str | None = None

    @property
    def name(self) -> str:
        return re.split(r"[:.]", self.path)[-1]


OVERRIDDEN = [
    Member("transformers:Trainer.create_accelerator_and_postprocess", TRAINER, "self"),
    Member("transformers:Trainer._get_collator_with_removed_columns", TRAINER, "self data_collator description"),
    Member("transformers:Trainer._get_train_sampler", TRAINER, "self train_dataset"),
    Member(
        "transformers:Trainer._get_dataloader",
        TRAINER,
        "self dataset description batch_size sampler_fn is_training dataloader_key",
    ),
    Member("transformers:Trainer.get_batch_samples", TRAINER, "self epoch_iterator num_batches device"),
    Member("transformers:Trainer._track_num_input_tokens", TRAINER, "self inputs"),
    Member("transformers:Trainer._get_num_items_in_batch", TRAINER, "self batch_samples device"),
    Member("transformers:Trainer.compute_loss", TRAINER, "self model inputs return_outputs num_items_in_batch"),
    Member("transformers:Trainer.create_optimizer", TRAINER, "self model"),
    Member("transformers:Trainer.training_step", TRAINER, "self model inputs num_items_in_batch"),
    Member("transformers:Trainer.training_step", MEMORY, "self model inputs num_items_in_batch"),
    Member("transformers:Trainer.floating_point_ops", TRAINER, "self inputs"),
    Member(
        "transformers:Trainer._inner_training_loop",
        MEMORY,
        "self batch_size args resume_from_checkpoint trial ignore_keys_for_eval",
    ),
    *(
        Member(
            "transformers:Trainer._prepare_for_training",
            file,
            "self max_steps train_dataloader resume_from_checkpoint",
        )
        for file in (MEMORY, CHECKPOINTS)
    ),
    Member("transformers:Trainer._get_grad_norm", TRAINER, "self model grad_norm"),
    Member(
        "transformers:Trainer._maybe_log_save_evaluate",
        TRAINER,
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    ),
    Member(
        "transformers:Trainer.evaluation_loop",
        TRAINER,
        "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    ),
    Member("transformers:Trainer.prediction_step", TRAINER, "self model inputs prediction_loss_only ignore_keys"),
    Member(
        "transformers:Trainer._init_training_state",
        CHECKPOINTS,
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    ),
    Member("transformers:Trainer._load_from_checkpoint", CHECKPOINTS, "self resume_from_checkpoint model"),
    Member("transformers:Trainer._load_optimizer_and_scheduler", CHECKPOINTS, "self checkpoint"),
    Member("transformers:Trainer._load_scaler", CHECKPOINTS, "self checkpoint"),
    Member("transformers:Trainer._load_rng_state", CHECKPOINTS, "self checkpoint"),
    Member("transformers:Trainer._load_best_model", CHECKPOINTS, "self"),
    *(
        Member(
            "transformers:Trainer._run_epoch",
            file,
            "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
            "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        )
        for file in (CHECKPOINTS, REHEARSAL)
    ),
    Member("transformers:Trainer._finalize_training", CHECKPOINTS, "self trial num_train_samples start_time"),
    Member("transformers:Trainer._get_output_dir", CHECKPOINTS, "self trial"),
    Member("transformers:Trainer._save_checkpoint", CHECKPOINTS, "self model trial"),
    Member("transformers:Trainer.save_model", CHECKPOINTS, "self output_dir _internal_call"),
    Member("transformers:Trainer._clip_grad_norm", REHEARSAL, "self model"),
    Member("transformers:Trainer._finalize_training", REHEARSAL, "self trial num_train_samples start_time"),
    Member("transformers:Trainer._move_model_to_device", REHEARSAL, "self model device"),
    Member("transformers:Trainer.get_train_dataloader", REHEARSAL, "self"),
    Member("transformers:Trainer._save", CHECKPOINTS, "self output_dir state_dict"),
    Member(
        "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading",
        "loading/quantized.py",
        "self model kwargs",
    ),
    Member(
        "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading",
        "loading/quantized.py",
        "self model kwargs",
    ),
    Member(
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.forward_adapters",
        "loading/token_rows.py",
        "self x active_adapters args kwargs",
    ),
    Member(
        "peft.tuners.lora.layer:LoraVariant.forward",
        "loading/initial_values.py",
        "module active_adapter x result kwargs",
    ),
    Member(
        "transformers.tokenization_python:PythonBackend._decode",
        "qwen_model/tokenization_qwen.py",
        "self token_ids skip_special_tokens clean_up_tokenization_spaces kwargs",
    ),
    Member(
        "transformers.tokenization_python:PythonBackend._add_tokens",
        "qwen_model/tokenization_qwen.py",
        "self new_tokens special_tokens",
    ),
    Member("transformers:Qwen3_5ForCausalLM._no_split_modules", "qwen_model/lean_models.py"),
    # transformers' documented hooks for a model of one's own.
    *(
        Member(f"transformers:PreTrainedModel.{name}", "qwen_model/modeling_qwen.py", parameters)
        for name, parameters in {
            "_init_weights": "self module",
            "_no_split_modules": None,
            "_skip_keys_device_placement": None,
            "_supports_sdpa": None,
            "_supports_flash_attn": None,
            "_supports_flex_attn": None,
            "_supports_attention_backend": None,
            "_keys_to_ignore_on_load_unexpected": None,
            "_tied_weights_keys": None,
        }.items()
    ),
]

REPLACED = [
    Member(
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer._collect_token_weights",
        "loading/token_rows.py",
        "self weight rows embed_dim",
    ),
    Member("peft.tuners.lora.awq:is_gptqmodel_available", "loading/adapters.py", ""),
    Member(
        "peft.tuners.lora:Linear._move_adapter_to_device_of_base_layer",
        "loading/adapters.py",
        "self adapter_name device",
    ),
    Member("peft.tuners.lora.gptq:is_gptqmodel_available", "loading/adapters.py", ""),
    Member("importlib:_bootstrap", "benchmarks/startup_contenders.py"),
    Member("importlib._bootstrap:_find_and_load", "benchmarks/startup_contenders.py", "name import_"),
    Member("accelerate.utils.other:is_deepspeed_available", "training/trainer_engines.py", ""),
    Member("accelerate.state:AcceleratorState.fsdp_plugin", "training/trainer_engines.py"),
    Member("accelerate.state:AcceleratorState.distributed_type", "training/trainer_engines.py"),
    Member("transformers:TrainingArguments.fsdp_plugin_args", "training/trainer_engines.py"),
    Member("transformers:Trainer.is_fsdp_enabled", "training/trainer_engines.py"),
    Member("transformers:Trainer.label_smoother", TRAINER),
    Member("transformers:Trainer.neftune_noise_alpha", TRAINER),
    Member("transformers:Trainer._total_loss_scalar", TRAINER),
    Member("transformers:Trainer._globalstep_last_logged", TRAINER),
    Member("torch.optim.lr_scheduler:LRScheduler.base_lrs", "training/trainer_resume.py"),
    Member("torch.optim.lr_scheduler:LRScheduler._last_lr", "training/trainer_resume.py"),
    Member("transformers.integrations.integration_utils:TensorBoardCallback.logging_dir", "training/callbacks.py"),
]

READ = [
    Member("transformers:Trainer._get_learning_rate", TRAINER, "self"),
    Member("transformers:Trainer._maybe_log_save_evaluate", CHECKPOINTS),
    Member("transformers:Trainer._tr_loss", CHECKPOINTS),
    Member("transformers:Trainer._train_batch_size", MEMORY),
    Member("transformers.trainer_pt_utils:safe_globals", "training/run_folder/states.py", ""),
    Member("torch.distributed.checkpoint.filesystem:_StorageInfo", "training/run_folder/states.py"),
    Member("torch.serialization:_get_layout", "training/run_folder/states.py", "name"),
    # A dict once it has been loaded from a checkpoint, contrary to its annotation.
    Member("transformers:TrainerState.stateful_callbacks", "training/callbacks.py"),
    Member("transformers:TrainerState.stateful_callbacks", "training/trainer_resume.py"),
    Member("transformers:PreTrainedConfig._auto_class", "qwen_model/configuration_qwen.py"),
    Member("transformers:PreTrainedTokenizerBase._auto_class", "qwen_model/tokenization_qwen.py"),
    *(Member(ATTENTION, f"qwen_model/{name}.py") for name in ("modeling_qwen", "sample_attention")),
    *(Member(ATTENTION, f"qwen_model/{name}.py") for name in ("fast_blocks", "answer_blocks")),
    Member("peft.tuners.lora:LoraLayer.cast_input_dtype_enabled", "loading/adapters.py"),
    Member("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", "qwen_model/sample_attention.py"),
    Member("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "qwen_model/sample_attention.py"),
    Member("torch:Tensor._version", "qwen_model/fused_ops.py"),
    Member("torch:Tensor._backward_hooks", "qwen_model/summed_gradients.py"),
    Member("torch:Tensor._post_accumulate_grad_hooks", "qwen_model/summed_gradients.py"),
    Member("torch:_assert_async", "qwen_model/lean_loss.py"),
    Member("torch.nn:Module._buffers", "loading/quantized.py"),
    Member("torch.nn:Module._buffers", "planning/model.py"),
    Member("transformers:PreTrainedModel._from_config", "planning/model.py"),
    Member("transformers:PreTrainedModel._from_config", "benchmarks/kv_cache_memory.py"),
    Member("torch:UntypedStorage._cdata", "planning/memory.py"),
    Member("torch.autograd.graph:_engine_run_backward", "planning/memory.py", "t_outputs args kwargs"),
    Member("torch.cuda:_initialized", "planning/fake_cuda.py"),
    Member("torch.optim.optimizer:_foreach_supported_types", "planning/fake_cuda.py"),
    Member("torch.nn:Module._parameters", "planning/model.py"),
    *(
        Member(f"accelerate.state:{name}._shared_state", REHEARSAL)
        for name in ("PartialState", "AcceleratorState", "GradientState")
    ),
    Member("torch:ops.mkldnn._linear_pointwise", "qwen_model/products.py"),
    Member("torch:ops.mkldnn._is_mkldnn_bf16_supported", "qwen_model/packed_linear.py"),
    Member("torch:ops.mkldnn._is_mkldnn_fp16_supported", "qwen_model/packed_linear.py"),
    Member("torch.distributed.distributed_c10d:_get_default_store", "training/distributed/world.py", ""),
    Member("tqdm:tqdm._instances", "commands.py"),
    Member("atexit:_run_exitfuncs", "commands.py"),
    *(
        Member(f"peft.tuners.lora:LoraLayer.{name}", "loading/initial_values.py")
        for name in ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "r", "get_base_layer")
    ),
    # What peft's wrappers of a layer hold.
    *(
        Member(f"{path}.{name}", "qwen_model/head.py")
        for path, names in {
            "peft.utils.other:TrainableTokensWrapper": "token_adapter",
            "peft.utils.other:ModulesToSaveWrapper": "modules_to_save original_module active_adapters disable_adapters",
            "peft.tuners.trainable_tokens.layer:TrainableTokensLayer": "trainable_tokens_delta token_indices merged",
            "peft.tuners.lora:LoraLayer": "lora_A lora_B lora_dropout scaling use_dora lora_variant merged "
            "disable_adapters active_adapters get_base_layer",
        }.items()
        for name in names.split()
    ),
    *(
        Member(f"torch.nn:Module._{name}", "qwen_model/head.py")
        for name in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    ),
]

MEMBERS = [*OVERRIDDEN, *REPLACED, *READ]


def find(path: str) -> Any:
    """Return the object of a member's path; ``None`` for an attribute that instances only have.

    Raises:
        LookupError: there is no such member.
    """
    module, _, names = path.partition(":")
    member: Any = importlib.import_module(module)
    for name in names.split("."):
        owner = member
        try:
            member = inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)
        except AttributeError:
            if inspect.isclass(owner) and any(sets_on_self(base, name) for base in owner.__mro__):
                return None
            raise LookupError(f"{path}: {owner.__name__} has no {name}") from None
    return member


def sets_on_self(owner: type, name: str) -> bool:
    """Return whether a class written in Python assigns ``self.NAME``, or annotates it."""
    source = source_of(owner)
    return re.search(rf"self\.{name}\b[^=\n]*=(?!=)|^    {name}:", source, re.MULTILINE) is not None


def source_of(owner: type) -> str:
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):  # built in
        return ""


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.path)
def test_member_has_its_parameters_in_installed_version(member: Member) -> None:
    installed = find(member.path)
    if member.parameters is not None:
        parameters = " ".join(inspect.signature(installed).parameters)
        assert parameters == member.parameters, f"{member.path} changed; it is used in {member.used_in}"


def test_every_listed_member_is_used_in_its_file() -> None:
    stale = [
        member
        for member in MEMBERS
        if not (REPO / member.used_in).is_file()
        or not re.search(rf"\b{member.name}\b", (REPO / member.used_in).read_text(encoding="utf-8"))
    ]
    assert stale == []


def test_changed_and_missing_members_are_found() -> None:
    assert find("transformers:Trainer._tr_loss") is None
    with pytest.raises(LookupError, match="Trainer has no _run_epochs"):
        find("transformers:Trainer._run_epochs")
    with pytest.raises(AssertionError, match=r"changed; it is used in training/trainer\.py"):
        test_member_has_its_parameters_in_installed_version(
            Member("transformers:Trainer._get_output_dir", TRAINER, "self run trial")
        )


def test_gradient_norm_is_asked_once_between_backward_passes_and_update() -> None:
    """``QwenTrainer._read_step`` relies on this order."""
    from transformers import Trainer

    source = inspect.getsource(Trainer._run_epoch)
    calls = [source.index(call) for call in ("self.training_step(", "self._get_grad_norm(", "self.optimizer.step()")]
    assert calls == sorted(calls) and source.count("self._get_grad_norm(") == 1


def test_epoch_is_passed_by_keyword() -> None:
    """``QwenTrainer._run_epoch`` reads it from its keyword arguments."""
    from transformers import Trainer

    call = re.search(r"self\._run_epoch\((.*?)\n\s*\)", inspect.getsource(Trainer._inner_training_loop), re.DOTALL)
    assert call is not None and re.search(r"\bepoch=", call[1])


# ---------------------------------------------------------------------------------- private members that are not listed

LISTED = {(member.used_in, member.name) for member in MEMBERS}
# Of a package whose one version export/gguf_tools.py names: tests/recipe/test_export_gguf.py runs it.
PINNED = {("export/gguf_driver.py", "_set_vocab_gpt2")}
# Documented by the standard library, in spite of the underscore.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def product_files() -> list[Path]:
    return [path for name in (*PACKAGES, "errors", "processes", "commands") for path in sources_of(name)] + [
        path for name in ("finetune", "merge_lora", "scripts", "benchmarks") for path in sources_of(name)
    ]


def own_names(tree: ast.AST) -> set[str]:
    """Return what a file defines: names of functions, classes, variables and attributes of ``self`` and ``cls``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_private_names(tree: ast.AST) -> Iterator[str]:
    """Yield private names that a file imports, reads or sets, but does not define."""
    own = own_names(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not (is_self(node.value) and node.attr in own):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in {*PACKAGES, "tests"}:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        yield from (name for name in names if is_private(name) and name not in own)


def library_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] not in {*PACKAGES, "builtins"}]


def unlisted_in_class(cls: type, file: str) -> Iterator[str]:
    """Yield private members of library bases that a class overrides, or reads from ``self``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    bases = library_bases(cls)
    for name in sorted(used | own_names(tree)):
        if is_private(name) and (file, name) not in LISTED:
            for base in bases:
                if name in vars(base) or sets_on_self(base, name):
                    yield f"{file}: {cls.__name__} uses {base.__module__}.{base.__qualname__}.{name}"
                    break


def classes_of(file: Path) -> list[type]:
    """Return the classes at the top of a file of a package."""
    module = importlib.import_module(".".join(file.relative_to(REPO).with_suffix("").parts))
    return [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]


def test_every_private_name_of_a_library_is_listed() -> None:
    unlisted = []
    for path in product_files():
        file = str(path.relative_to(REPO))
        names = foreign_private_names(ast.parse(path.read_text(encoding="utf-8")))
        unlisted += [f"{file}: {name}" for name in names if (file, name) not in LISTED | PINNED]
    assert unlisted == []


def test_every_private_member_of_a_base_class_is_listed() -> None:
    """Files of which a library is not installed, such as a server's on the oldest versions, are left out."""
    needed = {"serving/": "fastapi", "evaluation/task_harness": "lm_eval", "evaluation/tasks": "lm_eval"}
    absent = tuple(str(REPO / part) for part, library in needed.items() if not find_spec(library))
    found = (path for package in PACKAGES for path in sources_of(package) if not str(path).startswith(absent))
    unlisted = [
        line
        for file in found
        if file.stem != "__init__"
        for cls in classes_of(file)
        for line in unlisted_in_class(cls, str(file.relative_to(REPO)))
    ]
    assert unlisted == []


def test_unlisted_members_are_found() -> None:
    from transformers import Trainer

    class Careless(Trainer):
        def _save_rng_state(self, output_dir: str) -> None:
            self._own = self._signature_columns = None

    names = [line.rpartition(".")[2] for line in unlisted_in_class(Careless, "x.py")]
    assert names == ["_save_rng_state", "_signature_columns"]
    source = "from torch import _C\nrate._last_lr\nself._own = self._other\ngetattr(bar, '_instances')\nturn._replace()"
    assert sorted(foreign_private_names(ast.parse(source))) == ["_C", "_instances", "_last_lr", "_other"]
