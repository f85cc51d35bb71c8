"""Prompts in files: a `PromptCache` with a `Fingerprint` of the model, tokenizer and template that it belongs to.

In: what was loaded from a model folder. Out: files, and hashes that are made in a moment, since of the weights hardly
anything is read. How a file is made up is known to `qwen_mlx.cache.file`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from qwen_mlx.cache.file import Fingerprint, read_cache, write_cache
from qwen_mlx.checkpoint import GAINS, Header, read_header, weight_files
from qwen_mlx.decoding.reuse import PromptCache
from qwen_mlx.errors import CheckpointError
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

SAMPLE = 64  # bytes from the middle of a tensor
SAMPLES = 4096  # tensors at most that are looked into


def save_prompt_cache(
    path: str | Path, prompt: PromptCache, model: Qwen, tokenizer: Tokenizer, *, note: str = ""
) -> None:
    """Write `prompt` to `path`, which appears when complete; `note` as `write_cache` has it.

    Raises ValueError for a prompt of another model; other errors as `write_cache` and `fingerprint` have them.
    """
    if prompt.model is not model:
        raise ValueError("The prompt cache was made for another model, and a file tells whose it is: pass that model.")
    write_cache(path, prompt.cache, prompt.tokens, fingerprint(model, tokenizer), note=note)


def load_prompt_cache(
    path: str | Path, model: Qwen, tokenizer: Tokenizer, *, kv_bits: int | None = None
) -> PromptCache:
    """What `save_prompt_cache` wrote, to go on with: `stream_generate(..., prompt_cache=...)`.

    `kv_bits` as it was then. Raises PromptCacheError where the file is missing, damaged, or of another model,
    tokenizer, template or number of bits; other errors as `fingerprint` has them.
    """
    cache = model.make_cache(kv_bits=kv_bits)
    tokens = read_cache(path, cache, fingerprint(model, tokenizer))
    return PromptCache(tokens, cache, model)


def fingerprint(model: Qwen, tokenizer: Tokenizer) -> Fingerprint:
    """Of a model and its tokenizer.

    The model's part is made of config.json, the sizes and headers of the weight files, and a few bytes of each tensor:
    a fine-tuned model differs from its base in nothing else. Raises `CheckpointError` for files that cannot be read,
    ValueError for a model that `load` did not make.
    """
    folder = model.folder
    if folder is None:
        raise ValueError("This model was not loaded from a folder: nothing tells a prompt file of it from another's.")
    try:
        weights = weight_files(folder) + [file for file in [folder / GAINS] if file.exists()]
        parts = [(folder / "config.json").read_bytes()]
        headers: list[Header] = []
        for file in weights:
            found = read_header(file)
            parts.append(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
            parts += [f"{n} {h.dtype} {h.shape} {h.offset}".encode() for n, h in sorted(found.items())]
            headers += found.values()
        parts += _samples(headers)
        tokens = [(folder / "tokenizer.json").read_bytes()]
    except OSError as error:
        what = error.filename or folder
        raise CheckpointError(f"{what} cannot be read ({error.strerror}); check the model's folder.") from None
    # The template writes the special tokens by the names that the tokenizer's configuration gives them.
    template = [json.dumps([tokenizer.chat_template, dict(tokenizer.special_tokens)], sort_keys=True).encode()]
    dtype = str(model.dtype).removeprefix("mlx.core.")
    return Fingerprint(_name(folder), _hash(parts), _hash(tokens), _hash(template), dtype)


def _samples(headers: list[Header]) -> Iterable[bytes]:
    step = -(-len(headers) // SAMPLES)
    for header in sorted(headers, key=lambda header: (header.file, header.offset))[::step]:
        with header.file.open("rb", buffering=0) as file:
            file.seek(header.offset + max(header.nbytes - SAMPLE, 0) // 2)
            yield file.read(min(SAMPLE, header.nbytes))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _name(folder: Path) -> str:
    """The folder's name, or the repository's where the folder lies in the hub's cache and is named by a commit."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
