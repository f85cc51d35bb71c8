"""`python -m qwen_mlx.verify MODEL --prompts FILE`: does speculation change what this model writes, and is it faster?

Every prompt is answered greedily twice, plainly and with drafts. Where the two choose differently, the plain logits of
the two tokens say whether that was a near tie, which a sum in another order may decide either way; both then go on
from the plain text.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from qwen_mlx.chat.template import render
from qwen_mlx.cli import Parser, positive, run
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.drafting import DRAFTS, drafting
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.decoding.speculative import Drafting, Lengths, decode_with_drafts
from qwen_mlx.errors import PromptError
from qwen_mlx.hub import DEFAULT_MODEL
from qwen_mlx.load import load
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

NEAR = {mx.float32: 1e-3, mx.bfloat16: 0.5, mx.float16: 0.0625}
"""Differences of two logits that the order of a sum may turn: about four units in the last place of a logit of 20 in 16
bits, and in float32 what sums over a few thousand products come to."""

LONG_ENOUGH = 16
"""Tokens of an answer from which its time tells something."""


@dataclass
class Tally:
    """What was found over all prompts."""

    tokens: int = 0
    near_ties: int = 0
    differences: list[str] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)  # rounds that had a draft at this position, those before it right
    right: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # of the time, plain to speculative, prompt by prompt

    def count(self, k: int, accepted: int) -> None:
        while len(self.tried) < k:
            self.tried.append(0)
            self.right.append(0)
        for j in range(min(accepted + 1, k)):
            self.tried[j] += 1
            self.right[j] += j < accepted


class Watched:
    """`lengths`, of which a tally sees every round."""

    def __init__(self, lengths: Lengths, tally: Tally) -> None:
        self._lengths, self._tally = lengths, tally

    def choose(self) -> int:
        return self._lengths.choose()

    def observe(self, k: int, accepted: int, seconds: float) -> None:
        self._tally.count(k, accepted)
        self._lengths.observe(k, accepted, seconds)


@dataclass(frozen=True)
class Verification:
    """Both ways of one model, greedily, over prompts of token ids."""

    model: Qwen
    tokenizer: Tokenizer
    mode: str = "mtp"
    most: int | None = None
    max_tokens: int = 128

    def over(self, prompts: Iterable[Sequence[int]]) -> Tally:
        """Raises CheckpointError where the mode is "mtp" and the model has no draft head; others as `check_memory`."""
        tally = Tally()
        with device_limits():
            self._answer(next(iter(prompts := list(prompts))), Tally())  # kernels, buffers and costs are made first
            for prompt in prompts:
                before = tally.tokens
                plain, speculative = self._answer(prompt, tally)
                if tally.tokens - before >= LONG_ENOUGH:
                    tally.ratios.append(plain / speculative)
        return tally

    def _answer(self, prompt: Sequence[int], tally: Tally) -> tuple[float, float]:
        """Seconds of decoding plainly, and with drafts."""
        plain, plain_seconds = self._decode(prompt, None)
        stand: list[int] = []
        seconds = 0.0
        while len(stand) < len(plain):
            begun = [*prompt, *stand]
            drafts = drafting(self.model, begun, SamplingParams(), self.mode, self.most)
            assert drafts is not None
            watched = Drafting(drafts.drafter, Watched(drafts.lengths, tally), drafts.head)
            found, more = self._decode(begun, watched, count=len(plain) - len(stand))
            seconds += more
            rest = plain[len(stand) :]
            place = next((i for i, (ours, theirs) in enumerate(zip(found, rest)) if ours[0] != theirs[0]), len(rest))
            if place < len(rest):
                self._judge(len(begun) + place, rest[place], found[place][0], tally)
            stand += [token for token, _ in rest[: place + 1]]
        tally.tokens += len(plain)
        return plain_seconds, seconds

    def _decode(
        self, tokens: Sequence[int], drafts: Drafting | None, *, count: int | None = None
    ) -> tuple[list[tuple[int, mx.array]], float]:
        """Tokens with the logits they were chosen from, and the seconds of decoding; without `count` up to the end of
        the reply."""
        model, config = self.model, self.model.config
        ends = {*config.eos_token_ids, self.tokenizer.eos_token_id} if count is None else set()
        cache, size = model.make_cache(), config.text.vocab_size
        sampler = Sampler(SamplingParams(), tokens, vocab_size=size, num_real_tokens=self.tokenizer.vocab_size)
        count = count or self.max_tokens
        step_size = check_memory(model, len(tokens), count).step_size
        seen = drafts.seen if drafts else None
        logits = prefill(model, tokens, cache, step_size=step_size, seen=seen)
        mx.eval(logits)
        start = time.perf_counter()
        if drafts is None:
            decoded = decode(model, logits, cache, sampler, count=count)
        else:
            decoded = decode_with_drafts(model, logits, cache, sampler, count=count, drafting=drafts)
        found: list[tuple[int, mx.array]] = []
        for token, row, _ in decoded:
            found.append((token, row))
            if token in ends:
                break
        return found, time.perf_counter() - start

    def _judge(self, place: int, plain: tuple[int, mx.array], other: int, tally: Tally) -> None:
        token, row = plain
        gap = float((row[token] - row[other]).item())  # type: ignore[arg-type]
        if gap <= NEAR[self.model.dtype]:
            tally.near_ties += 1
            return
        texts = [repr(self.tokenizer.decode([i])) for i in (token, other)]
        tally.differences.append(f"token {place}: plain {texts[0]}, with drafts {texts[1]}, {gap:.3g} apart")


def report(tally: Tally) -> dict[str, Any]:
    """For --json; acceptance by position counts rounds in which the drafts before that position were right."""
    return {
        "tokens": tally.tokens,
        "near_ties": tally.near_ties,
        "differences": tally.differences,
        "acceptance": [round(right / tried, 4) for right, tried in zip(tally.right, tally.tried) if tried],
        "speed_ratio": round(median(tally.ratios), 3) if tally.ratios else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        texts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise PromptError(f"{args.prompts} is not Unicode text in UTF-8.") from None
    if not texts:
        raise PromptError(f"{args.prompts} holds no prompt; write one on each line.")
    model, tokenizer = load(args.model, revision=args.revision, dtype=args.dtype)
    if not args.raw:
        texts = [
            render(
                tokenizer.chat_template,
                [{"role": "user", "content": text}],
                special_tokens=tokenizer.special_tokens,
            )
            for text in texts
        ]
    verification = Verification(model, tokenizer, args.speculate, args.num_draft_tokens, args.max_tokens)
    found = report(verification.over([tokenizer.encode(text) for text in texts]))
    print(json.dumps({"model": args.model, **found}) if args.json else _lines(found), flush=True)
    if found["differences"]:
        sys.exit(1)


def _lines(found: dict[str, Any]) -> str:
    ratio = found["speed_ratio"]
    speed = f"{ratio:.2f} times plain decoding, median over the prompts" if ratio else "answers too short to tell"
    positions = ", ".join(f"{rate:.0%}" for rate in found["acceptance"]) or "no drafts were made"
    return "\n".join(
        [
            f"tokens       {found['tokens']}, of which {len(found['differences'])} differ and {found['near_ties']} are "
            "near ties decided otherwise",
            *(f"             {difference}" for difference in found["differences"]),
            f"acceptance   {positions}, by position",
            f"speed        {speed}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx verify", description="Hold speculative decoding against plain decoding.")
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help=f'folder, hub id, or "demo" (default: {DEFAULT_MODEL})')
    add("--revision", help="branch, tag or commit on the hub")
    add("--prompts", required=True, help="text file in UTF-8 with a prompt on each line")
    add("--raw", action="store_true", help="continue each prompt as it stands, without the chat template")
    add("--speculate", choices=("mtp", "ngram"), default="mtp", help="where drafts come from (default: mtp)")
    add("--num-draft-tokens", type=int, choices=DRAFTS, metavar="N", help="most drafts of a round (default: 4)")
    add("--max-tokens", "-m", type=positive, default=128, help="longest answer in tokens (default: 128)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the activations")
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
