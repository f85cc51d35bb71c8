"""The options that several commands have, and what is made of them."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from qwen_mlx.cache.quantized_kv import BITS
from qwen_mlx.cli import positive
from qwen_mlx.decoding.drafting import DRAFTS, MODES
from qwen_mlx.decoding.preflight import STEP_SIZES
from qwen_mlx.decoding.sampling import PRESETS, SamplingParams
from qwen_mlx.errors import SchemaError
from qwen_mlx.hub import DEFAULT_MODEL

THINKING = {"auto": None, "on": True, "off": False}
MEMORY = ("prefill_step_size", "kv_bits", "force")
DRAFTING = ("speculate", "num_draft_tokens")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it computes."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help=f'folder, hub id, or "demo" (default: {DEFAULT_MODEL})')
    add("--revision", help="branch, tag or commit on the hub")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the activations")


def add_thinking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thinking", choices=tuple(THINKING), default="auto", help="auto: as the checkpoint's template has it"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sampling of the model card for a use (default: the checkpoint's)")
    add("--max-tokens", "-m", type=int, help="longest answer in tokens (default: 512)")
    add("--temp", dest="temperature", type=float, help="temperature; 0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, help="sample from the likeliest tokens that hold this much of the mass")
    add("--top-k", type=int, help="sample from this many of the likeliest tokens; 0: all")
    add("--min-p", type=float, help="drop tokens less likely than this times the likeliest")
    add("--repetition-penalty", type=float, help="above 1, tokens of prompt and answer become less likely")
    add("--presence-penalty", type=float, help="subtracted once from every token of the answer")
    add("--frequency-penalty", type=float, help="subtracted from a token each time it stands in the answer")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--json-schema", metavar="FILE", help='JSON schema of the answer (pip install "qwen-mlx[json]")')


def add_memory(parser: argparse.ArgumentParser) -> None:
    """What takes more memory or less."""
    add, steps = parser.add_argument, ", ".join(map(str, STEP_SIZES))
    add("--prefill-step-size", type=positive, help=f"tokens read at a time (default: of {steps} the first that fits)")
    add(
        "--kv-bits",
        type=int,
        choices=BITS,
        help="bits of keys and values, in the full-attention layers only; on Metal "
        "each token is then a graph built anew (default: as computed)",
    )
    add("--force", action="store_true", help="try a prompt that memory, by the count of its bytes, has no room for")


def add_drafting(parser: argparse.ArgumentParser) -> None:
    """Several tokens at once."""
    add = parser.add_argument
    add(
        "--speculate",
        choices=MODES,
        default="auto",
        help="draft tokens and verify several at once where that is faster: by the model's own draft head (mtp), or by "
        "what stood in the text before (ngram); auto: mtp where the model has a head",
    )
    add("--num-draft-tokens", type=int, choices=DRAFTS, metavar="N", help="most drafts at a time (default: 4)")


def sampling_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """What `args` say of sampling, for `stream_generate`, checked: what is out of range is the parser's error.
    SchemaError for a schema that cannot be read."""
    names = [field.name for field in fields(SamplingParams)]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    try:
        SamplingParams(**given)
    except ValueError as error:
        parser.error(str(error))
    if args.preset is not None:
        given["preset"] = args.preset
    if args.json_schema is not None:
        given["json_schema"] = _read_schema(args.json_schema)
    return given


def _read_schema(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"The JSON schema cannot be read: {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The JSON schema {path} is not JSON: {error}.") from error
