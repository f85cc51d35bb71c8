"""What MLX refuses, the emulator refuses in the same words: compared with MLX's kernel inside mx.export_function."""

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import metal_kernel


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


SOURCE = "out[thread_position_in_grid.x] = 1;"
KERNEL = {"name": "example", "input_names": ["x"], "output_names": ["out"], "source": SOURCE}
CALL = {
    "inputs": [mx.ones(9)],
    "grid": (9, 1, 1),
    "threadgroup": (9, 1, 1),
    "output_shapes": [(9,)],
    "output_dtypes": [mx.float32],
}


def refusal(function):
    """Type and text of the error that `function` raises."""
    with pytest.raises((ValueError, TypeError)) as caught:
        function()
    return caught.type, str(caught.value)


def mlx_refusal(keywords, path):
    kernel = mx.fast.metal_kernel(**KERNEL)
    return refusal(lambda: mx.export_function(str(path), lambda *_: kernel(**keywords), mx.ones(9)))


BAD_CALLS = {
    "no_input": {"inputs": []},
    "two_inputs": {"inputs": [mx.ones(9)] * 2},
    "text_for_an_input": {"inputs": ["x"]},
    "list_for_an_input": {"inputs": [[1, 2]]},
    "none_for_an_input": {"inputs": [None]},
    "no_output_shape": {"output_shapes": []},
    "two_output_shapes": {"output_shapes": [(9,), (9,)]},
    "fractional_output_shape": {"output_shapes": [(4.5,)]},
    "two_output_dtypes": {"output_dtypes": [mx.float32] * 2},
    "text_for_an_output_dtype": {"output_dtypes": ["float32"]},
    "float64_output": {"output_dtypes": [mx.float64]},
    "two_grid_sizes": {"grid": (9, 1)},
    "four_threadgroup_sizes": {"threadgroup": (9, 1, 1, 1)},
    "float_template": {"template": [("T", 1.5)]},
    "text_template": {"template": [("T", "float")]},
    "wide_integer_template": {"template": [("T", 2**31)]},
    "dictionary_template": {"template": {"T": 1}},
    "text_for_init_value": {"init_value": "0"},
    "cpu_device": {"stream": mx.cpu},
    "cpu_stream": {"stream": mx.default_stream(mx.cpu)},
    "unknown_keyword": {"threads": 9},
}


@pytest.mark.parametrize("keywords", BAD_CALLS.values(), ids=BAD_CALLS)
def test_wrong_argument_is_refused_as_by_mlx(keywords, tmp_path):
    keywords = {**CALL, **keywords}
    assert refusal(lambda: metal_kernel(**KERNEL)(**keywords)) == mlx_refusal(keywords, tmp_path / "kernel.mlxfn")


@pytest.mark.parametrize("missing", CALL)
def test_missing_argument_is_refused_as_by_mlx(missing, tmp_path):
    keywords = {name: value for name, value in CALL.items() if name != missing}
    assert refusal(lambda: metal_kernel(**KERNEL)(**keywords)) == mlx_refusal(keywords, tmp_path / "kernel.mlxfn")


def test_positional_argument_is_refused_as_by_mlx():
    mine = refusal(lambda: metal_kernel(**KERNEL)([mx.ones(9)]))
    assert mine == refusal(lambda: mx.fast.metal_kernel(**KERNEL)([mx.ones(9)]))


@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param({"output_names": []}, id="no_output"),
        pytest.param({"source": 1}, id="source_is_no_text"),
        pytest.param({"input_names": [1]}, id="name_is_no_text"),
    ],
)
def test_wrong_kernel_is_refused_as_by_mlx(keywords):
    keywords = {**KERNEL, "header": "", "ensure_row_contiguous": True, "atomic_outputs": False, **keywords}
    mine = refusal(lambda: metal_kernel(**keywords))
    theirs = refusal(lambda: mx.fast.metal_kernel(*keywords.values()))
    assert mine == theirs


@pytest.mark.parametrize(
    "value", [np.ones(9), mx.array(1.0), 2, 1.5, True], ids=["numpy", "mlx", "int", "float", "bool"]
)
def test_what_mlx_takes_for_an_input_is_taken(value):
    (out,) = metal_kernel(**KERNEL)(**{**CALL, "inputs": [value]})
    assert out.tolist() == [1] * 9


@pytest.mark.parametrize(
    "keywords",
    [{"template": []}, {"template": None}, {"stream": mx.gpu}, {"init_value": mx.array(1.0)}],
    ids=["empty_template", "no_template", "gpu", "array_for_init_value"],
)
def test_what_mlx_takes_for_an_argument_is_taken(keywords):
    assert metal_kernel(**KERNEL)(**{**CALL, **keywords})[0].shape == (9,)


def test_too_large_a_threadgroup_is_refused_in_mlx_words():
    """MLX says so when the array is evaluated, which needs Metal: the words are those of its source."""
    message = r"^Thread group size \(2048\) is greater than  the maximum allowed threads per threadgroup \(1024\)\.$"
    with pytest.raises(ValueError, match=message):
        metal_kernel(**KERNEL)(**{**CALL, "threadgroup": (32, 32, 2)})


@pytest.mark.parametrize("keywords", [{"grid": (0, 1, 1)}, {"grid": (9, -1, 1)}, {"threadgroup": (9, 0, 1)}], ids=str)
def test_grid_without_threads_is_refused(keywords):
    with pytest.raises(ValueError, match="every size must be positive"):
        metal_kernel(**KERNEL)(**{**CALL, **keywords})


def test_32_buffers_are_refused():
    names = [f"x{number}" for number in range(31)]
    kernel = metal_kernel("many", names, ["out"], SOURCE)
    with pytest.raises(ValueError, match="many has 32 buffers; Metal binds at most 31"):
        kernel(**{**CALL, "inputs": [mx.ones(9)] * 31})


def test_verbose_prints_what_mlx_prints(capfd, tmp_path):
    keywords = {**CALL, "verbose": True}
    metal_kernel(**KERNEL)(**keywords)
    mine = capfd.readouterr().out
    kernel = mx.fast.metal_kernel(**KERNEL)
    mx.export_function(str(tmp_path / "kernel.mlxfn"), lambda *_: kernel(**keywords), mx.ones(9))
    assert mine == capfd.readouterr().out
