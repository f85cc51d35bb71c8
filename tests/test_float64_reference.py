"""The float64 reference and transformers' goldens, two independent roads to the same numbers, agree."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.float64_reference import Reference, logits
from tests.golden.checkpoints import VARIANTS, build
from tests.golden.compare import (
    BATCH_LENGTHS,
    GREEDY_LENGTHS,
    LENGTHS,
    MTP_LENGTHS,
    TOLERANCE,
    difference,
    load,
    logits_difference,
    sketch_difference,
)

INSIDE = 1e-4
"""Limit for hidden and cached values, which are smaller than logits."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(variant: str) -> dict[str, np.ndarray]:
    return load(variant)


@pytest.fixture(scope="module")
def checkpoint(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(variant, tmp_path_factory.mktemp(variant))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def inside(reference: Reference, golden: dict[str, np.ndarray]) -> dict[str, Any]:
    trace: dict[str, Any] = {}
    trace["final_norm"] = reference.hidden(golden["prompt_65_ids"].tolist(), trace)
    return trace


def test_checkpoint_is_the_one_the_goldens_were_made_from(checkpoint: Path, golden: dict[str, np.ndarray]) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == str(golden["checkpoint_sha256"])


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt(reference: Reference, golden: dict[str, np.ndarray], length: int) -> None:
    ours = reference.logits(golden[f"prompt_{length}_ids"].tolist())
    assert logits_difference(golden, length, ours) < TOLERANCE
    assert (ours.argmax(-1) == golden[f"prompt_{length}_argmax"]).all()


def test_logits_of_a_folder(checkpoint: Path, golden: dict[str, np.ndarray]) -> None:
    assert logits_difference(golden, 5, logits(checkpoint, golden["prompt_5_ids"].tolist())) < TOLERANCE


@pytest.mark.parametrize("part", ["layers", "mixers", "mlps", "final_norm"])
def test_hidden_states(inside: dict[str, Any], golden: dict[str, np.ndarray], part: str) -> None:
    ours = np.asarray(inside[part])[..., golden["positions"], :]
    assert difference(ours, golden[part]) < INSIDE


@pytest.mark.parametrize("state", ["recurrent", "conv", "keys", "values"])
def test_cached_state(inside: dict[str, Any], golden: dict[str, np.ndarray], state: str) -> None:
    names = [name for name in inside if name.startswith(state + "_")]
    assert len(names) == len({name.split(".")[0] for name in golden if name.startswith(state + "_")})
    assert max(sketch_difference(golden, name, inside[name]) for name in names) < INSIDE


@pytest.mark.parametrize("length", GREEDY_LENGTHS)
def test_greedy_tokens(reference: Reference, golden: dict[str, np.ndarray], length: int) -> None:
    tokens = golden[f"greedy_{length}_tokens"]
    prompt = golden[f"prompt_{length}_ids"].tolist()
    ours = reference.logits(prompt + tokens[:-1].tolist())[length - 1 :]
    assert (ours.argmax(-1) == tokens).all()
    assert difference(ours[:, golden["columns"]], golden[f"greedy_{length}_columns"]) < TOLERANCE
    assert difference(ours[-1], golden[f"greedy_{length}_last"]) < TOLERANCE


@pytest.mark.parametrize("row", range(len(BATCH_LENGTHS)))
def test_padding_on_the_left_changes_nothing(reference: Reference, golden: dict[str, np.ndarray], row: int) -> None:
    length, tokens = BATCH_LENGTHS[row], golden["batch_tokens"][row]
    prompt = golden["batch_ids"][row, -length:].tolist()
    ours = reference.logits(prompt + tokens[:-1].tolist())[length - 1 :]
    assert (ours.argmax(-1) == tokens).all()
    assert difference(ours[0], golden["batch_first"][row]) < TOLERANCE
    assert difference(ours[-1], golden["batch_last"][row]) < TOLERANCE


@pytest.mark.parametrize("length", MTP_LENGTHS)
def test_mtp_slots(reference: Reference, golden: dict[str, np.ndarray], length: int) -> None:
    ids = golden[f"prompt_{length}_ids"].tolist()
    ours = reference.mtp(reference.hidden(ids), [*ids[1:], int(golden[f"mtp_{length}_next"])])
    assert sketch_difference(golden, f"mtp_{length}_hidden", ours) < INSIDE
    assert difference((ours @ reference.head.T)[:, golden["columns"]], golden[f"mtp_{length}_columns"]) < TOLERANCE


@pytest.mark.parametrize("length", MTP_LENGTHS)
def test_mtp_drafts(reference: Reference, golden: dict[str, np.ndarray], length: int) -> None:
    drafts, ours = reference.drafts(golden[f"prompt_{length}_ids"].tolist(), 4)
    assert drafts == golden[f"mtp_{length}_drafts"].tolist()
    assert difference(ours, golden[f"mtp_{length}_last"]) < TOLERANCE
