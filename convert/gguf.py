"""GGUF files of Qwen3.5, as llama.cpp's converter writes them, under the names and conventions of our modules.

In: a file, or one of the files of a split model. Out: a `Source`, whose tensors are read rows at a time. Exact for F32,
F16, BF16, Q8_0, Q4_0 and Q4_1. The vision tower is not read: llama.cpp keeps it in a file of its own (mmproj), so
`vision` is empty.

What the converter changes and this module takes back (conversion/qwen.py of github.com/ggml-org/llama.cpp,
`_LinearAttentionVReorderBase`, `Qwen3NextModel`, `_Qwen35MtpMixin`):
value heads    stored tiled, [Hv / Hk, Hk] instead of [Hk, Hv / Hk]: in the v part of in_proj_qkv and conv1d, in
               in_proj_z, in_proj_a, in_proj_b, A_log, dt_bias, and in the columns of out_proj
A_log          stored as -exp(A_log) in float32; its logarithm gives the stored value back, not every last bit of A_log
gains          stored as 1 + w in float32, except linear_attn.norm, which is a gain as it is
MTP head       the layers behind the last one, its other tensors under `nextn` in the first of them
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen_mlx.checkpoint import some
from qwen_mlx.convert.gguf_blocks import FORMATS, OTHERS, read_rows, row_bytes
from qwen_mlx.convert.gguf_config import ARCHITECTURES, config, generation_config
from qwen_mlx.convert.gguf_file import DAMAGED, Metadata, Place, read_headers
from qwen_mlx.convert.gguf_names import EMBEDDING, HEAD, Target, mtp_targets, text_targets
from qwen_mlx.convert.gguf_tokenizer import TOKENS, eos_token_ids, tokenizer_files
from qwen_mlx.convert.source import Source, Tensor
from qwen_mlx.errors import CheckpointError


def open_gguf(path: Path) -> Source:
    """Read the header, or those of all files of a split model, and leave the tensors where they are.

    Raises `CheckpointError` for a file that is missing, damaged or no GGUF file, another architecture, a tensor in a
    format that is not read exactly, metadata that are missing or wrong, and tensors that are missing, unknown or of
    another shape.
    """
    metadata, places = read_headers(path)
    _check_architecture(metadata)
    _check_formats(path, places)
    if EMBEDDING not in places:
        raise CheckpointError(f"{path} has no {EMBEDDING}: it holds no whole model; download the model again.")
    rows = places[EMBEDDING].shape[0]
    if (tokens := len(metadata.texts(TOKENS))) != rows:
        raise CheckpointError(f"{path} has {tokens} tokens but {rows} rows in {EMBEDDING}; {DAMAGED}")
    facts = config(metadata, vocab_size=rows, tied=HEAD not in places, eos_token_ids=eos_token_ids(metadata))
    text, mtp = text_targets(facts["text_config"]), mtp_targets(facts["text_config"])
    _check_tensors(path, places, text | mtp)
    return Source(
        kind="GGUF",
        config=facts,
        text={target.name: _tensor(places[name], target) for name, target in text.items()},
        mtp={target.name: _tensor(places[name], target) for name, target in mtp.items()},
        files=tokenizer_files(metadata) | generation_config(metadata),
    )


def _check_architecture(metadata: Metadata) -> None:
    name = metadata.text("general.architecture")
    if name == "clip":
        raise CheckpointError(f"{metadata.file} is a vision tower (mmproj); give the file of the language model.")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.file} holds a model of architecture {name[:40]!r}; qwen_mlx runs Qwen3.5 only "
            f"({', '.join(ARCHITECTURES)})."
        )


def _check_formats(path: Path, places: Mapping[str, Place]) -> None:
    unread = [name for name, place in places.items() if place.kind not in FORMATS]
    if unread:
        kind = places[unread[0]].kind
        more = f", and {len(unread) - 1} more cannot be read either" if len(unread) > 1 else ""
        raise CheckpointError(
            f"{path}: {unread[0]} is stored as {OTHERS.get(kind, f'unknown type {kind}')}{more}; only "
            f"{', '.join(form.name for form in FORMATS.values())} are read: take the BF16 or Q8_0 file, or the "
            "safetensors release."
        )


def _check_tensors(path: Path, places: Mapping[str, Place], targets: Mapping[str, Target]) -> None:
    if missing := targets.keys() - places.keys():
        raise CheckpointError(f"{path} lacks {some(missing)}; download the model again.")
    if extra := places.keys() - targets.keys():
        raise CheckpointError(f"{path} holds tensors that its metadata do not speak of: {some(extra)}.")
    for name, target in targets.items():
        place = places[name]
        # ggml does not tell [1, N] from [N].
        if _without_ones(place.shape) != _without_ones(target.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(place.shape)}, where the metadata ask for {list(target.shape)}; "
                f"{DAMAGED}"
            )
        size = row_bytes(place)
        if size is None:
            form = FORMATS[place.kind]
            raise CheckpointError(
                f"{path}: {name}, of shape {list(place.shape)}, cannot be {form.name}, which has blocks of "
                f"{form.numbers} numbers; {DAMAGED}"
            )
        if place.offset + size * place.shape[0] > place.file.stat().st_size:
            raise CheckpointError(f"{place.file} ends before {name} does; {DAMAGED}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones, which ggml may or may not count as dimensions."""
    return shape if len(shape) < 2 or shape[0] != 1 else _without_ones(shape[1:])


def _tensor(place: Place, target: Target) -> Tensor:
    place = Place(place.file, target.shape, place.kind, place.offset)
    decay = target.name.endswith("A_log")

    def rows(start: int, stop: int) -> mx.array:
        order = target.rows.order()[start:stop] if target.rows else np.arange(start, stop)
        values = read_rows(place, order)
        if target.columns:
            return values[:, mx.array(target.columns.order())]
        if decay:
            return _log_of_decay(place, target, values)
        return values.astype(mx.float32) if target.is_gain else values

    dtype = mx.float32 if decay or target.is_gain else FORMATS[place.kind].dtype
    return Tensor(target.shape, dtype, rows)


def _log_of_decay(place: Place, target: Target, values: mx.array) -> mx.array:
    """A_log of -exp(A_log), rounded once."""
    stored = np.array(values.astype(mx.float32)).astype(np.float64)
    if not (stored < 0).all():
        raise CheckpointError(f"{place.file}: {target.name} is stored as -exp(A_log), and some of it is not negative.")
    return mx.array(np.log(-stored).astype(np.float32))
