"""Whatever is wrong with the request or the files: one sentence, exit code 2 (130 for Ctrl-C), and a known exception.

Tables drive the tests. Each row is tried on the command and in the library; most commands run in this process, real
processes are kept for signals, pipes, the hub, and a few rows that stand for the rest.
"""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qwen_mlx.__main__
from qwen_mlx import generate, load
from qwen_mlx.cli import run
from qwen_mlx.errors import CheckpointError, ModelNotFoundError, PromptError, TokenizerError
from qwen_mlx.hub import resolve
from tests.hub_stand_in import Hub

COMMAND = importlib.import_module("qwen_mlx.generate")
DEMO = resolve("demo")
START = "Once upon a time"
Change = Callable[[Path], object]


def configured(**values: Any) -> Change:
    """Other values in the text_config of config.json; None takes one away."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def of_type(model_type: str) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))

    return change


def weighted(edit: Callable[[dict[str, mx.array]], object], file: str = "model.safetensors") -> Change:
    """The demo's tensors after `edit`, in `file`."""

    def change(folder: Path) -> None:
        tensors = mx.load(str(DEMO / "model.safetensors"))
        assert isinstance(tensors, dict)
        edit(tensors)
        mx.save_safetensors(str(folder / file), tensors)

    return change


def written(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content)


