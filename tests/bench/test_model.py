"""`python -m qwen_mlx.bench model`: what it counts and compares, checked by hand, and the whole command on the demo."""

import csv
import json
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen_mlx.bench import main, model_startup
from qwen_mlx.bench import model as bench
from qwen_mlx.bench.chips import recognise
from qwen_mlx.bench.model_agreement import EnginesDiffer, near_ties
from qwen_mlx.bench.model_bytes import StepBytes, mean_context, quantization, step_bytes
from qwen_mlx.bench.model_engines import Ours, Run, timed_run
from qwen_mlx.bench.model_figures import alternate, figures, ratios
from qwen_mlx.bench.model_files import COLUMNS, write_csv
from qwen_mlx.bench.model_peer import MlxLM, NoPeer
from qwen_mlx.bench.model_report import Report, Result, as_object, lines
from qwen_mlx.bench.model_startup import Command, NoStart, Starts, commands, first_token, measure_starts
from qwen_mlx.cli import run
from qwen_mlx.config import read_config
from qwen_mlx.hub import resolve
from qwen_mlx.kernels import backend
from qwen_mlx.load import load, load_model
from qwen_mlx.model.qwen import Qwen
from tests.layouts import mlx_layout, released, write

DEMO = resolve("demo")
TINY = ["-p", "16", "-g", "4", "-n", "2"]
FLOAT = 4


