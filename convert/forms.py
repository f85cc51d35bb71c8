"""Which form a conversion gives to each module: that of its flags, of a recipe, or of a measurement."""

from collections.abc import Sequence

import mlx.core as mx

from qwen_mlx.convert.opened import Opened
from qwen_mlx.convert.plan import Forms
from qwen_mlx.convert.progress import tokens_through
from qwen_mlx.convert.recipes import MTP_FORM, RECIPES, Form, form_of, lowest_bits
from qwen_mlx.convert.sensitivity import allocate, possible_forms, quantizable, sensitivity
from qwen_mlx.errors import ConversionError
from qwen_mlx.load import parameters

AUTO = "auto"
WINDOWS = 2  # of the text: a measurement passes them some hundred times
BITS = (2, 3, 4, 5, 6, 8)  # among which a measurement chooses


def nothing(path: str) -> None:
    """Every module stays as it is."""


def flat(form: Form) -> Forms:
    """One form for all but the gates, which need 8 bits."""
    safe = form if form.mode == "affine" else Form(8)

    def forms(path: str) -> Form:
        lowest = lowest_bits(path)
        return form if form.bits >= lowest else Form(lowest, safe.group_size)

    return forms


def by_recipe(name: str, opened: Opened) -> Forms:
    recipe, config = RECIPES[name], opened.config.text
    return lambda path: MTP_FORM if path.startswith("mtp.") else form_of(recipe, path, config)


def by_measurement(opened: Opened, windows: Sequence[mx.array], vocab_size: int, target_bits: float) -> Forms:
    """The forms that lose least on `windows` at `target_bits` per weight; holds the whole float model in memory.

    Raises `ConversionError` for a target that no forms can meet.
    """
    model = opened.model()
    matrices = quantizable(model)
    # By the path of its module; what is no matrix stays as it is, and counts.
    sizes = {name.removesuffix(".weight"): int(array.size) for name, array in parameters(model).items()}
    fitting = [g for g in (128, 64) if all(matrix.weight.shape[-1] % g == 0 for matrix in matrices.values())]
    choices = [Form(bits, fitting[0] if fitting else 32) for bits in BITS]
    possible = {path: dict.fromkeys(forms, 0.0) for path, forms in possible_forms(matrices, choices).items() if forms}
    try:
        allocate(possible, sizes, target_bits)
    except ValueError as error:  # before the long measurement
        raise ConversionError(str(error).replace("target_bits", "--target-bits")) from None
    loaded = opened.loaded(mx.float32)
    with tokens_through("Measuring") as progress:
        measured = sensitivity(loaded, windows[:WINDOWS], choices, vocab_size=vocab_size, progress=progress)
    chosen = allocate(measured, sizes, target_bits)
    return lambda path: MTP_FORM if path.startswith("mtp.") else chosen.get(path)