def without(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def cut(size: int) -> Change:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def renamed(name: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def indexed(folder: Path) -> None:
    """An index that speaks of a second file."""
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def doubled_norms(tensors: dict[str, mx.array]) -> None:
    """Gains shifted by one, as an MLX conversion has them, in a file that is otherwise as released."""
    for name in tensors:
        if name.endswith("layernorm.weight") and "mtp" not in name:
            tensors[name] = tensors[name] + 1


def one_converted_convolution(tensors: dict[str, mx.array]) -> None:
    name = PREFIX + "layers.1.linear_attn.conv1d.weight"
    tensors[name] = tensors[name].swapaxes(1, 2)


def not_numbers(tensors: dict[str, mx.array]) -> None:
    name = PREFIX + "layers.2.mlp.up_proj.weight"
    tensors[name] = mx.full(tensors[name].shape, float("nan"), tensors[name].dtype)


PREFIX = "model.language_model."
GATE = PREFIX + "layers.0.mlp.gate_proj.weight"
FOLDERS: dict[str, tuple[Change, type[Exception], str]] = {
    "empty_folder": (emptied, CheckpointError, "config.json"),
    "no_config": (without("config.json"), CheckpointError, "config.json"),
    "config_is_no_json": (written("config.json", "{model}"), CheckpointError, "config.json"),
    "config_is_a_list": (written("config.json", "[]"), CheckpointError, "config.json"),
    "another_architecture": (of_type("llama"), CheckpointError, "llama"),
    "size_zero": (configured(hidden_size=0), CheckpointError, "hidden_size must be a positive integer, it is 0"),
    "size_negative": (configured(head_dim=-1), CheckpointError, "head_dim must be a positive integer, it is -1"),
    "size_is_text": (configured(vocab_size="2048"), CheckpointError, "vocab_size"),
    "size_missing": (configured(intermediate_size=None), CheckpointError, "lacks intermediate_size"),
    "heads_do_not_divide": (configured(num_key_value_heads=3), CheckpointError, "num_key_value_heads (3)"),
    "rotary_does_not_fit": (configured(head_dim=128), CheckpointError, "mrope_section"),
    "layers_do_not_agree": (configured(num_hidden_layers=9), CheckpointError, "layer_types must name 9 layers"),
    "sizes_of_another_model": (configured(intermediate_size=512), CheckpointError, "asks for (512, 128)"),
    "no_weights": (without("model.safetensors"), CheckpointError, "holds no model*.safetensors"),
    "missing_shard": (renamed("model-00001-of-00002.safetensors"), CheckpointError, "model-00002-of-00002.safetensors"),
    "missing_shard_of_the_index": (indexed, CheckpointError, "model-00002-of-00002.safetensors"),
    "truncated_data": (cut(100_000), CheckpointError, "truncated"),
    "truncated_header": (cut(100), CheckpointError, "truncated"),
    "empty_file": (cut(0), CheckpointError, "truncated"),
    "no_safetensors_file": (written("model.safetensors", "\x10" + "\0" * 7 + "x" * 99), CheckpointError, "header"),
    "wrong_shape": (weighted(lambda t: t.update({GATE: t[GATE][:9]})), CheckpointError, "gate_proj.weight has shape"),
    "missing_tensor": (weighted(lambda t: t.pop(GATE)), CheckpointError, "layers.0.mlp.gate_proj.weight"),
    "extra_tensor": (weighted(lambda t: t.update({GATE + "s": t[GATE]})), CheckpointError, "gate_proj.weights"),
    "unknown_tensor": (weighted(lambda t: t.update({"h.0": t[GATE]})), CheckpointError, "h.0"),
    "tensor_stored_twice": (weighted(lambda t: t, "model-2.safetensors"), CheckpointError, "stored twice"),
    "weights_not_numbers": (weighted(not_numbers), CheckpointError, "model.layers.2.mlp.up_proj.weight"),
    "norms_of_another_convention": (weighted(doubled_norms), CheckpointError, "norms"),
    "layers_of_two_conventions": (weighted(one_converted_convolution), CheckpointError, "two conventions"),
    "no_tokenizer": (without("tokenizer.json"), TokenizerError, "tokenizer.json"),
    "broken_tokenizer": (written("tokenizer.json", "{}"), TokenizerError, "tokenizer.json"),
    "broken_template": (written("chat_template.jinja", "{% if %}"), PromptError, "template"),
    "refusing_template": (written("chat_template.jinja", "{{ raise_exception('no') }}"), PromptError, "template"),
    "impossible_recommendation": (
        written("generation_config.json", '{"temperature": -1}'),
        CheckpointError,
        "generation_config.json: temperature",
    ),
}
every_folder = pytest.mark.parametrize(("change", "error", "said"), FOLDERS.values(), ids=FOLDERS.keys())

# The flags, the same in the library, its exception, a part of the sentence.
REQUESTS: dict[str, tuple[list[str], dict[str, Any], type[Exception], str]] = {
    "temperature_negative": (["--temp", "-1"], {"temperature": -1.0}, ValueError, "temperature"),
    "temperature_nan": (["--temp", "nan"], {"temperature": float("nan")}, ValueError, "temperature"),
    "top_p_zero": (["--top-p", "0"], {"top_p": 0.0}, ValueError, "top_p"),
    "top_p_above_one": (["--top-p", "1.5"], {"top_p": 1.5}, ValueError, "top_p"),
    "top_k_negative": (["--top-k", "-1"], {"top_k": -1}, ValueError, "top_k"),
    "min_p_above_one": (["--min-p", "2"], {"min_p": 2.0}, ValueError, "min_p"),
    "repetition_zero": (["--repetition-penalty", "0"], {"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
    "presence_large": (["--presence-penalty", "9"], {"presence_penalty": 9.0}, ValueError, "presence_penalty"),
    "frequency_large": (["--frequency-penalty", "9"], {"frequency_penalty": 9.0}, ValueError, "frequency_penalty"),
    "seed_negative": (["--seed", "-1"], {"seed": -1}, ValueError, "seed"),
    "max_tokens_zero": (["--max-tokens", "0"], {"max_tokens": 0}, ValueError, "max_tokens"),
    "stop_empty": (["--stop", ""], {"stop": [""]}, ValueError, "stop"),
    "prefill_step_zero": (["--prefill-step-size", "0"], {"prefill_step_size": 0}, ValueError, "step"),
    "empty_prompt": (["--prompt", ""], {"prompt": ""}, PromptError, "empty"),
    "prompt_not_unicode": (["--prompt", "a\udcff"], {"prompt": "a\udcff"}, PromptError, "Unicode"),
    "kv_bits_unknown": (["--kv-bits", "3"], {"kv_bits": 3}, ValueError, "kv"),
}

COMMAND_LINES: dict[str, tuple[list[str], str]] = {
    "blank_prompt": (["--prompt", " \n"], "empty"),
    "unknown_flag": (["--temprature", "1"], "--temprature"),
    "abbreviated_flag": (["--max", "1"], "--max"),
    "stray_word": (["hello"], "hello"),
    "number_is_text": (["--max-tokens", "many"], "many"),
    "step_is_text": (["--prefill-step-size", "many"], "many"),
    "value_is_missing": (["--temp"], "--temp"),
    "unknown_dtype": (["--dtype", "int8"], "int8"),
    "unknown_thinking": (["--thinking", "maybe"], "maybe"),
    "no_such_folder": (["--model", "./nowhere"], "nowhere"),
    "no_hub_id": (["--model", "qwen3.5"], "qwen3.5"),
}


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current and temporary folder in which nothing may be left behind."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert files_in(place) == []


@pytest.fixture
def broken(tmp_path: Path, change: Change) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    change(folder)
    return folder


def call(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        return run(lambda: COMMAND.main(list(arguments)))
    except SystemExit as end:
        return int(str(end.code))


def assert_one_sentence(code: int, out: str, err: str, said: str) -> None:
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def start(*arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "qwen_mlx.generate", *arguments]
    # The current folder may be another one than that of the package.
    environment = os.environ | {"PYTHONPATH": str(Path(qwen_mlx.__file__).parents[1])} | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finished(*arguments: str, **variables: str) -> tuple[int, str, str]:
    with start(*arguments, **variables) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


@every_folder
def test_a_folder_the_command_refuses(
    place: Path, broken: Path, capsys: pytest.CaptureFixture[str], error: type[Exception], said: str
) -> None:
    files = files_in(broken)
    code = call("--model", str(broken), "--prompt", START)
    assert_one_sentence(code, *capsys.readouterr(), said)
    assert files_in(broken) == files


@every_folder
def test_a_folder_the_library_refuses(broken: Path, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        generate(*load(broken), [{"role": "user", "content": START}])
    assert (type(caught.value), said in str(caught.value)) == (error, True)


@pytest.mark.parametrize(("flags", "options", "error", "said"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_the_command_refuses(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    options: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    code = call("--model", "demo", "--prompt", START, *flags)
    assert_one_sentence(code, *capsys.readouterr(), said)


@pytest.mark.parametrize(("flags", "options", "error", "said"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_the_library_refuses(
    flags: list[str], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        generate(*load("demo"), **({"prompt": START} | options))


@pytest.mark.parametrize(("flags", "said"), COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_a_command_line_that_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    code = call("--model", "demo", "--prompt", START, *flags)
    assert_one_sentence(code, *capsys.readouterr(), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "a verb is missing"), (["sing"], "no verb sing"), (["--model", "demo"], "no verb --model")],
    ids=["missing", "unknown", "flag"],
)
def test_a_verb_that_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["qwen-mlx", *arguments])
    with pytest.raises(SystemExit) as end:
        qwen_mlx.__main__.main()
    assert_one_sentence(int(str(end.value.code)), *capsys.readouterr(), said)


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfeh\x00", b"", b"\n"], ids=["latin1", "utf16", "empty", "blank"])
def test_what_stdin_may_not_hold(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code = call("--model", "demo")
    assert_one_sentence(code, *capsys.readouterr(), "The prompt")


def test_a_prompt_that_is_missing_on_a_terminal(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, slave = os.openpty()
    with open(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        code = call("--model", "demo")
    assert_one_sentence(code, *capsys.readouterr(), "--prompt")


@pytest.mark.parametrize("flags", [[], ["--prompt", "-"]], ids=["none", "dash"])
def test_a_stdin_that_is_closed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_sentence(call("--model", "demo", *flags), *capsys.readouterr(), "no prompt")


def test_a_stdout_that_is_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert (call("--model", "demo", "--prompt", START), "stdout is closed" in capsys.readouterr().err) == (2, True)


def test_a_file_that_cannot_be_opened(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        (place / "config.json").read_text()

    assert_one_sentence(run(main), *capsys.readouterr(), "config.json: No such file")


def test_an_output_that_lacks_the_letter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    code = run(lambda: print("Zoë"))
    assert_one_sentence(code, "", capsys.readouterr().err, "ascii has no '\\xeb'")


REPRESENTATIVES = {
    "truncated": (cut(100_000), ["--prompt", START], "truncated"),
    "not_numbers": (weighted(not_numbers), ["--prompt", START], "up_proj"),
    "temperature": (without("config.json"), ["--prompt", START, "--temp", "-1"], "temperature"),
}


@pytest.mark.parametrize(("change", "flags", "said"), REPRESENTATIVES.values(), ids=REPRESENTATIVES.keys())
def test_the_process_says_the_same(place: Path, broken: Path, flags: list[str], said: str) -> None:
    assert_one_sentence(*finished("--model", str(broken), *flags, HF_HOME=str(place)), said)


@pytest.mark.parametrize(
    ("reachable", "said"),
    [(True, "The hub has no model tales/a"), (False, "Cannot reach the hub")],
    ids=["unknown_id", "no_network"],
)
def test_a_model_that_cannot_be_fetched(place: Path, reachable: bool, said: str) -> None:
    with Hub({}) as hub:
        home = {"TMPDIR": str(place), "HF_HOME": str(place)}
        variables = home | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        if reachable:
            done = finished("--model", "tales/a", "--prompt", START, **variables)
    if not reachable:
        done = finished("--model", "tales/a", "--prompt", START, **variables)
    assert_one_sentence(*done, said)


# Drawn almost evenly from the vocabulary: whatever the model has learned, this seed meets no end token in 2,500.
ENDLESS = ["--model", "demo", "--raw", "--prompt", START, "--temp", "100000", "--seed", "18", "--max-tokens", "4000"]


def test_ctrl_c_in_decode_keeps_the_text_so_far() -> None:
    with start(*ENDLESS) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err, bool(first), out[-1:]) == (130, b"Interrupted.\n", True, b"\n")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_in_prefill(form: list[str]) -> None:
    slow = ["--model", "demo", "--raw", "--prompt", "a " * 3900, "--prefill-step-size", "1", *form]
    with start(*slow) as process:
        assert process.stderr is not None
        seen = process.stderr.readline()  # the progress, after a second
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert seen.startswith(b"Prompt: ")
    assert (process.returncode, err.splitlines()[-1]) == (130, b"Interrupted.")
    expected = {"model": "demo", "text": "", "finish_reason": "interrupted"}
    expected |= dict.fromkeys(("usage", "timings", "peak_memory_gb"))
    assert (json.loads(out) == expected) if form else (out == b"")


def interrupt(*_: Any, **__: Any) -> Any:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_the_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMMAND, "load", interrupt)
    assert (call("--model", "demo", "--prompt", START), *capsys.readouterr()) == (130, "", "Interrupted.\n")


def test_ctrl_c_while_the_verb_is_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", interrupt)
    monkeypatch.setattr(sys, "argv", ["qwen-mlx", "generate"])
    assert (qwen_mlx.__main__.main(), *capsys.readouterr()) == (130, "", "Interrupted.\n")


def test_ctrl_c_ends_the_json_with_the_text_so_far(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = COMMAND.stream_generate
    texts = []

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for response in stream(*arguments, **options):
            texts.append(response.text)
            yield response
            if response.generation_tokens == 5:
                interrupt()

    monkeypatch.setattr(COMMAND, "stream_generate", interrupted)
    code = call(*ENDLESS, "--json", "--verbose")
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (code, err.splitlines()[-1], "Generation: 5 tokens" in err) == (130, "Interrupted.", True)
    assert (report["text"], report["finish_reason"]) == ("".join(texts), "interrupted")
    assert report["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("form", [[], ["--json", "--max-tokens", "2"]], ids=["text", "json"])
def test_a_pipe_that_nobody_reads(form: list[str]) -> None:
    with start(*ENDLESS, *form) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not form:
            os.read(process.stdout.fileno(), 4096)
        process.stdout.close()
        err = process.stderr.read().decode()
        code = process.wait(timeout=60)
    assert_one_sentence(code, "", err, "nobody reads")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_disk_that_is_full(form: list[str]) -> None:
    command = [sys.executable, "-m", "qwen_mlx.generate", "--model", "demo", "--prompt", START, "-m", "2", *form]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert_one_sentence(done.returncode, "", done.stderr, "No space left")


@pytest.mark.parametrize("model", ["./nowhere", "a/b/c", "qwen3.5", str(DEMO / "config.json")])
def test_a_model_that_the_library_does_not_find(model: str) -> None:
    with pytest.raises(ModelNotFoundError):
        load(model)


def test_a_dtype_that_the_library_does_not_know() -> None:
    with pytest.raises(ValueError, match="int8"):
        load("demo", dtype="int8")
