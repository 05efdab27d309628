"""Ways to round a merge to bfloat16, compared on a real model with its adapter, and on random weights.

    python -m benchmarks.rounding --model_name_or_path DIR --adapter DIR --data_path FILE.json

For each way: the share of the learnt change that is kept, the share of the weights that move, the size of the errors
relative to the change, and what the model does on conversations that the adapter was trained on, compared with the
merge in float32: loss of the answers, root mean square of the logits' differences, divergence (KL) of the next token,
and greedy answers that are equal. ``nearest`` and ``dithered`` are those of merge_lora.py. The others were tried:

- ``stochastic`` draws a random threshold for each weight.
- ``balanced`` multiplies the change of each row by the gain with which rounding to nearest keeps all of it: the
  smallest errors that are orthogonal to the change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from commands import HelpFormatter

RESULTS = Path(__file__).parent / "results" / "rounding.json"
LOGIT_SAMPLES, ANSWERS, ANSWER_TOKENS = 24, 24, 24
RANDOM_SIZES = (1e-5, 3e-5, 1e-4)  # of the change, beside weights of size 0.05
Round = Callable[[str, Any, Any], Any]
"""Name, exact values and values of the base, [R, C] in float32 -> rounded values in float32."""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="base, in bfloat16")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter that was trained on it")
    parser.add_argument("--data_path", type=Path, required=True, help="data of the training: a list of conversations")
    args = parse_args(parser, argv, RESULTS)
    import torch

    torch.manual_seed(0)
    rows = compare_random()
    rows += compare_real(args.model_name_or_path, args.adapter, args.data_path)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    names = [args.model_name_or_path.name, args.adapter.name, args.data_path.name]
    flags = zip(("--model_name_or_path", "--adapter", "--data_path"), names, strict=True)
    command = "python -m benchmarks.rounding " + " ".join(f"{flag} {name}" for flag, name in flags)
    save_results({"command": command, "versions": {"torch": torch.__version__}, "rows": rows}, args.output)


def ways() -> dict[str, Round]:
    import torch

    from checkpoints.rounding import round_rows

    def of_product(rounding: Any) -> Round:
        return lambda name, exact, base: round_rows(exact, torch.bfloat16, rounding, name, 0).float()

    def stochastic(name: str, exact: Any, base: Any) -> Any:
        thresholds = torch.randint(2**16, exact.shape, dtype=torch.int32)
        return ((exact.view(torch.int32) + thresholds) & -(2**16)).view(torch.float32)

    def balanced(name: str, exact: Any, base: Any) -> Any:
        change = exact - base
        wanted = change.square().sum(1, keepdim=True)
        low, high = torch.zeros_like(wanted), torch.full_like(wanted, 32.0)
        for _ in range(14):
            gain = (low + high) / 2
            kept = ((torch.addcmul(base, change, gain).bfloat16().float() - base) * change).sum(1, keepdim=True)
            low, high = torch.where(kept < wanted, gain, low), torch.where(kept < wanted, high, gain)
        return torch.addcmul(base, change, high).bfloat16().float()

    return {
        "nearest": of_product("nearest"), "dithered": of_product("dithered"), "stochastic": stochastic,
        "balanced": balanced,
    }  # fmt: skip


def figures(exact: Mapping[str, Any], base: Mapping[str, Any], rounded: Mapping[str, Any]) -> dict[str, float]:
    applied = learnt = errors = moved = count = 0.0
    for name, value in exact.items():
        change, written = value - base[name], rounded[name] - base[name]
        applied += float((change * written).sum())
        learnt += float(change.square().sum())
        errors += float((rounded[name] - value).square().sum())
        moved += int(written.count_nonzero())
        count += written.numel()
    shares = {"kept": applied / learnt, "moved": moved / count, "error_relative_to_change": (errors / learnt) ** 0.5}
    return {name: round(value, 4) for name, value in shares.items()}


def compare_random() -> list[dict[str, Any]]:
    """Compare on normally distributed weights [1024, 1024] and changes of rank 16."""
    import torch

    rows: list[dict[str, Any]] = []
    base = (0.05 * torch.randn(1024, 1024)).bfloat16().float()
    for size in RANDOM_SIZES:
        exact = base + size / 4 * torch.randn(1024, 16) @ torch.randn(16, 1024)
        for name, way in ways().items():
            rounded = {"w": way("w", exact, base)}
            row = {"weights": f"random, change {size:g}", "way": name}
            rows.append(row | figures({"w": exact}, {"w": base}, rounded))
    return rows


def compare_real(model_folder: Path, adapter: Path, data: Path) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints.adapter import read_adapter
    from checkpoints.files import load_json
    from checkpoints.fold import WeightedAdapter, plan_fold
    from checkpoints.shards import open_checkpoint

    source = open_checkpoint(model_folder)
    fold = plan_fold(source, load_json(model_folder / "config.json"), [WeightedAdapter(read_adapter(adapter))])
    base = {name: source.read(name).float() for name in fold.changed}
    exact = {name: fold.read(name).float() for name in fold.changed}
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    samples = encoded(tokenizer, json.loads(data.read_text(encoding="utf-8")))

    def behaviour(weights: Mapping[str, Any]) -> tuple[Any, float, list[list[int]]]:
        with torch.no_grad():
            for name, value in weights.items():
                model.get_parameter(name).copy_(value)
        return *logits_and_loss(model, samples), answers(model, tokenizer, samples)

    rows: list[dict[str, Any]] = []
    logits, loss, texts = behaviour(exact)
    expected = logits.log_softmax(-1)
    for name, weights in {"base": base, **{name: None for name in ways()}}.items():
        rounded = weights or {each: ways()[name](each, value, base[each]) for each, value in exact.items()}
        other, other_loss, other_texts = behaviour(rounded)
        divergence = torch.nn.functional.kl_div(other.log_softmax(-1), expected, log_target=True, reduction="batchmean")
        rows.append(
            {"weights": model_folder.name, "way": name} | figures(exact, base, rounded) | {
                "loss": round(other_loss, 4), "loss_in_float32": round(loss, 4),
                "logits_rms": round(float((other - logits).square().mean().sqrt()), 4),
                "kl": float(f"{float(divergence):.2g}"),
                "equal_answers": sum(a == b for a, b in zip(texts, other_texts, strict=True)), "answers": len(texts),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def encoded(tokenizer: Any, records: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Return prompt and whole conversation, as ids, of the first records in alpaca's or the conversations' format."""
    samples = []
    for record in records[:LOGIT_SAMPLES]:
        if "conversations" in record:
            question, answer = (turn["value"] for turn in record["conversations"][:2])
        else:
            question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
            answer = record["output"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        samples.append((prompt, tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:512]))
    return samples


def logits_and_loss(model: Any, samples: Sequence[tuple[list[int], list[int]]]) -> tuple[Any, float]:
    """Return the logits [N, V] at the N tokens of all answers, and their mean loss."""
    import torch

    logits, targets = [], []
    with torch.no_grad():
        for prompt, ids in samples:
            logits.append(model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1])
            targets += ids[len(prompt) :]
    together = torch.cat(logits)
    return together, float(torch.nn.functional.cross_entropy(together, torch.tensor(targets)))


def answers(model: Any, tokenizer: Any, samples: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Return greedy answers, generated as one batch that is padded on the left."""
    import torch

    prompts = [prompt for prompt, _ in samples[:ANSWERS]]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return [row[width:].tolist() for row in generated]


if __name__ == "__main__":
    main(sys.argv[1:])
