"""GGUF files, written by llama.cpp's own writer and changed as its converter does, come back as they were released."""

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.checkpoint import open_checkpoint
from qwen_mlx.config import read_config
from qwen_mlx.convert.gguf import open_gguf
from qwen_mlx.convert.gguf_blocks import FORMATS, OTHERS, read_rows
from qwen_mlx.convert.gguf_file import Place, read_headers
from qwen_mlx.convert.gguf_tokenizer import eos_token_ids, tokenizer_files
from qwen_mlx.convert.source import Source
from qwen_mlx.errors import CheckpointError
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer
from tests import real_tokenizer
from tests.convert import gguf_files
from tests.convert.gguf_files import patch, with_tensor
from tests.golden import compare
from tests.golden.checkpoints import VARIANTS

MORE_VALUE_HEADS = "b-r2-d64"  # Hv > Hk, untied, 8 layers
WIDE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def gguf_of(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`gguf_of(variant, kind, ...)`: a file of that golden checkpoint; not to be written to."""

    @cache
    def file(variant: str, kind: str, **options: int) -> Path:
        path = tmp_path_factory.mktemp(f"{variant}-{kind}") / "model.gguf"
        return gguf_files.write(path, checkpoint_of(variant), kind, **options)

    return file


def whole(source: Source) -> dict[str, mx.array]:
    """Every tensor, those of the MTP head under `mtp.`."""
    both = source.text | {f"mtp.{name}": tensor for name, tensor in source.mtp.items()}
    arrays = {name: tensor.all() for name, tensor in both.items()}
    for name, tensor in both.items():
        assert (arrays[name].shape, arrays[name].dtype) == (tensor.shape, tensor.dtype), name
    return arrays


def released(checkpoint: Path) -> dict[str, mx.array]:
    """What must come back: the text by the loader's own table, the head as the file has it, with gains of 1 + w."""
    stored = mx.load(str(checkpoint / "model.safetensors"))
    head = {name: array for name, array in stored.items() if name.startswith("mtp.")}
    for name in [name for name in head if "norm" in name]:
        head[name] = 1 + head[name].astype(mx.float32)
    for name in [name for name in head if ".experts." in name]:
        kinds = ("gate", "up") if "gate_up" in name else ("down",)
        for kind, part in zip(kinds, mx.split(head[name], len(kinds), axis=1)):
            head[name.partition("experts.")[0] + f"switch_mlp.{kind}_proj.weight"] = part
        del head[name]
    return open_checkpoint(checkpoint).tensors() | head


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint32 if array.dtype == mx.float32 else mx.uint16))


def is_wide(name: str, array: mx.array) -> bool:
    """Whether the converter keeps the tensor in float32 in every file."""
    return array.ndim == 1 or name.endswith(("conv1d.weight", "mlp.gate.weight", "shared_expert_gate.weight"))


@every_variant
@pytest.mark.parametrize("kind", WIDE)
def test_tensors_come_back_bit_for_bit(
    checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path], variant: str, kind: str
) -> None:
    expected = released(checkpoint_of(variant))
    found = whole(open_gguf(gguf_of(variant, kind)))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        dtype = mx.float32 if is_wide(name, array) else WIDE[kind]
        assert found[name].dtype == dtype, name
        if not name.endswith("A_log"):
            assert np.array_equal(bits(found[name]), bits(array.astype(dtype))), name


@every_variant
def test_a_log_gives_the_stored_decay(
    checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path], variant: str
) -> None:
    # exp and its rounding to float32 lose up to 1.2e-7 of A_log, wherever it lies; the logarithm half an ulp more.
    found = whole(open_gguf(gguf_of(variant, "BF16")))
    expected = {name: array for name, array in released(checkpoint_of(variant)).items() if name.endswith("A_log")}
    assert expected
    for name, array in expected.items():
        stored = np.exp(np.array(array))
        again = np.exp(np.array(found[name]).astype(np.float64))
        assert np.abs(np.array(found[name]) - np.array(array)).max() <= 2.5e-7
        assert np.abs(again / stored - 1).max() <= 1.5e-7


