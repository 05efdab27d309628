"""A training run: arguments, checks, data, model, trainer, distributed processes and the run folder."""
