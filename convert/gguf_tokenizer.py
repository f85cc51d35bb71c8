"""The tokenizer's files, put together from the metadata of a GGUF file.

In: metadata. Out: tokenizer.json, tokenizer_config.json and chat_template.jinja as bytes, and the ids that end a reply.
A GGUF file has the tokens in the order of their ids (ordinary ones, added ones, names for the padding rows) and the
merges; how text is normalized and split it leaves to the reader, who knows the model (`get_vocab_base` in
conversion/base.py and gguf-py/gguf/vocab.py of github.com/ggml-org/llama.cpp).
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_mlx.convert.gguf_file import Metadata
from qwen_mlx.errors import CheckpointError
from qwen_mlx.tokenizer import QWEN35_SPLIT

TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
TEMPLATE = "tokenizer.chat_template"
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.h, enum llama_token_type
# llama.cpp makes a control token of everything in <| |>; these are not special in Qwen's own files.
NOT_SPECIAL = {f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()}
# The converter keeps one of the ids that end a reply; like llama.cpp, we know the other by name.
ENDS = {"<|im_end|>", "<|endoftext|>"}


def tokenizer_files(metadata: Metadata) -> dict[str, Path | bytes]:
    """Raises `CheckpointError` for another kind of tokenizer, and for tokens, types and merges that contradict."""
    for key, known in (("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", ("qwen35", "qwen2"))):
        if metadata.text(key) not in known:
            raise metadata.wrong(key, f"{' or '.join(map(repr, known))}, as of a Qwen model")
    named = {name: _token(metadata, key) for name, key in (("eos_token", "eos"), ("pad_token", "padding"))}
    about = {
        "add_bos_token": False,
        "bos_token": None,
        **named,
        "clean_up_tokenization_spaces": False,
        # transformers' own class for Qwen would take the split of Qwen2 instead of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files: dict[str, Path | bytes] = {
        "tokenizer.json": _backend(metadata).to_str().encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
    }
    if TEMPLATE in metadata.values:
        files["chat_template.jinja"] = metadata.text(TEMPLATE).encode()
    return files


def eos_token_ids(metadata: Metadata) -> list[int]:
    """The ids of all tokens that end a reply."""
    tokens = metadata.texts(TOKENS)
    ends = {_token(metadata, kind) for kind in ("eos", "eot", "eom")} | ENDS
    return [i for i, token in enumerate(tokens) if token in ends]


def _token(metadata: Metadata, kind: str) -> str | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    if key not in metadata.values:
        return None
    number, tokens = metadata.size(key, least=0), metadata.texts(TOKENS)
    if number >= len(tokens):
        raise metadata.wrong(key, f"an id below {len(tokens)}")
    return tokens[number]


def _backend(metadata: Metadata) -> tokenizers.Tokenizer:
    ordinary, added = _vocabulary(metadata)
    halves = [merge.partition(" ") for merge in metadata.texts(MERGES)]
    merges = [(left, right) for left, _, right in halves]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(ordinary)}, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{metadata.file}: {MERGES} and {TOKENS} do not belong together ({str(error)!r:.200}); download it again."
        ) from None
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN35_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in added])
    if backend.get_vocab_size() != len(ordinary) + len(added):
        raise CheckpointError(f"{metadata.file}: {TOKENS} has a token twice, or one that is empty; download it again.")
    return backend


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[tuple[str, bool]]]:
    """The ordinary tokens, and the added ones with whether they are special, both in the order of their ids."""
    tokens, types = metadata.texts(TOKENS), metadata.integers(TYPES)
    ordinary = sum(kind == ORDINARY for kind in types)
    unused = sum(kind == UNUSED for kind in types)
    middle = types[ordinary : len(types) - unused]
    in_order = types == [ORDINARY] * ordinary + middle + [UNUSED] * unused
    if len(types) != len(tokens) or not in_order or not {CONTROL, USER_DEFINED}.issuperset(middle):
        raise metadata.wrong(TYPES, f"{len(tokens)} types: ordinary tokens, added ones and unused ones, in this order")
    added = zip(tokens[ordinary : len(tokens) - unused], middle)
    return tokens[:ordinary], [(text, kind == CONTROL and text not in NOT_SPECIAL) for text, kind in added]
