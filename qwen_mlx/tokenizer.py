"""Text to token ids and back, by the checkpoint's own `tokenizer.json` through the `tokenizers` library.

In: a model folder, text, token ids. Out: token ids, text, and the texts a chat template needs (the template itself and
the names of the special tokens). It does not know how a prompt is built, which tokens end a reply, or how many rows
the embedding has.
"""

from __future__ import annotations

import codecs
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers

from qwen_mlx.errors import PromptError, TokenizerError

QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Byte-level BPE with NFC normalization; nothing is ever added before or after the text."""

    chat_template: str | None
    """The checkpoint's own template, None if it has none."""
    special_tokens: Mapping[str, str]
    """What tokenizer_config.json names, such as {"eos_token": "<|im_end|>", "pad_token": ...}."""
    eos_token_id: int | None
    vocab_size: int
    """Number of ids that have a text, added tokens included; the embedding may have more rows."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> None:
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = special_tokens
        eos = special_tokens.get("eos_token")
        self.eos_token_id = None if eos is None else backend.token_to_id(eos)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        Raises TokenizerError if a file is missing, cannot be read, or would split text in another way than Qwen3.5.
        """
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_config(folder / "tokenizer_config.json")
        tokenizer = cls(backend, special_tokens=_special_tokens(config), chat_template=_chat_template(folder, config))
        if "eos_token" in tokenizer.special_tokens and tokenizer.eos_token_id is None:
            raise TokenizerError(
                f"tokenizer_config.json in {folder} names {tokenizer.special_tokens['eos_token']!r} as eos_token, "
                "but tokenizer.json has no such token: the two files belong to different models."
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised. Raises PromptError if it is not Unicode."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise PromptError(
                f"Only Unicode text can be encoded, and {ascii(text)[:60]} is not: pass a str without lone surrogates."
            ) from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`: bytes that are not UTF-8 become U+FFFD, ids without a text (padding rows) become nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = False) -> Detokenizer:
        """A fresh Detokenizer whose pieces add up to what `decode` gives for the whole."""
        return Detokenizer(self._backend, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """What tokenizer.json says, as it is used here."""
        return self._backend.to_str()

    def token_to_id(self, text: str) -> int | None:
        """Id of one token, as it is written in tokenizer.json; None if there is none."""
        return self._backend.token_to_id(text)


class Detokenizer:
    """Tokens in, text out, one token at a time: a character is given out as soon as its last byte is there, never half.

    A token's bytes come from its own text, so a step costs the same however long the reply has become. Python's
    incremental UTF-8 decoder and the `tokenizers` library both follow the Unicode Standard's substitution of maximal
    subparts (section 3.9), which is why invalid bytes come out the same in pieces as in one go.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool) -> None:
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {token for token, entry in added.items() if entry.special}
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; empty within a character."""
        text = self._backend.id_to_token(token)
        if text is None or token in self._skipped:
            return ""
        return self._utf8.decode(_token_bytes(text))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(text: str) -> bytes:
    # The library's ByteLevel decoder has this rule, for added tokens too: through the table, or as it stands if one
    # character is not in the table (a space, for example).
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, text))
    except KeyError:
        return text.encode()


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: the tokenizer must lie in the model's folder.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is not a tokenizer that can be read ({error}): download it again.") from error
    # Files saved in the middle of a training run carry its batch settings, which would cut or pad every prompt.
    backend.no_truncation()
    backend.no_padding()
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise TokenizerError(f"{path} has no byte-level decoder: it is not a Qwen tokenizer.")
    _check_split(backend, path)
    return backend


def _check_split(backend: tokenizers.Tokenizer, path: Path) -> None:
    r"""Make sure that combining marks (`\p{M}`) stay with their letters, which is new in Qwen3.5.

    Writers that took the tokenizer for Qwen2's saved the old expression into many files. It changes the ids of every
    script with combining marks and no others, so nobody notices: it is replaced, with a warning.
    """
    pre_tokenizer = backend.pre_tokenizer
    # The pickle state is the part's JSON; reading tokenizer.json a second time would cost half a second.
    state = {} if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    splits = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if any(r"\p{M}" in split for split in splits):
        return
    if QWEN2_SPLIT not in splits:
        raise TokenizerError(f"{path} does not split text as Qwen3.5 does (found {splits}): it is another model's.")
    warnings.warn(
        rf"{path} splits text as Qwen2 did, without \p{{M}}; it is read with Qwen3.5's expression instead.",
        stacklevel=4,
    )
    split = pre_tokenizers.Split(Regex(QWEN35_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text ({error}): download it again.") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} holds a {type(config).__name__} where an object is expected: download it again.")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `*_token` of the config as text; older files write a token as an object with its text under "content"."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja before the config's `chat_template`, which is a text or a list of named ones."""
    path = folder / "chat_template.jinja"
    template = _read_text(path) if path.is_file() else config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"The chat_template in {folder} is a {type(template).__name__}, not a text: fix that entry."
        )
    return template
