"""The converted folder in mlx-vlm, where that is installed: the same logits and tower, and mtp/ as its drafter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.load import load_model
from qwen_mlx.load_mtp import load_mtp
from tests.convert.test_folder import FORMS, TOKENS, convert
from tests.layouts import released, write

vlm = pytest.importorskip("mlx_vlm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

VISION = {
    "model_type": "qwen3_5", "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
    "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16,
    "out_hidden_size": 128, "deepstack_visual_indexes": [],
}  # fmt: skip
SHAPES = {
    "patch_embed.proj.weight": (32, 3, 2, 16, 16), "patch_embed.proj.bias": (32,), "pos_embed.weight": (16, 32),
    "blocks.0.norm1.weight": (32,), "blocks.0.norm1.bias": (32,), "blocks.0.norm2.weight": (32,),
    "blocks.0.norm2.bias": (32,), "blocks.0.attn.qkv.weight": (96, 32), "blocks.0.attn.qkv.bias": (96,),
    "blocks.0.attn.proj.weight": (32, 32), "blocks.0.attn.proj.bias": (32,),
    "blocks.0.mlp.linear_fc1.weight": (64, 32), "blocks.0.mlp.linear_fc1.bias": (64,),
    "blocks.0.mlp.linear_fc2.weight": (32, 64), "blocks.0.mlp.linear_fc2.bias": (32,),
    "merger.norm.weight": (32,), "merger.norm.bias": (32,), "merger.linear_fc1.weight": (128, 128),
    "merger.linear_fc1.bias": (128,), "merger.linear_fc2.weight": (128, 128), "merger.linear_fc2.bias": (128,),
}  # fmt: skip


def with_vision(source: Path, folder: Path) -> Path:
    tower = {f"model.visual.{name}": mx.random.normal(shape).astype(mx.bfloat16) for name, shape in SHAPES.items()}
    write(folder, source, released(source) | tower)
    config = json.loads((folder / "config.json").read_text())
    ids = {"image_token_id": 355, "video_token_id": 356, "vision_start_token_id": 357, "vision_end_token_id": 358}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": VISION} | ids))
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["a-r1-d32", "b-r2-d64"])
def test_same_logits_same_tower_same_drafts(
    form: str, variant: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from mlx_vlm.speculative.drafters import load_drafter
    from mlx_vlm.utils import load_model as load_peer

    source = with_vision(checkpoint_of(variant), tmp_path / "source")
    folder = tmp_path / "model"
    convert(source, folder, FORMS[form])
    peer, original = load_peer(folder), load_peer(source)
    towers = [dict(vlm_parameters(model.vision_tower)) for model in (peer, original)]
    assert towers[0].keys() == towers[1].keys()
    assert all(mx.array_equal(towers[0][name], towers[1][name]).item() for name in towers[0])

    drafter, kind = load_drafter(str(folder / "mtp"))
    assert kind == "mtp"
    shutil.rmtree(folder / "qwen_mlx")  # mlx-vlm has the rounded gains alone
    ours = load_model(folder, dtype="float32")
    head = load_mtp(folder, ours)
    assert head is not None
    for model in (peer, drafter):
        model.set_dtype(mx.float32)
    logits = peer.language_model(TOKENS).logits
    # Embeddings of this mode come out in bfloat16, whatever the dtype of the model.
    tolerance = 5e-3 if form == "mxfp4" else 5e-4
    assert np.abs(np.array(ours(TOKENS)) - np.array(logits)).max() < tolerance
    x = mx.random.normal((1, 5, 128))
    drafts = drafter._forward_hidden(x, x, None, mx.arange(5)[None])
    assert np.abs(np.array(head(x, x, head.make_cache())) - np.array(drafts)).max() < 5e-4


def vlm_parameters(model: object) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())  # type: ignore[attr-defined]
