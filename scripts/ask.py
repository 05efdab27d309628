"""Ask a model one question: ``python -m scripts.ask --model_name_or_path DIR [--adapter DIR] "question"``.

The answer goes to stdout, everything else to stderr. Each token is the most likely one, whatever generation_config.json
says: equal questions get equal answers, which are those that the end of a training run has counted. With --do_sample an
answer is drawn as in scripts.chat.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from commands import CommandParser, quiet_libraries, run_command
from console import visible
from errors import ConfigError, one_line
from serving.flags import add_template_flags, template_arguments

if TYPE_CHECKING:
    from loading.checkpoint import Checkpoint


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m scripts.ask",
        description=f"Ask a model one question.\n\n{(__doc__ or '').partition(chr(10) * 2)[2]}",
        allow_abbrev=False,
    )
    parser.add_argument("question", help="the user's message; - reads it from stdin")
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder, or model id on a hub")
    parser.add_argument("--adapter", help="LoRA adapter to use with it")
    parser.add_argument(
        "--any_base",
        action="store_true",
        help="use the adapter with other weights than those of its training, with a warning instead of an error",
    )
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja chat template instead of the checkpoint's")
    parser.add_argument("--system_message", help="system message (default: that of the model's chat format)")
    add_template_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length limit of the answer (default: 512)")
    parser.add_argument(
        "--do_sample", action="store_true",
        help="draw the answer as scripts.chat does, with the values of generation_config.json (default: take the most "
        "likely token each time, without its repetition_penalty)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    args = parser.parse_args(argv)
    if args.any_base and args.adapter is None:
        parser.error("--any_base needs --adapter")
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {args.max_new_tokens} is too small; give 1 or more")
    if args.question == "-":
        args.question = sys.stdin.read()
    if not args.question.strip():
        parser.error("the question is empty")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    quiet_libraries()
    import torch

    from chat.render import encode_prompt, render_prompt
    from chat.turns import Turn
    from checkpoints.adapter import read_adapter
    from loading.checkpoint import load_checkpoint
    from loading.inference import load_for_inference
    from loading.prompt_modes import prompt_families

    if args.adapter is not None:
        read_adapter(args.adapter)  # refused before the base is read
    adapters = [] if args.adapter is None else [args.adapter]
    checkpoint = load_checkpoint(args.model_name_or_path, chat_template=args.chat_template, adapters=adapters)
    family, _ = prompt_families(checkpoint, args.thinking, template_arguments(args))
    settings = _settings(checkpoint, args.do_sample)
    model = load_for_inference(checkpoint, args.adapter, args.any_base)
    tokenizer = checkpoint.tokenizer
    prompt = render_prompt([Turn("user", args.question)], family, args.system_message)
    input_ids = torch.tensor([encode_prompt(prompt, tokenizer)], device=model.device)
    try:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.max_new_tokens,
            eos_token_id=checkpoint.end_ids,
            pad_token_id=checkpoint.end_ids[-1],
            **settings,
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of a setting that transformers refuses
        file = checkpoint.folder / "generation_config.json"
        fix = "Copy it again from the original checkpoint, or remove the setting"
        raise ConfigError(f"{file} cannot be used: {one_line(error)}", fix) from error
    print(visible(tokenizer.decode(output[0, input_ids.shape[1] :].tolist(), skip_special_tokens=True).strip()))


def _settings(checkpoint: Checkpoint, do_sample: bool) -> dict[str, Any]:
    """Return how tokens are chosen, as ``generate`` takes it.

    Raises:
        ConfigError: the checkpoint's values cannot be sampled with.
    """
    if not do_sample:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    from serving.requests import RequestError
    from serving.sampling import default_sampling

    file = checkpoint.folder / "generation_config.json"
    try:
        sampling = default_sampling(checkpoint.generation_config, checkpoint.family)
    except RequestError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not sampling.temperature:
        raise ConfigError(
            f"--do_sample: {file} takes the most likely token each time (do_sample is false, or temperature 0)",
            "Correct it there, or leave --do_sample out",
        )
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    return {"do_sample": True, **{name: getattr(sampling, name) for name in names}}


if __name__ == "__main__":
    run_command(main, "scripts.ask", prints_result=True)
