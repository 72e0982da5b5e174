"""Bindings: how each model family reaches a method."""
