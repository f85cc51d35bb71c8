"""How many of 4 drafts are right at every place of a text, to `traces.json`: recorded, and drawn from published rates.

    python benchmarks/data/traces.py

A trace is a string of digits: digit t says how many of the drafts made there are right, one after the other, when t
tokens of the text are known beyond the first. So a replay may draft any number at any place. The recorded ones are the
embedded demo model's, whose texts are made from patterns: its drafts are far better than those of released models, for
which no such records exist. Theirs are drawn: easy and hard stretches follow each other, and the rates by position are
the published ones; the stretches lift those of later drafts a little, so that every trace names its own. Recording
takes a minute on one core.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from qwen_mlx import load
from qwen_mlx.chat.template import render
from qwen_mlx.hub import resolve
from qwen_mlx.load_mtp import load_mtp

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_demo"))
import talk

Trace = dict[str, object]
DEPTH, SEED = 4, 20
KINDS = [("tales", 0), ("tales", 1), ("chat", 0), ("chat", 1), ("tools", 0), ("noise", 0), ("noise", 1)]
"""Kinds of prompts and temperatures; the calls of tools are the same at both."""
OPENINGS = ["Once upon a time", "Long ago,", "There was once a brave owl", "Once there was", "In the forest"]
MLXCEL = "https://github.com/lablup/mlxcel/blob/main/docs/"
RAPID = "https://github.com/raullenchai/Rapid-MLX/issues/"

DRAWN = {  # name: (the chance of each draft if those before it are right, source and how it was read)
    "code, 27B": (
        (0.87, 0.74, 0.74, 0.74),
        MLXCEL + "benchmarks.md, M3 Ultra: 1.869 tokens a round with 1 draft, 3.398 with 4; the rest evenly between",
    ),
    "code, 9B": (
        (0.85, 0.80, 0.75, 0.70),
        RAPID + "2175: 0.852 of all drafts right; its decay over the positions is a guess",
    ),
    "prose, 27B": (
        (0.78, 0.51, 0.53, 0.50),
        MLXCEL
        + "benchmark_results/qwen38-mtp-m1ultra-2026-08-16.md: first draft 0.78; 2.18 tokens a round with 2 drafts, "
        "2.39 with 3; the fourth is a guess",
    ),
    "chat, 0.8B": (
        (0.75, 0.75, 0.75, 0.75),
        "https://github.com/ModelTC/LightLLM/pull/1402: 2.738 tokens a round with 3 drafts, read as equal chances",
    ),
    "chat, 4B": (
        (0.67, 0.33, 0.33, 0.33),
        "https://huggingface.co/Youssofal/Qwen3.5-4B-MTPLX-Optimized-Speed: 0.667 and 0.222 right at depths 1 and 2, "
        "which is the 0.44 of all drafts of " + RAPID + "3115; deeper as the second",
    ),
    "chat, 4B, worst": (
        (0.525, 0.33, 0.33, 0.33),
        RAPID + "3115: 0.35 of all drafts right with 2; split as in the row above",
    ),
}
EASY, HARD, LENGTH = 24, 12, 1024
"""Mean lengths of easy and hard stretches in tokens, which nobody has published, and the length of a drawn trace."""


class Demo:
    def __init__(self) -> None:
        self.model, self.tokenizer = load("demo", dtype="float32")
        self.head = load_mtp(resolve("demo"), self.model)
        self.end = {self.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}

    def text(self, prompt: list[int], count: int, temperature: int) -> list[int]:
        """The prompt and what follows it, at most `count` tokens, the token that ends it included."""
        ids, cache, key = list(prompt), self.model.make_cache(), mx.random.key(len(prompt))
        logits = self.model(mx.array([ids]), cache)[:, -1]
        for _ in range(count):
            key, now = mx.random.split(key)
            token = mx.random.categorical(logits / temperature, key=now) if temperature else mx.argmax(logits, axis=-1)
            ids.append(int(token.item()))
            if ids[-1] in self.end:
                break
            logits = self.model(token[:, None], cache)[:, -1]
        return ids

    def right(self, ids: list[int], start: int) -> str:
        """The digits of a text that begins at `start`. What would be drafted beyond its end counts as wrong."""
        model, cache = self.model, self.head.make_cache()
        hidden = model.hidden(model.embed(mx.array([ids])), model.make_cache())
        digits = []
        for i in range(len(ids) - 2):
            y = self.head(hidden[:, i : i + 1], model.embed(mx.array([[ids[i + 1]]])), cache)
            before, count = cache.snapshot(), 0
            for following in ids[i + 2 : i + 2 + DEPTH]:
                draft = mx.argmax(model.logits(y), axis=-1)
                if draft.item() != following:
                    break
                count += 1
                y = self.head(y, model.embed(draft), cache)
            cache.restore(before)
            digits.append(str(count))
        return "".join(digits[max(start - 1, 0) :])

    def chat(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        prompt = render(self.tokenizer.chat_template, messages, tools=tools, thinking=False)
        return self.tokenizer.encode(prompt)

    def prompts(self, kind: str) -> Iterator[list[int]]:
        r = random.Random(SEED)
        if kind == "tales":
            yield from (self.tokenizer.encode(opening) for opening in OPENINGS)
        elif kind == "chat":
            for _ in range(16):
                yield self.chat([{"role": "user", "content": talk.question(r).text}])
        elif kind == "tools":
            for _ in range(10):
                question, call, result, _ = talk.tool_turns(r)
                yield self.chat([question], [talk.WEATHER, talk.TIME])
                yield self.chat([question, call, result], [talk.WEATHER, talk.TIME])
        else:
            yield from (noise(r, 24) for _ in range(4))


def noise(r: random.Random, count: int) -> list[int]:
    """Random tokens, none of the special ones or single bytes."""
    return [r.randrange(300, 2000) for _ in range(count)]


def recorded() -> Iterator[Trace]:
    demo = Demo()
    for kind, temperature in KINDS:
        texts = [(demo.text(prompt, 160, temperature), len(prompt)) for prompt in demo.prompts(kind)]
        how = f"the demo model's own texts after {len(texts)} prompts, one after the other, temperature {temperature}"
        right = "".join(demo.right(*text) for text in texts)
        yield trace(f"{kind}, {temperature}", "recorded", how, right)
    how = "the demo head's drafts in a text of random tokens that no model wrote: nearly all are wrong"
    yield trace("random tokens", "recorded", how, demo.right(noise(random.Random(SEED), 514), 1))


def trace(name: str, kind: str, how: str, right: str) -> Trace:
    rates = [round(sum(int(digit) > j for digit in right) / len(right), 3) for j in range(DEPTH)]
    return {"name": name, "kind": kind, "how": how, "all_right_up_to": rates, "right": right}


def drawn() -> Iterator[Trace]:
    """Every chance a is a + d in easy stretches and a - 2 d in hard ones, which are half as frequent."""
    for name, (chances, source) in DRAWN.items():
        r = random.Random(f"{SEED} {name}")
        spread = [0.6 * min(1 - a, a / 2) for a in chances]
        easy, stretches = True, []
        for _ in range(LENGTH + DEPTH):
            easy ^= r.random() < 1 / (EASY if easy else HARD)
            stretches.append(easy)
        digits = []
        for t in range(LENGTH):
            at = [a + (d if e else -2 * d) for a, d, e in zip(chances, spread, stretches[t : t + DEPTH])]
            digits.append(str(next((j for j, chance in enumerate(at) if r.random() >= chance), DEPTH)))
        yield trace(name, "drawn", source, "".join(digits))


def write(traces: list[Trace]) -> None:
    about = (
        "recorded: counted with the embedded demo model and its own head, whose drafts are better than those of "
        "released models. drawn: from the published rates named, seeded, in easy and hard stretches of 24 and 12 "
        "tokens; nobody recorded them. Digit t of `right`: how many of 4 drafts are right where t tokens are known "
        "beyond the first; all_right_up_to: the share of places with at least 1, 2, 3, 4 right."
    )
    text = json.dumps({"about": about, "depth": DEPTH, "traces": traces}, indent=1)
    Path(__file__).with_name("traces.json").write_text(text + "\n")


if __name__ == "__main__":
    write([*recorded(), *drawn()])
