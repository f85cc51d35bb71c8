"""Every example runs on the demo model, in a process of its own, as a user would run it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def run_example(name: str) -> str:
    """What the example prints; it must end well and say nothing on stderr."""
    # PYTHONPATH: a script's own folder, not the working directory, is where Python looks first.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, EXAMPLES[name]], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_these_are_the_examples() -> None:
    assert set(EXAMPLES) == {"chat", "generate", "logits", "reuse", "sampling", "stream"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_on_a_screen_and_says_what_it_shows(name: str) -> None:
    source = EXAMPLES[name].read_text()
    assert len(source.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(source))


def test_generate_answers_and_tells() -> None:
    answer, tale = run_example("generate").split("\n", 1)
    assert "far" in answer
    assert re.match(r"Once upon a time\b.*\bthe\b", tale, re.DOTALL)


def test_chat_calls_its_tool_and_takes_the_turn_back() -> None:
    said = run_example("chat")
    call = said.index("ToolCall(name='get_weather', arguments={'city': 'Paris'}")
    result = said.index("text='In Paris it is sunny, 21 degrees.'")
    assert call < result < said.index("Content(", result)
    assert said.endswith("What is the weather in Paris? has been taken back; left are 0 messages.\n")


def test_stream_ends_with_what_it_cost() -> None:
    tale, cost = run_example("stream").rsplit("\n\n", 1)
    assert re.match(r"Once upon a time(\W+\w+){20}", tale)
    assert re.match(r"\d+ tokens, ended by (stop|length)\nfirst token after \d+\.\d\d s, then \d+ tokens", cost)


def test_sampling_shows_what_seeds_and_stops_do() -> None:
    lines = run_example("sampling").splitlines()[1:]
    said = {way.strip(): text for way, text in (line.split(": ", 1) for line in lines)}
    assert all(len(text) > 10 for text in said.values())
    assert said["warm, seed 1"] == said["seed 1 again"] != said["warm, seed 2"]
    assert "." not in said["until a stop"]


def test_logits_shows_probabilities_in_order_and_a_perplexity() -> None:
    *table, last = run_example("logits").splitlines()[1:]
    chances = [float(row.split("%")[0]) for row in table]
    assert len(chances) == 5
    assert chances == sorted(chances, reverse=True)
    assert 0 < chances[-1] <= sum(chances) <= 100.1
    assert 1 < float(last.rsplit(" ", 1)[1]) < 50


def test_reuse_computes_the_text_once() -> None:
    said = re.findall(
        r"^first token after [\d.]+ s: (\d+) of (\d+) tokens were known", run_example("reuse"), re.MULTILINE
    )
    (none, _), (known, prompt) = said
    assert none == "0"
    assert 0.9 < int(known) / int(prompt) < 1
