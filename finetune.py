"""Fine-tune a Qwen model on conversations: all parameters, a LoRA adapter, or Q-LoRA.

python finetune.py --model_name_or_path DIR --data_path FILE --output_dir DIR --use_lora
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from commands import importing, run_command, set_up_logging
from training.checks import check_args
from training.config.args import RunArguments
from training.config.parsing import parse_args
from training.distributed.launch import detect_launcher, init_process_group
from training.freed_memory import kept_freed_memory, set_up_libraries
from training.run_folder.failures import explain_how_to_resume
from training.run_folder.prepare import owned_output, prepare_output
from training.run_folder.start import agree_on_start
from training.signals import ignore_save_requests

logger = logging.getLogger("finetune")  # not __name__, which is __main__ when it runs as a command


def main(argv: Sequence[str]) -> int:
    detect_launcher()
    set_up_logging()
    ignore_save_requests()
    set_up_libraries()
    args = parse_args(argv)
    check_args(args)
    if args.dry_run:
        with importing():
            from training.data import show_preview

        return show_preview(args)
    if args.plan:
        with importing():
            from planning.command import show_plan

        return show_plan(args)
    with owned_output(args):
        run(args)
    return 0


def run(args: RunArguments) -> None:
    """Train as the arguments say, and save to the output folder, which this process owns."""
    with importing():  # for seconds: the arguments have been checked before
        from planning.at_start import expected_memory
        from training.base import load_base
        from training.build import build_trainer
        from training.data import load_shared_data
        from training.distributed.agreement import check_agreement
        from training.distributed.heartbeat import join_run
        from training.held_out import choose_held_out
        from training.model import choose_embeddings, load_training_model
        from training.summary import record_end, record_start, run_facts
        from training.training_arguments import build_training_arguments, remove_accelerate_variables

    remove_accelerate_variables()
    init_process_group(args)
    training_arguments = build_training_arguments(args)
    world, heartbeat = join_run(args.options.heartbeat_timeout)
    checkpoint = load_base(args)
    check_agreement(world, args, checkpoint, training_arguments.device.type)
    policy = choose_embeddings(args.lora, checkpoint)
    sets = load_shared_data(world, args, training_arguments, checkpoint)
    held_out = choose_held_out(args, checkpoint, sets)
    facts = run_facts(args, checkpoint, sets, policy) if world.is_first else {}
    start = agree_on_start(world, args, facts)
    if start.is_finished:
        heartbeat.finish()
        return
    trained = load_training_model(checkpoint, args, training_arguments, policy)
    prepare_output(args, start.removes_leftovers)  # removes old results, now that every check has passed
    trainer, log = build_trainer(
        args, training_arguments, checkpoint, trained, sets, facts, start, world, heartbeat, held_out
    )
    record_start(trainer, args, sets, policy, expected_memory(trainer, args))
    with explain_how_to_resume(args.output_dir, args.resumes_automatically):
        is_kept = training_arguments.device.type == "cpu" and trainer.keeps_freed_memory(policy)
        with trainer.signals.handling(), kept_freed_memory(is_kept):
            trainer.train(resume_from_checkpoint=start.checkpoint)
        seconds = log.progress.elapsed()
        logger.info("Saving to %s", args.output_dir)
        trainer.save_model()
    record_end(trainer, args, log, sets, policy, seconds)
    heartbeat.finish()


if __name__ == "__main__":
    run_command(main, "finetune.py")
