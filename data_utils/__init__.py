"""Data files to batches: records -> conversations -> token ids -> examples -> batches."""
