"""Prompts in files: saved and loaded = never saved; and what makes a file another model's, each file of a model folder
and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx import PromptCache, load, load_prompt_cache, save_prompt_cache, stream_generate
from qwen_mlx.cache.file import Fingerprint
from qwen_mlx.checkpoint import read_header
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.prompt_file import fingerprint
from qwen_mlx.errors import CheckpointError, PromptCacheError
from qwen_mlx.hub import resolve
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

PARTS = ("model", "tokenizer", "template", "dtype")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model, to be changed."""
    return Path(shutil.copytree(resolve("demo"), tmp_path / "demo"))


def of(folder: Path, dtype: str = "float32") -> Fingerprint:
    return fingerprint(*load(folder, dtype=dtype))


def differ(one: Fingerprint, other: Fingerprint) -> list[str]:
    return [part for part in PARTS if getattr(one, part) != getattr(other, part)]


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def fine_tune(folder: Path) -> None:
    """One matrix has other values; names, shapes and sizes stay."""
    file = folder / "model.safetensors"
    header = max(read_header(file).values(), key=lambda header: header.nbytes)
    assert header.dtype in ("BF16", "F16", "F32")
    with file.open("r+b") as stream:
        stream.seek(header.offset)
        data = stream.read(header.nbytes)
        stream.seek(header.offset)
        stream.write(data[4:] + data[:4])


def change_bos(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|endoftext|>" if config.get("bos_token") is None else None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        pytest.param(edit_text("config.json", "{", "{ "), "model", id="configuration"),
        pytest.param(fine_tune, "model", id="fine_tuned_weights"),
        pytest.param(edit_text("tokenizer.json", "{", "{ "), "tokenizer", id="tokenizer"),
        pytest.param(edit_text("chat_template.jinja", "{", " {"), "template", id="template"),
        pytest.param(change_bos, "template", id="special_tokens"),
    ],
)
def test_a_change_in_one_file_is_a_change_in_one_part(change: Callable[[Path], None], part: str, folder: Path) -> None:
    before = of(folder)
    change(folder)
    assert differ(of(folder), before) == [part]


def test_another_dtype(folder: Path) -> None:
    assert differ(of(folder, "bfloat16"), of(folder)) == ["dtype"]
    assert of(folder, "bfloat16").dtype == "bfloat16"


def test_other_names_of_tensors_are_another_model(folder: Path) -> None:
    before, file = fingerprint(*load(folder)), folder / "model.safetensors"
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "mlx", "written": "anew, with a header of another length"})
    model, tokenizer = load(folder)
    assert differ(fingerprint(model, tokenizer), before) == ["model"]


def test_exact_gains_belong_to_the_model(folder: Path) -> None:
    model, tokenizer = load(folder, dtype="float32")
    before, gains = fingerprint(model, tokenizer), folder / "qwen_mlx" / "gains.safetensors"
    if gains.exists():
        gains.unlink()
    else:
        gains.parent.mkdir()
        mx.save_safetensors(str(gains), {"a": mx.zeros((3,))})
    assert differ(fingerprint(model, tokenizer), before) == ["model"]


def test_a_moved_folder_is_the_same_model(folder: Path) -> None:
    before = of(folder)
    moved = of(folder.rename(folder.with_name("moved")))
    assert differ(moved, before) == []
    assert (before.name, moved.name) == ("demo", "moved")


def test_a_folder_of_the_hubs_cache_is_called_by_its_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = folder.parent / "models--Qwen--Qwen3.5-0.8B" / "snapshots" / "0123abc"
    there.parent.mkdir(parents=True)
    assert of(folder.rename(there)).name == "Qwen/Qwen3.5-0.8B"
    monkeypatch.chdir(there)
    assert of(Path(".")).name == "Qwen/Qwen3.5-0.8B"


def test_a_folder_by_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(folder)
    monkeypatch.chdir(folder)
    assert of(Path(".")) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_gone(name: str, folder: Path) -> None:
    model, tokenizer = load(folder, dtype="float32")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"No such file|holds no model\*.safetensors"):
        fingerprint(model, tokenizer)


def test_a_model_that_was_not_loaded_has_no_fingerprint(folder: Path) -> None:
    loaded, tokenizer = load(folder)
    with pytest.raises(ValueError, match="This model was not loaded from a folder"):
        fingerprint(Qwen(loaded.config), tokenizer)


def computed(model: Qwen, tokenizer: Tokenizer, kv_bits: int | None = None) -> PromptCache:
    prompt = PromptCache(tokenizer.encode("Once upon a time" * 20), model.make_cache(kv_bits=kv_bits), model)
    mx.eval(prefill(model, prompt.tokens, prompt.cache, step_size=64))
    return prompt


@pytest.mark.parametrize(("dtype", "kv_bits"), [("float32", None), ("float32", 8), ("bfloat16", None), ("bfloat16", 4)])
def test_saved_and_loaded_is_never_saved(dtype: str, kv_bits: int | None, tmp_path: Path) -> None:
    model, tokenizer = load("demo", dtype=dtype)
    prompt, path = computed(model, tokenizer, kv_bits), tmp_path / "prompt.safetensors"
    save_prompt_cache(path, prompt, model, tokenizer)
    loaded = load_prompt_cache(path, *load("demo", dtype=dtype), kv_bits=kv_bits)
    assert loaded.tokens == prompt.tokens
    said = []
    for known in (prompt, loaded):
        asked = [*known.tokens, *tokenizer.encode(", the fox")]
        options = {"temperature": 0.0, "max_tokens": 32, "kv_bits": kv_bits}
        options |= {"logit_bias": {token: -1e4 for token in model.config.eos_token_ids}}
        answer = stream_generate(known.model, tokenizer, asked, prompt_cache=known, **options)
        said.append([r.token for r in answer])
    assert (len(said[0]), said[0]) == (32, said[1])


def test_an_answer_can_be_saved_with_its_prompt(tmp_path: Path) -> None:
    model, tokenizer = load("demo", dtype="float32")
    prompt = computed(model, tokenizer)
    asked = [*prompt.tokens, *tokenizer.encode(", the fox")]
    list(stream_generate(model, tokenizer, asked, prompt_cache=prompt, max_tokens=5))
    save_prompt_cache(tmp_path / "prompt.safetensors", prompt, model, tokenizer)
    loaded = load_prompt_cache(tmp_path / "prompt.safetensors", model, tokenizer)
    assert (loaded.tokens, loaded.cache.offset) == (prompt.tokens, len(prompt.tokens))
    assert loaded.tokens[: len(asked)] == asked


@pytest.mark.parametrize(("saved", "asked"), [(None, 8), (8, None), (8, 4)])
def test_other_bits_are_refused(saved: int | None, asked: int | None, tmp_path: Path) -> None:
    model, tokenizer = load("demo", dtype="float32")
    save_prompt_cache(tmp_path / "prompt.safetensors", computed(model, tokenizer, saved), model, tokenizer)
    with pytest.raises(PromptCacheError, match="give the same kv_bits"):
        load_prompt_cache(tmp_path / "prompt.safetensors", model, tokenizer, kv_bits=asked)


def test_another_model_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, dtype="float32")
    save_prompt_cache(tmp_path / "prompt.safetensors", computed(model, tokenizer), model, tokenizer)
    fine_tune(folder)
    other = folder.rename(folder.with_name("tuned"))
    words = "was made with demo in float32, and this is tuned in float32: they differ in model;"
    with pytest.raises(PromptCacheError, match=words):
        load_prompt_cache(tmp_path / "prompt.safetensors", *load(other, dtype="float32"))
