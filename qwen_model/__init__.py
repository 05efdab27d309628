"""The model: Qwen v1 for current transformers, and the classes and facts of all supported architectures."""
