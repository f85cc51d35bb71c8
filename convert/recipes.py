"""Which form each matrix takes: a table of recipes, and the form that a recipe gives to a path.

What made the table, as `benchmarks/quantization.py` and others measured it:

- A quarter of a bit more divides the divergence by 1.4 to 1.5 where it makes the grid finer, and by 1.2 where it halves
  the groups from 128 to 64. So groups of 128, and the bits they save where they matter.
- The head's error is the logits' own; the first and the last eighth of the layers, down_proj and v_proj lose more by
  the same rounding than the others do. So does out_proj of the Gated DeltaNet, in Unsloth's measurements of the
  released models (https://unsloth.ai/docs/models/qwen3.5/gguf-benchmarks).
- There, too, the experts bear fewer bits than all that stands beside them, which is 5 % of the weights.
- in_proj_a and in_proj_b make the decay and the step of the delta rule, and a router chooses experts: little to save,
  much to lose.

The MTP head is one layer beside all others and is not in the table: it takes `MTP_FORM` in every recipe. The demo's
foretells as many tokens in 5 bits as in float, and fewer in 4; a refused draft costs a pass of the whole model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen_mlx.config import TextConfig

FLOAT_BITS = 16
# Never below 8 bits: gates of the delta rule, and what chooses and weighs experts.
GATES = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.gate", "mlp.shared_expert_gate")


@dataclass(frozen=True, order=True)
class Form:
    """How `mx.quantize` stores a matrix: bits of a weight, weights that share a scale, and the mode."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    @property
    def bits_per_weight(self) -> float:
        """Scales counted: an affine group has a scale and a bias of 16 bits, one of the other modes a scale of 8."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def fits(self, size: int) -> bool:
        """Whether rows of `size` weights can be cut into its groups."""
        return size % self.group_size == 0


MTP_FORM = Form(6, 128)


@dataclass(frozen=True)
class Recipe:
    """`bits` for every matrix but those that are named by the end of their path: `raised` in all layers, `edges` in the
    first and the last eighth of them. "tied" is an embedding that is the head as well, "*" every matrix.

    `beside_experts` is for what every token meets in a mixture of experts, where the experts are most of the weights.
    """

    bits: int
    group_size: int
    raised: Mapping[str, int] = field(default_factory=dict)
    edges: Mapping[str, int] = field(default_factory=dict)
    beside_experts: int = 0


RECIPES = {
    "q3": Recipe(
        3,
        128,
        raised={"tied": 4, "lm_head": 5, "down_proj": 4, "out_proj": 4, "v_proj": 5},
        edges={"*": 4, "down_proj": 5},
        beside_experts=5,
    ),
    "q4": Recipe(
        4,
        128,
        raised={"tied": 5, "lm_head": 6, "down_proj": 5, "out_proj": 5, "v_proj": 6},
        edges={"*": 5, "down_proj": 6},
        beside_experts=6,
    ),
    "q4-gdn": Recipe(4, 128, raised={"in_proj_qkv": 5, "in_proj_z": 5, "out_proj": 5}),
    "q6": Recipe(6, 128, raised={"lm_head": 8, "v_proj": 8}, edges={"down_proj": 8}, beside_experts=8),
    "q8": Recipe(8, 64),
}


def form_of(recipe: Recipe, path: str, config: TextConfig) -> Form:
    """The form of the matrix at `path`, such as `model.layers.3.mlp.up_proj` or `lm_head`.

    Every matrix has one; where its groups do not divide the rows (`Form.fits`), whoever converts leaves the matrix as
    it is and says so.
    """
    return Form(_bits(recipe, path, config), recipe.group_size)


def _bits(recipe: Recipe, path: str, config: TextConfig) -> int:
    name = "tied" if config.tie_word_embeddings and path.endswith("embed_tokens") else path.rpartition(".")[2]
    wanted = [recipe.raised.get(name, recipe.bits), lowest_bits(path)]
    if match := re.search(r"layers\.(\d+)\.", path):
        layer, layers = int(match[1]), config.num_hidden_layers
        eighth = max(layers // 8, 1)
        if not eighth <= layer < layers - eighth:
            wanted += [recipe.edges.get("*", 0), recipe.edges.get(name, 0)]
        if config.moe and "switch_mlp" not in path:
            wanted.append(recipe.beside_experts)
    return max(wanted)


def lowest_bits(path: str) -> int:
    """What no recipe and no budget goes below at this path."""
    return 8 if path.endswith(GATES) else 2


def bits_per_weight(sizes: Mapping[str, int], forms: Mapping[str, Form | None]) -> float:
    """Mean over all weights; `sizes` counts them by path, and what has no form there is 16 bits wide."""
    bits = 0.0
    for path, size in sizes.items():
        form = forms.get(path)
        bits += size * (form.bits_per_weight if form else FLOAT_BITS)
    return bits / sum(sizes.values())
