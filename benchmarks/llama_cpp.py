"""Token ids and logits of a Qwen v1 checkpoint in llama.cpp, exported in both layouts, compared with this toolkit's.

    python -m benchmarks.llama_cpp --model_name_or_path DIR [--work_dir DIR] [--output FILE]

Builds llama.cpp from llama-cpp-python's source distribution on PyPI, in a virtual environment under ``--work_dir``.
That takes some minutes, a compiler and the network; a finished build is reused. The checkpoint is written in the layout
qwen2 by scripts.convert_layout, and in the layout qwen with the model's code in the folder. llama.cpp's converter makes
a float32 GGUF file of each, and llama.cpp computes in float32 throughout, its cache included.

Compared are the token ids of texts (the large reference set in ``$QWEN_SHARED``, else those in export.verify.prompts)
and, on the conversations in export.verify.prompts, all logits and the greedy tokens that follow. No text is longer than
seq_length, beyond which the two layouts use different rotary embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results_file import parse_args, save_results
from checkpoints.files import load_json
from commands import HelpFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "llama_cpp.json"
NAME, RELEASE = "llama-cpp-python", "0.3.36"
SOURCES = f"llama_cpp_python-{RELEASE}"
GREEDY_TOKENS = 16

# Runs in llama.cpp's environment, isolated from this toolkit. ggml's type 0 is float32.
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
    for _ in range(requests["greedy_tokens"]):
        greedy[-1].append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(greedy[-1][-1:])
(folder / "results.json").write_text(json.dumps({"texts": texts, "greedy": greedy}))
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_cpp", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="folder of a Qwen v1 checkpoint")
    parser.add_argument("--work_dir", type=Path, help="folder to build llama.cpp in (default: a temporary one)")
    args = parse_args(parser, argv, RESULTS)
    model: Path = args.model_name_or_path.resolve()
    if not (model / "config.json").is_file() or load_json(model / "config.json").get("model_type") != "qwen":
        parser.error(f"--model_name_or_path {args.model_name_or_path} is not the folder of a Qwen v1 checkpoint")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)).resolve()
        build_llama_cpp(work)
        with tempfile.TemporaryDirectory(dir=work) as exports:  # several times the size of the model
            rows = compare(model, work, Path(exports))
        command = f"python -m benchmarks.llama_cpp --model_name_or_path {model.name}"
        report = {"command": command, "machine": machine(work), "rows": rows}
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    save_results(report, args.output)


def build_llama_cpp(work: Path) -> None:
    """Unpack ``SOURCES`` and install it into ``work/venv``; the file ``built`` marks a complete build."""
    done, text = work / "built", f"{SOURCES}, Python {platform.python_version()}\n"
    if done.is_file() and done.read_text() == text:
        return
    print(f"building {SOURCES}: some minutes", flush=True)
    run([sys.executable, "-m", "venv", "--clear", work / "venv"])
    pip, archive = [work / "venv" / "bin" / "python", "-m", "pip"], work / f"{SOURCES}.tar.gz"
    run([*pip, "download", "--no-deps", "--no-binary", NAME, "--dest", work, f"{NAME}=={RELEASE}"])
    shutil.unpack_archive(archive, work, filter="data")
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    library_only = "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"  # without image support and programs
    # The converter imports sentencepiece for every vocabulary; its other requirements are in the toolkit's environment.
    run([*pip, "install", archive, "sentencepiece"], CMAKE_ARGS=library_only, CMAKE_BUILD_PARALLEL_LEVEL=jobs)
    done.write_text(text)


def make_gguf(model: Path, layout: str, work: Path, exports: Path) -> Path:
    """Export the checkpoint in ``layout`` and convert it to a float32 GGUF file; return its path."""
    import torch

    from export.chat import write_chat_template, write_generation_config
    from export.standalone import write_code

    folder, gguf = exports / layout, exports / f"{layout}.gguf"
    if layout == "qwen2":
        run([sys.executable, "-m", "scripts.convert_layout", model, folder, "--layout", layout])
    else:
        folder.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".py":  # changed files replace the links, their targets stay
                (folder / file.name).symlink_to(file)
        write_code(folder)
        write_chat_template(folder)
        write_generation_config(folder)
    converter = work / SOURCES / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [work / "venv" / "bin" / "python", converter, folder, "--outtype", "f32", "--outfile", gguf]
    # With the toolkit's libraries. The folder's code is run: HF_HOME keeps it out of the user's cache.
    cache = {"HF_HOME": str(exports / "cache"), "HF_HUB_OFFLINE": "1"}
    run(command, PYTHONPATH=str(Path(torch.__file__).parents[1]), **cache)
    return gguf


def run(command: Sequence[object], **environment: str) -> None:
    """Run a command in the repository's root, with additions to the environment; show its output if it fails."""
    words, variables = [str(word) for word in command], {**os.environ, **environment}
    result = subprocess.run(words, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stdout[-2000:]}")


