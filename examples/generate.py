"""A whole answer at once: `python examples/generate.py [model]`."""

import sys

from qwen_mlx import generate, load

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "demo")

# Messages go through the model's chat template.
messages = [{"role": "user", "content": "What is the opposite of near?"}]
print(generate(model, tokenizer, messages, thinking=False, max_tokens=100))

# Plain text is continued as it stands.
beginning = "Once upon a time"
print(beginning + generate(model, tokenizer, beginning, max_tokens=100))
