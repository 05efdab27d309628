"""Fine-tune a Qwen model on conversations: all parameters, or a LoRA adapter.

python finetune.py --model_name_or_path DIR --data_path FILE --output_dir DIR --use_lora
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from commands import run_command, set_up_logging

logger = logging.getLogger("finetune")  # not __name__, which is __main__ when it runs as a command


def main(argv: Sequence[str]) -> int:
    from processes import is_first
    from training.checks import check_args
    from training.config.parsing import parse_args
    from training.distributed.launch import detect_launcher, init_process_group
    from training.run_folder.output import explain_how_to_resume, prepare_output
    from training.signals import Signals, ignore_save_requests

    detect_launcher()
    set_up_logging()
    ignore_save_requests()
    args = parse_args(argv)
    check_args(args)

    # What takes seconds to import, after the arguments have been found good.
    from transformers import set_seed

    from loading.adapters import embeddings_policy
    from loading.checkpoint import load_checkpoint
    from training.callbacks import RunLog, build_callbacks, set_tensorboard_folder
    from training.data import build_collator, load_data, preview_data, save_reports, show_reports
    from training.distributed.agreement import check_agreement, check_same_data
    from training.distributed.heartbeat import HeartbeatCallback, join_run
    from training.distributed.shared_data import load_shared
    from training.model import load_training_model
    from training.progress import Progress
    from training.run_folder.start import agree_on_start
    from training.summary import describe_result, describe_run, run_facts, save_arguments, save_summary
    from training.trainer import QwenTrainer
    from training.training_arguments import build_training_arguments, remove_accelerate_variables

    if args.dry_run:  # starts no processes
        return show_reports(preview_data(args)) if is_first() else 0
    remove_accelerate_variables()
    init_process_group(
        args.trainer_value("ddp_timeout"), bool(args.trainer_value("deepspeed")), args.trainer_value("use_cpu")
    )
    training_arguments = build_training_arguments(args)
    set_seed(training_arguments.seed)
    world, heartbeat = join_run(args.options.heartbeat_timeout)
    checkpoint = load_checkpoint(args.model.model_name_or_path, args.model.cache_dir, args.model.model_hub)
    check_agreement(world, args, checkpoint, training_arguments.device.type)
    sets = load_shared(world, lambda: load_data(args, training_arguments, checkpoint))
    check_same_data(world, sets)
    policy = None
    if args.lora.use_lora:
        policy = embeddings_policy(args.lora.trainable_embeddings, checkpoint, args.lora.lora_weight_path)
    facts = run_facts(args, checkpoint, sets, policy) if world.is_first else {}
    start = agree_on_start(world, args, facts)
    if start.is_finished:
        logger.info("%s holds this run, and it is done: there is nothing to do", args.output_dir)
        heartbeat.finish()
        return 0

    model = load_training_model(checkpoint, args, training_arguments, policy)
    prepare_output(args, start.removes_leftovers)  # old results go only when nothing can be refused any more
    if world.is_first:
        save_arguments(args)
    progress = Progress()
    log = RunLog(args.output_dir, progress, resumes=start.checkpoint is not None)
    signals = Signals()
    trainer = QwenTrainer(
        checkpoint,
        loss=args.model.loss,
        data_mixing=args.data.data_mixing,
        facts=facts,
        progress=progress,
        signals=signals,
        status=heartbeat.status,
        world=world,
        model=model,
        args=training_arguments,
        data_collator=build_collator(checkpoint),
        train_dataset=sets["train"],
        eval_dataset=sets.get("eval"),
        callbacks=[*build_callbacks(args, log), HeartbeatCallback(heartbeat.status)],
    )
    set_tensorboard_folder(trainer.callback_handler.callbacks, args.options.logging_dir)
    if world.is_first:  # who alone knows what became of the records
        logger.info("Fine-tuning\n%s", describe_run(trainer, args, sets["train"], policy))
        save_reports({name: examples.report for name, examples in sets.items()}, args.output_dir)
    with explain_how_to_resume(args.output_dir, args.resumes_automatically):
        with signals.handling():
            trainer.train(resume_from_checkpoint=start.checkpoint)
        seconds = progress.elapsed()
        logger.info("Saving to %s", args.output_dir)
        trainer.save_model()
    if trainer.is_world_process_zero():
        summary = save_summary(trainer, args, log, sets, policy, seconds)
        logger.info("Done: %s", describe_result(summary))
    trainer.accelerator.end_training()
    heartbeat.finish()
    return 0


if __name__ == "__main__":
    run_command(main, "finetune.py")
