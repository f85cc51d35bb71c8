"""One prompt, several ways to choose the next token: `python examples/sampling.py [model]`."""

import sys

from qwen_mlx import SamplingParams, generate, load

WAYS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=30),
    "warm, seed 1": SamplingParams(temperature=1.0, top_p=0.95, top_k=20, seed=1, max_tokens=30),
    "warm, seed 2": SamplingParams(temperature=1.0, top_p=0.95, top_k=20, seed=2, max_tokens=30),
    "seed 1 again": SamplingParams(temperature=1.0, top_p=0.95, top_k=20, seed=1, max_tokens=30),
    "hot but cut": SamplingParams(temperature=1.5, min_p=0.1, seed=1, max_tokens=30),
    "no repeats": SamplingParams(temperature=0.0, presence_penalty=1.5, repetition_penalty=1.1, max_tokens=30),
    "until a stop": SamplingParams(temperature=0.0, stop=".", max_tokens=30),
}

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "demo")

prompt = "One cold winter day, the fox"
print(prompt + " ...")
for way, params in WAYS.items():
    print(f"{way:>12}: {generate(model, tokenizer, prompt, params)!r}")
