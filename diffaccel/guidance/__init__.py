"""Guidance by comparison: steering a pipeline by what a damaged or negated model would do."""
