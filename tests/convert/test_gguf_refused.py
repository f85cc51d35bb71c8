"""GGUF files that are damaged, foreign or contradict themselves: one sentence each, never a traceback or a hang."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen_mlx.convert.gguf import open_gguf
from qwen_mlx.convert.gguf_file import read_headers
from qwen_mlx.errors import CheckpointError
from tests.convert import gguf_files
from tests.convert.gguf_files import patch, with_tensor

VARIANT = "b-r2-d64"  # Hv > Hk, untied, 8 layers


@pytest.fixture(scope="module")
def content(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a good file holds."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "a.gguf", checkpoint_of(VARIANT), "Q8_0").read_bytes()


@pytest.fixture
def a_file(content: bytes, tmp_path: Path) -> Path:
    """A good file, to be damaged."""
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    return path


def value_of(file: Path, key: str) -> int:
    """Where the type of the key's value stands."""
    stored = struct.pack("<Q", len(key)) + key.encode()
    return file.read_bytes().index(stored) + len(stored)


def without_key(key: str) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.kv_data[0].pop(key)  # type: ignore[return-value]


def with_key(key: str, value: object, kind: gguf.GGUFValueType) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind)

    return change


def without_tensor(name: str) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.tensors[0].pop(name)  # type: ignore[return-value]


def changed_list(key: str, change: Callable[[list[object]], list[object]]) -> Callable[[gguf.GGUFWriter], None]:
    def apply(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][key].value = change(writer.kv_data[0][key].value)

    return apply


K_BLOCKS = np.zeros((128, 144), np.uint8)  # [128, 256] in Q4_K
U32, TEXT, FLOAT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
WRITTEN = {
    "architecture": (with_key("general.architecture", "llama", TEXT), "architecture 'llama'.*qwen35, qwen35moe"),
    "mmproj": (with_key("general.architecture", "clip", TEXT), "vision tower"),
    "k_quantized": (
        with_tensor("blk.1.ffn_down.weight", K_BLOCKS, gguf.GGMLQuantizationType.Q4_K),
        "blk.1.ffn_down.weight is stored as Q4_K; only .*Q8_0 file, or the safetensors",
    ),
    "missing_tensor": (without_tensor("blk.1.ssm_a"), "lacks blk.1.ssm_a"),
    "missing_embedding": (without_tensor("token_embd.weight"), "token_embd.weight"),
    "extra_tensor": (with_tensor("blk.1.odd.weight", np.zeros(4, np.float32)), "blk.1.odd.weight"),
    "shape": (with_tensor("blk.0.ssm_a", np.zeros(5, np.float32)), r"blk.0.ssm_a has shape \[5\].*\[4\]"),
    "quantized_vector": (
        with_tensor("blk.0.attn_norm.weight", np.zeros(4 * 34, np.uint8), gguf.GGMLQuantizationType.Q8_0),
        "blk.0.attn_norm.weight.*cannot be Q8_0",
    ),
    "no_interval_like_it": (with_key("qwen35.full_attention_interval", 3, U32), "lacks blk"),
    "zero_heads": (with_key("qwen35.attention.head_count", 0, U32), "head_count must be a positive integer, it is 0"),
    "text_for_a_size": (with_key("qwen35.block_count", "9", TEXT), "block_count must be a positive integer, it is '9'"),
    "absurd_layers": (with_key("qwen35.block_count", 2**31 - 1, U32), "block_count must be between 2 and 1024"),
    "only_draft_layers": (with_key("qwen35.block_count", 1, U32), "block_count must be between 2 and 1024"),
    "value_heads": (with_key("qwen35.ssm.time_step_rank", 3, U32), "time_step_rank must be a multiple"),
    "infinite_eps": (
        with_key("qwen35.attention.layer_norm_rms_epsilon", float("inf"), FLOAT),
        "epsilon must be a positive number, it is inf",
    ),
    "yarn": (with_key("qwen35.rope.scaling.type", "yarn", TEXT), "rope.scaling.type must be absent"),
    "sections": (
        changed_list("qwen35.rope.dimension_sections", lambda sections: sections[:2]),
        "dimension_sections must be three sizes",
    ),
    "fourth_section": (
        changed_list("qwen35.rope.dimension_sections", lambda sections: [*sections[:3], 1]),
        "dimension_sections must be three sizes and a 0",
    ),
    "tokenizer_kind": (with_key("tokenizer.ggml.model", "llama", TEXT), "tokenizer.ggml.model must be 'gpt2'"),
    "another_split": (with_key("tokenizer.ggml.pre", "llama-bpe", TEXT), "tokenizer.ggml.pre must be 'qwen35'"),
    "fewer_tokens": (changed_list(TOKENS, lambda tokens: tokens[:-1]), "383 tokens but 384 rows"),
    "fewer_types": (changed_list(TYPES, lambda types: types[:-1]), "token_type must be 384 types"),
    "types_in_disorder": (changed_list(TYPES, lambda types: types[::-1]), "in this order"),
    "token_twice": (changed_list(TOKENS, lambda t: [*t[:353], t[352], *t[354:]]), "a token twice"),
    "ordinary_token_twice": (changed_list(TOKENS, lambda t: [t[1], *t[1:]]), "tokenizer.ggml.tokens"),
    "merge_of_nothing": (changed_list("tokenizer.ggml.merges", lambda merges: ["x"]), "do not belong together"),
    "eos_beyond": (with_key("tokenizer.ggml.eos_token_id", 384, U32), "eos_token_id must be an id below 384"),
    "split_count": (with_key("split.count", [1], gguf.GGUFValueType.ARRAY), "split.count must be a positive integer"),
    "split_number": (with_key("split.no", -1, gguf.GGUFValueType.INT32), "split.no must be a positive integer or 0"),
    "alignment": (with_key("general.alignment", 48, U32), "general.alignment must be a power of two"),
}


