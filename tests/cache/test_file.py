"""A cache in a file: reloaded = never left memory, damaged = refused, interrupted = never written."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache import file as module
from qwen_mlx.cache.file import Fingerprint, read_cache, write_cache
from qwen_mlx.cache.kv import SLAB
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.checkpoint import read_header
from qwen_mlx.errors import PromptCacheError
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import contents, greedy, prompt, same
from tests.golden.checkpoints import VARIANTS

MINE = Fingerprint("mine", model="1", tokenizer="2", template="3", dtype="float32")
Saved = tuple[Path, SequenceCache, list[int]]


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


def save(path: Path, model: Qwen, count: int = 20, cache: SequenceCache | None = None) -> Saved:
    """A prompt of `count` tokens, in a cache and in a file."""
    cache, tokens = cache or model.make_cache(), prompt(count)
    model(tokens, cache)
    write_cache(path, cache, tokens[0].tolist(), MINE)
    return path, cache, tokens[0].tolist()


@pytest.fixture
def saved(tmp_path: Path, model: Qwen) -> Saved:
    return save(tmp_path / "prompt.safetensors", model)


def refused(path: Path, model: Qwen, words: str, mine: Fingerprint = MINE) -> None:
    """Loading is refused in one sentence, and the cache is what it was."""
    cache = model.make_cache()
    with pytest.raises(PromptCacheError, match=words) as caught:
        read_cache(path, cache, mine)
    assert re.fullmatch(r"[^\n]*[^.]\.", str(caught.value))
    assert (cache.offset, cache.arrays) == (0, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reloaded_cache_goes_on_as_if_it_had_never_left_memory(
    variant: str, dtype: str, tmp_path: Path, model_of: Callable[[str, str], Qwen]
) -> None:
    model = model_of(variant, dtype)
    path, cache, tokens = save(tmp_path / "prompt.safetensors", model)
    reloaded = model.make_cache()
    assert read_cache(path, reloaded, MINE) == tokens
    assert reloaded.offset == 20
    assert [a.dtype for a in reloaded.arrays] == [a.dtype for a in cache.arrays]
    assert same(contents(reloaded), contents(cache))
    goes_on_alike(model, reloaded, cache)


def goes_on_alike(model: Qwen, one: SequenceCache, other: SequenceCache, first: int = 5) -> None:
    (tokens, logits), (expected, expected_logits) = (greedy_float32(model, cache, first) for cache in (one, other))
    assert tokens == expected
    assert np.array_equal(logits, expected_logits)


def greedy_float32(model: Qwen, cache: SequenceCache, first: int) -> tuple[list[int], np.ndarray]:
    """32 tokens, and the logits of all of them [32, V]."""
    tokens, rows = [first], []
    for _ in range(32):
        rows.append(model(mx.array([[tokens[-1]]]), cache)[0, -1].astype(mx.float32))
        tokens.append(int(mx.argmax(rows[-1])))
    return tokens[1:], np.array(mx.stack(rows))


@pytest.mark.parametrize("count", [1, SLAB - 1, SLAB, SLAB + 1, 3 * SLAB - 5])
def test_every_length(count: int, tmp_path: Path, model: Qwen) -> None:
    path, cache, tokens = save(tmp_path / "prompt.safetensors", model, count)
    reloaded = model.make_cache()
    assert read_cache(path, reloaded, MINE) == tokens
    goes_on_alike(model, reloaded, cache)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_keys_and_values(bits: int, tmp_path: Path, model: Qwen) -> None:
    made = (model.make_cache(kv_bits=bits) for _ in range(2))
    path, cache, _ = save(tmp_path / "prompt.safetensors", model, 300, next(made))
    reloaded = next(made)
    read_cache(path, reloaded, MINE)
    assert same(contents(reloaded), contents(cache))
    goes_on_alike(model, reloaded, cache)


def test_keys_and_values_in_other_bits_are_refused(tmp_path: Path, model: Qwen) -> None:
    cache = model.make_cache(kv_bits=8)
    path, _, _ = save(tmp_path / "prompt.safetensors", model, cache=cache)
    words = "layer 3 holds QuantizedKVCache of .*, 8 bits kept there, and KVCache of .* here; give the same kv_bits"
    refused(path, model, words)


def test_what_was_taken_back_is_not_in_the_file(tmp_path: Path, model: Qwen) -> None:
    cache, tokens = model.make_cache(), prompt(20)
    model(tokens, cache)
    model(prompt(9), cache)
    cache.rewind(9)
    write_cache(tmp_path / "one", cache, tokens[0].tolist(), MINE)
    save(tmp_path / "other", model)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_slab_has_the_room_it_had(tmp_path: Path, model: Qwen) -> None:
    """A compiled step attends to all of it, so that its length may show in the last digits."""
    cache = model.make_cache()
    model(prompt(2 * SLAB + 9), cache)
    cache.rewind(2 * SLAB + 9)
    path, _, _ = save(tmp_path / "prompt.safetensors", model, cache=cache)
    reloaded = model.make_cache()
    read_cache(path, reloaded, MINE)
    assert [a.shape for a in reloaded.arrays] == [a.shape for a in cache.arrays]
    assert reloaded.arrays[-1].shape[3] == 3 * SLAB
    goes_on_alike(model, reloaded, cache)


def test_a_saved_cache_goes_on(saved: Saved, model: Qwen) -> None:
    _, cache, tokens = saved
    fresh = model.make_cache()
    model(mx.array([tokens]), fresh)
    goes_on_alike(model, cache, fresh)


def test_the_file_holds_what_is_filled_and_no_more(saved: Saved) -> None:
    """a-r1-d32: three layers with Hk = Hv = 4, Dk = Dv = 32 and one attention layer with Hkv 2, Dh 64."""
    path, _, tokens = saved
    found = {name: (header.shape, header.dtype) for name, header in read_header(path).items()}
    expected = {f"layers.{i}.conv_state": ((1, 3, 384), "F32") for i in range(3)}
    expected |= {f"layers.{i}.recurrent_state": ((1, 4, 32, 32), "F32") for i in range(3)}
    assert found == expected | {"layers.3.keys_values": ((2, 1, 2, 20, 64), "F32"), "tokens": ((20,), "U32")}
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    assert arrays["tokens"].tolist() == tokens
    assert metadata["format"] == "qwen_mlx prompt cache 1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_a_fresh_process(
    dtype: str, tmp_path: Path, model_of: Callable[[str, str], Qwen], checkpoint_of: Callable[[str], Path]
) -> None:
    path, cache, tokens = save(tmp_path / "prompt.safetensors", model_of("f-k32-v64", dtype))
    program = f"""
