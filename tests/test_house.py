"""The rules of the house: who imports whom, what is exported, what an import costs, how the commands answer."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_mlx
from qwen_mlx.__main__ import VERBS

ROOT = Path(__file__).parents[1]

# A part imports only parts of earlier lines. `__init__` stands for the package's own public names.
ORDER = [
    ["__version__"],
    ["errors"],
    ["cli"],
    ["config", "metal"],
    ["kernels", "cache", "checkpoint", "hub"],
    ["model"],
    ["tokenizer", "chat"],
    ["load"],
    ["load_mtp"],
    ["decoding"],
    ["flags"],
    ["generate", "batch", "evaluation"],
    ["conversation"],
    ["display", "mcp_tools", "terminal"],
    ["repl"],
    ["__init__"],
    ["server", "bench", "perplexity", "convert", "demo"],
    ["upload", "info", "cache_prompt", "verify"],
    ["__main__"],
]
LINE = {part: number for number, line in enumerate(ORDER) for part in line}
# Names that `from qwen_mlx import ...` finds in its `__init__`; `generate` and `load` are parts as well.
FACE = set(qwen_mlx.__all__) - LINE.keys()


def package_files() -> Iterator[Path]:
    """Files of the import package relative to it, through the links to metal and convert."""
    for folder, folders, names in os.walk(ROOT / "qwen_mlx", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        yield from (Path(folder, name).relative_to(ROOT / "qwen_mlx") for name in names if name.endswith(".py"))


MODULES = sorted(path.as_posix() for path in package_files())


def part_of(module: str) -> str:
    """`model/qwen.py` -> `model`"""
    return module.split("/")[0].removesuffix(".py")


def imported_parts(source: str) -> Iterator[str]:
    """Parts of the package that `source` imports anywhere, functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            dotted = ["qwen_mlx.a_relative_import"]
        elif isinstance(node, ast.ImportFrom):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            package, _, rest = f"{name}.__init__".partition(".")
            if package == "qwen_mlx":
                part = rest.split(".")[0]
                yield "__init__" if part in FACE else part


def wrong_imports(module: str, source: str) -> list[str]:
    own = part_of(module)
    others = {part for part in imported_parts(source) if part != own}
    return sorted(part for part in others if part not in LINE or LINE[part] >= LINE[own])


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_backwards_along_the_walk(module: str) -> None:
    assert part_of(module) in LINE, f"{part_of(module)} has no place in ORDER"
    assert wrong_imports(module, (ROOT / "qwen_mlx" / module).read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        pytest.param("model/qwen.py", "from qwen_mlx.tokenizer import Tokenizer", ["tokenizer"], id="upward"),
        pytest.param("model/qwen.py", "import qwen_mlx.load", ["load"], id="upward_by_plain_import"),
        pytest.param("model/qwen.py", "from qwen_mlx import decoding", ["decoding"], id="upward_from_the_package"),
        pytest.param("model/qwen.py", "from qwen_mlx import SamplingParams", ["__init__"], id="public_name"),
        pytest.param("model/qwen.py", "import qwen_mlx", ["__init__"], id="the_package_itself"),
        pytest.param("model/qwen.py", "def f():\n    from qwen_mlx.load import load", ["load"], id="in_a_function"),
        pytest.param("cache/kv.py", "from qwen_mlx.kernels.backend import metal", ["kernels"], id="sideways"),
        pytest.param("model/qwen.py", "from .norm import RMSNorm", ["a_relative_import"], id="relative"),
        pytest.param("model/qwen.py", "from qwen_mlx.scheduler import Scheduler", ["scheduler"], id="unknown"),
        pytest.param("model/qwen.py", "from qwen_mlx.model.norm import RMSNorm", [], id="own_folder"),
        pytest.param("model/qwen.py", "from qwen_mlx.cache.kv import KVCache", [], id="backward"),
        pytest.param("hub.py", "from qwen_mlx import __version__", [], id="version"),
        pytest.param("convert/save.py", "from qwen_mlx import SamplingParams, load", [], id="above_the_face"),
    ],
)
def test_the_reader_of_imports_sees(module: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(module, source) == wrong


def test_only_the_package_and_its_command_import_by_name() -> None:
    # importlib is how an upward import could hide from the test above.
    by_name = {m for m in MODULES if re.search(r"import_module|__import__", (ROOT / "qwen_mlx" / m).read_text())}
    assert by_name == {"__init__.py", "__main__.py", "chat/__init__.py"}  # the last has a command that stands above it


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) == "metal"])
def test_metal_imports_only_the_standard_library(module: str) -> None:
    tree = ast.parse((ROOT / "qwen_mlx" / module).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in imports}
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_and_stays_short(module: str) -> None:
    source = (ROOT / "qwen_mlx" / module).read_text()
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 400


