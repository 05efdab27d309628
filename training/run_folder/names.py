"""Names of files in a run folder."""

from __future__ import annotations

TRAINER_STATE = "trainer_state.json"
# The first file of a run and the last.
RUN_ARGUMENTS, RUN_SUMMARY = "run_args.json", "run_summary.json"
# A folder with one of them belongs to a run.
RECORDS = ("training_log.jsonl", RUN_SUMMARY, RUN_ARGUMENTS)
