"""A checkpoint becomes a model in memory."""
