"""Ids, logits and greedy answers of a checkpoint in llama.cpp, as GGUF files, compared with this toolkit's.

    python -m benchmarks.llama_cpp --model_name_or_path DIR [--questions FILE] [--tools DIR] [--output FILE]

scripts.export_gguf writes a file of each type; it converts Qwen v1 to the layout qwen2. llama.cpp computes in float32
with a float32 cache. ``--tools`` is the folder of scripts.export_gguf, with llama-cpp-python.

Compared are the ids of texts (the large reference set in ``$QWEN_SHARED``, else those in export.verify.prompts), and
for the questions of FILE, a list of conversations, or for those in export.verify.prompts, all logits of the prompt and
the greedy answer. No prompt is longer than Qwen v1's seq_length, beyond which its rotary embeddings are others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from checkpoints.files import load_json
from commands import HelpFormatter
from errors import ConfigError
from export.gguf_tools import CONVERTER, QUANTIZER, TOOLS, check_tools

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "llama_cpp.json"
TYPES = ("f32", "f16", "q8_0", "q4_k_m")
GREEDY_TOKENS = 32

# Runs with llama.cpp's library. ggml's type 0 is float32.
RUNNER = """
import json, pathlib, sys
import numpy
from llama_cpp import Llama
folder = pathlib.Path(sys.argv[2])
requests = json.loads((folder / "requests.json").read_text())
longest = max(map(len, requests["prompts"])) + requests["greedy_tokens"]
llama = Llama(sys.argv[1], n_ctx=longest, type_k=0, type_v=0, flash_attn=False, logits_all=True, verbose=False)
texts = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in requests["texts"]]
greedy = []
for number, prompt in enumerate(requests["prompts"]):
    llama.reset()
    llama.eval(prompt)
    numpy.save(folder / f"{number}.npy", llama.scores[: len(prompt)])
    greedy.append([])
    while len(greedy[-1]) < requests["greedy_tokens"]:
        greedy[-1].append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if greedy[-1][-1] in requests["end_ids"]:
            break
        llama.eval(greedy[-1][-1:])
(folder / "results.json").write_text(json.dumps({"texts": texts, "greedy": greedy}))
"""


@dataclass(frozen=True)
class Reference:
    """What this toolkit computes in float32.

    Attributes:
        logits: [T, V] of each prompt.
        greedy: the ids that answer each prompt.
        texts, source: texts whose ids are compared, and where they are from.
    """

    checkpoint: Any
    prompts: list[list[int]]
    logits: list[Any]
    greedy: list[list[int]]
    texts: list[str]
    source: str

    def requests(self) -> dict[str, Any]:
        end_ids = self.checkpoint.end_ids
        return {"texts": self.texts, "prompts": self.prompts, "greedy_tokens": GREEDY_TOKENS, "end_ids": end_ids}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_cpp", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--questions", type=Path, help="conversations whose first questions are asked")
    parser.add_argument(
        "--tools", type=Path, default=TOOLS, help="folder of scripts.export_gguf (default: %(default)s)"
    )
    args = parse_args(parser, argv, RESULTS)
    try:
        check_tools(args.tools, "q4_k_m")
    except ConfigError as error:
        parser.error(f"--tools {error}")
    model: Path = args.model_name_or_path.resolve()
    if not (model / "config.json").is_file():
        parser.error(f"--model_name_or_path {args.model_name_or_path} is not the folder of a checkpoint")
    reference = load_reference(model, args.questions)
    rows: list[dict[str, Any]] = []
    for type_ in TYPES:
        with tempfile.TemporaryDirectory() as temporary:
            gguf = Path(temporary, "model.gguf")
            flags = ["--outfile", gguf, "--quantize", type_, "--tools", args.tools]
            run([sys.executable, "-m", "scripts.export_gguf", model, *flags])
            size = {"type": type_, "megabytes": round(gguf.stat().st_size / 1e6, 1)}
            rows.append({**size, **compare(reference, gguf, args.tools)})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    questions = f" --questions {args.questions.name}" if args.questions else ""
    command = f"python -m benchmarks.llama_cpp --model_name_or_path {model.name}{questions}"
    save_results({"command": command, "machine": machine(), "rows": rows}, args.output)


def load_reference(model: Path, questions: Path | None) -> Reference:
    import torch

    from chat.render import encode_prompt, render_prompt
    from chat.turns import Turn
    from export.verify.prompts import PROMPTS
    from loading.checkpoint import load_checkpoint, load_model

    checkpoint = load_checkpoint(str(model))
    asked = [question for question, _ in PROMPTS]
    if questions is not None:
        records = json.loads(questions.read_text(encoding="utf-8"))
        first = [(record.get("messages") or record["conversations"])[0] for record in records]
        asked = [turn.get("content") or turn["value"] for turn in first]
    prompts = [
        encode_prompt(render_prompt([Turn("user", text)], checkpoint.family), checkpoint.tokenizer) for text in asked
    ]
    longest = getattr(checkpoint.config, "seq_length", checkpoint.config.max_position_embeddings) - GREEDY_TOKENS
    source, texts = load_texts()
    network, ends = load_model(checkpoint, torch.float32), checkpoint.end_ids
    settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": GREEDY_TOKENS}
    settings |= {"eos_token_id": ends, "pad_token_id": ends[-1]}
    logits, greedy = [], []
    prompts = [ids[:longest] for ids in prompts]
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits.append(network(ids).logits[0])
            generated = network.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            greedy.append(generated[0, len(prompt) :].tolist())
    return Reference(checkpoint, prompts, logits, greedy, texts, source)


def run(command: Sequence[object], **environment: str) -> None:
    """Run a command in the repository's root, with additions to the environment; show its output if it fails."""
    words, variables = [str(word) for word in command], {**os.environ, **environment}
    result = subprocess.run(words, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stdout[-2000:]}")


