"""`python -m qwen_mlx.generate`: what goes to stdout, what to stderr, and that every flag acts."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qwen_mlx.__main__
from qwen_mlx import __version__, bench, generate, load
from qwen_mlx.chat.template import render
from qwen_mlx.cli import Progress, run
from qwen_mlx.decoding.reuse import PromptCache
from qwen_mlx.hub import DEFAULT_MODEL, resolve

COMMAND = importlib.import_module("qwen_mlx.generate")
MODEL, TOKENIZER = load("demo")
START = "Once upon a time"
MESSAGES = [{"role": "user", "content": START}]


def call(*arguments: str) -> int:
    """The exit code of the command, run in this process on the demo model."""
    try:
        return run(lambda: COMMAND.main(["--model", "demo", "--max-tokens", "8", *arguments]))
    except SystemExit as end:
        return int(str(end.code))


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def by_module() -> subprocess.CompletedProcess[str]:
    return process("qwen_mlx.generate", "--model", "demo", "--prompt", START, "--max-tokens", "12")


@pytest.fixture(scope="module")
def by_verb() -> subprocess.CompletedProcess[str]:
    return process("qwen_mlx", "generate", "--model", "demo", "--prompt", START, "--max-tokens", "12")


def test_stdout_holds_the_text_alone(by_module: subprocess.CompletedProcess[str]) -> None:
    assert by_module.stdout == generate(MODEL, TOKENIZER, MESSAGES, max_tokens=12) + "\n"


def test_stderr_is_silent(by_module: subprocess.CompletedProcess[str]) -> None:
    assert (by_module.stderr, by_module.returncode) == ("", 0)


def test_module_and_verb_are_one_command(
    by_module: subprocess.CompletedProcess[str], by_verb: subprocess.CompletedProcess[str]
) -> None:
    assert (by_verb.returncode, by_verb.stdout, by_verb.stderr) == (0, by_module.stdout, "")


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """Without Metal, MLX calls g++ for what is compiled; a machine with nothing but Python has none."""
    done = process(
        "qwen_mlx.generate",
        "--model",
        "demo",
        "-p",
        START,
        "--max-tokens",
        "2",
        PATH=str(tmp_path),
        TMPDIR=str(tmp_path),
    )
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])


def test_each_piece_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    seen: list[str] = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    call("--prompt", START, "--raw")
    texts = [r.text for r in COMMAND.stream_generate(MODEL, TOKENIZER, START, max_tokens=8)]
    assert seen[: len(texts)] == ["".join(texts[: n + 1]) for n in range(len(texts))]


@pytest.mark.parametrize("arguments", [("--prompt", "-"), ("-p", "-"), ()], ids=["long", "short", "none"])
def test_the_prompt_may_be_piped_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    pipe_in(monkeypatch, "Wer ist Zoë?".encode())
    call(*arguments)
    expected = generate(MODEL, TOKENIZER, [{"role": "user", "content": "Wer ist Zoë?"}], max_tokens=8)
    assert capsys.readouterr().out == expected + "\n"


def test_a_prompt_on_the_line_leaves_stdin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, b"not read")
    call("--prompt", START)
    assert sys.stdin.read() == "not read"


def test_a_mark_of_the_byte_order_at_the_start_of_stdin_is_no_part_of_the_prompt(
    recorded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(monkeypatch, "\ufeffOnce \ufeffupon".encode())
    call("--raw")
    assert recorded.stream["prompt"] == "Once \ufeffupon"


# Python reads what is not UTF-8 on the command line as surrogates.
@pytest.mark.parametrize(("word", "what"), [("caf\udce9", "The prompt"), ("-", "The prompt on stdin")])
def test_a_prompt_that_is_not_utf8_is_told_by_its_first_wrong_byte(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, word: str, what: str
) -> None:
    pipe_in(monkeypatch, b"caf\xe9")
    code = call("--prompt", word)
    said = f"error: {what} is not Unicode text in UTF-8: byte 0xe9 at place 3.\n"
    assert (code, capsys.readouterr().err) == (2, said)


def test_a_prompt_on_the_line_may_have_any_letter(recorded: SimpleNamespace) -> None:
    call("--raw", "--prompt", "Zoë 🙂 漢")
    assert recorded.stream["prompt"] == "Zoë 🙂 漢"


def test_without_a_chat_template_there_is_raw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("demo"), folder, ignore=shutil.ignore_patterns("*.jinja"))
    code = call("--model", str(folder), "--prompt", START)
    said = "error: The model has no chat template; give --raw to continue the prompt as it stands.\n"
    assert (code, *capsys.readouterr()) == (2, "", said)
    assert call("--model", str(folder), "--prompt", START, "--raw") == 0


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """`line` after the command with the demo model, a short prompt and its redirections."""
    command = [sys.executable, "-m", "qwen_mlx.generate", "--model", "demo", "--max-tokens", "2"]
    return subprocess.run(["sh", "-c", f"{shlex.join(command)} {line}"], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_what_is_closed_takes_nothing_from_the_answer(closed: str) -> None:
    """A file that gets the number 0 is one MLX fails on, and a stderr that is None is stdout to print."""
    done = shell(f"--prompt Hello --json --verbose {closed}")
    assert (done.returncode, json.loads(done.stdout)["usage"]["completion_tokens"]) == (0, 2)


def test_a_closed_stdin_holds_no_prompt() -> None:
    done = shell("<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: There is no prompt;")


def test_an_error_is_not_written_to_stdout_where_stderr_is_closed() -> None:
    done = shell("--prompt '' 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_closed_stdout_is_refused() -> None:
    done = shell("--prompt Hello >&-")
    assert (done.returncode, done.stderr) == (2, "error: stdout is closed, so there is nowhere to write to.\n")


def test_a_child_gets_what_was_closed_too() -> None:
    program = (
        "import subprocess, sys; from qwen_mlx.cli import run\n"
        "see = 'import os; [os.fstat(n) for n in range(3)]'\n"
        "run(lambda: print(subprocess.run([sys.executable, '-c', see]).returncode))"
    )
    line = f"{shlex.join([sys.executable, '-c', program])} <&-"
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120).stdout == "0\n"


def python(program: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", ["qwen_mlx.generate", "qwen_mlx", "qwen_mlx.bench"])
def test_ctrl_c_during_the_imports(module: str) -> None:
    word = {"qwen_mlx": ["generate"], "qwen_mlx.bench": ["model"]}.get(module, [])
    program = (
        "import runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mlx': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        f"sys.argv[1:] = {word}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    assert python(program) == (130, "", "Interrupted.\n")


def test_a_second_ctrl_c_on_the_way_out() -> None:
    program = (
        "import atexit, signal, sys\n"
        "from qwen_mlx.cli import run\n"
        "def interrupt(): signal.raise_signal(signal.SIGINT)\n"
        "atexit.register(interrupt)\n"
        "sys.exit(run(interrupt))"
    )
    assert python(program) == (130, "", "Interrupted.\n")


def test_a_second_ctrl_c_does_not_break_off_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    stderr = Interrupting()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert (run(lambda: signal.raise_signal(signal.SIGINT)), stderr.getvalue()) == (130, "Interrupted.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_json_is_one_object_with_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    call("--prompt", START, "--json")
    report = json.loads(capsys.readouterr().out)
    assert {key: set(value) if isinstance(value, dict) else type(value) for key, value in report.items()} == {
        "model": str,
        "text": str,
        "finish_reason": str,
        "usage": {"prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details"},
        "timings": {"load_s", "time_to_first_token_s", "prompt_tps", "generation_tps"},
        "peak_memory_gb": float,
    }


def test_json_tells_what_was_generated(capsys: pytest.CaptureFixture[str]) -> None:
    call("--prompt", START, "--raw", "--json", "--speculate", "off")
    report = json.loads(capsys.readouterr().out)
    usage = {
        "prompt_tokens": len(TOKENIZER.encode(START)),
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0},
    }
    text = generate(MODEL, TOKENIZER, START, max_tokens=8)
    assert (report["text"], report["usage"], report["finish_reason"]) == (text, usage, "length")


@pytest.mark.parametrize(
    "line",
    [
        r"Prompt: \d+ tokens, [\d.]+ tokens-per-sec",
        r"Generation: \d+ tokens, [\d.]+ tokens-per-sec",
        r"Peak memory: [\d.]+ GB",
        r"Time to first token: [\d.]+ s",
        r"Cached: 0 of \d+ prompt tokens",
    ],
)
def test_verbose_closes_with_the_lines_of_mlx_lm(capsys: pytest.CaptureFixture[str], line: str) -> None:
    call("--prompt", START, "--verbose")
    assert re.search(f"^{line}$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_verbose_does_not_touch_stdout(capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    call("--prompt", START, "--verbose", *form)
    verbose = capsys.readouterr().out
    call("--prompt", START, *form)
    quiet = capsys.readouterr().out
    numbers = re.compile(r'("\w+(_s|_tps|_gb)": )[\d.]+')
    assert numbers.sub(r"\1", verbose) == numbers.sub(r"\1", quiet)


def test_the_same_seed_gives_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        call("--prompt", START, "--temp", "2", "--seed", seed, "--max-tokens", "20")
        texts.append(capsys.readouterr().out)
    assert (texts[0] == texts[1], texts[0] == texts[2]) == (True, False)


def test_the_reply_ends_before_a_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    call("--prompt", START, "--raw")
    text = capsys.readouterr().out.removesuffix("\n")
    stop = text[len(text) // 2 :][:3]
    call("--prompt", START, "--raw", "--stop", stop)
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Instead of working: what the command asked of `load`, `load_prompt_cache` and `stream_generate`."""
    seen = SimpleNamespace()

    def fake_load(model: str, **options: Any) -> tuple[Any, Any]:
        seen.load = {"model": model, **options}
        return MODEL, TOKENIZER

    def fake_stream(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Iterator[Any]:
        seen.stream = {"prompt": prompt, **options}
        return iter(())

    def fake_load_file(path: str, model: Any, tokenizer: Any, **options: Any) -> PromptCache:
        seen.file = {"path": path, **options}
        return PromptCache([], MODEL.make_cache(), MODEL)

    monkeypatch.setattr(COMMAND, "load", fake_load)
    monkeypatch.setattr(COMMAND, "load_prompt_cache", fake_load_file)
    monkeypatch.setattr(COMMAND, "stream_generate", fake_stream)
    return seen


SCHEMAS = json.loads((Path(__file__).parent / "data/schemas.json").read_text(encoding="utf-8"))
# flag: (its words, where it must arrive, under which name, as what)
FLAGS: dict[str, tuple[list[str], str, str, Any]] = {
    "--model": (["some/folder"], "load", "model", "some/folder"),
    "--revision": (["v2"], "load", "revision", "v2"),
    "--dtype": (["float16"], "load", "dtype", "float16"),
    "--prompt": (["What?"], "stream", "prompt", [{"role": "user", "content": "What?"}]),
    "--system-prompt": (["Rhyme."], "stream", "prompt", [{"role": "system", "content": "Rhyme."}, *MESSAGES]),
    "--raw": ([], "stream", "prompt", START),
    "--thinking": (["on"], "stream", "thinking", True),
    "--max-tokens": (["3"], "stream", "max_tokens", 3),
    "--temp": (["0.5"], "stream", "temperature", 0.5),
    "--top-p": (["0.6"], "stream", "top_p", 0.6),
    "--top-k": (["7"], "stream", "top_k", 7),
    "--min-p": (["0.1"], "stream", "min_p", 0.1),
    "--repetition-penalty": (["1.2"], "stream", "repetition_penalty", 1.2),
    "--presence-penalty": (["0.4"], "stream", "presence_penalty", 0.4),
    "--frequency-penalty": (["-0.3"], "stream", "frequency_penalty", -0.3),
    "--seed": (["9"], "stream", "seed", 9),
    "--preset": (["code"], "stream", "preset", "code"),
    "--json-schema": ([str(Path(__file__).parent / "data/schemas.json")], "stream", "json_schema", SCHEMAS),
    "--stop": (["a", "--stop", "b"], "stream", "stop", ["a", "b"]),
    "--prefill-step-size": (["64"], "stream", "prefill_step_size", 64),
    "--kv-bits": (["8"], "stream", "kv_bits", 8),
    "--speculate": (["ngram"], "stream", "speculate", "ngram"),
    "--num-draft-tokens": (["2"], "stream", "num_draft_tokens", 2),
    "--prompt-cache-file": (["some/file"], "file", "path", "some/file"),
    "--force": ([], "stream", "force", True),
}


@pytest.mark.parametrize(("flag", "way"), FLAGS.items(), ids=FLAGS.keys())
def test_a_flag_acts(recorded: SimpleNamespace, flag: str, way: tuple[list[str], str, str, Any]) -> None:
    words, place, name, value = way
    call("--prompt", START, flag, *words)
    assert getattr(recorded, place)[name] == value


def test_every_flag_is_tried() -> None:
    shown = {"--help", "--json", "--verbose"}  # tested by what they print
    flags = {flag for action in COMMAND._parser()._actions for flag in action.option_strings if flag[:2] == "--"}
    assert flags == FLAGS.keys() | shown


@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False), ("auto", None)])
def test_thinking_has_three_settings(recorded: SimpleNamespace, word: str, value: bool | None) -> None:
    call("--prompt", START, "--thinking", word)
    assert recorded.stream["thinking"] is value