def call(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        return run(lambda: main(["model", *arguments]))
    except SystemExit as end:
        return int(str(end.code))


def last_line(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def cells(table: Path) -> list[list[str]]:
    return list(csv.reader(table.read_text().splitlines()))


@pytest.fixture
def no_starts(monkeypatch):
    """Start-up takes a second in every engine, without any process."""

    def started(wanted, repetitions, progress):
        return {name: Starts([1.0] * repetitions) for name in wanted}

    monkeypatch.setattr(bench, "measure_starts", started)


@pytest.fixture(scope="module")
def mlx_lm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlx_lm.generate")
        pytest.importorskip("mlx_lm.models.qwen3_5")


# Bytes of a decode step.


def shaped(folder: Path, *, model_type: str = "qwen3_5", **sizes: Any) -> Qwen:
    """A model of the demo's kind with other sizes; nothing of it is evaluated."""
    raw = json.loads((DEMO / "config.json").read_text())
    layers = sizes.get("num_hidden_layers", 8)
    raw["model_type"] = model_type
    raw["tie_word_embeddings"] = sizes.get("tie_word_embeddings", True)
    raw["text_config"] |= {"layer_types": None, "num_hidden_layers": layers, **sizes}
    (folder / "config.json").write_text(json.dumps(raw))
    return Qwen(read_config(folder))


@pytest.fixture
def small_released(tmp_path) -> Qwen:
    """The shape of Qwen3.5-0.8B, tied: 18 linear and 6 full layers."""
    return shaped(
        tmp_path,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        vocab_size=248320,
        max_position_embeddings=262144,
    )


# qkv, z and out, b and a; q with its gate, k and v, out; three matrices of the MLP; the head.
LINEAR = 6144 * 1024 + 2 * 2048 * 1024 + 2 * 16 * 1024
FULL = 4096 * 1024 + 2 * 512 * 1024 + 2048 * 1024
MATRICES = 18 * LINEAR + 6 * FULL + 24 * 3 * 1024 * 3584 + 248320 * 1024
# Taps, A_log and dt_bias, gain of the output norm; gains of q and k; two gains a layer and the last one.
VECTORS = 18 * (6144 * 4 + 2 * 16 + 128) + 6 * 2 * 256 + (2 * 24 + 1) * 1024
KV = 6 * 2 * 2 * 256  # numbers a token
STATES = 18 * (3 * 6144 + 16 * 128 * 128)


def test_bytes_of_a_step_of_0_8B_in_float32(small_released):
    assert (LINEAR, FULL, MATRICES + VECTORS) == (10518528, 7340032, 752393024)
    assert step_bytes(small_released, 576) == StepBytes(
        FLOAT * (MATRICES + VECTORS), FLOAT * KV * 576, FLOAT * 2 * STATES
    )


def test_bytes_of_a_step_of_0_8B_in_4_bits(small_released):
    nn.quantize(small_released, group_size=64, bits=4)
    # Eight numbers in four bytes, and a scale and a bias for 64 of them.
    weights = MATRICES // 2 + MATRICES // 64 * 2 * FLOAT + FLOAT * VECTORS
    assert step_bytes(small_released, 1).weights == weights
    assert quantization(small_released) == "4 bit by 64, affine"


def test_keys_values_and_columns_are_in_the_dtype_of_the_activations_and_the_state_is_not(small_released):
    small_released.dtype = mx.bfloat16
    step = step_bytes(small_released, 100)
    assert (step.kv, step.states) == (2 * KV * 100, 18 * 2 * (3 * 6144 * 2 + 16 * 128 * 128 * FLOAT))


def test_bytes_of_a_step_of_a_mixture_count_the_chosen_experts_and_one_row_of_the_embedding(tmp_path):
    model = shaped(
        tmp_path,
        model_type="qwen3_5_moe",
        num_hidden_layers=4,
        tie_word_embeddings=False,
        hidden_size=64,
        vocab_size=512,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    )
    # One key head and two value heads of 128; two query heads and one of keys and values of 256.
    linear = 512 * 64 + 2 * 256 * 64 + 2 * 2 * 64 + 512 * 4 + 2 * 2 + 128
    full = 1024 * 64 + 2 * 256 * 64 + 512 * 64 + 2 * 256
    feed_forward = 8 * 64 + 2 * 3 * 64 * 32 + 3 * 64 * 48 + 64
    rest = 4 * 2 * 64 + 64 + 512 * 64 + 64  # gains, the head, a row of the embedding
    assert step_bytes(model, 10) == StepBytes(
        FLOAT * (3 * linear + full + 4 * feed_forward + rest),
        FLOAT * 2 * 256 * 10,
        FLOAT * 3 * 2 * (3 * 512 + 2 * 128 * 128),
    )


def test_weights_that_are_quantized_in_several_ways_are_all_told_of():
    model = load_model(DEMO)
    assert quantization(model) == "none"
    nn.quantize(model, 64, 4, class_predicate=lambda path, module: path.endswith("up_proj"))
    nn.quantize(model, 32, 8, class_predicate=lambda path, module: path.endswith("down_proj"))
    assert quantization(model) == "4 bit by 64, affine and 8 bit by 32, affine"


def test_the_mean_context_is_that_of_the_steps_on_the_clock():
    contexts = [512 + n for n in range(1, 128)]  # with the token that goes in, of the 2nd to the 128th
    assert mean_context(512, 128) == sum(contexts) / len(contexts)


def test_share_of_the_bandwidth():
    step = StepBytes(weights=3_000_000_000, kv=900_000_000, states=100_000_000)
    assert step.share(recognise("Apple M1 Max"), 50) == pytest.approx(0.5)  # 4 GB of 400 GB/s: 100 steps a second


# The arithmetic.


def runs_of(*seconds: tuple[float, float], peak: int = 1000) -> list[Run]:
    return [Run(100, 11, first, decode, peak) for first, decode in seconds]


def test_figures_of_runs():
    found = figures(runs_of((1.0, 2.0), (2.0, 1.0), (4.0, 4.0)))
    assert found["prefill_tok_s"].values == (100, 50, 25)
    assert found["decode_tok_s"].values == (5, 10, 2.5)
    assert (found["decode_tok_s"].median, found["decode_tok_s"].spread) == (5, 1.5)
    assert found["first_token_s"].median == 2


def test_a_ratio_comes_pair_by_pair():
    ours, theirs = runs_of((1, 1), (2, 1), (10, 1)), runs_of((2, 2), (6, 3), (10, 0.5), peak=2500)
    found = ratios(figures(ours), figures(theirs))
    assert found["prefill_tok_s"].values == found["first_token_s"].values == pytest.approx((2, 3, 1))
    # The ratio of the medians would be 3.
    assert found["prefill_tok_s"].median == pytest.approx(2)
    assert found["decode_tok_s"].values == pytest.approx((2, 3, 0.5))
    assert found["peak_bytes"].median == 2.5


def test_engines_alternate():
    assert list(alternate(["A", "B"], 3)) == [["A", "B"], ["B", "A"], ["A", "B"]]


class Fake:
    """An engine that takes as long as it is told, on a clock of its own."""

    name, weight_bytes = "fake", 5000

    def __init__(self, monkeypatch, steps):
        self.now, self.steps = 0.0, steps
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def tokens(self, prompt, count):
        for seconds in self.steps[:count]:
            self.now += seconds
            yield 0

    def synchronize(self):
        self.now += 100


def test_a_run_ends_with_its_last_token_and_starts_on_an_idle_device(monkeypatch):
    measured = timed_run(Fake(monkeypatch, [3.0, 0.5, 1.5]), [1, 2, 3], 3)
    assert (measured.first_s, measured.decode_s) == (3, 2)
    assert (measured.prefill_tps, measured.decode_tps) == (1, 1)


def test_peak_memory_is_without_the_weights_of_others():
    model, tokenizer = load("demo")
    engine = Ours(model, tokenizer.vocab_size)
    mx.eval(model.parameters())
    alone = timed_run(engine, [1] * 16, 2).peak_bytes
    other = mx.zeros((5000, 5000))
    mx.eval(other)
    assert alone > engine.weight_bytes
    assert timed_run(engine, [1] * 16, 2).peak_bytes == pytest.approx(alone, rel=0.2)
    assert other.nbytes > 5 * alone


# Whether two engines say the same.


def rows(*values: list[float]) -> list[mx.array]:
    return [mx.array(row) for row in values]


def compare(ours: list[mx.array], theirs: list[mx.array], *, exact: bool = True):
    tokens = [int(mx.argmax(row).item()) for row in ours]
    return near_ties(list(zip(tokens, ours)), theirs, exact=exact, prompt_tokens=9, shown=lambda token: f"<{token}>")


def test_the_same_tokens_are_no_tie_whatever_the_logits_are_shifted_by():
    assert compare(rows([0, 3, 1], [5, 0, 0]), rows([10, 13, 11], [1, 0, 0])) == []


def test_a_near_tie_is_listed_and_what_follows_is_compared_as_well():
    ours, theirs = rows([0, 2.0002, 2], [1, 0, 0], [0, 0, 1]), rows([0, 2, 2.0003], [1, 0, 0], [0, 0, 1])
    (tie,) = compare(ours, theirs)
    assert (tie.position, tie.ours, tie.theirs, tie.bound) == (1, 1, 2, 5e-4)
    assert (tie.our_gap, tie.their_gap) == pytest.approx((0.0002, 0.0003), rel=1e-2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param([0, 2.001, 2], [0, 2, 2.0001], id="clear_for_us"),
        pytest.param([0, 2.0001, 2], [0, 2, 2.001], id="clear_for_them"),
        pytest.param([0, 2, 1], [0, float("nan"), 1], id="not_a_number"),
        pytest.param([0, float("nan"), 1], [0, 2, 1], id="not_a_number_of_ours"),
    ],
)
def test_more_than_a_near_tie_is_refused(ours, theirs):
    with pytest.raises(EnginesDiffer, match=r"at token 2 of 2 after 9 tokens qwen_mlx takes <\d> and mlx-lm <\d>"):
        compare(rows([1, 0, 0], ours), rows([1, 0, 0], theirs))


@pytest.mark.parametrize(("gap", "is_near"), [pytest.param(0.15, True, id="near"), pytest.param(0.17, False, id="far")])
def test_in_16_bits_a_near_tie_is_a_share_of_the_spread(gap, is_near):
    ours, theirs = rows([-4, 6, 6 - gap]), rows([-4, 6, 6.01])  # a spread of 10: 0.156
    if is_near:
        assert len(compare(ours, theirs, exact=False)) == 1
    else:
        with pytest.raises(EnginesDiffer):
            compare(ours, theirs, exact=False)


def test_padding_of_the_vocabulary_that_the_other_engine_draws_is_refused():
    with pytest.raises(EnginesDiffer, match="qwen_mlx takes <0> and mlx-lm <2>"):
        near_ties([(0, mx.array([1.0, 0, 5]))], rows([1, 0, 5]), exact=False, prompt_tokens=1, shown=lambda t: f"<{t}>")


# Start-up.


def python(code: str, banner: bytes = b"") -> Command:
    return Command([sys.executable, "-c", code], banner)


def test_a_start_ends_with_the_first_byte_after_the_banner():
    assert first_token(python("print('==\\nx', flush=True)\nwhile True: pass", b"==\n")) > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param("import sys; sys.exit('a line\\nthe reason\\n')", "the reason", id="complaint"),
        pytest.param("pass", "it ended without a token", id="silence"),
        pytest.param("print('==')", "it ended without a token", id="banner_only"),
    ],
)
def test_a_command_that_writes_no_token_says_why(code, reason):
    with pytest.raises(NoStart, match=reason):
        first_token(python(code, b"==\n"))


