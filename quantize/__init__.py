"""Quantising checkpoints: GPTQ and AWQ after their papers, block by block; NF4 by bitsandbytes."""
