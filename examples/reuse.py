"""Two questions about one text, which is computed once: `python examples/reuse.py [model]`."""

import sys

from qwen_mlx import PrefixStore, load, stream_generate

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "demo")

store = PrefixStore(model, max_bytes=1 << 30)  # what was used least recently goes first
text = "Once upon a time there was a fox by the river, and an owl in the old oak. " * 20

for question in ("Who are you?", "What is the capital of France?"):
    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    for response in stream_generate(model, tokenizer, messages, prefix_store=store, max_tokens=60):
        print(response.text, end="", flush=True)
    print(f"\nfirst token after {response.time_to_first_token:.2f} s: {response.reuse}")
