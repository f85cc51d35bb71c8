"""A conversion from its source to a folder that is complete, proved and ready to publish.

pull -> open -> forms -> write -> verify -> card -> the final name
"""

import hashlib
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from qwen_mlx.config import read_json
from qwen_mlx.convert.card import card
from qwen_mlx.convert.dwq import tune
from qwen_mlx.convert.folder import Request, check_place, claimed, finish, write
from qwen_mlx.convert.forms import AUTO, by_measurement, by_recipe, flat, nothing
from qwen_mlx.convert.opened import Opened, open_model
from qwen_mlx.convert.plan import Forms
from qwen_mlx.convert.progress import tokens_through
from qwen_mlx.convert.pull import Origin, pull
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.save import ACCOUNT, copy_companions, write_json, write_text
from qwen_mlx.convert.source import Source
from qwen_mlx.convert.verify import objection, verify
from qwen_mlx.errors import ConversionError, TokenizerError, UnverifiedError
from qwen_mlx.evaluation.text import WINDOW, cut_windows, read_text
from qwen_mlx.load import DTYPES
from qwen_mlx.tokenizer import Tokenizer

PROVING = 8  # windows of the text, at most half of it, on which nothing was learned
NOT_ASKED = "it was asked not to be compared with its source"


@dataclass(frozen=True)
class Options:
    """What a conversion is asked to do."""

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


@dataclass(frozen=True)
class Words:
    """A text as tokens of the model: what may be learned from, and what the result is proved on."""

    learning: list[mx.array]
    proving: list[mx.array]
    vocab_size: int
    name: str
    sha256: str


def convert(options: Options) -> dict[str, Any]:
    """Make `options.mlx_path` of `options.hf_path`; returns the account that is written there as qwen_mlx.json.

    Raises `ModelNotFoundError` for a source that cannot be had, `CheckpointError` for what is wrong in it, and
    `ConversionError` for a request that makes no sense or something in the way; `UnverifiedError` for a result that is
    not what its bits per weight let expect: it is marked as such, and does not take the place of an older folder.
    """
    text = read_text(options.text)
    origin = pull(options.hf_path, options.revision)
    check_place(options.mlx_path, origin.path, force=options.force)
    vision, mtp = not options.text_only, options.mtp
    opened = open_model(origin.path, dequantize=options.dequantize, vision=vision, mtp=mtp)
    if (options.form or options.recipe) and opened.quantized:
        raise ConversionError(
            f"{options.hf_path} is quantized already, and a second time would lose more; take the original, or make a "
            "float model of it with --dequantize first."
        )
    learns = options.recipe == AUTO or options.dwq
    words = read_words(opened, options, text) if options.verify or learns else None
    if learns and (words is None or not words.learning):
        raise ConversionError(
            "Measuring and tuning need a tokenizer.json in the source and a text of at least two windows, "
            f"{2 * WINDOW} tokens; give a longer --text, or take another recipe and no --dwq."
        )
    request = Request(
        options.mlx_path,
        options.dtype or usual_dtype(opened.source),
        choose_forms(opened, options, words),
        {
            "source": _source(origin, opened.source.kind),
            "command": said(options, origin.id),
            "recipe": options.recipe,
            "dwq": options.dwq,
            "learned_from": words.sha256 if words and learns else None,
        },
        vision=vision,
        mtp=mtp,
    )
    with claimed(request):
        return _convert(opened, options, request, words, _source_card(origin.path))


def _convert(
    opened: Opened, options: Options, request: Request, words: Words | None, source_card: str | None
) -> dict[str, Any]:
    account = write(opened, request)
    for path in account["left_float"]:
        print(f"{path} stays as it is: its size does not divide by the group size.", file=sys.stderr)
    if options.dwq and words:
        tune(request.partial, opened, words.learning, request.dtype)
    account |= prove(opened, request, words, account["bits_per_weight"]) if options.verify else unproved(NOT_ASKED)
    if account["verified"] and account["source"]["verified"] is False:
        account |= {"verified": False, "reason": "it is as its source, which is not verified"}
    write_json(request.partial / ACCOUNT, account)
    write_text(request.partial / "README.md", card(request.partial, source_card))
    if account["proof"] and not account["verified"]:
        if options.mlx_path.exists():
            where = f"it is in {request.partial}, and {options.mlx_path} is left as it was"
        else:
            finish(request)
            where = f"it is in {options.mlx_path}, marked as unverified"
        raise UnverifiedError(f"The result is not sound: {account['reason']}; {where}.", account)
    finish(request)
    return account


