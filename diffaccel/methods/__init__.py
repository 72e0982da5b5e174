"""Attention methods: what is computed, independent of any model."""
