"""The embedded demo model: a trained Qwen3.5 of 2.8 million parameters. Data only; see README.md here."""