def said(options: Options, source: str) -> str:
    """The command that makes the same again, for everybody to see: without folders of this machine."""
    form = options.form
    words = ["python -m qwen_mlx.convert --hf-path", shlex.quote(source)]
    words += [f"--revision {shlex.quote(options.revision)}"] if options.revision else []
    words += [f"-q --q-bits {form.bits} --q-group-size {form.group_size} --q-mode {form.mode}"] if form else []
    words += [f"--recipe {options.recipe}"] if options.recipe else []
    words += [f"--target-bits {options.target_bits}"] if options.target_bits is not None else []
    words += [f"--text {shlex.quote(options.text.name)}"] if options.text else []
    words += [f"--dtype {options.dtype}"] if options.dtype else []
    flags = {"--dwq": options.dwq, "--dequantize": options.dequantize, "--text-only": options.text_only,
             "--no-mtp": not options.mtp, "--no-verify": not options.verify}  # fmt: skip
    return " ".join([*words, *(flag for flag, given in flags.items() if given)])


def _source(origin: Origin, kind: str) -> dict[str, Any]:
    """Where the weights come from; a conversion names what it was made of, and whether it was sound."""
    account = origin.path / ACCOUNT
    before = read_json(account) if account.is_file() else {}
    first = before.get("source")
    if isinstance(first, dict) and not origin.hub:
        kept = {name: first.get(name) for name in ("id", "hub", "revision")}
        return {**kept, "kind": kind, "by": before.get("command"), "verified": before.get("verified")}
    said = {"id": origin.id, "hub": origin.hub, "revision": origin.revision, "kind": kind}
    return {**said, "by": None, "verified": before.get("verified")}


def _source_card(path: Path) -> str | None:
    file = path / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def choose_forms(opened: Opened, options: Options, words: Words | None) -> Forms:
    if options.form is not None:
        return flat(options.form)
    if options.recipe != AUTO:
        return nothing if options.recipe is None else by_recipe(options.recipe, opened)
    if words is None or options.target_bits is None:
        raise ValueError("The recipe auto needs target_bits.")
    return by_measurement(opened, words.learning, words.vocab_size, options.target_bits)


def prove(opened: Opened, request: Request, words: Words | None, bits_per_weight: float) -> dict[str, Any]:
    """`verified`, `reason` and `proof` of the account."""
    if words is None:
        return unproved("its source has no tokenizer to read a text with")
    head = opened.head() if request.mtp else None
    with tokens_through("Verifying") as progress:
        found = verify(request.partial, opened.source, opened.model(), head, words.proving, words.vocab_size, progress)
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


def read_words(opened: Opened, options: Options, text: str) -> Words | None:
    """`text` by the source's own tokenizer, the last windows kept for the proof; None where there is no tokenizer."""
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
    windows = cut_windows(tokenizer.encode(text))
    proving = min(PROVING, max(1, len(windows) // 2))
    name = "built-in sample" if options.text is None else options.text.name
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Words(windows[:-proving], windows[-proving:], tokenizer.vocab_size, name, sha256)


def usual_dtype(source: Source) -> str:
    """That of the stored matrices, or of their scales; of what is unpacked as float32 (FP8, GGUF) bfloat16."""
    scales = [found.dtype for name, found in source.text.items() if name.endswith(".scales")]
    floats = [found.dtype for found in source.text.values() if found.ndim > 1 and found.dtype in DTYPES.values()]
    stored = Counter(dtype for dtype in scales or floats if dtype in DTYPES.values()).most_common(1)
    names = {dtype: name for name, dtype in DTYPES.items()}
    if not stored or (stored[0][0] == mx.float32 and source.kind in ("FP8", "GGUF")):
        return "bfloat16"
    return names[stored[0][0]]
