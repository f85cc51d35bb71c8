"""The generated text against MLX's own: mx.export_function records a kernel where there is no Metal to run it."""

import random

import mlx.core as mx
import pytest

from tests import metal_emulator
from tests.metal_emulator.signature import ATTRIBUTES, TYPE_NAMES, generate


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


@pytest.fixture
def recorded(tmp_path):
    """`recorded(arrays, output_dtypes, ...)`: the bytes of the file in which MLX keeps the kernel."""

    def record(source, arrays, output_dtypes, *, header="", template=None, atomic_outputs=False):
        kernel = mx.fast.metal_kernel(
            "example", names(arrays), outputs(output_dtypes), source, header=header, atomic_outputs=atomic_outputs
        )

        def call(*inputs):
            return kernel(
                inputs=list(inputs),
                template=template,
                grid=(32, 1, 1),
                threadgroup=(32, 1, 1),
                output_shapes=[(4,)] * len(output_dtypes),
                output_dtypes=output_dtypes,
            )

        path = tmp_path / "kernel.mlxfn"
        mx.export_function(str(path), call, *arrays)
        return path.read_bytes()

    return record


def names(arrays):
    return ["a", "b", "c", "d"][: len(arrays)]


def outputs(dtypes):
    return ["out", "more"][: len(dtypes)]


def generated(source, arrays, output_dtypes, *, header="", template=None, atomic_outputs=False):
    return generate(
        "example",
        names(arrays),
        outputs(output_dtypes),
        source,
        header=header,
        atomic_outputs=atomic_outputs,
        inputs=arrays,
        output_dtypes=output_dtypes,
        template=template,
    )


STATEMENTS = [
    "uint e = thread_position_in_grid.x;",
    "auto l = thread_index_in_simdgroup;",
    "uint3 t = threads_per_threadgroup;",
    "int s = a_shape[0];",
    "int64_t st = b_strides[0];",
    "int nd = a_ndim;",
    "threadgroup_barrier(mem_flags::mem_threadgroup);",
    "uint q = simdgroup_index_in_threadgroup;",
    "uint w = threads_per_simdgroup;",
]
TEMPLATES = [None, [("T", mx.float32)], [("T", mx.bfloat16), ("N", 4), ("B", True), ("M", -3)]]


def random_kernel(seed):
    draw = random.Random(seed)
    dtypes = list(TYPE_NAMES)
    shapes = [(), (3,), (4, 16), (2, 3, 4)]
    atomic = draw.random() < 0.2
    output_count = draw.choice([1, 2])
    return {
        "source": " ".join(draw.sample(STATEMENTS, draw.randint(0, 6))) + " out[0] = 0;",
        "arrays": [mx.zeros(draw.choice(shapes), draw.choice(dtypes)) for _ in range(2)],
        "output_dtypes": [mx.float32 if atomic else draw.choice(dtypes) for _ in range(output_count)],
        "header": draw.choice(["", "// helper\n"]),
        "template": draw.choice(TEMPLATES),
        "atomic_outputs": atomic,
    }


@pytest.mark.parametrize("seed", range(64))
def test_text_of_a_random_kernel_is_mlx_text(seed, recorded):
    kernel = random_kernel(seed)
    assert generated(**kernel).text.encode() in recorded(**kernel)


@pytest.mark.parametrize("dtype", TYPE_NAMES, ids=str)
def test_name_of_a_dtype_is_mlx_name(dtype, recorded):
    arrays = [mx.zeros(9).astype(dtype)]
    assert generated("out[0] = 0;", arrays, [dtype]).text.encode() in recorded("out[0] = 0;", arrays, [dtype])


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attribute_becomes_a_parameter_as_in_mlx(attribute, recorded):
    source = f"auto id = {attribute};"
    assert generated(source, [], [mx.float32]).text.encode() in recorded(source, [], [mx.float32])


X = "out[thread_position_in_grid.x] = 0;"
CORNERS = {
    "no_input": ([], {}),
    "scalar": ([mx.array(1)], {}),
    "seven_elements": ([mx.zeros(7)], {}),
    "eight_elements": ([mx.zeros(8)], {}),
    "no_element": ([mx.zeros((0, 4))], {}),
    "atomic_outputs": ([mx.zeros(9)], {"atomic_outputs": True}),
    "negative_template": ([mx.zeros(9)], {"template": [("N", -7)]}),
    "boolean_templates": ([mx.zeros(9)], {"template": [("B", True), ("C", False)]}),
    "empty_template": ([mx.zeros(9)], {"template": []}),
    "shape_strides_ndim": ([mx.zeros((3, 4))], {"source": f"{X} int s = a_shape[0] + a_strides[0] + a_ndim;"}),
    "shape_of_a_scalar": ([mx.array(1)], {"source": f"{X} int s = a_shape[0];"}),
    "shape_in_a_comment": ([mx.zeros((3, 4))], {"source": f"{X} // a_shape"}),
    "shape_in_the_header": ([mx.zeros((3, 4))], {"header": "// a_shape thread_index_in_simdgroup\n"}),
    "shape_of_a_longer_name": ([mx.zeros((3, 4))], {"source": f"{X} int data_shape = 0;"}),
}


@pytest.mark.parametrize(("arrays", "keywords"), CORNERS.values(), ids=CORNERS)
def test_text_of_a_corner_is_mlx_text(arrays, keywords, recorded):
    kernel = {"source": X, "arrays": arrays, "output_dtypes": [mx.float32], **keywords}
    assert generated(**kernel).text.encode() in recorded(**kernel)


def test_malformed_signature_is_mlx_own(recorded):
    """Without attributes MLX counts a shape as an array: the list of parameters ends before the last one."""
    kernel = {
        "source": "out[0] = a_shape[0]; more[0] = 1;",
        "arrays": [mx.zeros(16)],
        "output_dtypes": [mx.float32, mx.float32],
    }
    text = generated(**kernel).text
    assert text.count(") {\n") == 2
    assert text.encode() in recorded(**kernel)


def test_every_parameter_has_its_buffer():
    signature = generated("out[0] = a_shape[0] + a_ndim;", [mx.zeros((2, 8)), mx.array(1)], [mx.float32])
    assert [parameter.name for parameter in signature.parameters] == ["a", "a_shape", "a_ndim", "b", "out"]
