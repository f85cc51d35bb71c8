"""Tokens to logits. Knows no tokenizer, no sampling and no speculation."""
