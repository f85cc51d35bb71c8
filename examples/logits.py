"""Look inside: the likeliest next tokens, and how surprising a text is: `python examples/logits.py [model]`."""

import sys

import mlx.core as mx

from qwen_mlx import load

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "demo")

text = "Once upon a time, there was a boy named"
tokens = mx.array([tokenizer.encode(text)])  # [B, T], here one row

# The model is three steps; model(tokens) does all of them.
x = model.embed(tokens)  # [B, T, D]
hidden = model.hidden(x, model.make_cache())  # [B, T, D]
logits = model.logits(hidden)  # [B, T, V]
logits = logits[..., : tokenizer.vocab_size].astype(mx.float32)  # without the padding rows of the vocabulary
logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)

last = logprobs[0, -1]
print(f"After {text!r} comes")
for token in mx.argsort(-last)[:5].tolist():
    print(f"{mx.exp(last[token]).item():7.1%}  {tokenizer.decode([token])!r}")

# The logits at position t are about token t + 1.
surprise = -mx.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)
print(f"Perplexity of the text: {mx.exp(surprise.mean()).item():.2f}")
