"""Export of checkpoints: other layouts, the model's code, a model card, and verification of a merge."""