import sys
from pathlib import Path
import numpy as np
from qwen_mlx.cache.file import read_cache
from qwen_mlx.load import load_model
from tests.cache.test_file import MINE, greedy_float32
model = load_model(Path(sys.argv[1]), dtype={dtype!r})
cache = model.make_cache()
tokens = read_cache(sys.argv[2], cache, MINE)
found, logits = greedy_float32(model, cache, 5)
np.savez(sys.argv[3], tokens=tokens, found=found, logits=logits)
"""
    arguments = [str(checkpoint_of("f-k32-v64")), str(path), str(tmp_path / "found.npz")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment, timeout=120)
    found = np.load(tmp_path / "found.npz")
    expected, logits = greedy_float32(model_of("f-k32-v64", dtype), cache, 5)
    assert found["tokens"].tolist() == tokens
    assert found["found"].tolist() == expected
    assert np.array_equal(found["logits"], logits)


def places(size: int, header: int) -> list[int]:
    """All of the header, and some of what lies behind it."""
    return [*range(header), *np.random.RandomState(1).randint(header, size, 100).tolist(), header, size - 1]


def test_a_byte_that_changed_is_refused(saved: Saved, model: Qwen) -> None:
    path = saved[0]
    whole, header = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for place in places(len(whole), header):
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            refused(path, model, "damaged|no prompt file")
    path.write_bytes(whole)
    assert read_cache(path, model.make_cache(), MINE) == saved[2]


def test_a_file_of_another_length_is_refused(saved: Saved, model: Qwen) -> None:
    path = saved[0]
    whole, header = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for length in [*places(len(whole), header)[::7], len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, model, "damaged")
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        refused(path, model, "damaged")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 64, id="header_of_many_bytes"),
        pytest.param((2).to_bytes(8, "little") + b"{}", id="no_metadata"),
        pytest.param((2).to_bytes(8, "little") + b"[]", id="no_object"),
        pytest.param((20000).to_bytes(8, "little") + b"[" * 20000, id="deep"),
        pytest.param((21).to_bytes(8, "little") + b'{"__metadata__": "a"}', id="metadata_is_text"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path, model: Qwen) -> None:
    (tmp_path / "prompt.safetensors").write_bytes(content)
    refused(tmp_path / "prompt.safetensors", model, "is damaged or no prompt file")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        pytest.param({"format": "mlx"}, "its format is 'mlx'", id="weights"),
        pytest.param({"0.0": "KVCache"}, "its format is None", id="a_peers_prompt_file"),
        pytest.param(
            {"format": "qwen_mlx prompt cache 2"}, "is 'qwen_mlx prompt cache 2', not .* 1'", id="later_format"
        ),
        pytest.param({"format": "qwen_mlx prompt cache 1"}, "is damaged", id="no_digest"),
    ],
)
def test_another_safetensors_file_is_refused(metadata: dict[str, str], words: str, tmp_path: Path, model: Qwen) -> None:
    path = tmp_path / "prompt.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3,))}, metadata)
    refused(path, model, words)


@pytest.mark.parametrize("part", ["model", "tokenizer", "template", "dtype"])
def test_another_fingerprint_is_refused_by_name(part: str, saved: Saved, model: Qwen) -> None:
    theirs = replace(MINE, name="theirs", **{part: "bfloat16"})
    dtype = theirs.dtype
    words = f"was made with mine in float32, and this is theirs in {dtype}: they differ in {part}; "
    refused(saved[0], model, words, theirs)


def test_all_that_differs_is_named(saved: Saved, model: Qwen) -> None:
    refused(saved[0], model, "differ in model and template;", replace(MINE, model="9", template="9"))


def test_a_folder_of_another_name_is_the_same_model(saved: Saved, model: Qwen) -> None:
    assert read_cache(saved[0], model.make_cache(), replace(MINE, name="moved")) == saved[2]


def test_text_of_any_kind_in_the_name(tmp_path: Path, model: Qwen) -> None:
    """The digest is put in where it belongs, and not into what looks like its place."""
    cache, named = model.make_cache(), replace(MINE, name="Köln \U0001f600 " + module.NO_DIGEST)
    model(prompt(3), cache)
    write_cache(tmp_path / "a", cache, [1, 2, 3], named)
    assert read_cache(tmp_path / "a", model.make_cache(), named) == [1, 2, 3]


def test_there_is_no_file(tmp_path: Path, model: Qwen) -> None:
    refused(tmp_path / "prompt.safetensors", model, "There is no prompt file .*prompt.safetensors; check the path")


def test_a_folder_is_no_file(tmp_path: Path, model: Qwen) -> None:
    refused(tmp_path, model, r"cannot be read \(Is a directory\)")
    with pytest.raises(PromptCacheError, match=r"cannot be written \(.*\): it takes [\d,]+ bytes in a folder that"):
        save(tmp_path, model)
    assert not Path(f"{tmp_path}.unfinished").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read and write everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read(saved: Saved, model: Qwen) -> None:
    saved[0].chmod(0)
    with as_nobody():
        refused(saved[0], model, r"cannot be read \(Permission denied\); give a file that you may read")


def test_a_folder_that_may_not_be_written_to(saved: Saved, model: Qwen) -> None:
    path, cache, tokens = saved
    before = path.read_bytes()
    path.parent.chmod(0o500)
    with as_nobody(), pytest.raises(PromptCacheError, match=r"cannot be written \(Permission denied\)"):
        write_cache(path, cache, tokens, MINE)
    path.parent.chmod(0o700)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path, model: Qwen) -> None:
    with pytest.raises(PromptCacheError, match=r"cannot be written \(No such file or directory\)"):
        save(tmp_path / "no" / "prompt.safetensors", model)


def test_a_file_that_shrinks_while_it_is_read(saved: Saved, model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, verified = saved[0].read_bytes(), module._verified_header

    def cut(*arguments: object) -> object:
        found = verified(*arguments)
        saved[0].write_bytes(whole[:-100])
        return found

    monkeypatch.setattr(module, "_verified_header", cut)
    refused(saved[0], model, "is damaged")


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="ctrl_c"),
        pytest.param(MemoryError(), MemoryError, id="memory"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), PromptCacheError, id="disk_full"),
    ],
)
@pytest.mark.parametrize("step", ["in_the_middle", "before_the_rename"])
def test_a_write_that_ends_early_leaves_the_old_file(
    step: str,
    failure: BaseException,
    raised: type[BaseException],
    saved: Saved,
    model: Qwen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = saved[0]
    before, data, calls = path.read_bytes(), module._data, []

    def fails(array: mx.array) -> memoryview:
        calls.append(array)
        if len(calls) == 4:
            raise failure
        return data(array)

    def fails_to_sync(descriptor: int) -> None:
        raise failure

    if step == "in_the_middle":
        monkeypatch.setattr(module, "_data", fails)
    else:
        monkeypatch.setattr(os, "fsync", fails_to_sync)
    with pytest.raises(raised):
        save(path, model, 30)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_write_replaces_the_old_file(saved: Saved, model: Qwen) -> None:
    _, _, tokens = save(saved[0], model, 30)
    assert read_cache(saved[0], model.make_cache(), MINE) == tokens
    assert os.listdir(saved[0].parent) == [saved[0].name]


@pytest.mark.parametrize(
    ("padding", "rows", "fed", "told", "words"),
    [
        pytest.param(None, 1, 0, 0, "The cache is empty", id="empty"),
        pytest.param(None, 1, 9, 8, "holds 9 tokens, but 8 are given", id="too_few_tokens"),
        pytest.param(None, 1, 9, 10, "holds 9 tokens, but 10 are given", id="too_many_tokens"),
        pytest.param(None, 2, 9, 9, "one sequence without padding", id="batch"),
        pytest.param([0, 5], 2, 9, 9, "one sequence without padding", id="padded_batch"),
        pytest.param([5], 1, 9, 9, "one sequence without padding", id="padding"),
    ],
)
def test_what_cannot_be_saved(
    padding: list[int] | None, rows: int, fed: int, told: int, words: str, tmp_path: Path, model: Qwen
) -> None:
    cache = model.make_cache(padding)
    if fed:
        model(prompt(fed, rows), cache)
    with pytest.raises(ValueError, match=words):
        write_cache(tmp_path / "prompt.safetensors", cache, list(range(told)), MINE)
    assert os.listdir(tmp_path) == []


def test_only_an_empty_cache_is_loaded_into(saved: Saved, model: Qwen) -> None:
    path, cache, _ = saved
    before = contents(cache)
    with pytest.raises(ValueError, match="into an empty cache without padding"):
        read_cache(path, cache, MINE)
    assert same(contents(cache), before)
    with pytest.raises(ValueError, match="into an empty cache without padding"):
        read_cache(path, model.make_cache([0]), MINE)


def test_the_same_cache_gives_the_same_bytes(saved: Saved, model: Qwen, tmp_path: Path) -> None:
    again, _, _ = save(tmp_path / "again", model)
    assert again.read_bytes() == saved[0].read_bytes()


def test_a_cache_can_be_saved_loaded_and_saved(saved: Saved, model: Qwen, tmp_path: Path) -> None:
    path, _, tokens = saved
    reloaded = model.make_cache()
    read_cache(path, reloaded, MINE)
    more, _ = greedy(model, reloaded, 5, first=7)
    write_cache(tmp_path / "again", reloaded, [*tokens, 7, *more[:-1]], MINE)
    last = model.make_cache()
    assert read_cache(tmp_path / "again", last, MINE) == [*tokens, 7, *more[:-1]]
    goes_on_alike(model, last, reloaded)


def test_the_metadata_tell_a_person_what_it_is(saved: Saved) -> None:
    _, metadata = mx.load(str(saved[0]), format="safetensors", return_metadata=True)
    about = json.loads(metadata["about"])
    assert about["fingerprint"]["name"] == "mine"
    assert about["form"][3] == "KVCache of 2 heads of 64 in float32"


def test_what_a_link_leads_to_is_written(tmp_path: Path, model: Qwen) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save(tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_size > 0


def test_what_is_neither_file_nor_folder_stays_what_it_is(tmp_path: Path, model: Qwen) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PromptCacheError, match="is no file that could be replaced"):
        save(tmp_path / "pipe", model)
    assert (tmp_path / "pipe").is_fifo()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is about to put its file in place, another writes the whole of its own."""
    replace, written = Path.replace, []

    def replace_late(unfinished: Path, path: Path) -> Path:
        if not written:
            written.append(unfinished)
            save(tmp_path / "prompt", model)
        return replace(unfinished, path)

    monkeypatch.setattr(Path, "replace", replace_late)
    saved = save(tmp_path / "prompt", model)
    cache = model.make_cache()
    assert read_cache(tmp_path / "prompt", cache, MINE) == saved[2]
    assert list(tmp_path.iterdir()) == [tmp_path / "prompt"]
