"""The examples of a run, from its arguments."""

from __future__ import annotations

import logging

from data_utils.collate import Collator
from data_utils.dataset import ExampleSet, load_examples
from data_utils.encode import EncodeOptions, Encoder
from training.args import RunArguments
from training.loading import Checkpoint

logger = logging.getLogger(__name__)


def load_data(args: RunArguments, checkpoint: Checkpoint) -> dict[str, ExampleSet]:
    """The ``train`` set, and the ``eval`` set where there is one.

    Raises:
        DataError: a file or a record that cannot be used.
    """
    if args.data.lazy_preprocess:
        logger.info("--lazy_preprocess: conversations are tokenised once, before the first step, so faults show early")
    options = EncodeOptions(
        max_length=args.training.model_max_length,
        system_message=args.data.system_message,
        label_mask=args.data.label_mask,
    )
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, options)
    paths = {"train": args.data.data_path, "eval": args.data.eval_data_path}
    shows = not args.training.disable_tqdm and args.training.process_index == 0
    return {name: load_examples(path, encoder, show_progress=shows) for name, path in paths.items() if path}


def build_collator(checkpoint: Checkpoint) -> Collator:
    """Pads with end-of-text; the attention mask comes from lengths, so the choice has no effect."""
    return Collator(checkpoint.end_ids[-1])
