"""How much of an agent's prompts is computed with a prefix store, beside how much of them is new, and without a store.

    env -u OPENBLAS_CORETYPE python benchmarks/prefix_reuse.py [--turns 30] [--layers 24]

A trace of turns, each one answer: questions, tool results of 50 to 600 tokens, after a third of the turns one answer
made again, after two thirds an earlier question with a sentence more, and all behind it gone. The texts are drawn from
a seed, thoughts, calls and answers too: they are fed token by token, as if the model had drawn them, so that the next
prompt begins with what was written, as far as the template leaves it standing (it leaves out the thoughts before the
last question). New is what stands in a prompt behind the longest beginning that it shares with any earlier prompt and
its answer: nothing that is kept could spare that. The limit is on tokens computed for each new one; time is for
information.

The model is the demo model, or with --layers a random one of the 0.8B shape, fed the demo's tokens; float32. BLAS as
prefill_decode.py has it. A table on stderr; the last line is JSON. Logits that differ from those without a store by
more than 5e-4 are an error.
"""

import argparse
import ctypes
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1.15
TOLERANCE = 5e-4
STEP_SIZE = 512
SYSTEM = (
    "You are an agent that works in a repository of Python code. Look before you write: list files, read them, search. "
    "Change one thing at a time and run the tests after every change. Keep to the style of the code around you. Never "
    "delete what you did not make. When you are done, say in a few sentences what you changed and why."
)
TOOLS = [
    ("list_files", "List the files of a folder with their sizes.", ["folder"]),
    ("read_file", "Read a part of a file, by line numbers.", ["path", "first", "last"]),
    ("search", "Find lines that match a regular expression.", ["pattern", "folder"]),
    ("edit_file", "Replace one text in a file by another.", ["path", "old", "new"]),
    ("run_tests", "Run the tests of a file and return the output.", ["path", "options"]),
]
NAMES = (
    "account batch buffer cache client column cursor entry event field filter handler header index item job key limit "
    "line lock message node offset order page parser path queue record result row schema server stream table token user"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--layers", type=int, help="of a random model of the 0.8B shape, which has 24")
    parser.add_argument("--blas", default="libopenblas.so.0", help='BLAS to preload; "wheel" keeps the one MLX brings')
    args = parser.parse_args()
    if args.blas != "wheel" and sys.platform == "linux":
        ctypes.CDLL(args.blas, ctypes.RTLD_GLOBAL)  # works only before MLX is imported

    import mlx.core as mx

    from qwen_mlx import PrefixStore, load

    model, tokenizer = load("demo", dtype="float32")
    if args.layers:
        model = random_model(args.layers)
    store, rows, seen = PrefixStore(model), [], []
    print(f"{'turn':>4} {'what':10} {'prompt':>7} {'computed':>8} {'new':>6} {'s':>7} {'s cold':>7}", file=sys.stderr)
    for number, (what, prompt, answer) in enumerate(encoded(tokenizer, args.turns), start=1):
        row = {"prompt": len(prompt), "new": len(prompt) - max((alike(text, prompt) for text in seen), default=0)}
        seen.append(prompt + answer)
        row |= measure(model, tokenizer, prompt, answer, store)
        rows.append(row)
        print(f"{number:4} {what:10} {row['prompt']:7} {row['computed']:8} {row['new']:6} "
              f"{row['seconds']:7.2f} {row['seconds_cold']:7.2f}", file=sys.stderr)  # fmt: skip
    result = {"device": str(mx.default_device()), "mlx": mx.__version__, "blas": args.blas, "turns": args.turns,
              "model": f"random 0.8B shape, {args.layers} layers" if args.layers else "demo"}  # fmt: skip
    result |= summary(rows) | {"store_bytes": store.nbytes, "max_bytes": store.max_bytes}
    print(json.dumps(result))
    if not result["largest_logit_difference"] <= TOLERANCE:
        raise SystemExit(f"logits differ by {result['largest_logit_difference']:.1e}, allowed is {TOLERANCE}")
    if result["ratio"] > LIMIT:
        raise SystemExit(f"{result['ratio']} tokens are computed for each new one, allowed are {LIMIT}")


def random_model(layers: int):
    import mlx.core as mx
    from checkpoint import make

    from qwen_mlx.load import load_model

    folder = make(Path(tempfile.gettempdir()) / f"qwen_mlx-random-0.8B-{layers}-16", layers=layers)
    model = load_model(folder, dtype="float32")
    mx.eval(model.parameters())
    return model


def measure(model, tokenizer, prompt: list[int], answer: list[int], store) -> dict[str, float | int]:
    """One turn with the store, the answer fed and kept, and its prompt once more without."""
    import mlx.core as mx

    from qwen_mlx.decoding.autoregressive import decode
    from qwen_mlx.decoding.reuse import Reuse

    start = time.perf_counter()
    with Reuse(model, prompt, store=store) as text:
        logits = text.read(model, tokenizer, step_size=STEP_SIZE)
        mx.eval(logits)
        read = time.perf_counter()
        script = iter([*answer, 0])  # one more than is taken: an answer is read up to its last token
        drawn = decode(model, logits, text.cache, lambda row: 0 * row.argmax(-1) + next(script), count=len(answer) + 1)
        text.tokens += [token for token, *_ in (next(drawn) for _ in answer)]
        drawn.close()
        told = time.perf_counter()
    kept = time.perf_counter()
    cold = Reuse(model, prompt).read(model, tokenizer, step_size=STEP_SIZE)
    mx.eval(cold)
    return {
        "computed": len(prompt) - text.cached_tokens,
        "seconds": read - start + kept - told,
        "seconds_cold": time.perf_counter() - kept,
        "difference": mx.abs(logits - cold).max().item(),
    }


def summary(rows: list[dict]) -> dict[str, float | int]:
    total = {name: sum(row[name] for row in rows) for name in ("prompt", "computed", "new", "seconds", "seconds_cold")}
    return {
        "prompt_tokens": total["prompt"],
        "computed_tokens": total["computed"],
        "new_tokens": total["new"],
        "ratio": round(total["computed"] / total["new"], 4),
        "ratio_without_a_store": round(total["prompt"] / total["new"], 2),
        "seconds": round(total["seconds"], 2),
        "seconds_without_a_store": round(total["seconds_cold"], 2),
        "times_faster": round(total["seconds_cold"] / total["seconds"], 2),
        "largest_logit_difference": max(row["difference"] for row in rows),
    }


def alike(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning of both."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def encoded(tokenizer, turns: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Of each turn what it is, the ids of its prompt, and those of its answer up to the end of the message."""
    from qwen_mlx.chat.template import render

    def text(messages: list[dict], **options) -> str:
        return render(tokenizer.chat_template, messages, tools=[schema(*tool) for tool in TOOLS], thinking=True,
                      special_tokens=tokenizer.special_tokens, **options)  # fmt: skip

    for what, messages, answer in Trace(lambda words: len(tokenizer.encode(words))).turns(turns):
        prompt, whole = text(messages), text([*messages, answer], add_generation_prompt=False)
        assert whole.startswith(prompt)
        yield what, tokenizer.encode(prompt), tokenizer.encode(whole[len(prompt) :].rstrip("\n"))


def schema(name: str, description: str, arguments: list[str]) -> dict:
    properties = {argument: {"type": "string", "description": f"The {argument}."} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": arguments[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class Trace:
    """A conversation between a user, an agent and its tools, the same each time. `count` tells a text's tokens."""

    def __init__(self, count) -> None:
        self._random, self._count = random.Random("a trace of an agent"), count
        self._calls = 0  # that are still to be made before an answer
        self.messages: list[dict] = [{"role": "system", "content": SYSTEM}]

    def turns(self, count: int) -> Iterator[tuple[str, list[dict], dict]]:
        """What happened, the messages that are to be answered, and the answer."""
        for number in range(count):
            if number and number == count // 3:
                what = self._regenerate()
            elif number and number == 2 * count // 3:
                what = self._edit()
            else:
                what = self._go_on()
            answer = self._answer()
            yield what, list(self.messages), answer
            self.messages.append(answer)

    def _go_on(self) -> str:
        if self.messages[-1].get("tool_calls"):
            lines = self._random.choice([self._listing, self._code, self._code, self._report])
            self.messages.append({"role": "tool", "content": self._text(lines, self._random.randint(50, 600))})
            return "result"
        self.messages.append({"role": "user", "content": self._text(self._prose, self._random.randint(20, 120))})
        self._calls = self._random.randint(2, 5)
        return "question"

    def _regenerate(self) -> str:
        self._calls += bool(self.messages.pop().get("tool_calls"))
        return "regenerate"

    def _edit(self) -> str:
        """Of the question before the last, if there is one, a longer form."""
        place = [i for i, message in enumerate(self.messages) if message["role"] == "user"][-2:][0]
        content = f"{self.messages[place]['content']}\n{self._prose()}"
        self.messages[place:] = [{"role": "user", "content": content}]
        self._calls = self._random.randint(2, 5)
        return "edit"

    def _answer(self) -> dict:
        answer = {"role": "assistant", "reasoning_content": self._text(self._prose, self._random.randint(15, 60))}
        if not self._calls:
            return answer | {"content": self._text(self._prose, self._random.randint(40, 120))}
        self._calls -= 1
        name, _, arguments = self._random.choice(TOOLS)
        values = {argument: self._code().strip() for argument in arguments}
        return answer | {"content": "", "tool_calls": [{"function": {"name": name, "arguments": values}}]}

    def _text(self, line, tokens: int) -> str:
        """Lines that come to `tokens` tokens, or a few more."""
        lines: list[str] = []
        while self._count("\n".join(lines)) < tokens:
            lines.append(line())
        return "\n".join(lines)

    def _name(self) -> str:
        return "_".join(self._random.sample(NAMES, 2))

    def _prose(self) -> str:
        a, b, c = self._random.sample(NAMES, 3)
        verb = self._random.choice(["must not change", "reads twice", "forgets", "should return", "is slower than"])
        return f"The {a} of the {b} {verb} the {c} when the {self._name()} is empty."

    def _listing(self) -> str:
        return f"{self._random.randint(100, 99999):>8}  src/{self._random.choice(NAMES)}/{self._name()}.py"

    def _code(self) -> str:
        a, b, c, n = self._name(), self._name(), self._random.choice(NAMES), self._random.randint(0, 99)
        forms = [f"    {a} = {b}.{c}({n})", f"    if {a} is None:", f"        return {b}[{n}]", f"def {a}({c}: int):"]
        return self._random.choice(forms)

    def _report(self) -> str:
        n, m = self._random.randint(0, 99), self._random.randint(0, 99)
        forms = [f"tests/test_{self._name()}.py::test_{self._name()} PASSED [{n:3}%]", f"E       assert {n} == {m}"]
        return self._random.choice(forms)


if __name__ == "__main__":
    main()