def ask_llama_cpp(gguf: Path, requests: dict[str, Any], tools: Path, folder: Path) -> dict[str, Any]:
    """Return the ids of the texts, and the ids of the greedy answers; logits are written to ``folder``."""
    (folder / "requests.json").write_text(json.dumps(requests))
    run([sys.executable, "-c", RUNNER, gguf, folder], PYTHONPATH=str(tools.resolve()))
    results: dict[str, Any] = load_json(folder / "results.json")
    return results


def compare(reference: Reference, gguf: Path, tools: Path) -> dict[str, Any]:
    """Return the figures of a file."""
    from chat.render import plain_encoder

    encode = plain_encoder(reference.checkpoint.tokenizer)
    answers = Path(tempfile.mkdtemp(dir=gguf.parent))
    results = ask_llama_cpp(gguf, reference.requests(), tools, answers)
    pairs = zip(reference.texts, results["texts"], strict=True)
    different = [text for text, theirs in pairs if encode(text) != theirs]
    by_nfc = sum(unicodedata.normalize("NFC", text) != text for text in different)
    counts = {"texts": len(reference.texts), "of": reference.source, "other_ids": len(different)}
    return {**counts, "of_these_changed_by_nfc": by_nfc, **compare_logits(reference, answers, results["greedy"])}


def compare_logits(reference: Reference, answers: Path, greedy: list[list[int]]) -> dict[str, Any]:
    """Return figures of logits and answers.

    Args:
        answers: folder of llama.cpp's logits per prompt.
        greedy: ids that llama.cpp generated per prompt.
    """
    import numpy
    import torch

    differences, sizes, equal = [], [], []
    for number, expected in enumerate(reference.logits):
        logits = torch.from_numpy(numpy.load(answers / f"{number}.npy"))
        differences.append((logits - expected).abs().max())
        sizes.append(expected.abs().max())
        equal += (logits.argmax(-1) == expected.argmax(-1)).tolist()
    alike = sum(ours == theirs for ours, theirs in zip(reference.greedy, greedy, strict=True))
    largest = {"largest_logit": sizes, "largest_difference": differences}
    return {
        "prompts": len(greedy), "positions": len(equal), "equal_next_tokens": round(sum(equal) / len(equal), 4),
        **{name: float(f"{torch.stack(values).max():.2g}") for name, values in largest.items()},
        "greedy_tokens": GREEDY_TOKENS, "equal_greedy_answers": alike,
    }  # fmt: skip


def load_texts() -> tuple[str, list[str]]:
    """Return the source of the texts, and the texts; without lone surrogates, which UTF-8 cannot encode."""
    file = Path(os.environ.get("QWEN_SHARED") or ROOT.parent / "shared") / "golden" / "tokenizer.json"
    if not file.is_file():
        from export.verify.prompts import PROMPTS

        return "export/verify/prompts.py", [text for question_and_answer in PROMPTS for text in question_and_answer]
    cases = json.loads(file.read_text(encoding="utf-8"))["strings"]
    return "golden/tokenizer.json", [case["text"] for case in cases if not case["lone_surrogate"]]


def machine() -> dict[str, Any]:
    tried = dict(package.split("==") for package in (*CONVERTER, QUANTIZER[0]))
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"device": platform.processor() or platform.machine(), **versions, **tried}


if __name__ == "__main__":
    main(sys.argv[1:])