@every_variant
@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_come_back_as_ggml_defines_them(
    checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path], variant: str, kind: str
) -> None:
    # Every permutation moves whole blocks, so quantizing the released tensors must give the same numbers.
    expected = released(checkpoint_of(variant))
    found = whole(open_gguf(gguf_of(variant, kind)))
    quantized = gguf.GGMLQuantizationType[kind]
    for name in [name for name, array in expected.items() if not is_wide(name, array)]:
        values = np.array(expected[name].astype(mx.float32))
        truth = gguf.dequantize(gguf.quantize(values, quantized), quantized)
        assert np.array_equal(bits(found[name]), truth.view(np.uint32)), name


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: FORMATS[number].name)
def test_every_pattern_of_bits_is_read_as_ggml_reads_it(tmp_path: Path, number: int) -> None:
    # Random bytes hold scales that are subnormal, infinite and no numbers, and all the integers.
    form, kind = FORMATS[number], gguf.GGMLQuantizationType(number)
    assert (form.name, (form.numbers, form.size)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])
    data = np.random.RandomState(number).randint(0, 256, (512, 16 * form.size)).astype(np.uint8)
    (tmp_path / "data").write_bytes(b"before" + data.tobytes())
    place = Place(tmp_path / "data", (512, 16 * form.numbers), number, len(b"before"))
    found = read_rows(place, np.arange(512))
    with np.errstate(invalid="ignore"):
        truth = gguf.dequantize(data, kind)
    assert found.dtype == form.dtype
    np.testing.assert_array_equal(np.array(found.astype(mx.float32)), truth)


def test_the_other_formats_are_called_as_in_ggml() -> None:
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind not in FORMATS}
    assert {number: OTHERS[number] for number in names} == names


