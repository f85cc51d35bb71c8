"""`python -m qwen_mlx.convert`: the options, and what is shown in the end."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_mlx.cli import Parser
from qwen_mlx.convert.folder import REQUEST, beside
from qwen_mlx.convert.forms import AUTO
from qwen_mlx.convert.pipeline import Options, convert
from qwen_mlx.convert.recipes import RECIPES, Form
from qwen_mlx.convert.upload import check_access, upload
from qwen_mlx.errors import UnverifiedError
from qwen_mlx.load import DTYPES

DEFAULT_RECIPE = "q4"
USUAL = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    recipe, form = _quantization(parser, args)
    if args.dwq and not (recipe or form):
        parser.error("--dwq needs -q")
    if (args.private or args.allow_unverified) and not args.upload_repo:
        parser.error("--private and --allow-unverified need --upload-repo")
    if args.upload_repo and not args.verify and not args.allow_unverified:
        parser.error("--upload-repo with --no-verify needs --allow-unverified")
    if args.upload_repo:
        check_access(args.upload_repo)
    options = Options(
        hf_path=args.hf_path,
        mlx_path=Path(args.mlx_path).expanduser(),
        revision=args.revision,
        form=form,
        recipe=recipe,
        target_bits=args.target_bits,
        dwq=args.dwq,
        text=args.text,
        dequantize=args.dequantize,
        dtype=args.dtype,
        text_only=args.text_only,
        mtp=args.mtp,
        verify=args.verify,
        force=args.force,
    )
    try:
        account = convert(options)
    except KeyboardInterrupt:
        partial = beside(options.mlx_path, "partial")
        if (partial / REQUEST).exists():
            print(f"What is finished is kept in {partial}; the same command goes on from there.", file=sys.stderr)
        raise
    except UnverifiedError as error:
        print(*_table(options.mlx_path, error.account), sep="\n")
        raise
    print(*_table(options.mlx_path, account), sep="\n")
    if args.upload_repo:
        upload(options.mlx_path, args.upload_repo, private=args.private, allow_unverified=args.allow_unverified)


def _parser() -> Parser:
    parser = Parser(prog="qwen-mlx convert", description="Convert, quantize, prove and publish a Qwen3.5 checkpoint.")
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="hub id, folder, or .gguf file")
    add("--revision", help="branch, tag or commit of the hub repository")
    add("--mlx-path", default="mlx_model", help="folder to write (default: mlx_model)")
    add("--force", action="store_true", help="put the new model in the place of an existing folder")
    add("--dtype", choices=DTYPES, help="of what is not quantized (default: as config.json says)")
    add("--quantize", "-q", action="store_true", help=f"quantize, by recipe {DEFAULT_RECIPE} unless told otherwise")
    add("--recipe", choices=[*RECIPES, AUTO], help="which tensors get which bits; auto measures (implies -q)")
    add("--target-bits", type=float, help="bits per weight that --recipe auto may use")
    add("--q-bits", type=int, help="the same bits for everything instead of a recipe")
    add("--q-group-size", type=int, help="weights that share a scale")
    add("--q-mode", choices=USUAL, help="kind of quantization (default: affine)")
    add("--dwq", action="store_true", help="tune the scales by mlx-lm's learned quantization; slow")
    add("--dequantize", "-d", action="store_true", help="make a float model of a quantized one")
    add("--text-only", action="store_true", help="drop the vision tower")
    add("--no-mtp", dest="mtp", action="store_false", help="drop the draft head")
    add("--text", type=Path, help="UTF-8 text to calibrate and verify on (default: the built-in sample)")
    add("--no-verify", dest="verify", action="store_false", help="do not compare the result with its source")
    add("--upload-repo", help="hub repository to publish the result in")
    add("--private", action="store_true", help="create that repository as a private one")
    add("--allow-unverified", action="store_true", help="publish a result that was not verified, too")
    return parser


def _quantization(parser: Parser, args: argparse.Namespace) -> tuple[str | None, Form | None]:
    """The recipe or the one form that is asked for, if any."""
    flat = [flag for flag in ("q_bits", "q_group_size", "q_mode") if getattr(args, flag) is not None]
    if args.dequantize and (args.quantize or args.recipe or flat):
        parser.error("choose either --quantize or --dequantize")
    if args.recipe and flat:
        parser.error(f"choose either --recipe or --{flat[0].replace('_', '-')}")
    if (args.recipe == AUTO) != (args.target_bits is not None):
        parser.error("--recipe auto and --target-bits belong together")
    if args.target_bits is not None and not 0 < args.target_bits < math.inf:
        parser.error(f"--target-bits must be a positive number, not {args.target_bits}")
    if flat and not args.quantize:
        parser.error(f"--{flat[0].replace('_', '-')} needs -q")
    if not flat:
        return args.recipe or (DEFAULT_RECIPE if args.quantize else None), None
    mode = args.q_mode or "affine"
    bits, group_size = USUAL[mode]
    bits = bits if args.q_bits is None else args.q_bits
    group_size = group_size if args.q_group_size is None else args.q_group_size
    if mode != "affine" and (bits, group_size) != USUAL[mode]:
        parser.error(f"--q-mode {mode} has {USUAL[mode][0]} bits in groups of {USUAL[mode][1]}")
    if bits not in AFFINE_BITS:
        parser.error(f"--q-bits must be one of {', '.join(map(str, AFFINE_BITS))}, not {bits}")
    if mode == "affine" and group_size not in AFFINE_GROUPS:
        parser.error(f"--q-group-size must be one of {', '.join(map(str, AFFINE_GROUPS))}, not {group_size}")
    return None, Form(bits, group_size, mode)


def _table(path: Path, account: dict[str, Any]) -> list[str]:
    proof = account["proof"] or {}
    rows = [
        ("folder", str(path)),
        ("bits per weight", f"{account['bits_per_weight']:.2f}"),
        ("size", f"{account['bytes'] / 1e6:,.1f} MB"),
        ("draft head", _part(account, "mtp")),
        ("vision tower", _part(account, "vision")),
    ]
    if proof:
        rows += [
            ("text", f"{proof['text']}, {proof['tokens']} tokens"),
            ("KL from the source, mean", f"{proof['kl_mean']:.3g}"),
            ("KL from the source, 99.9 %", f"{proof['kl_p999']:.3g}"),
            ("same likeliest token", f"{proof['top1_agreement']:.1%}"),
            ("perplexity", f"{proof['perplexity']:.3f}"),
            ("perplexity of the source", f"{proof['perplexity_source']:.3f}"),
        ]
    if proof and proof["mtp_agreement"] is not None:
        rows.append(("tokens that the draft head foretells", f"{proof['mtp_agreement']:.1%}"))
        rows.append(("tokens that the source's foretells", f"{proof['mtp_agreement_source']:.1%}"))
    rows.append(("verified", "yes" if account["verified"] else f"no: {account['reason']}"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def _part(account: dict[str, Any], part: str) -> str:
    return "kept" if account["kept"][part] else "dropped" if part in account["dropped"] else "none in the source"
