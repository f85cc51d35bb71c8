"""Files written rows at a time: what others read from them, what is left of a run that broke off, how much memory."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import qwen_mlx
from qwen_mlx.convert import stream
from qwen_mlx.convert.plan import quantized
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.source import Tensor, held
from qwen_mlx.convert.stream import Item, Output, shards, write_file
from qwen_mlx.errors import CheckpointError
from tests.layouts import Tensors

CheckpointOf = Callable[[str], Path]
DTYPES = [mx.uint8, mx.bfloat16, mx.float32, mx.uint32, mx.float16]  # narrow before wide


def item(name: str, array: mx.array, dtype: mx.Dtype | None = None) -> Item:
    return Item(held(array), (Output(name, tuple(array.shape), dtype or array.dtype),), lambda rows: [rows])


def sized(*sizes: int) -> list[Item]:
    return [item(str(i), mx.zeros(size, mx.uint8)) for i, size in enumerate(sizes)]


def random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    numbers = mx.array(np.random.RandomState(math.prod(shape)).standard_normal(shape) * 90)
    return mx.abs(numbers).astype(dtype) if mx.issubdtype(dtype, mx.integer) else numbers.astype(dtype)


def write(path: Path, items: list[Item]) -> Path:
    write_file(path, items, lambda *_: None)
    return path


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint8)) if array.size else np.zeros(array.shape)


def same(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(
        (found[n].dtype, found[n].shape) == (wanted[n].dtype, wanted[n].shape)
        and np.array_equal(bits(found[n]), bits(wanted[n]))
        for n in wanted
    )


@pytest.mark.parametrize(
    ("sizes", "limit", "cut"),
    [
        pytest.param([], 10, [], id="nothing"),
        pytest.param([4, 6], 10, [[4, 6]], id="exactly_full"),
        pytest.param([4, 7], 10, [[4], [7]], id="one_byte_too_many"),
        pytest.param([4, 4, 4, 4, 4], 10, [[4, 4], [4, 4], [4]], id="several"),
        pytest.param([30], 10, [[30]], id="larger_than_a_file"),
        pytest.param([4, 30, 4], 10, [[4], [30], [4]], id="larger_in_the_middle"),
        pytest.param([6, 6, 4, 4], 10, [[6], [6, 4], [4]], id="in_their_order_not_packed"),
        pytest.param([10, 0, 1], 10, [[10, 0], [1]], id="empty"),
    ],
)
def test_files_are_cut_in_order_at_the_limit(sizes: list[int], limit: int, cut: list[list[int]]) -> None:
    assert [[item.nbytes for item in part] for part in shards(sized(*sizes), limit)] == cut


def test_parts_of_one_matrix_stay_in_one_file() -> None:
    form = Form(4, 32)
    items = [quantized(str(i), held(mx.zeros((8, 64))), form, mx.bfloat16) for i in range(3)]
    assert [len(part) for part in shards(items, items[0].nbytes)] == [1, 1, 1]
    assert {len(one.outputs) for part in shards(items, 1) for one in part} == {3}


ODD = [(3, 5), (7,), (1, 1, 1), (2, 3, 5), (0, 4), (4, 0)]


def mixed() -> tuple[list[Item], Tensors]:
    """Tensors of all kinds and of odd sizes, in an order in which nothing would be aligned."""
    arrays = {f"{shape} {i}": random(shape, dtype) for shape in ODD for i, dtype in enumerate(DTYPES)}
    return [item(name, array) for name, array in arrays.items()], arrays


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    items, arrays = mixed()
    content = write(tmp_path / "a.safetensors", items).read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "mlx"}
    assert length % 8 == 0
    assert {name: (8 + length + e["data_offsets"][0]) % arrays[name].dtype.size for name, e in entries.items()} == (
        dict.fromkeys(arrays, 0)
    )
    places = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    assert [a for a, _ in places] == [0, *(b for _, b in places[:-1])]
    assert places[-1][1] == len(content) - 8 - length


def test_mlx_reads_what_was_written(tmp_path: Path) -> None:
    items, arrays = mixed()
    found = mx.load(str(write(tmp_path / "a.safetensors", items)))
    assert isinstance(found, dict)
    assert same(found, arrays)


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    """Its own reader, which refuses holes and wrong sizes; NumPy has no bfloat16."""
    items, arrays = mixed()
    with safe_open(str(write(tmp_path / "a.safetensors", items)), framework="numpy") as file:
        assert set(file.keys()) == arrays.keys()
        for name in [name for name, array in arrays.items() if array.dtype != mx.bfloat16]:
            assert np.array_equal(file.get_tensor(name), np.array(arrays[name]))


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    array = random((6, 4, 5), mx.float32)
    turned = Tensor((6, 5, 4), mx.float32, lambda a, b: array[a:b].swapaxes(1, 2))
    path = write(tmp_path / "a.safetensors", [Item(turned, (Output("a", (6, 5, 4), mx.float32),), lambda rows: [rows])])
    found = mx.load(str(path))
    assert isinstance(found, dict)
    assert np.array_equal(np.array(found["a"]), np.array(array).swapaxes(1, 2))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_floats_are_rounded_as_numpy_does(dtype: mx.Dtype, tmp_path: Path) -> None:
    array = random((9, 8), mx.float32)
    found = mx.load(str(write(tmp_path / "a.safetensors", [item("a", array, dtype)])))
    assert isinstance(found, dict)
    wide = np.array(array)
    as_bits = wide.view(np.uint32)
    nearest_even = ((as_bits + 0x7FFF + ((as_bits >> 16) & 1)) >> 16 << 16).view(np.float32)
    wanted = {
        mx.float32: wide,
        mx.float16: wide.astype(np.float16).astype(np.float32),
        mx.bfloat16: nearest_even,
    }
    assert found["a"].dtype == dtype
    assert np.array_equal(np.array(found["a"].astype(mx.float32)), wanted[dtype])


def recorded(array: mx.array, read: list[int]) -> Tensor:
    """A tensor that tells how many rows were asked for at once."""

    def rows(start: int, stop: int) -> mx.array:
        read.append(stop - start)
        return array[start:stop]

    return Tensor(array.shape, array.dtype, rows)


@pytest.mark.parametrize(
    ("rows", "block", "read"),
    [
        pytest.param(600, 1 << 20, [600], id="at_once"),
        pytest.param(600, 600 * 256, [512, 88], id="scales_of_128_rows_are_not_cut"),
        pytest.param(600, 130 * 256, [128] * 4 + [88], id="a_block_of_scales"),
        pytest.param(300, 100 * 256, [100, 100, 100], id="less_than_a_block_of_scales"),
        pytest.param(5, 1, [1] * 5, id="a_row_larger_than_a_block"),
        pytest.param(1, 1, [1], id="one_row"),
    ],
)
def test_blocks_give_the_bytes_of_the_whole(
    rows: int, block: int, read: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random((rows, 64), mx.float32)
    asked: list[int] = []
    form = Form(4, 32)
    whole = write(tmp_path / "whole", [quantized("a", held(array), form, mx.bfloat16), item("b", array, mx.bfloat16)])
    monkeypatch.setattr(stream, "BLOCK", block)
    tensor = recorded(array, asked)
    as_it_is = Item(tensor, (Output("b", tensor.shape, mx.bfloat16),), lambda rows: [rows])
    parts = write(tmp_path / "parts", [quantized("a", tensor, form, mx.bfloat16), as_it_is])
    assert parts.read_bytes() == whole.read_bytes()
    assert asked == 2 * read


@pytest.mark.parametrize("form", [Form(4, 64), Form(8, 32), Form(4, 32, "mxfp4"), Form(4, 16, "nvfp4")])
def test_the_packed_matrix_is_that_of_mlx(form: Form, tmp_path: Path) -> None:
    array = random((24, 128), mx.bfloat16)
    found = mx.load(str(write(tmp_path / "a.safetensors", [quantized("a", held(array), form, mx.bfloat16)])))
    assert isinstance(found, dict)
    kinds = ("a.weight", "a.scales", "a.biases")
    assert same(found, dict(zip(kinds, mx.quantize(array, form.group_size, form.bits, form.mode))))


def test_progress_counts_tensors_and_the_bytes_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 1000)
    items, arrays = mixed()
    counts: list[tuple[int, int]] = []
    write_file(tmp_path / "a", items, lambda *count: counts.append(count))
    tensors, nbytes = map(sum, zip(*counts))
    assert tensors == len(items)
    assert nbytes == sum(item.source_nbytes for item in items) == sum(array.nbytes for array in arrays.values())


def test_what_breaks_off_leaves_no_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 4 * 64)

    def rows(start: int, stop: int) -> mx.array:
        if start >= 3:
            raise CheckpointError("It holds NaN.")
        return mx.ones((stop - start, 64))

    broken = Item(Tensor((9, 64), mx.float32, rows), (Output("a", (9, 64), mx.float32),), lambda rows: [rows])
    with pytest.raises(CheckpointError):
        write(tmp_path / "deep" / "a.safetensors", [broken])
    assert not list((tmp_path / "deep").iterdir())
    whole = [item("a", mx.ones((9, 64)))]
    assert write(tmp_path / "deep" / "a.safetensors", whole).read_bytes() == write(tmp_path / "b", whole).read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def rows(start: int, stop: int) -> mx.array:
        assert path.read_bytes() == b"old"
        return mx.ones((stop - start,))

    write(path, [Item(Tensor((3,), mx.float32, rows), (Output("a", (3,), mx.float32),), lambda rows: [rows])])
    assert path.read_bytes() != b"old"


MB = 1 << 20
LARGEST = 100 * MB
# The peak beyond that of the imports. On Linux `ru_maxrss` begins with what the parent had, VmHWM does not.
PROGRAM = """
import resource, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from qwen_mlx.checkpoint import read_header
from qwen_mlx.convert.plan import plan
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.source import tensor
from qwen_mlx.convert.stream import write_file
from qwen_mlx.model.linear import Linear
import mlx.nn as nn