@pytest.mark.parametrize("kind", ["BF16", "Q4_0"])
def test_any_rows_are_those_of_the_whole(gguf_of: Callable[..., Path], kind: str) -> None:
    source = open_gguf(gguf_of("e-k64-v32", kind))
    for name, tensor in source.text.items():
        together = bits(tensor.all())
        third = -(-tensor.shape[0] // 3)
        for start in range(0, tensor.shape[0], third):
            part = tensor.rows(start, min(start + third, tensor.shape[0]))
            assert np.array_equal(bits(part), together[start : start + third]), name


def test_no_more_than_the_rows_is_read(gguf_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: object) -> int | None:
            nonlocal read
            count = super().readinto(buffer)  # type: ignore[arg-type]
            read += count or 0
            return count

    source = open_gguf(gguf_of(MORE_VALUE_HEADS, "BF16"))
    monkeypatch.setattr(Path, "open", lambda path, mode: Counting(path, mode))
    for name in ("model.embed_tokens.weight", "model.layers.0.linear_attn.in_proj_qkv.weight"):
        read = 0
        source.text[name].rows(100, 110)
        assert read == 10 * 128 * 2  # rows, hidden size, bytes


@every_variant
def test_the_configuration_comes_back(
    checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    source = open_gguf(gguf_of(variant, "Q8_0"))
    save_files(source, tmp_path)
    found, expected = read_config(tmp_path), read_config(checkpoint_of(variant))
    assert replace(found, generation={}) == replace(expected, generation={})
    kept = {name: expected.generation[name] for name in ("temperature", "top_k", "top_p")}
    assert found.generation == kept
    assert source.config["text_config"]["mtp_num_hidden_layers"] == 1
    assert (source.kind, source.vision) == ("GGUF", {})


def save_files(source: Source, folder: Path) -> None:
    """config.json and the files beside it."""
    (folder / "config.json").write_text(json.dumps(source.config))
    for name, content in source.files.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)


@every_variant
def test_a_model_of_it_gives_the_golden_logits(gguf_of: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    source = open_gguf(gguf_of(variant, "BF16"))
    save_files(source, tmp_path)
    model = Qwen(read_config(tmp_path))
    weights = {name: tensor.all().astype(mx.float32) for name, tensor in source.text.items()}
    model.load_weights(list(weights.items()))
    model.eval()
    golden = compare.load(variant)
    for length in compare.LENGTHS:
        logits = np.array(model(mx.array(golden[f"prompt_{length}_ids"])[None])[0])
        assert compare.logits_difference(golden, length, logits) < compare.TOLERANCE


def test_a_file_without_a_draft_head(checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path]) -> None:
    source = open_gguf(gguf_of(MORE_VALUE_HEADS, "F16", mtp=False))
    assert (source.mtp, source.config["text_config"]["mtp_num_hidden_layers"]) == ({}, 0)
    assert source.config["text_config"]["num_hidden_layers"] == 8
    assert source.text.keys() == open_checkpoint(checkpoint_of(MORE_VALUE_HEADS)).tensors().keys()


def test_a_gain_in_16_bits_is_read_in_float32(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    change = with_tensor("output_norm.weight", np.arange(128).astype(np.float16))
    source = open_gguf(gguf_files.write(tmp_path / "a.gguf", checkpoint_of(MORE_VALUE_HEADS), "F16", change=change))
    gain = source.text["model.norm.weight"]
    assert (gain.dtype, gain.all().dtype, gain.all().tolist()) == (mx.float32, mx.float32, list(range(128)))


def test_one_row_may_be_a_vector_in_the_file(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    # Converters of other years wrote it so; ggml does not tell the two apart.
    change = with_tensor("blk.0.ffn_gate_inp_shexp.weight", np.arange(128).astype(np.float32))
    source = open_gguf(gguf_files.write(tmp_path / "a.gguf", checkpoint_of("d-moe"), "F16", change=change))
    gate = source.text["model.layers.0.mlp.shared_expert_gate.weight"]
    assert (gate.shape, gate.all().tolist()) == ((1, 128), [list(range(128))])


def test_version_2_is_version_3_in_little_endian(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    before = whole(open_gguf(gguf_of(MORE_VALUE_HEADS, "Q8_0")))
    second = shutil.copy(gguf_of(MORE_VALUE_HEADS, "Q8_0"), tmp_path / "second.gguf")
    patch(second, 4, struct.pack("<I", 2))
    after = whole(open_gguf(second))
    assert all(np.array_equal(bits(before[name]), bits(after[name])) for name in before)


def test_another_alignment(checkpoint_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    change = partial(gguf.GGUFWriter.add_custom_alignment, alignment=1024)
    wide = gguf_files.write(tmp_path / "wide.gguf", checkpoint_of(MORE_VALUE_HEADS), "Q8_0", change=change)
    plain = gguf_of(MORE_VALUE_HEADS, "Q8_0")
    assert wide.stat().st_size > plain.stat().st_size
    found = whole(open_gguf(wide))
    assert all(np.array_equal(bits(found[name]), bits(array)) for name, array in whole(open_gguf(plain)).items())


# Split files


@pytest.fixture
def parts(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> list[Path]:
    gguf_files.write(tmp_path / "m.gguf", checkpoint_of("f-k32-v64"), "BF16", tensors_per_file=30)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in files] == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    return files


@pytest.mark.parametrize("number", range(3))
def test_any_file_of_a_split_model_opens_all(gguf_of: Callable[..., Path], parts: list[Path], number: int) -> None:
    found = whole(open_gguf(parts[number]))
    expected = whole(open_gguf(gguf_of("f-k32-v64", "BF16")))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(bits(found[name]), bits(array)) for name, array in expected.items())


def without_the_second(parts: list[Path]) -> Path:
    parts[1].unlink()
    return parts[0]


def with_the_second_renamed(parts: list[Path]) -> Path:
    return parts[1].rename(parts[1].with_name("second.gguf"))


def with_two_exchanged(parts: list[Path]) -> Path:
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(second)
    return parts[0]


def with_a_number_too_high(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("m-00004-of-00003.gguf"))


def with_another_total(parts: list[Path]) -> Path:
    key = b"split.tensors.count" + struct.pack("<I", gguf.GGUFValueType.INT32)
    patch(parts[0], parts[0].read_bytes().index(key) + len(key), struct.pack("<i", 99))
    return parts[0]


def with_a_tensor_again(parts: list[Path]) -> Path:
    assert b"blk.0.attn_norm.weight" in parts[0].read_bytes()
    patch(parts[2], parts[2].read_bytes().index(b"blk.4.attn_norm.weight"), b"blk.0.attn_norm.weight")
    return parts[0]


SPLITS = {
    "again": (with_a_tensor_again, "m-00003-of-00003.gguf stores blk.0.attn_norm.weight again"),
    "missing": (without_the_second, "lacks m-00002-of-00003.gguf"),
    "renamed": (with_the_second_renamed, "second.gguf is not number 1 of 1"),
    "exchanged": (with_two_exchanged, "m-00002-of-00003.gguf is not number 2 of 3"),
    "too_high": (with_a_number_too_high, "4 of 3"),
    "another_total": (with_another_total, "of 99 tensors"),
}


@pytest.mark.parametrize(("change", "said"), SPLITS.values(), ids=SPLITS.keys())
def test_a_split_model_that_is_refused(parts: list[Path], change: Callable[[list[Path]], Path], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_gguf(change(parts))


# The tokenizer


def test_the_small_tokenizer_comes_back(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    source = open_gguf(gguf_of(MORE_VALUE_HEADS, "Q8_0"))
    save_files(source, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (368, 354)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.chat_template == gguf_files.TEMPLATE
    assert tokenizer.decode(tokenizer.encode("Zoë ran<|im_end|>")) == "Zoë ran<|im_end|>"
    assert source.config["eos_token_id"] == [352, 354]


def test_the_real_tokenizer_comes_back(tmp_path: Path) -> None:
    real_tokenizer.build(tmp_path)
    truth = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    ordinary = sorted(truth["model"]["vocab"], key=truth["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in truth["model"]["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "qwen35")
    tokens, types = gguf_files.with_added(ordinary, real_tokenizer.ADDED_SPECIAL, 248_320)
    gguf_files.add_tokenizer(writer, tokens, types, merges, eos=248_046, pad=248_044)
    gguf_files.finish(writer)

    metadata, _ = read_headers(tmp_path / "vocabulary.gguf")
    assert eos_token_ids(metadata) == [248_044, 248_046]
    found = tokenizer_files(metadata)["tokenizer.json"]
    assert isinstance(found, bytes)
    again = json.loads(found)
    for name in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert again[name] == truth[name], name
