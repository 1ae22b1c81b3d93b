"""Directories of compressed-tensors, for transformers and vLLM."""
