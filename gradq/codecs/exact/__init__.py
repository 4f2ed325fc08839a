"""Casts: fp32, bf16, fp16, fp64."""
