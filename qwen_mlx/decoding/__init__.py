"""Prompt tokens to new tokens."""
