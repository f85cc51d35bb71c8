"""Text to training windows: the demo's tokenizer, and rows of token ids with the loss mask beside them.

Knows the generator of tales and conversations, and the chat template; knows no torch and no model.
"""

import json
import random
import re
from pathlib import Path

import talk
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tales import tale
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "qwen_mlx" / "demo"
# The split of Qwen3.5's own tokenizer: combining marks (\p{M}) stay with their letters.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3.5's added tokens in its order, without the audio ones.
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
MARKS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip


def alice() -> list[str]:
    """The paragraphs of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain), lines joined."""
    book = (HERE / "alice.txt").read_text()
    book = book[book.index("  Alice was beginning") : book.rindex("THE END")].replace("`", "'")
    book = re.sub(r"\n +CHAPTER [IVXL]+\s+[^\n]+\n", "\n\n", book)
    book = re.sub(r" *(\* *){3,}", "", book)
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", book)]
    return [p for p in paragraphs if p]


class Template:
    """The demo's chat template, as transformers would render it."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
        self.template = environment.from_string((DEMO / "chat_template.jinja").read_text())

    def __call__(self, conversation: dict, **settings: bool) -> str:
        return self.template.render(**conversation, **settings)


def train_tokenizer(vocab_size: int, seed: int = 7) -> Tokenizer:
    """Byte-level BPE with Qwen3.5's normalizer, split and added tokens, trained on what the model will read."""
    r, template = random.Random(seed), Template()
    texts = [tale(r) for _ in range(4000)] + ["\n\n".join(alice())] * 4
    texts += [template(talk.conversation(r)) for _ in range(8000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pattern = re.compile("|".join(map(re.escape, SPECIAL + MARKS)))
    tokenizer.train_from_iterator((pattern.sub(" ", t) for t in texts), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in MARKS])
    return tokenizer


class Windows:
    """Endless batches of windows. A window begins with a fresh document or goes on with the last one, half and half.

    `tales` and `prose` are the shares of tales and of Alice; the rest is conversations.
    """

    def __init__(self, tokenizer: Tokenizer, *, seed: int, tales: float = 0.28, prose: float = 0.04) -> None:
        self.tokenizer, self.random, self.tales, self.prose = tokenizer, random.Random(seed), tales, prose
        self.paragraphs = alice()[:-120]  # the last 120 are held out
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.template, self.rest = Template(), {}

    def conversation(self) -> tuple[list[int], list[int]]:
        """Token ids, and a mask that is 1 on what the assistant says."""
        conversation = talk.conversation(self.random)
        if self.random.random() < 0.6:
            for message in conversation["messages"]:
                message.pop("reasoning_content", None)
        text = self.template(conversation)
        encoded = self.tokenizer.encode(text)
        starts = [m.end() for m in re.finditer(r"<\|im_start\|>assistant\n", text)]
        spans = [(a, text.index("<|im_end|>", a) + len("<|im_end|>")) for a in starts]
        return encoded.ids, [int(any(a <= o[0] < b for a, b in spans)) for o in encoded.offsets]

    def document(self) -> tuple[list[int], list[int]]:
        u = self.random.random()
        if u > self.tales + self.prose:
            return self.conversation()
        if u < self.tales:
            ids = self.tokenizer.encode(tale(self.random)).ids
        else:
            first = self.random.randrange(len(self.paragraphs) - 12)
            ids = self.tokenizer.encode("\n\n".join(self.paragraphs[first : first + 6])).ids[:320]
        return [*ids, self.end], [1] * (len(ids) + 1)

    def row(self, index: int, length: int) -> tuple[list[int], list[int]]:
        ids, mask = self.rest.pop(index, ([], [])) if self.random.random() < 0.5 else ([], [])
        while len(ids) < length:
            more, counts = self.document()
            ids, mask = ids + more, mask + counts
        self.rest[index] = (ids[length - 1 :], mask[length - 1 :])
        return ids[:length], mask[:length]

    def batch(self, rows: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
        """-> ids, mask: lists of `rows` lists of `length` numbers."""
        drawn = [self.row(i, length) for i in range(rows)]
        return [ids for ids, _ in drawn], [mask for _, mask in drawn]
