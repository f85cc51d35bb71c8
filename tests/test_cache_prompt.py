"""A prompt in a file: `python -m qwen_mlx.cache_prompt` makes it, `generate --prompt-cache-file` goes on from it."""

import importlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwen_mlx import PromptCache, load, load_prompt_cache
from qwen_mlx.cache import file as cache_file
from qwen_mlx.chat.template import CUT
from qwen_mlx.cli import Progress, run
from qwen_mlx.hub import resolve

COMMAND = importlib.import_module("qwen_mlx.cache_prompt")
GENERATE = importlib.import_module("qwen_mlx.generate")
MODEL, TOKENIZER = load("demo")
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("demo.json").read_text(encoding="utf-8"))
BEGINNING, QUESTION = "What is the capital of", " France?"
OPENED = "<|im_start|>user\n"
ANSWERED = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)


Call = Callable[..., Done]


def caller(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> Done:
        try:
            code = run(lambda: main(["--model", "demo", *arguments]))
        except SystemExit as end:
            code = int(str(end.code))
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.fixture
def cache(path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command that makes `path`, run in this process on the demo model."""
    call = caller(COMMAND.main, capsys)
    return lambda prompt, *flags: call("--prompt-cache-file", str(path), "--prompt", prompt, *flags)


@pytest.fixture
def whole(capsys: pytest.CaptureFixture[str]) -> Call:
    """`generate` without a file."""
    call = caller(GENERATE.main, capsys)
    return lambda prompt, *flags: call("--prompt", prompt, "--json", "--temp", "0", "--max-tokens", "32", *flags)


@pytest.fixture
def behind(path: Path, whole: Call) -> Call:
    """`generate` behind what `path` holds."""
    return lambda prompt, *flags: whole(prompt, "--prompt-cache-file", str(path), *flags)


def held(path: Path, **options: Any) -> str:
    """The text whose cache is in the file."""
    return TOKENIZER.decode(load_prompt_cache(path, MODEL, TOKENIZER, **options).tokens)


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def changed_demo(folder: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(resolve("demo"), folder)
    change(folder)
    return str(folder)


def test_the_result_is_one_line_on_stdout(cache: Call, path: Path) -> None:
    count = len(TOKENIZER.encode(OPENED + BEGINNING))
    assert cache(BEGINNING) == Done(0, f"{path}: {count} tokens\n", "")


def test_json_is_one_object(cache: Call, path: Path) -> None:
    done = cache(BEGINNING, "--json")
    count = len(TOKENIZER.encode(OPENED + BEGINNING))
    assert done.report == {"file": str(path), "tokens": count, "bytes": path.stat().st_size}
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the command asks of `load` and `check_memory`, and what it gives to be saved."""
    seen, check_memory = SimpleNamespace(), COMMAND.check_memory

    def fake_load(model: str, **options: Any) -> tuple[Any, Any]:
        seen.load = {"model": model, **options}
        return MODEL, TOKENIZER

    def spy(*sizes: Any, **options: Any) -> Any:
        seen.memory = options
        return check_memory(*sizes, **options)

    def fake_save(path: Path, prompt: PromptCache, *_: Any) -> None:
        path.write_bytes(b"saved")
        seen.saved = {"name": path.name, "text": TOKENIZER.decode(prompt.tokens), "layer": prompt.cache.form[3][:8]}

    monkeypatch.setattr(COMMAND, "load", fake_load)
    monkeypatch.setattr(COMMAND, "check_memory", spy)
    monkeypatch.setattr(COMMAND, "save_prompt_cache", fake_save)
    return seen


# flag: (its words, where it must arrive, under which name, as what)
FLAGS: dict[str, tuple[list[str], str, str, Any]] = {
    "--model": (["some/folder"], "load", "model", "some/folder"),
    "--revision": (["v2"], "load", "revision", "v2"),
    "--dtype": (["float16"], "load", "dtype", "float16"),
    "--prompt": (["Who"], "saved", "text", OPENED + "Who"),
    "--system-prompt": (
        ["Rhyme."],
        "saved",
        "text",
        f"<|im_start|>system\nRhyme.<|im_end|>\n{OPENED}{BEGINNING}",
    ),
    "--raw": ([], "saved", "text", BEGINNING),
    "--prompt-cache-file": (["other"], "saved", "name", "other"),
    "--prefill-step-size": (["3"], "memory", "step_size", 3),
    "--kv-bits": (["8"], "saved", "layer", "Quantize"),
    "--force": ([], "memory", "force", True),
}


@pytest.mark.parametrize(("flag", "way"), FLAGS.items(), ids=FLAGS.keys())
def test_a_flag_acts(
    recorded: SimpleNamespace,
    cache: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    way: tuple[list[str], str, str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    words, place, name, value = way
    assert cache(BEGINNING, flag, *words).code == 0
    assert getattr(recorded, place)[name] == value


def test_every_flag_is_tried() -> None:
    flags = {flag for action in COMMAND._parser()._actions for flag in action.option_strings if flag[:2] == "--"}
    assert flags == FLAGS.keys() | {"--help", "--json"}


def test_it_is_read_as_many_tokens_at_a_time_as_was_asked_for(cache: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("qwen_mlx.cli.time.monotonic", lambda: float(next(ticks)))
    count = len(TOKENIZER.encode(OPENED + BEGINNING))
    assert cache(BEGINNING, "--prefill-step-size", "4").err.startswith(f"Prompt: 4 of {count} tokens\n")


def test_the_prompt_may_be_piped_in(cache: Call, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, "Wer ist Zoë")
    assert cache("-").code == 0
    assert held(path) == OPENED + "Wer ist Zoë"


def test_a_prompt_that_has_the_mark_for_cutting_is_cached_to_its_end(
    cache: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(monkeypatch, f"Once {CUT} upon")
    cache("-")
    assert held(path) == f"{OPENED}Once {CUT} upon"


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_before_the_model_is_loaded(
    recorded: SimpleNamespace, cache: Call, prompt: str
) -> None:
    assert cache(prompt) == Done(2, "", "error: The prompt is empty; give at least one word.\n")
    assert not hasattr(recorded, "load")


@pytest.mark.parametrize("place", ["no/such/folder/file", ".", ""])
def test_where_nothing_can_be_written_no_model_is_loaded(
    recorded: SimpleNamespace, cache: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cache(BEGINNING, "--prompt-cache-file", place)
    said = f"error: {place or '.'} cannot be written: give the name of a file, in a folder that exists"
    assert (done.code, done.out, done.err.startswith(said)) == (2, "", True)
    assert not hasattr(recorded, "load")


def test_a_disk_that_is_full(cache: Call, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cache(BEGINNING)
    assert (done.code, done.out, list(path.parent.iterdir())) == (2, "", [])
    assert done.err.startswith(f"error: {path} cannot be written (No space left on device): it takes ")


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param(Progress, "update", id="in_the_prompt"),
        pytest.param(cache_file, "_data", id="in_the_file"),
        pytest.param(os, "fsync", id="before_the_rename"),
    ],
)
def test_ctrl_c_leaves_the_old_file(
    cache: Call, path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    cache("Who are")
    before = path.read_bytes()
    monkeypatch.setattr(place, name, interrupt)
    assert cache(BEGINNING) == Done(130, "", "Interrupted.\n")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_the_old_one(cache: Call, path: Path) -> None:
    cache("Who are")
    cache(BEGINNING)
    assert held(path) == OPENED + BEGINNING
    assert list(path.parent.iterdir()) == [path]


def test_what_raw_would_leave_out_is_refused(cache: Call, path: Path) -> None:
    done = cache(BEGINNING, "--raw", "--system-prompt", "Rhyme.")
    assert (done.code, done.out, "--raw leaves out" in done.err, path.exists()) == (2, "", True, False)


def test_without_a_chat_template_there_is_raw(cache: Call, path: Path, tmp_path: Path) -> None:
    folder = changed_demo(tmp_path / "model", lambda folder: (folder / "chat_template.jinja").unlink())
    said = "error: The model has no chat template; give --raw to cache the prompt as it stands.\n"
    assert cache(BEGINNING, "--model", folder) == Done(2, "", said)
    assert cache(BEGINNING, "--model", folder, "--raw").code == 0


def test_a_template_that_rewrites_messages_is_refused(cache: Call, path: Path, tmp_path: Path) -> None:
    def rewrite(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content | tojson }}")

    done = cache(BEGINNING, "--model", changed_demo(tmp_path / "model", rewrite))
    assert (done.code, done.out, path.exists()) == (2, "", False)
    assert done.err.startswith("error: The chat template does not write a message as it stands,")


def test_bits_make_a_smaller_file(cache: Call, path: Path) -> None:
    sizes = {bits: cache(BEGINNING * 8, "--json", *bits).report["bytes"] for bits in ((), ("--kv-bits", "4"))}
    tokens = len(TOKENIZER.encode(OPENED + BEGINNING * 8))
    elements = 2 * MODEL.config.text.num_key_value_heads * MODEL.config.text.head_dim
    layers = MODEL.config.text.layer_types.count("full_attention")
    # Of 64 elements in 32 bits: 4 bits, and a scale and a bias of 32. The header is a little longer.
    saved = layers * tokens * elements * (32 - 4 - 1) // 8
    assert sizes[()] - sizes["--kv-bits", "4"] == pytest.approx(saved, abs=1500)


@pytest.mark.parametrize(
    ("golden", "beginning", "question", "flags"),
    [
        pytest.param("capital", "What is the capital of", " France?", [], id="template"),
        pytest.param("story", "Tell me a", " story about an owl.", [], id="template_long_answer"),
        pytest.param("tale", "Once upon", " a time", ["--raw"], id="raw"),
    ],
)
def test_the_answer_is_that_of_transformers_to_the_whole_prompt(
    cache: Call, behind: Call, golden: str, beginning: str, question: str, flags: list[str]
) -> None:
    cached = cache(beginning, "--json", *flags).report["tokens"]
    report = behind(question, "--max-tokens", "64", *flags).report
    expected = GOLDEN[golden]
    text = TOKENIZER.decode(expected["tokens"], skip_special_tokens=True)
    assert (report["text"], report["usage"]["completion_tokens"]) == (text, len(expected["tokens"]))
    details = {"cached_tokens": cached}
    assert report["usage"]["prompt_tokens_details"] == details
    assert report["usage"]["prompt_tokens"] == len(expected["prompt_ids"])


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--repetition-penalty", "1.5"], id="penalty"),
        pytest.param(["--temp", "1", "--seed", "3"], id="sampled"),
        pytest.param(["--kv-bits", "8"], id="kv_bits"),
        pytest.param(["--thinking", "on"], id="thinking"),
        pytest.param(["--prefill-step-size", "2"], id="chunks"),
    ],
)
def test_options_act_as_on_the_whole_prompt(cache: Call, behind: Call, whole: Call, flags: list[str]) -> None:
    kept = flags if flags[0] == "--kv-bits" else []
    cache("Tell me a story about", *kept)
    ours, expected = behind(" an owl.", *flags).report, whole("Tell me a story about an owl.", *flags).report
    assert (ours["text"], ours["finish_reason"]) == (expected["text"], expected["finish_reason"])


def asked(monkeypatch: pytest.MonkeyPatch, behind: Call, question: str, *flags: str) -> str:
    """The prompt that `generate` makes of the file and the question."""
    seen: list[list[int]] = []

    def fake_stream(model: Any, tokenizer: Any, prompt: list[int], **options: Any) -> Any:
        seen.append(prompt)
        return iter(())

    monkeypatch.setattr(GENERATE, "stream_generate", fake_stream)
    assert behind(question, *flags).code == 0
    return TOKENIZER.decode(seen[0])


@pytest.mark.parametrize("question", [" France?", "France?", "\n\nOf France?\n"], ids=repr)
def test_file_and_question_are_one_message(
    cache: Call, behind: Call, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """It goes on where the text ends, with the spaces it has; at the end the template takes them off."""
    cache(" " + BEGINNING)
    assert asked(monkeypatch, behind, question) == OPENED + BEGINNING + question.rstrip() + ANSWERED


@pytest.mark.parametrize(
    ("word", "end"), [("on", "<think>\n"), ("off", "<think>\n\n</think>\n\n"), ("auto", "<think>\n\n</think>\n\n")]
)
def test_thinking_acts(cache: Call, behind: Call, monkeypatch: pytest.MonkeyPatch, word: str, end: str) -> None:
    cache(BEGINNING)
    prompt = asked(monkeypatch, behind, QUESTION, "--thinking", word)
    assert prompt == f"{OPENED}{BEGINNING}{QUESTION}<|im_end|>\n<|im_start|>assistant\n{end}"


def test_raw_puts_nothing_between(cache: Call, behind: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    cache("Once upon ", "--raw")
    assert asked(monkeypatch, behind, "a time ", "--raw") == "Once upon a time "


def test_a_file_serves_many_times(cache: Call, path: Path, behind: Call) -> None:
    cache(BEGINNING)
    before = path.read_bytes()
    first = behind(QUESTION).report["text"]
    assert (behind(QUESTION).report["text"], path.read_bytes()) == (first, before)


def test_verbose_tells_what_was_cached(cache: Call, behind: Call) -> None:
    cached = cache(BEGINNING, "--json").report["tokens"]
    prompt = len(GOLDEN["capital"]["prompt_ids"])
    assert f"\nCached: {cached} of {prompt} prompt tokens\n" in behind(QUESTION, "--verbose").err


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(Path.unlink, "There is no prompt file", id="missing"),
        pytest.param(damage, "is damaged or no prompt file", id="damaged"),
        pytest.param(lambda path: path.write_text("Once upon a time"), "is damaged or no prompt file", id="text"),
    ],
)
def test_a_file_that_cannot_be_used(
    cache: Call, path: Path, behind: Call, change: Callable[[Path], Any], words: str
) -> None:
    cache(BEGINNING)
    change(path)
    done = behind(QUESTION)
    assert (done.code, done.out, words in done.err, done.err.count("\n")) == (2, "", True, 1), done.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--kv-bits", "8"], "layer 3 holds KVCache", id="kv_bits"),
        pytest.param(["--dtype", "bfloat16"], "differ in dtype", id="dtype"),
        pytest.param(["--system-prompt", "Rhyme."], "give it to qwen-mlx cache_prompt", id="system_prompt"),
        pytest.param(["--system-prompt", ""], "give it to qwen-mlx cache_prompt", id="empty_system_prompt"),
        pytest.param(["--prompt-cache-file", ""], "cannot be read (Is a directory)", id="no_name"),
        pytest.param(["--prompt", ""], "The prompt is empty", id="no_question"),
    ],
)
def test_what_does_not_go_with_the_file(cache: Call, behind: Call, flags: list[str], words: str) -> None:
    cache(BEGINNING, "--dtype", "float32")
    done = behind(QUESTION, "--dtype", "float32", *flags)
    assert (done.code, done.out, words in done.err, done.err.count("\n")) == (2, "", True, 1), done.err


def test_bits_that_the_file_has_must_be_asked_for(cache: Call, behind: Call) -> None:
    cache(BEGINNING, "--kv-bits", "8")
    assert "give the same kv_bits" in behind(QUESTION).err
    assert behind(QUESTION, "--kv-bits", "8").code == 0


def change_one_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    arrays: Mapping[str, mx.array]
    arrays, metadata = mx.load(str(file), return_metadata=True)  # type: ignore[assignment, misc]
    weights = dict(arrays)
    name = min(name for name, array in weights.items() if array.ndim == 2)
    # In the middle: there a fingerprint looks.
    flat = weights[name].flatten()
    flat[flat.size // 2] = flat[flat.size // 2] + 1
    weights[name] = flat.reshape(weights[name].shape)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata)


def test_a_model_with_one_other_weight_is_refused(cache: Call, behind: Call, tmp_path: Path) -> None:
    tuned = changed_demo(tmp_path / "tuned", change_one_weight)
    cache(BEGINNING)
    done = behind(QUESTION, "--model", tuned)
    assert (done.code, done.out) == (2, "")
    assert "was made with demo in " in done.err
    assert "this is tuned in " in done.err
    assert "they differ in model;" in done.err
