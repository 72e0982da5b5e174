"""Attention ops: tensors in, tensors out."""