def test_a_start_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(model_startup, "LIMIT_S", 0.2)
    with pytest.raises(NoStart, match=r"no token within 0\.2 s"):
        first_token(python("while True: pass"))


def test_the_first_start_is_not_counted_and_one_that_fails_is_not_tried_again(monkeypatch):
    seconds = {"good": iter([9.0, 1.0, 2.0]), "bad": iter([])}

    def timed(command):
        try:
            return next(seconds[command.arguments[0]])
        except StopIteration:
            raise NoStart("why") from None

    monkeypatch.setattr(model_startup, "first_token", timed)
    told = []
    wanted = {name: Command([name]) for name in seconds}
    found = measure_starts(wanted, 2, lambda done, total: told.append((done, total)))
    assert found == {"good": Starts([1.0, 2.0]), "bad": Starts(reason="why")}
    assert told[0] == (0, 6)


def test_both_commands_get_the_same_prompt_and_go_without_the_template():
    ours, theirs = commands(DEMO, "float32", peer=True).values()
    assert "--raw" in ours.arguments
    assert "--ignore-chat-template" in theirs.arguments
    assert ours.arguments[ours.arguments.index("--prompt") + 1] in theirs.arguments


# The whole command.


def test_the_prompt_is_the_same_everywhere():
    tokens = bench.prompt_tokens(248077, 64)
    assert tokens[:3] == bench.prompt_tokens(248077, 3) == [209481, 188031, 104334]
    assert max(tokens) < 248077
    assert bench.prompt_hash(tokens) == "ccf16e8c4fed"


