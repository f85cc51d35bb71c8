"""`python -m qwen_mlx.bench kernels`: bytes and floors computed by hand, counts, times, and how it answers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx.bench import kernel_timing, kernel_traffic, main
from qwen_mlx.bench.chips import CHIPS, recognise
from qwen_mlx.bench.kernel_problems import (
    ATTENTION_CASES,
    CASES,
    MLX,
    PLAIN,
    Problem,
    chunk,
    conv,
    replay,
    scan,
    scan_with_tape,
    step,
)
from qwen_mlx.bench.kernel_timing import Measured, measure, winner
from qwen_mlx.bench.kernel_traffic import NoEmulator, Traffic, traffic
from qwen_mlx.bench.kernels import SHAPES
from qwen_mlx.cli import run
from qwen_mlx.kernels import backend
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes
from tests import metal_emulator
from tests.metal_emulator.device import emulated_metal

SMALL = Sizes(key_heads=1, value_heads=2, key_dim=32, value_dim=8, taps=4, dtype=mx.bfloat16)
SMALL_HEADS = AttentionSizes(64, query_heads=2, kv_heads=1, head_dim=96, rotary_dim=64, dtype=mx.bfloat16)
SMALL_CASES = [
    *((make, SMALL, min(T, 20)) for make, T in CASES),
    *((make, SMALL_HEADS, T) for make, T in ATTENTION_CASES),
]
SMALL_FLAGS = ["--key-heads", "1", "--value-heads", "2", "--key-dim", "32", "--value-dim", "8"]
KiB, MiB = 2**10, 2**20


@pytest.fixture
def emulator() -> None:
    metal_emulator.require()


def call(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        return run(lambda: main(["kernels", *arguments]))
    except SystemExit as end:
        return int(str(end.code))


# Per token: q, k, v and o, 8 KiB for 16 heads of 128 floats, g and beta, 64 bytes for 16 heads; and S in and out.
@pytest.mark.parametrize(
    ("models", "make", "tokens", "expected"),
    [
        pytest.param("0.8B, 2B", scan, 2, 2 * MiB + 2 * (32 * KiB + 128), id="scan"),
        pytest.param("4B, 9B", scan, 16, 4 * MiB + 16 * (48 * KiB + 256), id="scan_more_value_heads"),
        pytest.param("0.8B, 2B", scan_with_tape, 8, 2 * MiB + 8 * (40 * KiB + 128), id="tape"),
        pytest.param("0.8B, 2B", replay, 4, 2 * MiB + 4 * (16 * KiB + 64) + 4, id="replay_reads_half_a_tape"),
        pytest.param("4B, 9B", chunk, 512, 4 * MiB + 512 * (48 * KiB + 256), id="chunk"),
        # x, taps and two times three columns in 16 bits; q, k and v in 32; `ends`.
        pytest.param("0.8B, 2B", conv, 8, 6144 * (8 * 2 + 4 * 2 + 6 * 2 + 8 * 4) + 4, id="conv"),
        pytest.param("4B, 9B", conv, 512, 8192 * (512 * 2 + 4 * 2 + 6 * 2 + 512 * 4) + 4, id="conv_prefill"),
        # qkv, taps, columns; z and y; a and b; A_log and dt_bias; gain; eps; S.
        pytest.param(
            "0.8B, 2B",
            step,
            1,
            6144 * (2 + 4 * 2 + 6 * 2) + 2 * 2048 * 2 + 2 * 16 * 2 + 2 * 16 * 4 + 512 + 4 + 2 * MiB,
            id="step",
        ),
    ],
)
def test_bytes_that_must_move(models, make, tokens, expected):
    assert make(SHAPES[models], tokens).bytes_to_move == expected


@pytest.mark.parametrize(
    ("chip", "moved", "microseconds"),
    [
        pytest.param(CHIPS[0], 68_250, 1, id="M1"),
        pytest.param(CHIPS[1], 2_000_000, 5, id="M1_Max"),
        pytest.param(CHIPS[2], 819_000_000, 1000, id="M3_Ultra"),
        pytest.param(CHIPS[3], 2_241_220, 18.676833, id="M4"),
        pytest.param(CHIPS[4], 460, 0.001, id="M5_Max_of_32_cores"),
        pytest.param(CHIPS[5], 6_140, 0.01, id="M5_Max_of_40_cores"),
    ],
)
def test_floor(chip, moved, microseconds):
    assert chip.floor_us(moved) == pytest.approx(microseconds)


@pytest.mark.parametrize(
    ("device", "label"),
    [
        pytest.param("Apple M1", "M1", id="plain"),
        pytest.param("Apple M1 Max", "M1 Max", id="longer_name"),
        pytest.param("Apple M5 Max", "M5 Max (40)", id="the_faster_of_two"),
    ],
)
def test_a_chip_is_recognised(device, label):
    assert recognise(device).label == label


@pytest.mark.parametrize("device", ["Apple M1 Pro", "AMD EPYC", "Apple Paravirtual device"])
def test_a_chip_that_is_not_in_the_table(device):
    assert recognise(device) is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.label)
def test_every_bandwidth_has_a_source(chip):
    assert "https://" in chip.source


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("make", "sizes", "tokens"), SMALL_CASES)
def test_a_kernel_touches_every_byte_that_must_move_and_no_other(make, sizes, tokens):
    assert traffic(make, sizes, tokens).distinct == make(sizes, tokens).bytes_to_move


# Two heads of eight rows: two SIMD-groups. Every lane loads g, beta and its own quarter of q, k and a row of S, which
# is 8 of 32 floats; four lanes share an element of v, and one of them stores o.
def test_the_loads_and_stores_of_all_lanes(emulator):
    lanes = 2 * 32
    state, a_token = 2 * lanes * 8 * 4, lanes * (2 * 8 + 2 + 1) * 4 + 2 * 8 * 4
    assert traffic(scan, SMALL, 3).lanes == state + 3 * a_token


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("make", [chunk, conv])
@pytest.mark.parametrize("tokens", [48, 96])
def test_what_is_extended_equals_what_is_counted(make, tokens):
    extended, counted = traffic(make, SMALL, tokens), kernel_traffic._count(make(SMALL, tokens))
    assert (extended.distinct, extended.lanes) == (counted.distinct, counted.lanes)
    assert (extended.counted_at, counted.counted_at) == ((16, 32), (tokens,))


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        pytest.param(16, (16,), id="short"),
        pytest.param(512, (16, 32), id="long"),
        pytest.param(513, (513,), id="a_ragged_last_block_is_not_extended"),
    ],
)
def test_lengths_to_count(tokens, lengths):
    assert kernel_traffic.lengths_to_count(tokens) == lengths


@pytest.fixture
def two_layers(monkeypatch):
    monkeypatch.setattr(kernel_timing, "LAYERS", 2)


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize(("make", "sizes", "tokens"), SMALL_CASES)
def test_every_form_is_right_and_timed(make, sizes, tokens):
    with emulated_metal(check=False):
        problem = make(sizes, tokens)
        measured = measure(problem, rounds=1)
    assert problem.kernel.label in measured
    assert [one.trouble for one in measured.values() if one.seconds is None] == []
    assert winner(measured) in measured


def test_without_an_emulator_plain_mlx_and_mlx_itself_are_measured(two_layers):
    problem = scan(replace(SMALL, key_dim=16), 4)
    assert [*problem.forms] == [*measure(problem, rounds=2)] == [PLAIN, MLX]


def with_form(form) -> Problem:
    problem = scan(replace(SMALL, key_dim=16), 4)
    return replace(problem, forms={"planted": form, **problem.forms})


def refused(*inputs):
    raise RuntimeError("[metal_kernel] Unable to build\nand more lines")


@pytest.mark.parametrize(
    ("form", "trouble"),
    [
        pytest.param(lambda *x: [0.9 * x[2], x[5]], "wrong: off by", id="wrong_values"),
        pytest.param(lambda *x: [x[2] * mx.nan, x[5]], "wrong: off by nan", id="not_a_number"),
        pytest.param(lambda *x: [x[2][:, :1], x[5]], "wrong: shape (1, 1, 2, 8) for (1, 4, 2, 8)", id="wrong_shape"),
        pytest.param(refused, "does not run: [metal_kernel] Unable to build", id="does_not_run"),
    ],
)
def test_a_form_that_is_wrong_gets_no_time(two_layers, form, trouble):
    measured = measure(with_form(form), rounds=1)
    assert measured["planted"].seconds is None
    assert measured["planted"].trouble.startswith(trouble)
    assert winner(measured) in (PLAIN, MLX)


def test_nothing_wins_where_nothing_is_right():
    assert winner({PLAIN: Measured(None, "wrong")}) is None


def test_plain_mlx_leaves_the_kernels_as_trusted_as_they_were(monkeypatch):
    monkeypatch.setattr(backend, "distrusted", backend.distrusted)
    before = set(backend.distrusted)
    problem = conv(SMALL, 2)
    problem.forms[PLAIN](*problem.inputs)
    assert backend.distrusted == before


@pytest.fixture
def counts_nothing(monkeypatch):
    """A machine where the emulator is there and cheap."""
    monkeypatch.setattr("qwen_mlx.bench.kernels.traffic", lambda make, sizes, T: Traffic(2 * KiB, 3 * KiB, (T,)))


@pytest.mark.usefixtures("counts_nothing")
def test_the_last_line_is_json_with_every_row(capsys):
    assert call() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["bench"], result["metal"], result["rounds"]) == ("kernels", False, 0)
    assert {row["models"] for row in result["rows"]} == {"0.8B, 2B", "4B, 9B", "0.8B", "2B", "4B", "9B"}
    assert len(result["rows"]) == 2 * len(CASES) + 4 * len(ATTENTION_CASES)
    one = result["rows"][0]
    assert (one["kernel"], one["tokens"], one["served_by"]) == ("gated_delta_step", 1, "gated_delta_step")
    assert (one["bytes_must_move"], one["bytes_moved_distinct"], one["bytes_moved_by_all_lanes"]) == (
        2241220,
        2048,
        3072,
    )
    assert one["predicted_floor_us"]["M1 Max"] == pytest.approx(5.603)
    assert (one["measured"], one["winner"]) == ({}, None)
    assert result["chips"]["M3 Ultra"]["bandwidth"] == 819


@pytest.mark.usefixtures("counts_nothing")
def test_the_table_is_marked_as_a_prediction_and_says_what_was_scaled(capsys):
    call()
    out = capsys.readouterr().out
    assert "a prediction, no measurement" in out
    assert "counted at 16 and 32 tokens" in out
    assert "Measured" not in out


def test_the_whole_command_counts_on_the_emulator(capsys, emulator):
    assert call(*SMALL_FLAGS) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    assert [row["bytes_moved_distinct"] for row in rows] == [row["bytes_must_move"] for row in rows]
    assert all(line.startswith("Counting") for line in captured.err.splitlines())  # how far it is, where that is slow


def test_the_whole_command_where_there_is_metal(capsys, two_layers, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1 Max"})
    monkeypatch.setattr("qwen_mlx.bench.kernels.CASES", ((step, 1), (scan, 2), (conv, 20)))
    with emulated_metal(check=False):
        assert call(*SMALL_FLAGS, "--rounds", "1") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert "Measured on M1 Max" in captured.out
    assert "winner" in captured.out
    assert [sorted(row["measured"]) for row in result["rows"]] == [
        ["gated_delta_step", PLAIN],
        ["gated_delta_chunk", "gated_delta_scan", MLX, PLAIN],
        ["causal_conv1d", PLAIN],
    ]
    measured = result["rows"][1]["measured"].values()
    assert None not in [x for one in measured for x in (one["us"], one["share_of_bandwidth"])]
    assert result["rows"][1]["winner"] in result["rows"][1]["measured"]
    assert captured.err.startswith("The bytes that kernels move are counted where there is no Metal")


def test_a_form_that_is_not_timed_is_told_of(capsys, two_layers, monkeypatch):
    monkeypatch.setattr("qwen_mlx.bench.kernels.CASES", ((lambda sizes, tokens: with_form(refused), 4),))
    with emulated_metal(check=False):
        assert call("--rounds", "1") == 0
    captured = capsys.readouterr()
    assert "planted at 4 tokens is not timed: does not run: [metal_kernel] Unable to build." in captured.out
    assert "no share of it is told" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["rows"][0]["measured"]["planted"]["us"] is None


def test_a_shape_that_no_kernel_fits_is_said_to_be_served_by_plain_mlx(capsys):
    assert call("--key-heads", "2", "--key-dim", "48") == 0
    captured = capsys.readouterr()
    assert "No kernel fits this shape: plain MLX serves it." in captured.out
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    assert {row["served_by"] for row in rows} == {PLAIN}
    assert {row["bytes_moved_distinct"] for row in rows} == {None}
    assert captured.err == ""


@pytest.mark.usefixtures("counts_nothing")
def test_a_shape_that_some_kernels_fit(capsys):
    assert call("--key-heads", "2", "--value-heads", "10") == 0
    out = capsys.readouterr().out
    assert "Plain MLX serves this shape instead of gated_delta_step, gated_delta_scan," in out
    assert "causal_conv1d, which" not in out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        pytest.param(["--key-heads", "0"], "must be an integer, at least 1", id="zero"),
        pytest.param(["--key-dim", "x"], "must be an integer, at least 1", id="no_number"),
        pytest.param(["--key-heads", "2", "--value-heads", "3"], "no multiple of 2 key heads", id="no_multiple"),
        pytest.param(["--value-heads", "24"], "no multiple of 16 key heads", id="no_multiple_of_the_default"),
        pytest.param(["--value-dim", "257"], "--value-dim is 257; at most 256", id="too_large"),
        pytest.param(["--rounds", "-1"], "at least 1", id="rounds"),
        pytest.param(["--nonsense"], "--nonsense", id="unknown_flag"),
    ],
)
def test_wrong_flags_are_answered_by_one_sentence(capsys, flags, complaint):
    assert call(*flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert complaint in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        pytest.param([], "a bench is missing; the benches are kernels", id="none"),
        pytest.param(["nonsense"], "there is no bench nonsense; the benches are kernels", id="unknown"),
    ],
)
def test_a_bench_that_is_refused(capsys, line, complaint):
    with pytest.raises(SystemExit, match="2"):
        main(line)
    assert complaint in capsys.readouterr().err


def test_outside_of_a_checkout_columns_are_empty_and_it_says_why(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qwen_mlx.bench", "kernels", *SMALL_FLAGS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(only_the_package(tmp_path))},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["bytes_moved_distinct"] for row in rows} == {None}
    assert done.stderr.count("\n") == 1
    assert "for want of tests" in done.stderr
    assert "in a checkout, after pip install" in done.stderr


def only_the_package(folder: Path) -> Path:
    """A folder to import from that has the package and no tests."""
    installed = folder / "installed"
    installed.mkdir()
    (installed / "qwen_mlx").symlink_to(Path(kernel_traffic.__file__).parents[1])
    return installed


def test_the_emulator_of_another_checkout_is_not_taken(monkeypatch):
    monkeypatch.setattr(metal_emulator, "__file__", "/elsewhere/tests/metal_emulator/__init__.py")
    with pytest.raises(NoEmulator, match="that of another checkout"):
        traffic(scan, SMALL, 1)


def test_an_emulator_that_cannot_run_says_why(monkeypatch, capsys):
    monkeypatch.setattr(metal_emulator, "require", lambda: pytest.skip("the Metal emulator needs g++"))
    assert call(*SMALL_FLAGS) == 0
    assert capsys.readouterr().err == "The bytes that kernels move are not counted: the Metal emulator needs g++.\n"