def compare(model: Path, work: Path, exports: Path) -> list[dict[str, Any]]:
    """Return a row of figures per layout; ``exports`` is an empty folder to work in."""
    import torch

    from export.verify.prompts import prompt_ids
    from qwen_model.modeling_qwen import QWenLMHeadModel
    from qwen_model.tokenization_qwen import QWenTokenizer

    tokenizer = QWenTokenizer.from_pretrained(model)
    ours = QWenLMHeadModel.from_pretrained(model, dtype=torch.float32).eval()
    source, texts = load_texts()
    text_ids = list(map(tokenizer.encode_plain, texts))
    prompts = [ids[: ours.config.seq_length - GREEDY_TOKENS] for ids in prompt_ids(model, ours.config.vocab_size)]
    requests = {"texts": texts, "prompts": prompts, "greedy_tokens": GREEDY_TOKENS}
    rows: list[dict[str, Any]] = []
    for layout in ("qwen2", "qwen"):
        gguf, answers = make_gguf(model, layout, work, exports), Path(tempfile.mkdtemp(dir=exports))
        (answers / "requests.json").write_text(json.dumps(requests))
        run([work / "venv" / "bin" / "python", "-I", "-c", RUNNER, gguf, answers])
        results = load_json(answers / "results.json")
        different = [text for text, ids, theirs in zip(texts, text_ids, results["texts"], strict=True) if ids != theirs]
        by_nfc = sum(unicodedata.normalize("NFC", text) != text for text in different)
        counts = {"texts": len(texts), "of": source, "other_ids": len(different), "of_these_changed_by_nfc": by_nfc}
        with torch.no_grad():
            figures = compare_logits(ours, prompts, answers, results["greedy"])
        rows.append({"layout": layout, **counts, **figures})
    return rows


def compare_logits(ours: Any, prompts: list[list[int]], answers: Path, greedy: list[list[int]]) -> dict[str, Any]:
    """Return figures of a row.

    Args:
        answers: folder of llama.cpp's logits per prompt.
        greedy: ids that llama.cpp generated per prompt.
    """
    import numpy
    import torch

    settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": GREEDY_TOKENS}
    ours.generation_config.eos_token_id = None  # no id ends the text, as in RUNNER
    differences, sizes, equal, alike = [], [], [], 0
    for number, (prompt, theirs) in enumerate(zip(prompts, greedy, strict=True)):
        ids = torch.tensor([prompt])
        expected = ours(ids).logits[0]
        generated = ours.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        logits = torch.from_numpy(numpy.load(answers / f"{number}.npy"))
        differences.append((logits - expected).abs().max())
        sizes.append(expected.abs().max())
        equal += (logits.argmax(-1) == expected.argmax(-1)).tolist()
        alike += generated == prompt + theirs
    largest = {"largest_logit": sizes, "largest_difference": differences}
    return {
        "prompts": len(prompts), "positions": len(equal), "equal_next_tokens": round(sum(equal) / len(equal), 4),
        **{name: float(f"{torch.stack(values).max():.2g}") for name, values in largest.items()},
        "greedy_tokens": GREEDY_TOKENS, "prompts_of_equal_greedy_tokens": alike,
    }  # fmt: skip


def load_texts() -> tuple[str, list[str]]:
    """Return the source of the texts, and the texts; without lone surrogates, which UTF-8 cannot encode."""
    file = Path(os.environ.get("QWEN_SHARED") or ROOT.parent / "shared") / "golden" / "tokenizer.json"
    if not file.is_file():
        from export.verify.prompts import PROMPTS

        return "export/verify/prompts.py", [text for question_and_answer in PROMPTS for text in question_and_answer]
    cases = json.loads(file.read_text(encoding="utf-8"))["strings"]
    return "golden/tokenizer.json", [case["text"] for case in cases if not case["lone_surrogate"]]


def machine(work: Path) -> dict[str, Any]:
    commit = (work / SOURCES / ".git" / "modules" / "vendor" / "llama.cpp" / "HEAD").read_text()[:9]
    versions = {**{name: version(name) for name in ("torch", "transformers")}, NAME: RELEASE, "llama.cpp": commit}
    return {"device": platform.processor() or platform.machine(), **versions}


if __name__ == "__main__":
    main(sys.argv[1:])