# A source distribution, known by its PKG-INFO, holds real files in both places.
@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source distribution has no links")
@pytest.mark.parametrize("name", ["metal", "convert"])
def test_the_two_folders_at_the_top_are_linked_into_the_package(name: str) -> None:
    assert os.readlink(ROOT / "qwen_mlx" / name) == f"../{name}"


def written_files() -> Iterator[Path]:
    """The text that people wrote, wherever it stands; this file must name what it looks for."""
    for folder, folders, names in os.walk(ROOT, followlinks=False):
        hidden = {name for name in folders if name.startswith(".") and name != ".ci"}
        folders[:] = sorted(set(folders) - hidden - {"__pycache__", "build", "dist"})
        for path in (Path(folder, name) for name in names):
            if path.suffix in {".py", ".md", ".toml", ".jinja", ".metal"} or path.parent.name == ".ci":
                yield path


WRITTEN = sorted(path.relative_to(ROOT).as_posix() for path in written_files() if path != Path(__file__))


@pytest.mark.parametrize("path", WRITTEN)
def test_no_text_speaks_of_where_it_was_written(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    places = re.findall(r"(?<![\w.:/<-])/(?:home|Users|root|work|opt|tmp)/[\w.-]+", text)
    # Quoted, it is the scope of a pytest fixture.
    words = re.findall(r"(?<![\"'])\b(?:sessions?|workplace|FIXME|XXX)\b(?![\"'])", text)
    assert places + words == []


PUBLIC = [
    "BatchAnswer",
    "Chat",
    "GenerationResponse",
    "PrefixStore",
    "PromptCache",
    "SamplingParams",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "load_prompt_cache",
    "save_prompt_cache",
    "stream_generate",
]


def test_these_names_are_public() -> None:
    assert sorted(qwen_mlx.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(qwen_mlx))


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"__version__"}))
def test_a_public_name_is_something_to_call_with_a_docstring(name: str) -> None:
    value = getattr(qwen_mlx, name)
    assert callable(value)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'generat'"):
        _ = qwen_mlx.generat


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.mark.parametrize("before", ["", "import qwen_mlx.generate", "import qwen_mlx.load", "import qwen_mlx.__main__"])
def test_generate_and_load_are_functions_whatever_was_imported_before(before: str) -> None:
    done = python("-c", f"{before}\nfrom qwen_mlx import generate, load\nprint(type(generate), type(load))")
    assert (done.stdout, done.stderr) == ("<class 'function'> <class 'function'>\n", "")


HEAVY = {"transformers", "torch", "mlx_lm", "huggingface_hub", "scipy", "requests", "httpx", "llguidance", "mcp"}


def loaded(program: str) -> set[str]:
    """The top-level modules that `program` brings into a fresh process."""
    new = "{module.split('.')[0] for module in set(sys.modules) - before}"
    around = f"import sys; before = set(sys.modules)\n{program}\nprint(*{new})"
    done = python("-c", around)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_loads_nothing_but_the_standard_library() -> None:
    assert loaded("import qwen_mlx") - sys.stdlib_module_names == {"qwen_mlx"}


def test_a_generation_loads_no_heavy_library() -> None:
    modules = loaded(
        "from qwen_mlx import generate, load\n"
        "messages = [{'role': 'user', 'content': 'Hello.'}]\n"
        "generate(*load('demo'), messages, max_tokens=4)"
    )
    assert {"mlx", "tokenizers"} <= modules
    assert modules & HEAVY == set()


def test_the_command_loads_no_heavy_library() -> None:
    modules = loaded(
        "import contextlib, runpy\n"
        "sys.argv = ['', 'generate', '--model', 'demo', '--prompt', 'Hello.', '--max-tokens', '4']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('qwen_mlx', run_name='__main__')"
    )
    assert {"mlx", "tokenizers"} <= modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize("command", [[], *([verb] for verb in VERBS)], ids=lambda command: " ".join(command) or "none")
def test_a_command_explains_itself(command: list[str]) -> None:
    done = python("-m", "qwen_mlx", *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["usage: qwen-mlx", *command]))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_module_of_its_own_too(verb: str) -> None:
    assert python("-m", f"qwen_mlx.{verb}", "--help").stdout == python("-m", "qwen_mlx", verb, "--help").stdout != ""


def test_every_verb_stands_in_the_usage() -> None:
    lines = python("-m", "qwen_mlx", "--help").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)


def test_the_command_tells_its_version() -> None:
    assert python("-m", "qwen_mlx", "--version").stdout == f"qwen-mlx {qwen_mlx.__version__}\n"


@pytest.mark.parametrize("line", [["nonsense"], ["generate", "--nonsense"]], ids=" ".join)
def test_nonsense_is_answered_by_one_sentence(line: list[str]) -> None:
    done = python("-m", "qwen_mlx", *line)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*nonsense.*\n", done.stderr)