def test_the_command_starts_measures_and_ends_in_json(capsys, tmp_path):
    table = tmp_path / "runs.csv"
    assert call("demo", "-p", "16", "8", "-g", "4", "-n", "2", "--dtype", "float32", "--csv", str(table)) == 0
    captured = capsys.readouterr()
    result = last_line(captured.out)
    assert (result["bench"], result["model"], result["dtype"], result["quantization"]) == (
        "model",
        "demo",
        "float32",
        "none",
    )
    assert {"device", "metal", "platform", "preloaded"} <= result.keys()
    assert result["versions"].keys() == {"qwen-mlx", "mlx", "python"}
    assert (result["bandwidth_gb_s"], result["startup_ratio"], result["startup_missing"]) == (None, None, {})
    assert "CPU" in result["no_share_of_bandwidth"]
    assert len(result["startup_s"]["qwen_mlx"]["values"]) == 2
    assert [one["prompt_tokens"] for one in result["results"]] == [16, 8]
    one = result["results"][0]
    assert one["prompt_sha256"] == bench.prompt_hash(bench.prompt_tokens(load("demo")[1].vocab_size, 16))
    assert one["bytes_per_step"]["kv"] == 2 * 2 * 256 * 4 * 18
    assert one["bytes_per_step"]["total"] == sum(one["bytes_per_step"][part] for part in ("weights", "kv", "states"))
    engine = one["engines"]["qwen_mlx"]
    assert engine.keys() == {"prefill_tok_s", "decode_tok_s", "first_token_s", "peak_bytes", "share_of_bandwidth"}
    assert engine["share_of_bandwidth"] is None
    assert len(engine["decode_tok_s"]["values"]) == 2
    assert (one["ratios"], one["near_ties"]) == ({}, [])
    assert "(largest - smallest) / median" in captured.out
    assert "ratio" not in captured.out.splitlines()[4]
    heading, *written = cells(table)
    assert tuple(heading) == COLUMNS
    assert [row[:4] for row in written] == [["qwen_mlx", p, "4", n] for p in ("16", "8") for n in ("1", "2")]
    assert all(float(cell) > 0 for row in written for cell in row[4:])
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.usefixtures("mlx_lm")
def test_against_mlx_lm_both_are_measured_and_compared(capsys, tmp_path):
    table = tmp_path / "runs.csv"
    assert call("demo", "--against", "mlx-lm", *TINY, "--csv", str(table)) == 0
    captured = capsys.readouterr()
    result = last_line(captured.out)
    assert "mlx-lm" in result["versions"]
    assert result["startup_s"].keys() == {"qwen_mlx", "mlx-lm"}
    assert result["startup_missing"] == {}
    assert len(result["startup_ratio"]["values"]) == 2
    (one,) = result["results"]
    assert one["engines"].keys() == {"qwen_mlx", "mlx-lm"}
    assert one["ratios"].keys() == {"prefill_tok_s", "decode_tok_s", "first_token_s", "peak_bytes"}
    pairs = [ours / theirs for ours, theirs in zip(*(e["decode_tok_s"]["values"] for e in one["engines"].values()))]
    assert one["ratios"]["decode_tok_s"]["values"] == pytest.approx(pairs)
    assert "The greedy tokens of both engines are the same." in captured.out or one["near_ties"]
    assert [row[0] for row in cells(table)][1:] == ["qwen_mlx"] * 2 + ["mlx-lm"] * 2


