"""`python -m qwen_mlx.perplexity`: what goes to stdout, what to stderr, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx import perplexity as command
from qwen_mlx.cli import run
from qwen_mlx.hub import resolve
from qwen_mlx.load import load_model

TALES = json.loads((Path(__file__).parent / "golden" / "demo.json").read_text(encoding="utf-8"))["fresh_tales"]


def call(*arguments: str) -> int:
    """The exit code of the command, run in this process on the demo model."""
    try:
        return run(lambda: command.main(["--model", "demo", *arguments]))
    except SystemExit as end:
        return int(str(end.code))


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in 4 bits."""
    folder = tmp_path_factory.mktemp("four") / "demo"
    shutil.copytree(resolve("demo"), folder)
    model = load_model(folder, dtype="float32")
    nn.quantize(model, group_size=64, bits=4)
    tensors = {f"language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    tensors = {n: a[..., None] if n.endswith("conv1d.weight") else a for n, a in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "tale.txt"
    file.write_text(TALES["texts"][0], encoding="utf-8")
    return file


def test_the_table_alone_goes_to_stdout(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--text", str(text)) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"tokens predicted  \d+\nperplexity +[\d.]+\n", out)
    assert err == ""


def test_one_tale_is_as_well_predicted_as_it_should_be(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--text", str(text), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(np.exp(TALES["mean_loss"]), rel=0.3)
    assert {key: found[key] for key in ("model", "reference", "text", "window")} == {
        "model": "demo",
        "reference": None,
        "text": str(text),
        "window": 512,
    }


def test_kl_compares_with_the_reference(four_bits: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--model", str(four_bits), "--kl", "demo", "--text", str(text), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    call("--text", str(text), "--json")
    assert found["perplexity_reference"] == pytest.approx(json.loads(capsys.readouterr().out)["perplexity"])
    assert 1e-4 < found["kl_mean"] < found["kl_p999"] < 3
    assert 0.8 < found["top1_agreement"] <= 1
    call("--model", str(four_bits), "--kl", "demo", "--text", str(text))
    assert capsys.readouterr().out.count("\n") == 6


def test_a_text_of_fewer_tokens_than_layers(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress begins more than once: no token is through all of the first layers."""
    assert call("--text", str(text), "--max-tokens", "5") == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["tokens", "predicted", "4"]


def test_windows_and_max_tokens_act(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for options in ([], ["--max-tokens", "33"], ["--max-tokens", "33", "--window", "11"]):
        call("--text", str(text), "--json", *options)
        counts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert counts[0] > 60
    assert counts[1:] == [32, 30]


def test_without_a_text_the_sample_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--max-tokens", "40", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["tokens"]) == (None, 39)


@pytest.fixture(scope="module")
def another_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with two ids exchanged: as many tokens, other ones."""
    folder = tmp_path_factory.mktemp("vocabulary") / "demo"
    shutil.copytree(resolve("demo"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["Once"] = ids["Once"], ids["e"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_another_vocabulary_is_refused(
    another_vocabulary: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--kl", str(another_vocabulary), "--text", str(text)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*do not have one vocabulary.*\n", err)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "holds no text"), (b"\xfe", "not UTF-8"), (b"a", "nothing to predict"), (None, "No such file")],
    ids=["empty", "not_utf8", "one_token", "missing"],
)
def test_a_bad_text_is_one_sentence(
    data: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    if data is not None:
        file.write_bytes(data)
    assert call("--text", str(file)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: .*{reason}.*\n", err)


@pytest.mark.parametrize("flag", [["--window", "1"], ["--window", "0"], ["--max-tokens", "none"]], ids=" ".join)
def test_a_flag_out_of_range_is_one_sentence(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*flag) == 2
    assert re.fullmatch(rf"error: .*{flag[0]}.*\n", capsys.readouterr().err)
