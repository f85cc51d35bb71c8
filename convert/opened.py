"""A source together with the modules its tensors belong to, checked against each other by names and shapes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx.config import ModelConfig, parse_config, read_generation, read_json
from qwen_mlx.convert.dequantize import dequantized, is_quantized
from qwen_mlx.convert.gguf import open_gguf
from qwen_mlx.convert.source import Source, open_source
from qwen_mlx.errors import CheckpointError, ConversionError
from qwen_mlx.load import check_tensors, quantize_like, set_weights
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

SAME_ROWS = 256


@dataclass(frozen=True)
class Opened:
    """`source` fits `model()` and, where it has a draft head, `head()`: modules whose weights nobody has read."""

    path: Path
    source: Source
    config: ModelConfig

    def model(self) -> Qwen:
        model = Qwen(self.config)
        quantize_like(self.path, model, self.source.text)
        return model

    def loaded(self, dtype: mx.Dtype) -> Qwen:
        """`model()` with all its weights in memory."""
        model = self.model()
        model.dtype = dtype
        set_weights(model, {name: found.all() for name, found in self.source.text.items()}, dtype)
        return model

    def head(self) -> MTPHead | None:
        if not self.source.mtp:
            return None
        head = MTPHead(self.config.text)
        quantize_like(self.path, head, self.source.mtp)
        return head

    @property
    def quantized(self) -> bool:
        return is_quantized(self.model())


def open_model(path: Path, *, dequantize: bool = False, vision: bool = True, mtp: bool = True) -> Opened:
    """The checkpoint in the folder, or GGUF file, `path`; `dequantize` gives the float form of a quantized one.

    Without `vision` or `mtp` that part is not looked at. Raises `CheckpointError` where tensors and configuration
    disagree, besides what `open_source` raises, and `ConversionError` where there is nothing to dequantize.
    """
    if path.is_file():
        source = open_gguf(path)
        source = source if mtp else replace(source, mtp={})
        config = parse_config(source.config, _generation(source), path)
    else:
        raw = _without_fp8(read_json(path / "config.json"))
        config = parse_config(raw, read_generation(path), path)
        source = open_source(path, raw, vision=vision, mtp=mtp)
    if config.text.tie_word_embeddings:
        # Some tied releases store the head a second time.
        _check_second_head(path, source)
        source = replace(source, text={n: t for n, t in source.text.items() if not n.startswith("lm_head.")})
    opened = Opened(path, source, config)
    model = opened.model()
    check_tensors(path, model, source.text)
    if (head := opened.head()) is not None:
        check_tensors(f"The MTP head in {path}", head, source.mtp)
    if not dequantize:
        return opened
    if not is_quantized(model):
        raise ConversionError(f"{path} is not quantized, so there is nothing to dequantize; leave --dequantize out.")
    drafts = dequantized(source.mtp, head) if head is not None else {}
    return Opened(path, replace(source, text=dequantized(source.text, model), mtp=drafts), config)


def _check_second_head(path: Path, source: Source) -> None:
    """The first rows tell a copy of the embeddings from a head of its own, which would be dropped without a word."""
    for kind in ("weight", "scales", "biases"):
        head, embeddings = source.text.get(f"lm_head.{kind}"), source.text.get(f"model.embed_tokens.{kind}")
        if head is None or embeddings is None or (head.shape, head.dtype) != (embeddings.shape, embeddings.dtype):
            continue
        rows = min(SAME_ROWS, head.shape[0])
        if not mx.array_equal(head.rows(0, rows), embeddings.rows(0, rows)).item():
            raise CheckpointError(
                f"{path}: lm_head.{kind} is not model.embed_tokens.{kind}, and config.json says tie_word_embeddings; "
                "take both files from one release."
            )


def _without_fp8(config: dict[str, Any]) -> dict[str, Any]:
    """Without the note that it is one of Qwen's FP8 releases, whose scales are read as such; other methods are not."""
    said = config.get("quantization_config")
    ours = isinstance(said, dict) and said.get("quant_method") == "fp8" and said.get("weight_block_size") == [128, 128]
    return {name: value for name, value in config.items() if not (ours and name == "quantization_config")}


def _generation(source: Source) -> dict[str, Any]:
    said = source.files.get("generation_config.json", b"{}")
    return dict(json.loads(said)) if isinstance(said, bytes) else {}
