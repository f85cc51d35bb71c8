"""What a conversion writes: the same in mlx-lm as here, resumable to the byte, nothing dropped without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.convert import folder as writing
from qwen_mlx.convert.folder import Request, check_place, claimed, finish, write
from qwen_mlx.convert.opened import open_model
from qwen_mlx.convert.plan import Forms
from qwen_mlx.convert.recipes import Form
from qwen_mlx.errors import CheckpointError, ConversionError
from qwen_mlx.load import load_model
from qwen_mlx.load_mtp import load_mtp
from tests.golden.checkpoints import VARIANTS
from tests.layouts import Tensors, exact_gains, mlx_layout, released
from tests.layouts import write as write_layout

CheckpointOf = Callable[[str], Path]
FORMS: dict[str, Forms] = {
    "float": lambda path: None,
    "4 bit": lambda path: Form(4, 32),
    "8 bit": lambda path: Form(8, 64),
    "mxfp4": lambda path: Form(4, 32, "mxfp4"),
    "mixed": lambda path: None if "o_proj" in path else Form(8, 32) if "down_proj" in path else Form(5, 64),
}
TOKENS = mx.array([[5, 7, 11, 13, 17, 300, 2, 1]])


def convert(source: Path, mlx_path: Path, forms: Forms = FORMS["float"], **options: Any) -> list[str]:
    request = Request(mlx_path, "bfloat16", forms, {"recipe": None}, **options)
    account = write(open_model(source), request)
    finish(request)
    left: list[str] = account["left_float"]
    return left


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(file: Path) -> Tensors:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def equal(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and np.array_equal(np.array(ours[name].view(mx.uint8)), np.array(theirs[name].view(mx.uint8)))
        for name in theirs
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_is_the_mlx_layout_bit_for_bit(variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    convert(checkpoint_of(variant), tmp_path / "model")
    tensors = released(checkpoint_of(variant))
    assert equal(tensors_of(tmp_path / "model/model.safetensors"), mlx_layout(tensors))
    assert equal(tensors_of(tmp_path / "model/qwen_mlx/gains.safetensors"), exact_gains(tensors))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_loses_nothing(variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    convert(checkpoint_of(variant), tmp_path / "model")
    ours, theirs = (load_model(f, dtype="float32") for f in (tmp_path / "model", checkpoint_of(variant)))
    assert np.array_equal(np.array(ours(TOKENS)), np.array(theirs(TOKENS)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["b-r2-d64", "c-r3-d128", "d-moe"])
def test_mlx_lm_loads_it_and_gives_the_same_logits(
    form: str, variant: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as load_peer

    convert(checkpoint_of(variant), tmp_path / "model", FORMS[form])
    peer, _ = load_peer(tmp_path / "model")
    assert peer(TOKENS).dtype == mx.bfloat16  # no float32 tensor makes it compute everything in float32
    shutil.rmtree(tmp_path / "model/qwen_mlx")  # mlx-lm has the rounded gains alone
    ours = load_model(tmp_path / "model", dtype="float32")
    peer.set_dtype(mx.float32)
    assert np.abs(np.array(ours(TOKENS)) - np.array(peer(TOKENS))).max() < 5e-4


@pytest.mark.parametrize("form", ["float", "4 bit", "8 bit", "mixed"])
@pytest.mark.parametrize("variant", ["b-r2-d64", "c-r3-d128", "d-moe"])
def test_what_mlx_lm_converts_loads_here_and_is_carried_over(
    form: str, variant: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model as load_peer
    from mlx_lm.utils import quantize_model, save_config, save_model

    peer, config = load_peer(checkpoint_of(variant), lazy=True)
    if form == "mixed":
        peer, config = quantize_model(
            peer, config, 32, 4, quant_predicate=mixed_quant_predicate_builder("mixed_3_6", peer, 32)
        )
    elif form != "float":
        peer, config = quantize_model(peer, config, 32, int(form[0]))
    save_model(tmp_path / "theirs", peer)
    save_config(config, tmp_path / "theirs/config.json")
    peer.set_dtype(mx.float32)
    wanted = np.array(peer(TOKENS))
    assert np.abs(np.array(load_model(tmp_path / "theirs", dtype="float32")(TOKENS)) - wanted).max() < 5e-4
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert equal(tensors_of(tmp_path / "ours/model.safetensors"), tensors_of(tmp_path / "theirs/model.safetensors"))
    again, _ = load_peer(tmp_path / "ours")
    again.set_dtype(mx.float32)
    assert np.array_equal(np.array(again(TOKENS)), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["a-r1-d32", "d-moe"])
def test_draft_head_is_kept(form: str, variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    convert(checkpoint_of(variant), tmp_path / "model", FORMS[form])
    model = load_model(tmp_path / "model", dtype="float32")
    ours, theirs = load_mtp(tmp_path / "model", model), load_mtp(checkpoint_of(variant), model)
    assert ours is not None
    assert theirs is not None
    x = mx.random.normal((1, 5, 128))
    drafted, wanted = (np.array(head(x, x, head.make_cache())) for head in (ours, theirs))
    most = {"float": 0.02, "8 bit": 0.1}.get(form, 0.9)  # its gains are rounded to bfloat16
    assert np.abs(drafted - wanted).max() < most * np.abs(wanted).max()
    config = json.loads((tmp_path / "model/mtp/config.json").read_text())
    assert (config["model_type"], config["block_size"]) == ("qwen3_5_mtp", 3)
    assert ("quantization" in config) == (form != "float")


def test_no_mtp_and_text_only_drop_and_say_so(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = with_vision(checkpoint_of("a-r1-d32"), tmp_path / "source")
    convert(source, tmp_path / "all")
    convert(source, tmp_path / "text", vision=False, mtp=False)
    every, text = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("all", "text"))
    assert "vision_tower.merger.norm.weight" in tensors_of(tmp_path / "all/model.safetensors")
    assert every["vision_config"] == {"depth": 2}
    assert every["text_config"]["mtp_num_hidden_layers"] == 1
    assert not [name for name in tensors_of(tmp_path / "text/model.safetensors") if "vision" in name]
    assert not (tmp_path / "text/mtp").exists()
    assert not text.keys() & {"vision_config", "image_token_id"}
    assert text["architectures"] == ["Qwen3_5ForCausalLM"]
    assert text["text_config"]["mtp_num_hidden_layers"] == 0
    assert load_mtp(tmp_path / "text", load_model(tmp_path / "text")) is None


def with_vision(source: Path, folder: Path) -> Path:
    write_layout(folder, source, released(source) | {"model.visual.merger.norm.weight": mx.ones(8, mx.bfloat16)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 2}, "image_token_id": 7}))
    return folder


def test_flat_config_of_a_text_model_becomes_one_that_mlx_lm_knows(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as load_peer

    source = shutil.copytree(checkpoint_of("a-r1-d32"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(text))
    convert(source, tmp_path / "model")
    assert load_peer(tmp_path / "model")[0](TOKENS).shape == (1, 8, 384)


def test_states_and_gates_stay_float32(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    convert(checkpoint_of("a-r1-d32"), tmp_path / "model", FORMS["4 bit"])
    found = tensors_of(tmp_path / "model/model.safetensors")
    kinds = {name.split("layers.0.")[1]: a.dtype for name, a in found.items() if "layers.0.linear_attn" in name}
    assert kinds["linear_attn.A_log"] == kinds["linear_attn.norm.weight"] == mx.float32
    assert kinds["linear_attn.dt_bias"] == kinds["linear_attn.conv1d.weight"] == mx.bfloat16


def test_a_group_that_does_not_divide_is_named(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    odd = convert(checkpoint_of("c-r3-d128"), tmp_path / "model", lambda path: Form(4, 128))
    assert "model.embed_tokens" in odd  # 192 wide
    assert "model.layers.0.linear_attn.out_proj" not in odd  # 768
    assert "mtp.layers.0.mlp.up_proj" in odd
    assert "language_model.model.embed_tokens.scales" not in tensors_of(tmp_path / "model/model.safetensors")
    load_model(tmp_path / "model")


@pytest.mark.parametrize("form", ["float", "4 bit"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    form: str, checkpoint_of: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_of("b-r2-d64")
    convert(source, tmp_path / "whole", FORMS[form], shard=100_000)
    written: list[str] = []
    real = writing.write_file

    def interrupted(path: Path, *arguments: Any) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *arguments)

    monkeypatch.setattr(writing, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "model", FORMS[form], shard=100_000)
    assert not (tmp_path / "model").exists()
    unfinished = tmp_path / "model.partial/model-00006-of-00014.safetensors.unfinished"
    unfinished.write_bytes(b"half of it")
    first = written[:]
    monkeypatch.setattr(writing, "write_file", lambda path, *rest: (written.append(path.name), real(path, *rest)))
    convert(source, tmp_path / "model", FORMS[form], shard=100_000)
    assert len(written) == len(set(written))
    assert set(first) < set(written)
    assert contents(tmp_path / "model") == contents(tmp_path / "whole")
    assert not (tmp_path / "model.partial").exists()


def test_unfinished_work_of_another_request_is_not_taken_over(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of("a-r1-d32")
    write(open_model(source), Request(tmp_path / "model", "bfloat16", FORMS["4 bit"], {"recipe": "one"}))
    convert(source, tmp_path / "model", FORMS["8 bit"])
    convert(source, tmp_path / "fresh", FORMS["8 bit"])
    assert contents(tmp_path / "model") == contents(tmp_path / "fresh")


def test_unfinished_work_from_files_that_changed_since_is_not_taken_over(
    checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint_of("a-r1-d32"), tmp_path / "source")
    write(open_model(source), Request(tmp_path / "model", "bfloat16", FORMS["float"], {"recipe": None}))
    tensors = {name: -array for name, array in released(checkpoint_of("a-r1-d32")).items() if "up_proj" in name}
    write_layout(source, checkpoint_of("a-r1-d32"), released(checkpoint_of("a-r1-d32")) | tensors)
    convert(source, tmp_path / "model")
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "model") == contents(tmp_path / "fresh")


def test_shards_are_cut_and_listed(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    convert(checkpoint_of("a-r1-d32"), tmp_path / "model", shard=200_000)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 220_000 for path in files)
    held = {name: path.name for path in files for name in tensors_of(path)}
    assert held == index["weight_map"]
    model = load_model(tmp_path / "model", dtype="float32")
    assert np.array_equal(
        np.array(model(TOKENS)), np.array(load_model(checkpoint_of("a-r1-d32"), dtype="float32")(TOKENS))
    )


def test_nothing_appears_when_the_source_is_broken(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    tensors = released(checkpoint_of("a-r1-d32"))
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name] * float("nan")
    source = write_layout(tmp_path / "source", checkpoint_of("a-r1-d32"), tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN"):
        convert(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial").exists() or not any((tmp_path / "model.partial").iterdir())


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    request = Request(tmp_path / "model", "bfloat16", FORMS["float"], {})
    with claimed(request), pytest.raises(ConversionError, match="Another conversion writes to"), claimed(request):
        pass
    with claimed(request):  # and not for ever
        pass


def test_nothing_of_the_users_is_touched(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial/mine").touch()
    (tmp_path / "b.old").mkdir()
    (tmp_path / "c").mkdir()
    for mlx_path, force, said in (
        (tmp_path / "a", False, "a.partial is no unfinished conversion"),
        (tmp_path / "b", False, "b.old is in the way"),
        (tmp_path / "c", False, "c exists already"),
        (source, True, "is no conversion"),
        (Path(), True, "has no name of its own"),
    ):
        with pytest.raises(ConversionError, match=said):
            check_place(mlx_path, source / "inner", force=force)
    (source / "qwen_mlx.json").touch()
    with pytest.raises(ConversionError, match="lies in"):
        check_place(source, source / "inner", force=True)
    (tmp_path / "source.partial").mkdir()
    with pytest.raises(ConversionError, match="lies in"):
        check_place(tmp_path / "source", tmp_path / "source.partial", force=True)
    (tmp_path / "c/qwen_mlx.json").touch()
    check_place(tmp_path / "c", source, force=True)
    check_place(tmp_path / "new", source, force=False)


def test_a_weight_that_float16_cannot_hold_is_named(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    tensors = released(checkpoint_of("a-r1-d32"))
    tensors["model.language_model.layers.1.mlp.up_proj.weight"] *= 1e7
    source = write_layout(tmp_path / "source", checkpoint_of("a-r1-d32"), tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight does not fit float16"):
        write(open_model(source), Request(tmp_path / "model", "float16", FORMS["float"], {}))