def test_what_is_not_asked_for_is_left_to_the_checkpoint(recorded: SimpleNamespace) -> None:
    run(lambda: COMMAND.main(["--prompt", START]))
    options = {"prefill_step_size", "kv_bits", "force", "speculate", "num_draft_tokens"}
    assert recorded.stream.keys() == {"prompt", "thinking", "progress", *options}
    assert recorded.stream["speculate"] == "auto"


def test_the_default_model_is_the_smallest_release(recorded: SimpleNamespace) -> None:
    run(lambda: COMMAND.main(["--prompt", START]))
    assert (recorded.load["model"], DEFAULT_MODEL) == ("Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-0.8B")


def test_the_system_prompt_reaches_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    call("--prompt", START, "--system-prompt", "Rhyme.", "--json")
    messages = [{"role": "system", "content": "Rhyme."}, *MESSAGES]
    text = render(TOKENIZER.chat_template, messages, special_tokens=TOKENIZER.special_tokens)
    assert json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"] == len(TOKENIZER.encode(text))


@pytest.mark.parametrize("flag", [("--system-prompt", "Rhyme."), ("--thinking", "off")], ids=lambda flag: flag[0])
def test_what_raw_would_leave_out_is_refused(capsys: pytest.CaptureFixture[str], flag: tuple[str, str]) -> None:
    assert (call("--prompt", START, "--raw", *flag), "--raw" in capsys.readouterr().err) == (2, True)


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    code = call("--help")
    out = capsys.readouterr().out
    assert (code, [flag for flag in FLAGS if flag not in out]) == (0, [])


