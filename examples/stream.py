"""A text as it comes, then what it cost: `python examples/stream.py [model]`."""

import sys

from qwen_mlx import load, stream_generate

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "demo")

prompt = "Once upon a time"
print(prompt, end="")
for response in stream_generate(model, tokenizer, prompt, max_tokens=120):
    print(response.text, end="", flush=True)

# Every response carries the numbers so far; the last one says why the text ended.
print(f"\n\n{response.generation_tokens} tokens, ended by {response.finish_reason}")
print(f"first token after {response.time_to_first_token:.2f} s, then {response.generation_tps:.0f} tokens a second")
