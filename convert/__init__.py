"""Conversion of checkpoints. Nothing in the runtime imports this package."""
