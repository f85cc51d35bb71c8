"""Each mistake of `traps.py`, made on purpose, moves the numbers further than the goldens' tolerance allows.

Tests that cannot see a mistake prove nothing. Those that the goldens barely see have unit tests in test_layers.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.errors import CheckpointError
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from tests.golden.compare import TOLERANCE, load, logits_difference
from tests.model import traps
from tests.model.test_golden import (
    Golden,
    batch_difference,
    batch_logits,
    greedy_difference,
    greedy_logits,
    prompt_logits,
)

Check = Callable[[Qwen, Golden], float]
Plant = Callable[[Qwen, pytest.MonkeyPatch], None]
DENSE, GROUPED, MOE = "b-r2-d64", "a-r1-d32", "d-moe"


def prompt(model: Qwen, golden: Golden) -> float:
    return logits_difference(golden, 65, prompt_logits(model, golden, 65))


def continuation(model: Qwen, golden: Golden) -> float:
    return greedy_difference(golden, 5, greedy_logits(model, golden, 5))


def batch(model: Qwen, golden: Golden) -> float:
    return batch_difference(golden, batch_logits(model, golden))


TRAPS: list[tuple[str, Check, Plant]] = [
    (DENSE, prompt, traps.gate_before_the_norm),
    (DENSE, prompt, traps.gated_norm_is_zero_centred),
    (DENSE, prompt, traps.sigmoid_for_silu),
    (DENSE, prompt, traps.key_heads_tiled),
    (DENSE, prompt, traps.taps_reversed),
    (DENSE, prompt, traps.a_and_b_exchanged),
    (DENSE, prompt, traps.bias_behind_softplus),
    (DENSE, prompt, traps.decay_after_the_update),
    (DENSE, prompt, traps.queries_not_scaled),
    (DENSE, prompt, traps.rms_eps_of_1e_5),
    (DENSE, prompt, traps.q_proj_split_in_halves),
    (DENSE, prompt, traps.rotary_pairs_adjacent),
    (DENSE, prompt, traps.state_in_bfloat16),
    (DENSE, prompt, traps.gains_in_bfloat16),
    (DENSE, prompt, traps.softplus_in_bfloat16),
    (DENSE, prompt, traps.queries_and_keys_in_bfloat16),
    (DENSE, prompt, traps.a_log_in_bfloat16),
    (DENSE, prompt, traps.gated_norm_in_bfloat16),
    (DENSE, prompt, traps.one_not_added_to_the_gains),
    (DENSE, prompt, traps.one_added_twice_to_the_gains),
    (DENSE, prompt, traps.head_norms_not_zero_centred),
    (DENSE, prompt, traps.embedding_as_head_of_an_untied_model),
    (DENSE, prompt, traps.theta_of_another_default),
    (DENSE, prompt, traps.silu_for_sigmoid_in_attention),
    (GROUPED, prompt, traps.kv_heads_tiled),
    (DENSE, prompt, traps.no_mask),
    (DENSE, prompt, traps.second_norm_before_the_mixer_is_added),
    (GROUPED, batch, traps.padding_enters_the_convolution),
    (GROUPED, batch, traps.padding_is_attended_to),
    (GROUPED, batch, traps.padding_is_attended_to_from_the_second_token_on),
    (GROUPED, continuation, traps.window_forgotten),
    (GROUPED, continuation, traps.window_kept_behind_the_convolution),
    (GROUPED, continuation, traps.state_forgotten),
    (GROUPED, continuation, traps.state_not_stored),
    (GROUPED, continuation, traps.positions_start_again),
    (MOE, prompt, traps.experts_not_renormalised),
    (MOE, prompt, traps.gate_and_up_of_experts_exchanged),
    (MOE, prompt, traps.shared_expert_not_gated),
    (MOE, prompt, traps.one_expert_less),
]


@pytest.mark.parametrize(("variant", "check", "plant"), [pytest.param(*trap, id=trap[2].__name__) for trap in TRAPS])
def test_planted_trap_is_noticed(
    variant: str,
    check: Check,
    plant: Plant,
    checkpoint_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(checkpoint_of(variant), dtype="float32")
    plant(model, monkeypatch)
    assert check(model, load(variant)) > TOLERANCE


@pytest.mark.parametrize(("variant", "check"), dict.fromkeys(trap[:2] for trap in TRAPS))
def test_without_a_trap_there_is_nothing_to_notice(
    variant: str, check: Check, checkpoint_of: Callable[[str], Path]
) -> None:
    assert check(load_model(checkpoint_of(variant), dtype="float32"), load(variant)) < TOLERANCE


@pytest.mark.parametrize("variant", [DENSE, MOE])
def test_float32_tensors_of_the_release_survive_a_bfloat16_load(
    variant: str, model_of: Callable[[str, str], Qwen]
) -> None:
    exact, half = (
        {n: a for n, a in tree_flatten(model_of(variant, dtype).parameters()) if n.endswith(("A_log", "norm.weight"))}
        for dtype in ("float32", "bfloat16")
    )
    assert exact.keys() == half.keys()
    assert [n for n in exact if not np.array_equal(exact[n], half[n])] == []


def altered_copy(source: Path, folder: Path, config: dict[str, Any], extra: dict[str, mx.array] | None = None) -> Path:
    """The checkpoint `source` with another config.json and further tensors."""
    (folder / "config.json").write_text(json.dumps(config))
    tensors = mx.load(str(source / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | (extra or {}))
    return folder


def test_theta_has_no_default(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((checkpoint_of(DENSE) / "config.json").read_text())
    del config["text_config"]["rope_parameters"]["rope_theta"]
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_model(altered_copy(checkpoint_of(DENSE), tmp_path, config))


def test_head_stored_beside_a_tied_embedding_is_not_used(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((checkpoint_of(GROUPED) / "config.json").read_text())
    folder = altered_copy(checkpoint_of(GROUPED), tmp_path, config, {"lm_head.weight": mx.ones((384, 128))})
    assert prompt(load_model(folder, dtype="float32"), load(GROUPED)) < TOLERANCE


@pytest.mark.parametrize("variant", [DENSE, GROUPED], ids=["untied", "tied"])
@pytest.mark.parametrize("place", ["outside", "text_config"])
def test_tying_may_be_said_in_either_place(
    variant: str, place: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((checkpoint_of(variant) / "config.json").read_text())
    del (config["text_config"] if place == "outside" else config)["tie_word_embeddings"]
    folder = altered_copy(checkpoint_of(variant), tmp_path, config)
    assert prompt(load_model(folder, dtype="float32"), load(variant)) < TOLERANCE
