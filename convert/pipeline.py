"""A conversion from its source to a folder that is complete, proved and ready to publish.

pull -> open -> forms -> write -> verify -> card -> the final name
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from qwen_mlx.convert.card import card
from qwen_mlx.convert.dwq import tune
from qwen_mlx.convert.folder import Request, finish, write
from qwen_mlx.convert.forms import AUTO, by_measurement, by_recipe, flat, nothing
from qwen_mlx.convert.opened import Opened, open_model
from qwen_mlx.convert.plan import Forms
from qwen_mlx.convert.progress import tokens_through
from qwen_mlx.convert.pull import pull
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.save import ACCOUNT, copy_companions, write_json, write_text
from qwen_mlx.convert.verify import objection, verify
from qwen_mlx.errors import ConversionError, TokenizerError
from qwen_mlx.evaluation.text import cut_windows, read_text
from qwen_mlx.load import DTYPES
from qwen_mlx.tokenizer import Tokenizer

TOKENS = 4096  # of the text, on which a conversion is proved
NOT_ASKED = "it was asked not to be compared with its source"


@dataclass(frozen=True)
class Options:
    """What a conversion is asked to do; `command` is how it was said."""

    hf_path: str
    mlx_path: Path
    revision: str | None = None
    form: Form | None = None  # one for all that can be quantized
    recipe: str | None = None  # a name of RECIPES, or "auto" for `target_bits`
    target_bits: float | None = None
    dwq: bool = False  # tune the scales afterwards
    text: Path | None = None  # to calibrate and verify on; the built-in sample without
    dequantize: bool = False
    dtype: str | None = None
    text_only: bool = False
    mtp: bool = True
    verify: bool = True
    force: bool = False
    command: str = ""


@dataclass(frozen=True)
class Words:
    """A text as tokens of the model."""

    windows: list[mx.array]
    vocab_size: int
    name: str
    sha256: str


def convert(options: Options) -> dict[str, Any]:
    """Make `options.mlx_path` of `options.hf_path`; returns the account that is written there as qwen_mlx.json.

    Raises `ModelNotFoundError` for a source that cannot be had, `CheckpointError` for what is wrong in it, and
    `ConversionError` for a request that makes no sense, a folder that exists, or a result that is not what its bits
    per weight let expect: that one stays there, marked as unverified.
    """
    if options.mlx_path.exists() and not options.force:
        raise ConversionError(
            f"{options.mlx_path} exists already; choose another --mlx-path, or --force to put the new model there."
        )
    origin = pull(options.hf_path, options.revision)
    opened = open_model(origin.path, dequantize=options.dequantize)
    if (options.form or options.recipe) and opened.quantized:
        raise ConversionError(
            f"{options.hf_path} is quantized already, and a second time would lose more; take the original, or make a "
            "float model of it with --dequantize first."
        )
    measures = options.recipe == AUTO or options.dwq
    words = read_words(opened, options.text) if options.verify or measures else None
    if measures and words is None:
        raise ConversionError(
            f"{options.hf_path} has no tokenizer.json to read a text with; take a recipe, and no --dwq."
        )
    request = Request(
        options.mlx_path,
        options.dtype or usual_dtype(opened),
        choose_forms(opened, options, words),
        {
            "source": {"id": origin.id, "hub": origin.hub, "revision": origin.revision, "kind": opened.source.kind},
            "command": options.command,
            "recipe": options.recipe,
            "dwq": options.dwq,
        },
        vision=not options.text_only,
        mtp=options.mtp,
    )
    account, odd = write(opened, request)
    for path in odd:
        print(f"{path} stays as it is: its size does not divide by the group size.", file=sys.stderr)
    if options.dwq:
        assert words is not None
        tune(request.partial, opened, words.windows, request.dtype)
    account |= prove(opened, request, words, account["bits_per_weight"]) if options.verify else unproved(NOT_ASKED)
    write_json(request.partial / ACCOUNT, account)
    source_card = origin.path / "README.md"
    text = source_card.read_text(encoding="utf-8") if source_card.is_file() else None
    write_text(request.partial / "README.md", card(request.partial, text))
    finish(request)
    if options.verify and not account["verified"] and account["proof"]:
        raise ConversionError(f"{options.mlx_path} is marked as unverified: {account['reason']}.")
    return account


def choose_forms(opened: Opened, options: Options, words: Words | None) -> Forms:
    if options.form is not None:
        return flat(options.form)
    if options.recipe != AUTO:
        return nothing if options.recipe is None else by_recipe(options.recipe, opened)
    if words is None or options.target_bits is None:
        raise ValueError("The recipe auto needs target_bits.")
    return by_measurement(opened, words.windows, words.vocab_size, options.target_bits)


def prove(opened: Opened, request: Request, words: Words | None, bits_per_weight: float) -> dict[str, Any]:
    """`verified`, `reason` and `proof` of the account."""
    if words is None:
        return unproved("its source has no tokenizer to read a text with")
    head = opened.head() if request.mtp else None
    with tokens_through("Verifying") as progress:
        found = verify(request.partial, opened.source, opened.model(), head, words.windows, words.vocab_size, progress)
    measured = asdict(found.comparison)
    measured["perplexity_source"] = measured.pop("perplexity_reference")
    proof = {
        "text": words.name,
        "sha256": words.sha256,
        **measured,
        "mtp_agreement": found.mtp_agreement,
        "mtp_agreement_source": found.mtp_agreement_source,
    }
    reason = objection(found, bits_per_weight)
    return {"verified": reason is None, "reason": reason, "proof": proof}


def unproved(reason: str) -> dict[str, Any]:
    return {"verified": False, "reason": reason, "proof": None}


def read_words(opened: Opened, file: Path | None) -> Words | None:
    """The text of `file`, or the built-in sample, by the source's own tokenizer; None where there is none."""
    text = read_text(file)
    if "tokenizer.json" not in opened.source.files:
        return None
    with TemporaryDirectory() as folder:
        copy_companions(opened.source, Path(folder))
        tokenizer = Tokenizer.load(Path(folder))
    if tokenizer.vocab_size > opened.config.text.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {opened.path} has {tokenizer.vocab_size} tokens and the model only "
            f"{opened.config.text.vocab_size}: they belong to different models."
        )
    windows = cut_windows(tokenizer.encode(text)[:TOKENS])
    name = "built-in sample" if file is None else file.name
    return Words(windows, tokenizer.vocab_size, name, hashlib.sha256(text.encode()).hexdigest())


def usual_dtype(opened: Opened) -> str:
    """What the source's config.json says, bfloat16 where that is no dtype of ours."""
    said = opened.source.config.get("text_config", opened.source.config).get("dtype")
    return said if isinstance(said, str) and said in DTYPES else "bfloat16"