def peak():
    if sys.platform == "linux":
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

source, result, bits = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
mx.eval(mx.quantize(mx.random.normal((64, 64)), 64, 4))
before = peak()
tensors = {name: tensor(name, header) for name, header in read_header(source).items()}
model = nn.Module()
for name, found in tensors.items():
    model[name.removesuffix(".weight")] = Linear(found.shape[1], found.shape[0])
planned = plan(tensors, model, lambda path: Form(bits, 64) if bits < 16 else None, mx.bfloat16)
write_file(result, planned.items, lambda *_: None)
print(peak() - before)
"""


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_memory_does_not_grow_with_the_tensors(bits: int, dtype: mx.Dtype, tmp_path: Path) -> None:
    """Promised are the largest tensor four times over and one file of the result; a few blocks are what it takes."""
    columns = 4096
    row = random((1, columns), dtype)
    rows = mx.repeat(row, LARGEST // row.nbytes, axis=0)
    mx.save_safetensors(str(tmp_path / "source.safetensors"), {f"{name}.weight": rows for name in "abc"})
    del rows
    mx.clear_cache()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "source.safetensors"), str(tmp_path / "result"), str(bits)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(qwen_mlx.__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    written = (tmp_path / "result").stat().st_size
    assert written > 3 * LARGEST / 8
    assert taken < 4 * LARGEST + written
    assert taken < 128 * MB
