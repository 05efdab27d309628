"""Arguments, model loading, adapters, the trainer and what a run leaves behind."""
