"""Control tokens of ChatML, and Qwen v1's defaults. Imports nothing: it is copied into exported model folders."""

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

DEFAULT_SYSTEM = "You are a helpful assistant."
"""System message of conversations without one."""

MAX_WINDOW_SIZE = 6144
"""Default of ``max_window_size``: tokens of the prompt that ``chat()`` keeps."""