@pytest.mark.usefixtures("mlx_lm", "no_starts")
def test_no_speed_up_is_told_when_an_engine_is_spoiled(capsys, monkeypatch, tmp_path):
    class Spoiled(MlxLM):
        def __init__(self, folder, ours):
            super().__init__(folder, ours)
            mlp = self.model.language_model.model.layers[3].mlp.down_proj
            mlp.weight = -3 * mlp.weight

    monkeypatch.setattr(bench, "MlxLM", Spoiled)
    table = tmp_path / "runs.csv"
    assert call("demo", "--against", "mlx-lm", "-p", "16", "-g", "16", "-n", "1", "--csv", str(table)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no speed-up is told: at token " in captured.err
    assert " of 16 after 16 tokens qwen_mlx takes " in captured.err
    assert captured.err.count("\n") == 1
    assert not table.exists()


@pytest.mark.usefixtures("mlx_lm")
@pytest.mark.parametrize(
    ("module", "name"), [("qwen_mlx.bench.model_engines", "device_limits"), ("mlx_lm.generate", "wired_limit")]
)
def test_each_engine_runs_under_its_own_limits_of_memory(module, name, monkeypatch):
    held = []

    @contextmanager
    def limits(*_):
        held.append(True)
        yield
        held.append(False)

    monkeypatch.setattr(import_module(module), name, limits)
    ours = load_model(DEMO, dtype="float32")
    engine = MlxLM(DEMO, ours) if name == "wired_limit" else Ours(ours, ours.config.text.vocab_size)
    tokens = engine.tokens([5, 6, 7], 2)
    assert held == []
    next(tokens)
    assert held == [True]
    assert len(list(tokens)) == 1
    assert held == [True, False]


@pytest.mark.usefixtures("mlx_lm")
def test_mlx_lm_follows_our_tokens():
    ours = load_model(DEMO, dtype="float32")
    peer = MlxLM(DEMO, ours)
    prompt, forced = [5, 6, 7], [100, 200, 300]
    followed = list(peer.follow(prompt, forced))
    rows = ours(mx.array([prompt + forced]))[0, len(prompt) - 1 : -1]
    for got, row in zip(followed, rows, strict=True):
        assert mx.abs(got - (row - mx.logsumexp(row))).max().item() < 0.2  # its gains are those of bfloat16


@pytest.mark.usefixtures("mlx_lm")
def test_gains_tell_whether_the_weights_are_the_same(checkpoint_of, tmp_path):
    source = checkpoint_of("b-r2-d64")
    converted = write(tmp_path, source, mlx_layout(released(source)))
    assert not MlxLM(source, load_model(source, dtype="float32")).exact_gains
    assert MlxLM(converted, load_model(converted, dtype="float32")).exact_gains


@pytest.mark.usefixtures("mlx_lm")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mlx_lm_runs_in_our_dtype(dtype):
    peer = MlxLM(DEMO, load_model(DEMO, dtype=dtype))
    assert peer.model.language_model.model.embed_tokens.weight.dtype == getattr(mx, dtype)
    assert peer.model.language_model.model.layers[0].linear_attn.A_log.dtype == mx.float32


@pytest.mark.usefixtures("mlx_lm")
def test_a_folder_that_mlx_lm_cannot_load_is_told_of(tmp_path):
    with pytest.raises(NoPeer, match="mlx-lm cannot load"):
        MlxLM(tmp_path, load_model(DEMO))


def test_without_mlx_lm_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_lm.generate", None)
    assert call("demo", "--against", "mlx-lm", *TINY) == 2
    assert "run `pip install mlx-lm`" in capsys.readouterr().err


@pytest.mark.usefixtures("no_starts")
def test_on_a_known_chip_a_share_of_its_bandwidth_is_told(capsys, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M4"})
    monkeypatch.setattr(bench, "_bandwidth", lambda: (recognise("Apple M4"), ""))
    assert call("demo", *TINY) == 0
    out = capsys.readouterr().out
    result = last_line(out)
    assert (result["bandwidth_gb_s"], result["no_share_of_bandwidth"]) == (120, None)
    one = result["results"][0]
    rate = one["engines"]["qwen_mlx"]["decode_tok_s"]["median"]
    assert one["engines"]["qwen_mlx"]["share_of_bandwidth"] == pytest.approx(
        one["bytes_per_step"]["total"] * rate / 120e9, rel=1e-6
    )
    assert "No share" not in out


@pytest.mark.parametrize(
    ("generation", "device", "bandwidth", "why"),
    [
        pytest.param(16, "Apple M4", 120, "", id="known"),
        pytest.param(16, "Apple M4 Pro", None, "that of Apple M4 Pro is not in the table", id="unknown"),
        pytest.param(None, "Apple M4", None, "MLX runs on the CPU here", id="no_metal"),
    ],
)
def test_which_bandwidth(monkeypatch, generation, device, bandwidth, why):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": device})
    monkeypatch.setattr(backend, "gpu_generation", lambda: generation)
    chip, reason = bench._bandwidth()
    assert (chip and chip.bandwidth) == bandwidth
    assert reason.startswith(why)
    assert bool(reason) == (chip is None)


def test_a_folder_without_a_tokenizer_is_measured_and_has_no_start_up(capsys, checkpoint_of):
    assert call(str(checkpoint_of("a-r1-d32")), *TINY) == 0
    captured = capsys.readouterr()
    result = last_line(captured.out)
    assert result["startup_s"] == {"qwen_mlx": None}
    assert result["startup_missing"] == {"qwen_mlx": "the folder has no tokenizer.json"}
    assert "qwen_mlx not timed: the folder has no tokenizer.json" in captured.out


def canned(*, starts: dict[str, Starts] | None = None) -> Report:
    """Two engines, two repetitions, a near tie; ours twice as fast."""
    about = {
        "model": "demo",
        "device": "a chip",
        "metal": False,
        "platform": "somewhere",
        "versions": {"mlx": "1"},
        "preloaded": "libblas.so",
        "dtype": "float32",
        "quantization": "none",
        "generated_tokens": 11,
        "repetitions": 2,
    }
    ties = near_ties(
        [(1, mx.array([0, 2.0002, 2]))], rows([0, 2, 2.0003]), exact=True, prompt_tokens=100, shown=lambda _: ""
    )
    runs = {"qwen_mlx": runs_of((1, 1), (1, 1)), "mlx-lm": runs_of((2, 2), (2, 2))}
    result = Result(100, "0123456789ab", StepBytes(2**20, 2**20, 2**20), runs, ties)
    starts = starts or {"qwen_mlx": Starts([1, 1]), "mlx-lm": Starts([4, 3])}
    return Report(about, starts, [result], None, "none is known")


def test_the_table_has_the_ratio_near_ties_and_start_up():
    text = "\n".join(lines(canned(), lambda token: f"<{token}>"))
    assert "Near tie after 100 tokens, at token 1: <1> or <2>, 0.0002 and 0.0003 apart; at most 0.0005 is near." in text
    assert "The greedy tokens of both engines are the same." not in text
    assert "qwen_mlx 1 (0%); mlx-lm 3.5 (29%); ratio 3.5 (29%)" in text
    assert "preloaded libblas.so" in text
    assert "1.00 MiB weights, 1.00 MiB keys and values, 1.00 MiB states" in text
    assert next(line.split()[:4] for line in text.splitlines() if " ratio " in line) == ["100", "ratio", "2", "(0%)"]
    assert [tie["position"] for tie in as_object(canned())["results"][0]["near_ties"]] == [1]


def test_an_engine_that_does_not_start_has_no_start_up_and_no_ratio_of_it(tmp_path):
    report = canned(starts={"qwen_mlx": Starts([1, 1]), "mlx-lm": Starts(reason="it ended")})
    said = as_object(report)
    assert (said["startup_s"]["mlx-lm"], said["startup_missing"], said["startup_ratio"]) == (
        None,
        {"mlx-lm": "it ended"},
        None,
    )
    write_csv(tmp_path / "runs.csv", report)
    assert [row[-1] for row in cells(tmp_path / "runs.csv")] == ["startup_s", "1", "1", "", ""]


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from qwen_mlx.bench.model_files import write_plot

    write_plot(tmp_path / "speed.png", canned())
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["speed.png"]


def test_without_matplotlib_a_plot_is_refused_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bench, "_open", lambda args: pytest.fail("it loads the model"))
    assert call("demo", "--plot", str(tmp_path / "speed.png")) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert 'pip install "qwen-mlx[plot]"' in captured.err


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(tmp_path):
    broken = canned()
    broken.results[0].runs["qwen_mlx"].append(None)
    (tmp_path / "runs.csv").write_text("as it was")
    with pytest.raises(AttributeError):
        write_csv(tmp_path / "runs.csv", broken)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("runs.csv", "as it was")]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        pytest.param([], "required: MODEL", id="no_model"),
        pytest.param(["demo", "-p", "0"], "must be an integer, at least 1", id="no_prompt"),
        pytest.param(["demo", "-g", "1"], "-g is 1", id="one_token"),
        pytest.param(["demo", "-n", "x"], "must be an integer", id="no_number"),
        pytest.param(
            ["demo", "-p", "4000", "-g", "100"], "4000 tokens and 100 more are 4100; the model", id="too_long"
        ),
        pytest.param(["demo", "--against", "llama"], "llama", id="unknown_engine"),
        pytest.param(["demo", "--dtype", "int8"], "int8", id="unknown_dtype"),
        pytest.param(["demo", "--csv", "/nowhere/runs.csv"], "--csv cannot write /nowhere/runs.csv", id="no_folder"),
        pytest.param(["demo", "--csv", "."], "--csv cannot write .", id="a_folder"),
        pytest.param(["demo", "--plot", "speed.pdf"], "must end in .png, not be speed.pdf", id="no_png"),
        pytest.param(["no model"], "no model is no folder here", id="unknown_model"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(capsys, flags, complaint):
    assert call(*flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
