"""`python -m qwen_mlx.verify`: what it counts, what it says, and how it ends."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx import load, verify
from qwen_mlx.cli import run
from qwen_mlx.decoding import drafting, speculative
from qwen_mlx.hub import resolve
from qwen_mlx.verify import NEAR, Tally, Verification, report

MODEL, TOKENIZER = load("demo", dtype="float32")
PROMPTS = [TOKENIZER.encode(text) for text in ("Once upon a time there was a fox", "The capital of France is")]


def found(mode: str = "mtp", max_tokens: int = 24) -> Tally:
    return Verification(MODEL, TOKENIZER, mode, max_tokens=max_tokens).over(PROMPTS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Tell me a story.\n\nWho are you?\n", encoding="utf-8")
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = 0
    try:
        code = run(lambda: verify.main([*arguments, "--json"]))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["mtp", "ngram"])
def test_a_sound_loop_has_no_differences(mode: str) -> None:
    tally = found(mode)
    assert (tally.differences, tally.near_ties) == ([], 0)
    assert tally.tokens > 24


def wrong_from(monkeypatch: pytest.MonkeyPatch, gap: float) -> None:
    """Every draft stands, whatever the model says, and the model's logits are as near as `gap` asks for."""

    def all_stand(sampler, logits, *, drafts, draft_logits=None):  # type: ignore[no-untyped-def]
        return mx.array(drafts.size), mx.argmin(logits[-1:], axis=-1).astype(mx.uint32)

    monkeypatch.setattr(speculative, "accept", all_stand)
    monkeypatch.setattr(drafting, "Learning", lambda measured, most: drafting.Fixed(most))
    monkeypatch.setitem(NEAR, mx.float32, gap)


def test_tokens_that_differ_are_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_from(monkeypatch, 1e-3)
    tally = found()
    assert tally.near_ties == 0
    assert "with drafts" in tally.differences[0]


def test_what_is_near_is_a_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_from(monkeypatch, 1e9)
    tally = found()
    assert tally.differences == []
    assert tally.near_ties > 0


def test_a_position_counts_where_those_before_it_stood() -> None:
    tally = Tally()
    for accepted in (0, 1, 3, 3):
        tally.count(3, accepted)
    assert (tally.tried, tally.right) == ([4, 3, 2], [3, 2, 2])


def test_a_position_that_was_never_reached_is_left_out() -> None:
    tally = Tally()
    tally.count(2, 0)
    assert report(tally)["acceptance"] == [0.0]


def test_answers_that_are_too_short_say_nothing_of_speed() -> None:
    assert report(found(max_tokens=4))["speed_ratio"] is None


def test_the_command_says_what_was_found(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = told(capsys, "demo", "--prompts", str(file), "-m", "20")
    assert code == 0
    assert answer.keys() == {"model", "tokens", "near_ties", "differences", "acceptance", "speed_ratio"}


def test_without_json_it_is_three_lines(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main(["demo", "--prompts", str(file), "-m", "20", "--raw"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tokens", "acceptance", "speed"]


def test_differences_end_it_with_1(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_from(monkeypatch, 1e-3)
    code, answer = told(capsys, "demo", "--prompts", str(file), "-m", "20", "--dtype", "float32")
    assert code == 1
    assert answer["differences"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_prompts(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_bytes(content)
    assert run(lambda: verify.main(["demo", "--prompts", str(tmp_path / "prompts")])) == 2
    assert "prompts" in capsys.readouterr().err


def test_a_model_without_a_head(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(resolve("demo"), tmp_path / "headless"))
    tensors = mx.load(str(folder / "model.safetensors"))
    kept = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    mx.eval(kept)
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "pt"})
    assert run(lambda: verify.main([str(folder), "--prompts", str(file)])) == 2
    assert "has no draft head (mtp.*)" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "16", "many"])
def test_a_number_of_drafts_that_cannot_be(count: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        verify.main(["demo", "--prompts", str(file), "--num-draft-tokens", count])
    assert end.value.code == 2
    assert "--num-draft-tokens" in capsys.readouterr().err
