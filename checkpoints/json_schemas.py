"""Schemas of the JSON files in a checkpoint's, adapter's or run's folder: known keys with type and range, by file name.

Other keys pass: later models and libraries add some. An adapter is an exception: ``checkpoints.adapter_config`` refuses
unknown options that are set. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.companions import PROCESSOR_FILES
from checkpoints.json_rules import (
    ANY,
    ANY_NUMBER,
    ANY_TEXT,
    BOOLEAN,
    FILE_NAME,
    IDENTIFIER,
    OBJECT,
    TEXT,
    Fault,
    Rule,
    either,
    list_of,
    mapping_of,
    matching,
    number,
    one_of,
    table,
    text,
    whole,
)
from checkpoints.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_QUANTIZATION,
    BASE_ROPE,
    DATA_REPORT,
    MERGE_REPORT,
    RUN_ARGUMENTS,
    RUN_SUMMARY,
    TRAINING_SAMPLES,
    WEIGHTS,
)
from qwen_model.architectures import ARCHITECTURES, TEXT_TYPES

MIB = 2**20


@dataclass(frozen=True)
class Schema:
    """The limits and rules of a JSON file.

    Attributes:
        rule: for the object that the file is.
        most_bytes: of the file.
        has_nan: whether NaN and infinity may occur, as in the log of a run.
        fix: what to do about a faulty file, if not to copy it again.
    """

    rule: Rule = OBJECT
    most_bytes: int = 64 * MIB
    has_nan: bool = False
    fix: str = ""


MAX_LAYERS = 1000
MAX_KEPT_SAMPLES = 1000
_MAX_SIZE = 10**7
_MAX_IDS = 10**8
_LENGTH = whole(1, 10**9)
_TOKEN_ID = whole(-1, _MAX_IDS)  # -1: no such token
_TOKEN_IDS = either(_TOKEN_ID, list_of(_TOKEN_ID))
_COUNT = whole(0, 10**15)
_FRACTION = number(0, 1)
_FACTOR = number(0, 10**9)
_MODULES = list_of(TEXT)
# transformers looks the name up among everything that it exports.
_TOKENIZER_CLASS = matching(r"\w*Token\w*", "the name of a tokenizer's class")

# --------------------------------------------------------------------------------------------------------- config.json

_DTYPE = matching(
    r"(torch\.)?(float(16|32|64)|bfloat16|half|float)", '"float32", "float16", "bfloat16" or another float type'
)
_ROPE = table({
    **dict.fromkeys(("rope_type", "type"), one_of("default", "linear", "dynamic", "yarn", "longrope", "llama3")),
    "factor": number(1, 10**6), "original_max_position_embeddings": _LENGTH,
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "low_freq_factor", "high_freq_factor"), _FACTOR),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _FACTOR),
    **dict.fromkeys(("short_factor", "long_factor"), list_of(_FACTOR)), "truncate": BOOLEAN,
})  # fmt: skip

QUANTIZATION = table({
    "quant_method": IDENTIFIER, "version": TEXT, "checkpoint_format": TEXT, "format": TEXT, "quant_type": TEXT,
    "bnb_4bit_quant_type": one_of("nf4", "fp4"), "bnb_4bit_compute_dtype": _DTYPE, "bnb_4bit_quant_storage": IDENTIFIER,
    **dict.fromkeys(("bits", "w_bit"), whole(1, 32)), **dict.fromkeys(("group_size", "q_group_size"), whole(-1, 10**6)),
    **dict.fromkeys(("damp_percent", "llm_int8_threshold"), _FACTOR),
    **dict.fromkeys((
        "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_use_double_quant", "desc_act",
        "sym", "zero_point", "true_sequential", "static_groups", "llm_int8_has_fp16_weight",
        "llm_int8_enable_fp32_cpu_offload",
    ), BOOLEAN),
    **dict.fromkeys(("modules_to_not_convert", "llm_int8_skip_modules"), _MODULES),
    "modules_in_block_to_quantize": list_of(either(TEXT, _MODULES)), "model_file_base_name": TEXT, "dynamic": OBJECT,
})  # fmt: skip

# Sizes that libraries compute with; the second row has the names of Qwen v1's first release.
_SIZES = {
    "hidden_size": _MAX_SIZE, "num_hidden_layers": MAX_LAYERS, "num_attention_heads": 10**5, "intermediate_size":
    _MAX_SIZE, "vocab_size": _MAX_SIZE, "num_key_value_heads": 10**5, "kv_channels": 10**5,
    "n_embd": _MAX_SIZE, "n_layer": MAX_LAYERS, "n_head": 10**5, "ffn_hidden_size": _MAX_SIZE, "padded_vocab_size":
    _MAX_SIZE,
}  # fmt: skip
# Settings that only Qwen v1 has; in Qwen2's layout they are stored under `qwen_config`.
_QWEN_ONLY = {
    "seq_length": _LENGTH, "max_position_embeddings": _LENGTH, "use_dynamic_ntk": BOOLEAN, "use_logn_attn": BOOLEAN,
    "emb_dropout_prob": _FRACTION, "chat_format": IDENTIFIER,
}  # fmt: skip
_CONFIG_ROWS: Mapping[str, Rule] = {
    "model_type": IDENTIFIER, "architectures": list_of(IDENTIFIER), "transformers_version": TEXT, "_name_or_path": TEXT,
    **{name: whole(1, most) for name, most in _SIZES.items()}, "head_dim": whole(1, 10**5), "n_positions": _LENGTH,
    **_QWEN_ONLY,
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("attn_dropout_prob", "attention_dropout", "embd_pdrop", "attn_pdrop", "rotary_pct"), _FRACTION),
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), number(0, 1)), "initializer_range": number(0, 1000),
    **dict.fromkeys(("rotary_emb_base", "rope_theta"), number(1, 10**12)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _ROPE),
    **dict.fromkeys((
        "bf16", "fp16", "fp32", "no_bias", "use_cache", "tie_word_embeddings", "scale_attn_weights",
        "use_sliding_window", "attention_bias", "is_decoder", "output_attentions", "output_hidden_states",
    ), BOOLEAN),
    "use_flash_attn": either(BOOLEAN, one_of("auto")), "hidden_act": IDENTIFIER, "sliding_window": whole(-1, 10**9),
    "max_window_layers": whole(0, 10**6), "layer_types": list_of(IDENTIFIER, MAX_LAYERS),
    "eos_token_id": _TOKEN_IDS, **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN_ID),
    # The name of another attention, with a slash, is that of code on a hub.
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), IDENTIFIER),
    # transformers would read this file instead of the one that is checked.
    "transformers_weights": one_of(*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)),
    "quantization_config": QUANTIZATION, "qwen_config": table(_QWEN_ONLY),
    "converted_from": table({"layout": TEXT, "fingerprint": TEXT}), "tokenizer_class": _TOKENIZER_CLASS,
}  # fmt: skip


def _find_config_contradiction(config: Mapping[str, Any]) -> Fault:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    groups = config.get("num_key_value_heads")
    if hidden and heads and hidden % heads and not config.get("head_dim"):
        return f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
    if heads and groups and heads % groups:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if types is not None and layers is not None and len(types) != layers:
        return f"layer_types has {len(types)} entries, and num_hidden_layers is {layers}"
    return None


_QWEN_CONFIG = table(_CONFIG_ROWS, never_null=_SIZES, find_contradiction=_find_config_contradiction)
# Of models whose adapters can be merged, but which are not loaded: some have lists where Qwen has numbers.
_OTHER_CONFIG = table({
    name: _CONFIG_ROWS[name] for name in ("model_type", "architectures", "dtype", "torch_dtype", "quantization_config")
})  # fmt: skip
# A larger model with a text model in it.
_WHOLE_CONFIG = table(
    {
        **{name: rule for name, rule in _CONFIG_ROWS.items() if name not in _SIZES},
        "text_config": _QWEN_CONFIG,
        "vision_config": OBJECT,
    },
    required=["text_config"],
)


def _find_in_config(config: dict[str, Any], place: str) -> Fault:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in TEXT_TYPES:
        return _WHOLE_CONFIG.find_fault(config, place)
    is_other = isinstance(model_type, str) and model_type not in ARCHITECTURES
    return (_OTHER_CONFIG if is_other else _QWEN_CONFIG).find_fault(config, place)


_CONFIG = Rule("an object", lambda value: isinstance(value, dict), _find_in_config)

# --------------------------------------------------------------------------------------------- generation and tokenizer

_GENERATION = table({
    "chat_format": IDENTIFIER,
    "eos_token_id": _TOKEN_IDS, **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN_ID),
    **dict.fromkeys(("max_new_tokens", "max_length", "max_window_size"), _LENGTH),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k"), whole(-1, 10**9)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), whole(1, 10**4)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), number(0, 1)),
    **dict.fromkeys(("temperature", "repetition_penalty", "max_time", "guidance_scale"), number(0, 10**6)),
    **dict.fromkeys(("length_penalty", "diversity_penalty"), number(-(10**6), 10**6)),
    **dict.fromkeys((
        "do_sample", "use_cache", "return_dict_in_generate", "output_scores", "remove_invalid_values",
    ), BOOLEAN),
    "early_stopping": either(BOOLEAN, one_of("never")), "stop_strings": either(TEXT, _MODULES),
    "stop_words_ids": list_of(list_of(_TOKEN_ID)), "bad_words_ids": list_of(list_of(_TOKEN_ID)),
    "suppress_tokens": list_of(_TOKEN_ID), "begin_suppress_tokens": list_of(_TOKEN_ID),
    "cache_implementation": IDENTIFIER, "transformers_version": TEXT,
})  # fmt: skip

_ADDED_TOKEN_ROWS = {
    "content": TEXT, **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), BOOLEAN),
}  # fmt: skip
_TOKEN = either(TEXT, table(_ADDED_TOKEN_ROWS, required=["content"]))
_SPECIAL_TOKENS = {
    **dict.fromkeys((f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _TOKEN),
    "additional_special_tokens": list_of(_TOKEN), "extra_special_tokens": either(list_of(_TOKEN), mapping_of(_TOKEN)),
}  # fmt: skip
_TEMPLATES = list_of(table({"name": IDENTIFIER, "template": ANY_TEXT}, required=["name", "template"]), 100)
_TOKENIZER_CONFIG = table({
    **_SPECIAL_TOKENS, "tokenizer_class": _TOKENIZER_CLASS, "model_max_length": number(1, 1e31),
    "chat_template": either(ANY_TEXT, _TEMPLATES, mapping_of(ANY_TEXT, 100, IDENTIFIER)),
    "added_tokens_decoder": mapping_of(
        table(_ADDED_TOKEN_ROWS, required=["content"]), 10**6, matching(r"\d{1,9}", "a token's id")
    ),
    "extra_vocab_file": FILE_NAME, "errors": one_of("replace", "ignore", "strict"),
    **dict.fromkeys(("padding_side", "truncation_side"), one_of("left", "right")),
    **dict.fromkeys((
        "add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces",
    ), BOOLEAN),
    # transformers passes these on as arguments of a class, or reads these files instead of the ones that are checked.
    "init_inputs": list_of(OBJECT, 0), "fast_tokenizer_files": list_of(one_of("tokenizer.json")),
    "auto_map": either(OBJECT, list_of(either(TEXT, one_of(None)))),
})  # fmt: skip

# Without a look at each value's place: a vocabulary has 150,000 of them.
_VOCABULARY = Rule(
    "an object of tokens with their ids",
    lambda value: isinstance(value, dict) and all(type(id_) is int and 0 <= id_ <= _MAX_IDS for id_ in value.values()),
)
_MERGES = Rule(
    "a list of pairs of tokens",
    lambda value: isinstance(value, list) and all(type(pair) is str or _is_pair(pair) for pair in value),
)


def _is_pair(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) is str


_TOKENIZER = table({
    "model": table({"type": IDENTIFIER, "vocab": either(_VOCABULARY, list_of(ANY, _MAX_SIZE)), "merges": _MERGES}),
    "added_tokens": list_of(table({**_ADDED_TOKEN_ROWS, "id": whole(0, _MAX_IDS)}, required=["id", "content"]), 10**6),
    **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"), OBJECT),
    "version": TEXT,
}, required=["model"])  # fmt: skip

_INDEX = table(
    {"weight_map": OBJECT, "metadata": table({"total_size": number(0, 10**16)})},
    required=["weight_map"],
)

# ---------------------------------------------------------------------------------------------------- adapters and runs

_PLAIN_NAME = matching(r"[\w.]+", "a module's name")
_RANK, _SCALE = whole(1, 10**5), number(0, 10**9)
_PATTERN = text(10_000)
_ROW = whole(-_MAX_IDS, _MAX_IDS)  # compared with the base's rows once these are known
ADAPTER_ROWS: Mapping[str, Rule] = {
    "peft_type": TEXT, "task_type": matching(r"[A-Z_0-9]+", "a task of peft"), "peft_version": TEXT,
    "base_model_name_or_path": text(4096), "revision": TEXT, "r": _RANK, "lora_alpha": _SCALE,
    "rank_pattern": mapping_of(_RANK, key=_PATTERN), "alpha_pattern": mapping_of(_SCALE, key=_PATTERN),
    "lora_dropout": number(0, 0.999999), "bias": one_of("none", "all", "lora_only"),
    **dict.fromkeys((
        "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode", "ensure_weight_tying",
    ), BOOLEAN),
    "init_lora_weights": either(BOOLEAN, IDENTIFIER),
    **dict.fromkeys(("target_modules", "exclude_modules"), either(_PATTERN, _MODULES)),
    "modules_to_save": list_of(_PLAIN_NAME),
    "layers_to_transform": either(whole(0, MAX_LAYERS), list_of(whole(0, MAX_LAYERS))),
    "layers_pattern": either(matching(r"[\w.]*", "a module's name"), list_of(_PLAIN_NAME, 100)),
    "trainable_token_indices": either(
        list_of(_ROW, 10**6), mapping_of(list_of(_ROW, 10**6), 100, _PLAIN_NAME)
    ),
}  # fmt: skip
"""Options of an adapter that determine its weights and their effect."""

_DIGEST = matching(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")
_RELATIVE_PATH = matching(r"(?!/)(?!(.*/)?\.\.?(/|$))[^\\\0]+", "the path of a file in this folder", 1000)
_ARGUMENTS = table({
    "num_train_epochs": number(-1e9, 1e9), "max_steps": number(-1e15, 1e15), "lora_target_modules": list_of(TEXT),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), whole(0, 10**9)),
    "output_dir": text(), "model_name_or_path": text(),
}, never_null=["num_train_epochs", "max_steps"])  # fmt: skip
_MANIFEST = table({
    "format": whole(1, 10**6), "step": _COUNT, "written": TEXT, "checksum": _DIGEST,
    "files": mapping_of(table({"size": _COUNT, "sha256": _DIGEST}, required=["size", "sha256"]), 10**6, _RELATIVE_PATH),
    "mode": one_of("full", "lora", "q-lora"), "embeddings": one_of("full", "chatml_tokens", "none"), "base": TEXT,
    "data": mapping_of(TEXT, 100), "world_size": whole(1, 10**7), "engine": IDENTIFIER, "arguments": _ARGUMENTS,
    "versions": mapping_of(TEXT, 1000),
}, required=["format", "files"])  # fmt: skip
_SPLIT = table({"digest": TEXT, "sources": list_of(OBJECT)})
_SUMMARY = table({
    "base_model": text(), "base_fingerprint": TEXT, "base_is_quantized": BOOLEAN, "steps": _COUNT,
    "trained_tokens": _COUNT, "data": mapping_of(_SPLIT, 100), "versions": mapping_of(TEXT, 1000), "mode": TEXT,
    "model_type": TEXT,
})  # fmt: skip


def _find_unequal_lengths(sample: Mapping[str, Any]) -> Fault:
    ids, labels = len(sample["ids"]), len(sample["labels"])
    return None if ids == labels else f"labels has {labels:,} entries, ids has {ids:,}"


_SAMPLE = table(
    {"source": text(), "ids": list_of(whole(0, _MAX_IDS)), "labels": list_of(whole(-100, _MAX_IDS))},
    required=["source", "ids", "labels"], find_contradiction=_find_unequal_lengths,
)  # fmt: skip
_SAMPLES = table({"version": one_of(1), "samples": list_of(_SAMPLE, MAX_KEPT_SAMPLES)}, required=["version", "samples"])

_SHARE = number(-(10**6), 10**6)  # of a change, which rounding can reverse or enlarge
_KEPT = {"kept": _SHARE, "moved": _FRACTION}
_MERGE_REPORT = table({
    "version": whole(1, 10**6), "adapters": list_of(table({"name": TEXT, "weight": ANY_NUMBER})), "dtype": _DTYPE,
    "rounding": IDENTIFIER, "base_rounded_as": either(TEXT, one_of(None)),
    "change": table({
        **_KEPT, "worst": table({"name": TEXT, "kept": _SHARE}), "by_kind": mapping_of(table(_KEPT), 10**5),
    }),
}, required=["version", "change"])  # fmt: skip

_STATE = mapping_of(either(BOOLEAN, ANY_NUMBER, one_of(None), mapping_of(ANY_NUMBER)))
_CALLBACK = table({"args": _STATE, "attributes": _STATE}, required=["args", "attributes"])
_INTERVAL = number(0, 10**12)
_TRAINER_STATE = table({
    "epoch": _INTERVAL, "global_step": _COUNT, "max_steps": _COUNT,
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _INTERVAL),
    "train_batch_size": whole(1, 10**9), "num_train_epochs": _INTERVAL, "num_input_tokens_seen": _COUNT,
    "total_flos": number(0, 1e38), "log_history": list_of(OBJECT, 10**8), "best_metric": ANY_NUMBER,
    "best_global_step": _COUNT, "best_model_checkpoint": text(), "trial_name": TEXT, "trial_params": OBJECT,
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), BOOLEAN),
    "stateful_callbacks": mapping_of(either(_CALLBACK, list_of(_CALLBACK, 100)), 100),
}, never_null=["epoch", "global_step", "max_steps", "log_history"])  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ all files

SCHEMAS: Mapping[str, Schema] = {
    "config.json": Schema(_CONFIG),
    "generation_config.json": Schema(_GENERATION),
    "tokenizer_config.json": Schema(_TOKENIZER_CONFIG),
    "tokenizer.json": Schema(_TOKENIZER, 512 * MIB),
    "special_tokens_map.json": Schema(table(_SPECIAL_TOKENS)),
    "added_tokens.json": Schema(mapping_of(whole(0, _MAX_IDS), 10**6)),
    "vocab.json": Schema(_VOCABULARY),
    **dict.fromkeys(PROCESSOR_FILES, Schema()),
    "chat_template.json": Schema(table({"chat_template": either(ANY_TEXT, _TEMPLATES)})),
    **dict.fromkeys(("quantize_config.json", "quant_config.json", BASE_QUANTIZATION), Schema(QUANTIZATION)),
    BASE_ROPE: Schema(
        table(
            {"factor": number(1, 10**6), "original_max_position_embeddings": either(_LENGTH, one_of(None))},
            required=["factor"],
        )
    ),
    **{f"{name}.index.json": Schema(_INDEX) for name in (*WEIGHTS, *ADAPTER_WEIGHTS)},
    ADAPTER_CONFIG: Schema(table(ADAPTER_ROWS)),  # `adapter_config.py` also refuses unknown options
    RUN_ARGUMENTS: Schema(_ARGUMENTS, has_nan=True),
    RUN_SUMMARY: Schema(_SUMMARY, has_nan=True),
    DATA_REPORT: Schema(has_nan=True),
    MERGE_REPORT: Schema(_MERGE_REPORT),
    TRAINING_SAMPLES: Schema(_SAMPLES, fix="Remove it: a merge is then compared on everyday conversations"),
    "manifest.json": Schema(_MANIFEST, has_nan=True),
    "trainer_state.json": Schema(_TRAINER_STATE, 2048 * MIB, has_nan=True),
}
"""Schemas by file name; any other JSON file only has to be an object."""


def schema_of(name: str) -> Schema:
    """Return the schema of a file."""
    return SCHEMAS.get(name, Schema())