@pytest.mark.parametrize(("change", "said"), WRITTEN.values(), ids=WRITTEN.keys())
def test_a_file_that_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], said: str
) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", checkpoint_of(VARIANT), "Q8_0", change=change)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


NEEDED = [
    "general.architecture",
    *(
        f"qwen35.{name}"
        for name in (
            "block_count context_length embedding_length feed_forward_length attention.head_count "
            "attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon rope.freq_base "
            "rope.dimension_count rope.dimension_sections ssm.conv_kernel ssm.state_size ssm.group_count "
            "ssm.time_step_rank ssm.inner_size"
        ).split()
    ),
    *(f"tokenizer.ggml.{name}" for name in "model pre tokens token_type merges".split()),
]


@pytest.mark.parametrize("key", NEEDED)
def test_a_key_that_is_missing(checkpoint_of: Callable[[str], Path], tmp_path: Path, key: str) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", checkpoint_of(VARIANT), "Q8_0", change=without_key(key))
    with pytest.raises(CheckpointError, match=f"a.gguf lacks the key {key};"):
        open_gguf(path)


def test_a_decay_that_is_not_negative(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    change = with_tensor("blk.0.ssm_a", np.array([-1, -2, 0, -1], np.float32))
    source = open_gguf(gguf_files.write(tmp_path / "a.gguf", checkpoint_of(VARIANT), "Q8_0", change=change))
    with pytest.raises(CheckpointError, match=r"a.gguf: .*A_log"):
        source.text["model.layers.0.linear_attn.A_log"].rows(0, 4)


@pytest.mark.parametrize("value", [np.arange(3), ["a", "b"], "x", True, -1, 0.5, float("nan"), 2**40], ids=repr)
def test_values_of_another_kind_are_used_or_refused(
    a_file: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    metadata, places = read_headers(a_file)
    refused = set()
    for key in [*metadata.values, "qwen35.rope.scaling.type"]:
        changed = replace(metadata, values=metadata.values | {key: value})
        monkeypatch.setattr("qwen_mlx.convert.gguf.read_headers", lambda path, changed=changed: (changed, places))
        said = answer(metadata.file)
        if said is not None:
            refused.add(key)
            assert str(metadata.file) in said
            assert "\n" not in said
    assert refused.issuperset({"qwen35.block_count", TOKENS, TYPES, "tokenizer.ggml.merges", "tokenizer.ggml.pre"})


PATCHES: dict[str, tuple[int | str, bytes, str]] = {
    "magic": (0, b"GGML", "begins with b'GGML'"),
    "version_1": (4, struct.pack("<I", 1), "of version 1"),
    "big_endian": (4, struct.pack(">I", 3), r"big endian \(version 3\)"),
    "tensor_count": (8, struct.pack("<Q", 2**60), "cannot hold the 1152921504606846976 tensors"),
    "key_count": (16, struct.pack("<Q", 2**40), "cannot hold the 1099511627776 keys"),
    "key_length": (24, struct.pack("<Q", 2**62), "ends within key 0"),
    "key_not_utf8": (32, b"\xff", "key 0 is not UTF-8"),
    "key_of_two_lines": (32, b"\n", "key 0 is no name"),
    "unknown_type": ("qwen35.block_count", struct.pack("<I", 13), "block_count has a value of unknown type 13"),
    "text_beyond": ("tokenizer.chat_template", struct.pack("<IQ", 8, 2**40), "ends within tokenizer.chat_template"),
    "array_of_arrays": (TYPES, struct.pack("<II", 9, 9), "token_type has elements of unknown type 9"),
    "array_count": (TYPES, struct.pack("<IIQ", 9, 5, 2**61), "ends within tokenizer.ggml.token_type"),
    "text_count": (TOKENS, struct.pack("<IIQ", 9, 8, 2**61), "cannot hold the 2305843009213693952 texts"),
    "dimensions": ("token_embd.weight", struct.pack("<I", 0), "token_embd.weight has 0 dimensions"),
    "many_dimensions": ("token_embd.weight", struct.pack("<I", 2**31), "token_embd.weight has 2147483648 dimensions"),
    "rows": ("token_embd.weight", struct.pack("<IQQ", 2, 128, 2**50), "384 tokens but 1125899906842624 rows"),
    "unknown_format": ("token_embd.weight", struct.pack("<IQQI", 2, 128, 384, 99), "stored as unknown type 99"),
    "offset": ("token_embd.weight", struct.pack("<IQQIQ", 2, 128, 384, 8, 2**60), "ends before token_embd.weight"),
}


@pytest.mark.parametrize(("where", "data", "said"), PATCHES.values(), ids=PATCHES.keys())
def test_a_header_that_is_damaged(a_file: Path, where: int | str, data: bytes, said: str) -> None:
    patch(a_file, value_of(a_file, where) if isinstance(where, str) else where, data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_gguf(a_file)
    assert str(a_file) in str(caught.value)


def test_a_key_that_comes_twice(a_file: Path) -> None:
    patch(a_file, a_file.read_bytes().index(b"tokenizer.ggml.model"), b"general.architecture")
    with pytest.raises(CheckpointError, match=r"has the key general\.architecture twice"):
        open_gguf(a_file)


def test_a_tensor_that_comes_twice(a_file: Path) -> None:
    patch(a_file, a_file.read_bytes().index(b"blk.1.attn_norm.weight"), b"blk.0.attn_norm.weight")
    with pytest.raises(CheckpointError, match=r"stores blk.0.attn_norm.weight twice"):
        open_gguf(a_file)


def test_no_file() -> None:
    with pytest.raises(CheckpointError, match=r"no file nowhere\.gguf"):
        open_gguf(Path("nowhere.gguf"))


def test_a_file_that_is_cut_off_anywhere(a_file: Path, content: bytes) -> None:
    header = len(content) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(a_file).tensors)
    lengths = [*range(0, header, 997), len(content) // 2, len(content) - 100]
    for length in lengths:
        a_file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"a\.gguf"):
            open_gguf(a_file)


def test_a_file_that_is_cut_off_later(a_file: Path) -> None:
    tensor = open_gguf(a_file).text["lm_head.weight"]
    with a_file.open("r+b") as stream:
        stream.truncate(100_000)
    with pytest.raises(CheckpointError, match="became shorter"):
        tensor.rows(0, 384)


def test_mutated_headers_are_read_or_refused(a_file: Path, content: bytes) -> None:
    header = max(content.rindex(name) for name in (b"output.weight", b"nextn.hnorm.weight")) + 60
    chance = random.Random(20)
    refused = 0
    for _ in range(500):
        mutated = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            start = chance.randrange(header)
            size = chance.choice((1, 2, 4, 8))
            mutated[start : start + size] = chance.choice(
                (
                    chance.randbytes(size),
                    b"\0" * size,
                    b"\xff" * size,
                    bytes([mutated[start] ^ 1 << chance.randrange(8)]),
                )
            )
        a_file.write_bytes(mutated)
        said = answer(a_file)
        refused += said is not None
        assert said is None or (str(a_file) in said and len(said) < 600)
    assert 100 < refused < 500


def answer(file: Path) -> str | None:
    """What is said against the file, None if it can be read."""
    try:
        open_gguf(file)
    except CheckpointError as error:
        return str(error)
    return None
