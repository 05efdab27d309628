"""Fine-tune a Qwen model on conversations: all parameters, or a LoRA adapter.

python finetune.py --model_name_or_path DIR --data_path FILE --output_dir DIR --use_lora
"""

from __future__ import annotations

from collections.abc import Sequence

from errors import run_command


def main(argv: Sequence[str]) -> int:
    from training.args import parse_args
    from training.checks import check_args
    from training.logs import logger, set_up_logging
    from training.output import prepare_output, resumable

    set_up_logging()
    args = parse_args(argv)
    check_args(args)

    # What takes seconds to import, after the arguments have been found good.
    from transformers import set_seed

    from training.adapters import attach_lora, embeddings_policy
    from training.callbacks import RunLog, build_callbacks
    from training.checks import check_machine
    from training.data import build_collator, load_data, preview_data, save_receipts, show_receipts
    from training.loading import load_checkpoint, load_model
    from training.logs import set_tensorboard_folder
    from training.run import describe_result, describe_run, save_arguments, save_summary
    from training.trainer import QwenTrainer

    check_machine(args)
    set_seed(args.training.seed)

    checkpoint = load_checkpoint(args.model.model_name_or_path, args.training.cache_dir, args.model.model_hub)
    if args.dry_run:
        return show_receipts(preview_data(args, checkpoint))  # 1 where the run would be worthless
    sets = load_data(args, checkpoint)
    model = load_model(checkpoint, args)
    policy = None
    if args.lora.use_lora:
        policy = embeddings_policy(args.lora.trainable_embeddings, checkpoint, args.lora.lora_weight_path)
        model = attach_lora(model, checkpoint, args.lora, policy, in_float32=not args.training.pure_bf16)

    resumed = args.resumed_checkpoint()
    prepare_output(args)  # old results go only when nothing can be refused any more
    log = RunLog(args.output_dir, resumes=resumed is not None)
    trainer = QwenTrainer(
        checkpoint,
        loss=args.model.loss,
        data_mixing=args.data.data_mixing,
        model=model,
        args=args.training,
        data_collator=build_collator(checkpoint),
        train_dataset=sets["train"],
        eval_dataset=sets.get("eval"),
        callbacks=build_callbacks(args, log),
    )
    log.trainer = trainer
    set_tensorboard_folder(trainer, args.options.logging_dir)
    logger.info("Fine-tuning\n%s", describe_run(trainer, args, sets["train"], policy))

    if trainer.is_world_process_zero():
        save_receipts({name: examples.receipt for name, examples in sets.items()}, args.output_dir)
    with resumable(args.output_dir):
        trainer.train(resume_from_checkpoint=resumed)
        seconds = log.elapsed()
        logger.info("Saving to %s", args.output_dir)
        trainer.save_model()
    if trainer.is_world_process_zero():
        save_arguments(args)
        summary = save_summary(trainer, args, log, sets, policy, seconds)
        logger.info("Done: %s", describe_result(summary))
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_command(main, "finetune.py")
