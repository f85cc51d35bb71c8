"""The whole of a conversion as a command: what is written and printed, from where it may come, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from qwen_mlx.cli import run
from qwen_mlx.convert import forms, main, pipeline
from qwen_mlx.convert.recipes import Form
from qwen_mlx.errors import CheckpointError, ConversionError, ModelNotFoundError, UnverifiedError
from qwen_mlx.evaluation.text import cut_windows
from qwen_mlx.hub import resolve
from qwen_mlx.load import load, load_model
from tests.convert.gguf_files import write as write_gguf
from tests.hub_stand_in import Hub, Repository

DEMO = resolve("demo")
TOKENS = mx.array([[5, 7, 300, 11]])


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Tales that the demo tells, two windows of them."""
    tales = json.loads((Path(__file__).parents[1] / "golden/demo.json").read_text(encoding="utf-8"))
    told = " ".join(tales[name]["prompt"] + tales[name]["text"] for name in ("tale", "long_ago"))
    file = tmp_path / "text.txt"
    file.write_text(" ".join([told] * 5), encoding="utf-8")
    return str(file)


def account(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "qwen_mlx.json").read_text())
    return found


def test_a_quantized_model_with_its_proof_and_card(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    main(["--hf-path", "demo", "--mlx-path", str(folder), "-q", "--text", text])
    found = account(folder)
    assert (found["verified"], found["recipe"], found["kept"]) == (True, "q4", {"mtp": True, "vision": False})
    origin = {"id": "demo", "hub": False, "revision": None, "kind": "released", "by": None, "verified": None}
    assert found["source"] == origin
    assert found["command"] == "python -m qwen_mlx.convert --hf-path demo --recipe q4 --text text.txt"
    assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "qwen_mlx.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("mlx", "apache-2.0")
    assert f"{found['proof']['tokens']} tokens" in card.text  # type: ignore[index]
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["verified"].strip() == "yes"
    assert float(printed["bits per weight"]) == pytest.approx(found["bits_per_weight"], abs=0.006)
    assert load(folder)[1].encode("a tale")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_bits_per_weight_count_every_byte_of_the_text_model(tmp_path: Path) -> None:
    found = pipeline.convert(pipeline.Options("demo", tmp_path / "model", form=Form(4, 64), verify=False))
    tensors = mx.load(str(tmp_path / "model/model.safetensors"))
    assert isinstance(tensors, dict)
    parameters = sum(a.size for n, a in mx.load(str(DEMO / "model.safetensors")).items() if not n.startswith("mtp"))
    assert found["bits_per_weight"] == pytest.approx(8 * sum(a.nbytes for a in tensors.values()) / parameters, abs=1e-3)
    assert (found["verified"], found["reason"]) == (False, "it was asked not to be compared with its source")


def test_a_gguf_file(text: str, tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("b-r2-d64")
    file = write_gguf(tmp_path / "model.gguf", checkpoint, "BF16")
    # The head of a random checkpoint foretells nothing.
    main(["--hf-path", str(file), "--mlx-path", str(tmp_path / "model"), "--text", text, "--no-mtp"])
    assert account(tmp_path / "model")["verified"]
    assert account(tmp_path / "model")["source"]["kind"] == "GGUF"  # type: ignore[index]
    ours, theirs = (load_model(f, dtype="float32")(TOKENS) for f in (tmp_path / "model", checkpoint))
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 5e-4


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_from_the_hub_and_back(hub: Hub, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        file.name: file.read_bytes()
        for file in DEMO.iterdir()
        if file.suffix in (".json", ".jinja", ".md", ".safetensors")
    }
    hub.repositories["tales/demo"] = Repository(files | {"model.py": b"raise SystemExit"}, revisions=("main", "v1"))
    arguments = ["--hf-path", "tales/demo", "--revision", "v1", "-q", "--text", text]
    main([*arguments, "--mlx-path", str(tmp_path / "model"), "--upload-repo", "tales/demo-4bit", "--private"])
    assert hub.repositories["tales/demo-4bit"].private
    found = account(tmp_path / "model")
    assert found["source"]["id"] == "tales/demo"  # type: ignore[index]
    assert found["source"]["revision"] == hub.repositories["tales/demo"].commit  # type: ignore[index]
    assert ModelCard(hub.repositories["tales/demo-4bit"].files["README.md"].decode()).data.base_model == "tales/demo"
    assert not any("model.py" in path for _, path in hub.requests)
    back, kept = load(resolve("tales/demo-4bit"))[0], load(tmp_path / "model")[0]
    assert mx.array_equal(back(TOKENS), kept(TOKENS)).item()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main([*arguments, "--mlx-path", str(tmp_path / "again")])
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hf-path", "demo", "--q-bits", "4"], "--q-bits needs -q"),
        (["--hf-path", "demo", "-q", "-d"], "either --quantize or --dequantize"),
        (["--hf-path", "demo", "--recipe", "q4", "--q-bits", "4"], "either --recipe or --q-bits"),
        (["--hf-path", "demo", "-q", "--q-bits", "7"], "--q-bits must be one of 2, 3, 4, 5, 6, 8, not 7"),
        (["--hf-path", "demo", "-q", "--q-group-size", "48"], "--q-group-size must be one of 32, 64, 128, not 48"),
        (["--hf-path", "demo", "-q", "--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4 has 4 bits in groups of 32"),
        (["--hf-path", "demo", "--recipe", "auto"], "--recipe auto and --target-bits belong together"),
        (["--hf-path", "demo", "-q", "--q-bits", "0"], "--q-bits must be one of 2, 3, 4, 5, 6, 8, not 0"),
        (["--hf-path", "demo", "--recipe", "auto", "--target-bits", "nan"], "must be a positive number, not nan"),
        (["--hf-path", "demo", "--private"], "need --upload-repo"),
        (["--hf-path", "demo", "--upload-repo", "mine"], "mine is no id of a repository"),
        (["--hf-path", "demo", "--mlx-path", "", "--force"], "has no name of its own"),
        (["--hf-path", "demo", "--target-bits", "4"], "--recipe auto and --target-bits belong together"),
        (["--hf-path", "demo", "--dwq"], "--dwq needs -q"),
        (["--hf-path", "demo", "--no-verify", "--upload-repo", "a/b"], "needs --allow-unverified"),
        (["--hf-path", "demo", "-d"], "is not quantized"),
        (["--hf-path", "no/such.gguf"], "There is no file no/such.gguf"),
        (["--hf-path", "no/such/folder"], "no/such/folder is no folder here"),
        (["--hf-path", "demo", "--revision", "v1"], "has no revision v1"),
        (["--hf-path", "demo", "-q", "--text", "no.txt"], "no.txt: No such file"),
        (["--hf-path", "demo", "--recipe", "auto", "--target-bits", "1"], "--target-bits must be at least"),
        ([], "--hf-path"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_said_in_one_sentence(
    arguments: list[str], said: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "auto" in arguments:
        arguments = [*arguments, "--text", text]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            code = run(lambda: main(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_an_existing_folder_is_left_alone_unless_told_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(ConversionError, match="exists already"):
        pipeline.convert(pipeline.Options("demo", folder, verify=False))
    with pytest.raises(ConversionError, match="is no conversion"):
        pipeline.convert(pipeline.Options("demo", folder, verify=False, force=True))
    assert (folder / "mine").read_text() == "kept"
    (folder / "qwen_mlx.json").write_text("{}")
    pipeline.convert(pipeline.Options("demo", folder, verify=False, force=True))
    assert not (folder / "mine").exists()
    assert load_model(folder)


def test_a_quantized_source_is_not_quantized_again(tmp_path: Path) -> None:
    pipeline.convert(pipeline.Options("demo", tmp_path / "one", form=Form(8), verify=False))
    with pytest.raises(ConversionError, match="quantized already"):
        pipeline.convert(pipeline.Options(str(tmp_path / "one"), tmp_path / "two", form=Form(4), verify=False))
    pipeline.convert(pipeline.Options(str(tmp_path / "one"), tmp_path / "two", dequantize=True, verify=False))
    ours, theirs = (load_model(tmp_path / f, dtype="float32")(TOKENS) for f in ("one", "two"))
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 0.2


def test_a_refused_result_does_not_take_the_place_of_a_good_one(text: str, tmp_path: Path) -> None:
    pipeline.convert(pipeline.Options("demo", tmp_path / "model", form=Form(8), text=Path(text)))
    good = (tmp_path / "model/model.safetensors").read_bytes()
    bad = pipeline.Options("demo", tmp_path / "model", form=Form(2, 128), text=Path(text), force=True)
    with pytest.raises(ConversionError, match=r"model\.partial, and .*model is left as it was"):
        pipeline.convert(bad)
    assert (tmp_path / "model/model.safetensors").read_bytes() == good


def test_a_result_outside_its_band_stays_marked(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnverifiedError, match=r"(2\.\d+ bits|draft head foretells).*marked as unverified"):
        pipeline.convert(pipeline.Options("demo", tmp_path / "model", form=Form(2, 128), text=Path(text)))
    found = account(tmp_path / "model")
    assert not found["verified"]
    assert found["proof"]["kl_mean"] > 0.5  # type: ignore[index]
    assert "not verified" in (tmp_path / "model/README.md").read_text().lower()


def test_what_is_made_of_an_unsound_model_is_not_sound(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnverifiedError):
        pipeline.convert(pipeline.Options("demo", tmp_path / "bad", form=Form(2, 128), text=Path(text)))
    with pytest.raises(UnverifiedError) as refused:
        pipeline.convert(pipeline.Options(str(tmp_path / "bad"), tmp_path / "copy", text=Path(text)))
    copy = refused.value.account
    assert copy["proof"]["kl_mean"] == 0
    assert (copy["verified"], copy["reason"]) == (False, "it is as its source, which is not verified")
    assert copy["source"]["id"] == "demo"
    assert "--q-bits 2" in copy["source"]["by"]


def test_a_text_of_a_few_words_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Once upon a time")
    with pytest.raises(UnverifiedError, match="predicted tokens are too few to tell"):
        pipeline.convert(pipeline.Options("demo", tmp_path / "model", text=tmp_path / "few.txt"))


def test_without_a_tokenizer_it_says_that_it_could_not_verify(tmp_path: Path) -> None:
    source = shutil.copytree(DEMO, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    found = pipeline.convert(pipeline.Options(str(source), tmp_path / "model"))
    assert (found["verified"], found["reason"]) == (False, "its source has no tokenizer to read a text with")


def test_bits_by_measurement_keep_to_the_target(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A measurement passes the text once for each matrix and form.
    monkeypatch.setattr(forms, "BITS", (3, 8))
    monkeypatch.setattr(pipeline, "cut_windows", lambda tokens: cut_windows(tokens, 64))
    main(
        [
            "--hf-path",
            "demo",
            "--mlx-path",
            str(tmp_path / "model"),
            "--recipe",
            "auto",
            "--target-bits",
            "5.2",
            "--text",
            text,
        ]
    )
    found = account(tmp_path / "model")
    assert 4.9 < float(str(found["bits_per_weight"])) < 5.35  # norms and convolutions besides
    config = json.loads((tmp_path / "model/config.json").read_text())
    gates = [form for path, form in config["quantization"].items() if path.endswith(("in_proj_a", "in_proj_b"))]
    assert all(form["bits"] == 8 for form in gates)


def test_learned_scales(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    monkeypatch.setattr(pipeline, "tune", lambda folder, opened, windows, dtype: learned.append(len(windows)))
    options = pipeline.Options("demo", tmp_path / "model", form=Form(4), dwq=True, text=Path(text))
    found = pipeline.convert(options)
    windows = found["proof"]["tokens"] / 511
    assert found["dwq"]
    assert found["learned_from"] == found["proof"]["sha256"]
    assert learned == [1]  # what proves the result was not learned from
    assert windows <= 1.1


def test_the_dtype_is_that_of_what_is_stored(tmp_path: Path) -> None:
    """config.json may speak of another: mlx-lm's --dtype leaves it as it was."""
    pipeline.convert(pipeline.Options("demo", tmp_path / "half", dtype="float16", form=Form(8), verify=False))
    config = json.loads((tmp_path / "half/config.json").read_text())
    config["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    pipeline.convert(pipeline.Options(str(tmp_path / "half"), tmp_path / "again", verify=False))
    one, two = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("half", "again"))
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert all(one[name].dtype == two[name].dtype and mx.array_equal(one[name], two[name]).item() for name in one)


def test_odd_group_sizes_are_named_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(DEMO, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (source / "config.json").write_text(json.dumps(config))
    tensors = mx.load(str(source / "model.safetensors"))
    assert isinstance(tensors, dict)
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name] = tensors[name][:, :96] if "down_proj" in name else tensors[name][:96]
    mx.save_safetensors(str(source / "new.safetensors"), tensors)
    (source / "new.safetensors").rename(source / "model.safetensors")
    pipeline.convert(pipeline.Options(str(source), tmp_path / "model", form=Form(4, 64), verify=False))
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj stays as it is: its size does not divide by the group size." in said
    assert "up_proj" not in said


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom qwen_mlx.convert import folder, main\nfrom qwen_mlx.cli import run\n"
        "real = folder.write_file\n"
        "def slow(path, *rest):\n    real(path, *rest)\n"
        "    print('written', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "folder.write_file = slow\nsys.exit(run(lambda: main(sys.argv[1:])))\n"
    )
    command = [sys.executable, "-c", program, "--hf-path", "demo", "--mlx-path", str(tmp_path / "model"), "--no-verify"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "written\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "model.partial/model.safetensors").exists()
    written = (tmp_path / "model.partial/model.safetensors").stat().st_mtime_ns
    main(command[3:])
    assert (tmp_path / "model/model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / "model.partial").exists()


@pytest.mark.parametrize("name", ["no/such", "tales/gated"])
def test_what_the_hub_refuses(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["tales/gated"] = Repository(error=(403, "GatedRepo"))
    with pytest.raises(ModelNotFoundError):
        pipeline.convert(pipeline.Options(name, tmp_path / "model"))
    assert list(tmp_path.glob("model*")) == []


def test_a_broken_source_leaves_nothing(tmp_path: Path) -> None:
    source = shutil.copytree(DEMO, tmp_path / "source")
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="truncated"):
        pipeline.convert(pipeline.Options(str(source), tmp_path / "model"))
    assert list(tmp_path.glob("model*")) == []
