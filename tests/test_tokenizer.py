"""The tokenizer against facts from elsewhere: llama.cpp's recorded hash, tiktoken, the `tokenizers` library itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from qwen_mlx.errors import PromptError, TokenizerError
from qwen_mlx.tokenizer import Tokenizer
from tests import real_tokenizer
from tests.real_tokenizer import ADDED_SPECIAL, FIRST_ADDED_ID, QWEN2_SPLIT, QWEN35_SPLIT

FACTS = json.loads((Path(__file__).parent / "data" / "tokenizer_facts.json").read_text(encoding="utf-8"))
CHECK = FACTS["llama_cpp_check"]
TEXTS_PER_KIND = 20_000
SCRIPTS = [
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x52F),
    (0x590, 0x6FF),
    (0x900, 0xDFF),
    (0xE00, 0xE7F),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2000, 0x206F),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF),
    (0x9, 0xD),
]
"""First and last code point of ASCII, Latin, combining marks, Greek and Cyrillic, ..., emoji, white space."""


def sha256_of_ids(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real_tokenizer")
    real_tokenizer.build(folder)
    return folder


@pytest.fixture(scope="session")
def real(real_folder: Path) -> Tokenizer:
    return Tokenizer.load(real_folder)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(TEXTS_PER_KIND)]
    characters = ["".join(chr(rng.randint(*rng.choice(SCRIPTS))) for _ in range(length)) for length in lengths]
    words = [token.decode("utf-8", "ignore") for token in real_tokenizer.ranks()]
    joined = ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(TEXTS_PER_KIND)]
    return characters + joined


@pytest.fixture(scope="session")
def encoded(real: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [real.encode(text) for text in texts]


@pytest.fixture(scope="session")
def normalized(texts: list[str]) -> list[str]:
    # The library's own normalizer: Python's unicodedata knows an older Unicode.
    nfc = normalizers.NFC()
    return [nfc.normalize_str(text) for text in texts]


def test_ids_of_check_text_have_the_hash_llama_cpp_recorded_for_qwen35(real: Tokenizer) -> None:
    assert sha256_of_ids(real.encode(CHECK["text"])) == CHECK["sha256"]


def test_ids_of_the_published_example(real: Tokenizer) -> None:
    example = FACTS["readme_example"]
    assert real.encode(example["text"]) == example["ids"]


def test_ids_equal_tiktoken(encoded: list[list[int]], normalized: list[str]) -> None:
    # tiktoken gives out a whole word that stands in the table even if no merge leads to it; the Hugging Face form
    # cannot. Without these 201 tokens both must agree.
    _, unreachable = real_tokenizer.merges()
    reachable = {token: rank for token, rank in real_tokenizer.ranks().items() if token not in unreachable}
    added = {text: FIRST_ADDED_ID + i for i, text in enumerate(ADDED_SPECIAL)}
    peer = tiktoken.Encoding("qwen3.5", pat_str=QWEN35_SPLIT, mergeable_ranks=reachable, special_tokens=added)
    assert encoded == [peer.encode(text, allowed_special="all") for text in normalized]


def test_decoding_gives_back_the_normalized_text(
    real: Tokenizer, encoded: list[list[int]], normalized: list[str]
) -> None:
    assert [real.decode(ids) for ids in encoded] == normalized


@pytest.mark.parametrize(("index", "text"), list(enumerate(ADDED_SPECIAL)))
def test_added_token_is_one_id(real: Tokenizer, index: int, text: str) -> None:
    assert real.encode(f"a{text}a")[1:-1] == [FIRST_ADDED_ID + index]


def test_vocab_size_counts_added_tokens(real: Tokenizer) -> None:
    assert real.vocab_size == 248_077


def test_eos_is_the_configs(real: Tokenizer) -> None:
    assert real.eos_token_id == 248_046


def test_padding_row_decodes_to_nothing(real: Tokenizer) -> None:
    assert real.decode([248_319]) == ""


def test_nothing_is_added_around_the_text(real: Tokenizer) -> None:
    assert real.encode("") == []


@pytest.fixture(scope="session")
def qwen2_split_folder(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = tokenizers.Tokenizer.from_file(str(real_folder / "tokenizer.json"))
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    folder = tmp_path_factory.mktemp("qwen2_split")
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    return folder


@pytest.fixture(scope="session")
def with_qwen2_split(qwen2_split_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(qwen2_split_folder / "tokenizer.json"))


def test_the_qwen2_split_is_the_one_that_is_repaired(with_qwen2_split: tokenizers.Tokenizer) -> None:
    assert sha256_of_ids(with_qwen2_split.encode(CHECK["text"]).ids) == CHECK["sha256_with_qwen2_split"]


def test_qwen2_split_is_repaired_with_a_warning(qwen2_split_folder: Path) -> None:
    with pytest.warns(UserWarning, match="as Qwen2 did"):
        repaired = Tokenizer.load(qwen2_split_folder)
    assert sha256_of_ids(repaired.encode(CHECK["text"])) == CHECK["sha256"]


@pytest.mark.parametrize("text", ["ที่นี่มีน้ำ", "हिन्दी में लिखिए", "مُحَمَّدٌ"], ids=["thai", "hindi", "arabic"])
def test_combining_marks_need_the_new_split(real: Tokenizer, with_qwen2_split: tokenizers.Tokenizer, text: str) -> None:
    assert real.encode(text) != with_qwen2_split.encode(text).ids


# A vocabulary of single bytes, where every id below 256 is a byte and every sequence of bytes can be written.
SMALL_ADDED = {"<|im_end|>": True, "<think>": False, "two words": False, "漢字": False, "éé": False}
IM_END, THINK, TWO_WORDS = 256, 257, 258


def small_backend(split: str = QWEN35_SPLIT) -> tokenizers.Tokenizer:
    return real_tokenizer.backend({bytes([byte]): byte for byte in range(256)}, [], SMALL_ADDED, split=split)


SMALL = small_backend()


def save(folder: Path, backend: tokenizers.Tokenizer, config: object = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save(tmp_path_factory.mktemp("small"), small_backend()))


@pytest.mark.parametrize(
    ("skip", "text"), [(False, "a<|im_end|><think>b"), (True, "a<think>b")], ids=["all", "without_special"]
)
def test_skipping_leaves_out_special_tokens_only(small: Tokenizer, skip: bool, text: str) -> None:
    assert small.decode([ord("a"), IM_END, THINK, ord("b")], skip_special_tokens=skip) == text


@pytest.mark.parametrize("text", ["\ud800", "half \udfff"])
def test_lone_surrogate_is_refused(small: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="not"):
        small.encode(text)


def test_token_to_id_of_unknown_text(small: Tokenizer) -> None:
    assert small.token_to_id("<|nobody|>") is None


def test_token_to_id_of_added_token(small: Tokenizer) -> None:
    assert small.token_to_id("<think>") == THINK


# Bytes that begin, continue or break a character; the truth is the library's decode of the whole sequence.
LEADS_AND_CONTINUATIONS = [0x41, 0x80, 0x8F, 0x90, 0xA0, 0xBF, 0xC1, 0xC3, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xF5]
any_id = st.one_of(st.sampled_from(LEADS_AND_CONTINUATIONS), st.integers(0, 255 + len(SMALL_ADDED)), st.just(9_999))


@given(ids=st.lists(any_id, max_size=30), skip=st.booleans())
@settings(max_examples=1_000, deadline=None)
def test_pieces_add_up_to_decode(small: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = small.detokenizer(skip_special_tokens=skip)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join([*pieces, detokenizer.finish()]) == SMALL.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 248_319), max_size=30))
@settings(max_examples=300, deadline=None)
def test_pieces_add_up_to_decode_with_the_real_vocabulary(real: Tokenizer, ids: list[int]) -> None:
    detokenizer = real.detokenizer()
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join([*pieces, detokenizer.finish()]) == real.decode(ids)


@given(text=st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_after_each_byte_every_whole_character_is_out_and_no_half(small: Tokenizer, text: str) -> None:
    detokenizer = small.detokenizer()
    data = text.encode()
    said = ""
    whole = []
    for byte in data:
        said += detokenizer.add(byte)
        whole.append(said)
    assert whole == [data[: n + 1].decode(errors="ignore") for n in range(len(data))]


def test_finish_is_empty_after_a_whole_character(small: Tokenizer) -> None:
    detokenizer = small.detokenizer()
    for byte in "🦙".encode():
        detokenizer.add(byte)
    assert detokenizer.finish() == ""


def test_finish_replaces_an_incomplete_character(small: Tokenizer) -> None:
    detokenizer = small.detokenizer()
    for byte in "🦙".encode()[:3]:
        detokenizer.add(byte)
    assert detokenizer.finish() == "\ufffd"


def test_added_token_ends_an_incomplete_character(small: Tokenizer) -> None:
    detokenizer = small.detokenizer()
    detokenizer.add("é".encode()[0])
    assert detokenizer.add(TWO_WORDS) == "\ufffdtwo words"


def test_skipped_token_does_not_end_an_incomplete_character(small: Tokenizer) -> None:
    detokenizer = small.detokenizer(skip_special_tokens=True)
    lead, continuation = "é".encode()
    assert [detokenizer.add(token) for token in (lead, IM_END, continuation)] == ["", "", "é"]


def without_split(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def without_pre_tokenizer(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = None


def with_another_split(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+"), behavior="isolated")


def with_another_decoder(backend: tokenizers.Tokenizer) -> None:
    backend.decoder = decoders.WordPiece()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_split, "does not split"),
        (without_pre_tokenizer, "does not split"),
        (with_another_split, "does not split"),
        (with_another_decoder, "byte-level"),
    ],
)
def test_another_models_tokenizer_is_refused(
    tmp_path: Path, change: Callable[[tokenizers.Tokenizer], None], words: str
) -> None:
    backend = small_backend()
    change(backend)
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.load(save(tmp_path, backend))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"'])
def test_corrupt_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{"])
def test_corrupt_tokenizer_config(tmp_path: Path, content: bytes) -> None:
    (save(tmp_path, small_backend()) / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "special": True}], ids=["text", "object"])
def test_eos_may_be_text_or_object(tmp_path: Path, token: object) -> None:
    assert Tokenizer.load(save(tmp_path, small_backend(), {"eos_token": token})).eos_token_id == IM_END


def test_eos_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"</s>"):
        Tokenizer.load(save(tmp_path, small_backend(), {"eos_token": "</s>"}))


def test_special_tokens_are_those_with_a_text(tmp_path: Path) -> None:
    config = {"bos_token": None, "pad_token": "<think>", "add_bos_token": False, "model_max_length": 7}
    assert Tokenizer.load(save(tmp_path, small_backend(), config)).special_tokens == {"pad_token": "<think>"}


def test_a_tokenizer_without_config_has_no_eos(small: Tokenizer) -> None:
    assert small.eos_token_id is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
    ids=["text", "named", "no_default", "none"],
)
def test_chat_template_of_the_config(tmp_path: Path, entry: object, expected: str | None) -> None:
    assert Tokenizer.load(save(tmp_path, small_backend(), {"chat_template": entry})).chat_template == expected


def test_chat_template_file_comes_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of the file ü", encoding="utf-8")
    folder = save(tmp_path, small_backend(), {"chat_template": "of the config"})
    assert Tokenizer.load(folder).chat_template == "of the file ü"


def test_chat_template_of_a_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="chat_template"):
        Tokenizer.load(save(tmp_path, small_backend(), {"chat_template": 7}))


def test_batch_settings_of_a_training_run_are_dropped(tmp_path: Path) -> None:
    backend = small_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert Tokenizer.load(save(tmp_path, backend)).encode("abc") == [97, 98, 99]
