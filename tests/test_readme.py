"""The README keeps its word: its Python runs in order, its commands on the demo model run, its links and files exist.

Commands stand in ```bash blocks, one to a line. The two that set everything up begin with `python3 -m venv`; `.ci/run`
takes them from there and runs them whole, so here only what they do once the packages are installed is run.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
FIRST_SCREEN = TEXT.splitlines()[:60]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[int, str]]:
    """(line it begins on, content) of every fenced block in that language."""
    found = ((TEXT[: m.start(2)].count("\n"), m.group(2)) for m in FENCE.finditer(TEXT) if m.group(1) == language)
    return list(found)


COMMANDS = [
    command.strip()
    for _, block in blocks("bash")
    for line in block.replace("\\\n", "").splitlines()
    for command in line.split(" && ")
    if command.strip() and not command.lstrip().startswith("#")
]
OURS = re.compile(r"(?:python3? -m qwen_mlx[. ]|qwen-mlx )(\w+)(.*)")
ON_THE_DEMO = [command for command in COMMANDS if OURS.search(command) and "--model demo" in command]


def test_the_readme_has_what_is_tested_here() -> None:
    assert TEXT
    assert blocks("python")
    assert ON_THE_DEMO


@pytest.mark.parametrize("what", [r"-m qwen_mlx\.generate .*--model demo", r"-m pytest"])
def test_the_first_screen_has_the_two_commands_that_set_everything_up(what: str) -> None:
    setup = re.compile(rf"python3 -m venv .*pip install .*{what}")
    assert sum(setup.match(line) is not None for line in FIRST_SCREEN) == 1
    # More than one, further down, would leave open which of them `.ci/run` takes.
    assert sum(setup.match(line) is not None for line in TEXT.splitlines()) == 1


def test_the_python_runs_in_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for line, code in blocks("python"):
        # The empty lines in front make a traceback point into the README.
        exec(compile("\n" * line + code, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `python`, `.venv/bin/python` and `qwen-mlx` are those of this test."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / ".venv/bin").mkdir(parents=True)
    for name, target in (("python", ""), ("python3", ""), ("qwen-mlx", "-m qwen_mlx ")):
        script = folder / ".venv/bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {target}"$@"\n')
        script.chmod(0o755)
    return folder


@pytest.mark.parametrize("command", ON_THE_DEMO)
def test_a_command_on_the_demo_model_runs(command: str, installed: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{installed / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=installed,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@cache
def help_of(verb: str) -> str:
    command = [sys.executable, "-m", "qwen_mlx", verb, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if OURS.search(command)])
def test_the_flags_of_a_command_exist(command: str) -> None:
    verb, rest = OURS.search(command).groups()  # type: ignore[union-attr]
    flags = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.split("|")[0]))
    known = set(
        re.findall(r"(?<!\S)--?[a-z][\w-]*", help_of(verb).replace("[", " ").replace("]", " ").replace(",", " "))
    )
    assert flags - known == set()


def files_spoken_of() -> set[str]:
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXT) if "://" not in link}
    scripts = {word for command in COMMANDS for word in command.split() if word.endswith((".py", ".sh", ".ci/run"))}
    return (links | scripts) - {""}


def test_the_files_it_speaks_of_exist() -> None:
    assert {name for name in files_spoken_of() if not (ROOT / name).exists()} == set()


def test_its_links_into_itself_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", TEXT), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)\s]+)\)", TEXT)) <= anchors
