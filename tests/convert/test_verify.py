"""The proof of a conversion: its figures against NumPy, its memory, and what it finds in broken results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.convert.folder import Request, finish, write
from qwen_mlx.convert.forms import flat, nothing
from qwen_mlx.convert.opened import open_model
from qwen_mlx.convert.plan import Forms
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.verify import Proof, objection, verify
from qwen_mlx.evaluation.measures import Comparison
from qwen_mlx.hub import resolve
from qwen_mlx.load import load_model
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.qwen import Qwen
from tests.convert.test_source import fp8, write_fp8
from tests.layouts import released

DEMO = resolve("demo")
TALES = json.loads((Path(__file__).parents[1] / "golden/demo.json").read_text(encoding="utf-8"))
REAL = 2025  # tokens of the demo; the rows of its vocabulary behind them are padding


def windows() -> list[mx.array]:
    """Two tales as the demo tells them."""
    return [mx.array((TALES[name]["prompt_ids"] + TALES[name]["tokens"])[:60]) for name in ("tale", "long_ago")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo as a float and as a 4 bit model; not to be written to."""
    made: dict[str, Path] = {}

    def folder(form: str) -> Path:
        if form not in made:
            made[form] = convert(DEMO, tmp_path_factory.mktemp(form) / "model", FORMS[form])
        return made[form]

    return folder


FORMS: dict[str, Forms] = {"float": nothing, "4": flat(Form(4, 32))}


def convert(source: Path, mlx_path: Path, forms: Forms) -> Path:
    request = Request(mlx_path, "bfloat16", forms, {})
    write(open_model(source), request)
    finish(request)
    return mlx_path


def proof_of(folder: Path, source: Path = DEMO) -> Proof:
    opened = open_model(source)
    return verify(folder, opened.source, opened.model(), opened.head(), windows(), REAL)


def log_softmax(model: Qwen) -> np.ndarray:
    """[windows, T, real vocabulary] in float64"""
    logits = np.stack([np.array(model(window[None]))[0, :, :REAL] for window in windows()]).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_figures_are_those_of_numpy(converted: Callable[[str], Path]) -> None:
    found = proof_of(converted("4")).comparison
    ours, theirs = (log_softmax(load_model(f, dtype="float32"))[:, :-1] for f in (converted("4"), DEMO))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1).ravel()
    following = np.stack([np.array(window)[1:] for window in windows()])
    nll = [-np.take_along_axis(x, following[..., None], -1).mean() for x in (ours, theirs)]
    assert found.tokens == kl.size == 118
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_p999 == pytest.approx(np.quantile(kl, 0.999), rel=1e-3)
    assert found.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert [found.perplexity, found.perplexity_reference] == pytest.approx(np.exp(nll), rel=1e-4)


def test_draft_agreement_is_that_of_the_definition(converted: Callable[[str], Path]) -> None:
    found = proof_of(converted("4"))
    for folder, said in (converted("4"), found.mtp_agreement), (DEMO, found.mtp_agreement_source):
        model = load_model(folder, dtype="float32")
        head = load_mtp(folder, model)
        assert head is not None
        hits = []
        for window in windows():
            hidden, embedded = model.hidden(model.embed(window[None]), model.make_cache()), model.embed(window[None])
            drafts = model.logits(head(hidden[:, :-1], embedded[:, 1:], head.make_cache()))
            hits += (drafts.argmax(-1) == model.logits(hidden)[:, 1:].argmax(-1)).tolist()[0]
        assert said == pytest.approx(np.mean(hits))
        assert np.mean(hits) > 0.7


def test_a_sound_result_has_no_objection(converted: Callable[[str], Path]) -> None:
    found = proof_of(converted("float"))
    assert objection(found, 16.0) is None
    assert found.comparison.kl_mean < 1e-6
    assert found.comparison.top1_agreement == 1
    assert objection(proof_of(converted("4")), 4.6) is None


def broken(folder: Path, target: Path, file: str, change: Callable[[dict[str, mx.array]], object]) -> Path:
    shutil.copytree(folder, target)
    tensors = mx.load(str(target / file))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(target / file), tensors, {"format": "mlx"})
    return target


def reversed_taps(tensors: dict[str, mx.array]) -> None:
    for name in [name for name in tensors if name.endswith("conv1d.weight")]:
        tensors[name] = tensors[name][:, ::-1]


def swapped_halves(tensors: dict[str, mx.array]) -> None:
    left, right = mx.split(tensors["fc.weight"], 2, axis=1)
    tensors["fc.weight"] = mx.concatenate([right, left], axis=1)


def test_convolutions_that_run_backwards_are_refused(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(converted("float"), tmp_path / "model", "model.safetensors", reversed_taps)
    said = objection(proof_of(folder), 16.0)
    assert said is not None
    assert "a mean KL of at most 0.02" in said


def test_a_draft_head_put_together_wrongly_is_refused(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(converted("float"), tmp_path / "model", "mtp/model.safetensors", swapped_halves)
    said = objection(proof_of(folder), 16.0)
    assert said is not None
    assert "the draft head foretells" in said


@pytest.mark.parametrize(
    ("bits", "kl", "agreement", "refused"),
    [
        (16.0, 0.001, 0.99, False),
        (16.0, 0.1, 0.99, True),
        (16.0, 0.001, 0.8, True),
        (4.5, 0.1, 0.8, False),
        (4.5, float("nan"), 0.8, True),
        (2.5, 1.2, 0.5, False),
        (2.5, 2.0, 0.5, True),
        (2.5, 3.6, 0.12, True),
    ],
)
def test_bands(bits: float, kl: float, agreement: float, refused: bool) -> None:
    found = Proof(Comparison(100, kl, kl, agreement, 9.0, 9.0), None, None)
    assert (objection(found, bits) is not None) is refused


def test_a_head_that_foretells_nothing_in_the_source_either_is_refused() -> None:
    found = Proof(Comparison(100, 0.001, 0.01, 0.99, 9.0, 9.0), 0.008, 0.007)
    assert "no sound one" in str(objection(found, 16.0))


def test_a_source_that_cannot_be_loaded_is_compared_all_the_same(tmp_path: Path) -> None:
    """FP8: its rows are scaled as they are read."""
    source = write_fp8(tmp_path / "fp8", DEMO, fp8(released(DEMO)))
    opened = open_model(source)
    assert opened.source.kind == "FP8"
    folder = convert(source, tmp_path / "model", nothing)
    shutil.copy(DEMO / "tokenizer.json", folder)
    found = verify(folder, opened.source, opened.model(), opened.head(), windows(), REAL)
    assert found.comparison.kl_mean < 1e-3  # rounded to bfloat16, four bits finer than E4M3
    assert 0 < proof_of(folder).comparison.kl_mean < 0.5  # from the demo itself, whose weights are finer