@pytest.mark.parametrize(
    ("argument", "said"), [("--help", "generate "), ("-h", "generate "), ("--version", __version__)]
)
def test_the_command_without_a_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argument: str, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["qwen-mlx", argument])
    assert (qwen_mlx.__main__.main(), said in capsys.readouterr().out) == (0, True)


@pytest.mark.parametrize("verb", qwen_mlx.__main__.VERBS)
def test_a_verb_is_the_module_of_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["qwen-mlx", verb, "--help"])
    with pytest.raises(SystemExit):
        qwen_mlx.__main__.main()
    assert f"qwen-mlx {verb}" in capsys.readouterr().out


def test_offline_without_the_default_model(tmp_path: Path) -> None:
    done = process("qwen_mlx.generate", "--prompt", START, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*Qwen/Qwen3\.5-0\.8B.* the embedded model, demo,.*\n", done.stderr)


def test_a_model_behind_the_lengths_of_a_bench_is_told_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["model", "-p", "64", "128", "demo"])
    said = "-p/--prompt: must be an integer, at least 1, not demo; if that is the model, put it first (see "
    assert said in capsys.readouterr().err


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        warnings.simplefilter("always")
        warnings.warn("this is odd", stacklevel=1)

    run(main)
    assert capsys.readouterr().err == "warning: this is odd\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("qwen_mlx.cli.time.monotonic", lambda: clock.now)
    return clock


