"""Quantise checkpoints: GPTQ and AWQ as in their papers, block by block; NF4 by bitsandbytes."""