def watch(clock: SimpleNamespace, seconds: list[float]) -> None:
    with Progress("Prompt") as progress:
        start = clock.now
        for n, second in enumerate(seconds, start=1):
            clock.now = start + second
            progress.update(n * 10, 70)


def test_less_than_a_second_of_work_is_not_spoken_of(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    watch(clock, [0.3, 0.6, 0.99])
    assert capsys.readouterr().err == ""


def test_in_a_pipe_progress_is_a_line_after_a_second_and_every_five(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    watch(clock, [0.5, 1.5, 3.0, 7.0, 8.0, 12.0, 20.0])
    assert capsys.readouterr().err.splitlines() == [f"Prompt: {done} of 70 tokens" for done in (20, 40, 60)]


def test_a_first_step_that_takes_over_a_second_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    with Progress("Prompt") as progress:
        progress.update(0, 70)
        progress._timer.join()  # it ends when it has spoken
        said = capsys.readouterr().err
    assert said == "Prompt: 0 of 70 tokens\n"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, seconds: list[float]) -> str:
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        watch(clock, seconds)
        print("end", file=terminal, flush=True)
        seen = b""
        while not seen.endswith(b"end\r\n"):
            seen += os.read(master, 4096)
    os.close(master)
    return seen.decode().removesuffix("end\r\n")


def test_on_a_terminal_progress_is_one_line_that_is_wiped_in_the_end(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    seen = on_a_terminal(monkeypatch, clock, [0.5, 1.5, 3.0])
    assert [line.removesuffix("\x1b[K") for line in seen.split("\r")] == [
        "",
        "Prompt: 20 of 70 tokens",
        "Prompt: 30 of 70 tokens",
        "",
    ]


def test_on_a_terminal_quick_work_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    assert on_a_terminal(monkeypatch, clock, [0.2, 0.4]) == ""


def test_a_long_prompt_shows_its_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("qwen_mlx.cli.time.monotonic", lambda: float(next(ticks)))
    call("--prompt", START, "--raw", "--prefill-step-size", "1")
    captured = capsys.readouterr()
    count = len(TOKENIZER.encode(START))
    assert captured.err.startswith(f"Prompt: 1 of {count} tokens\n")
    assert captured.out == generate(MODEL, TOKENIZER, START, max_tokens=8) + "\n"
