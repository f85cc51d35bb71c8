"""A conversation that goes on from a prompt file."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx import Chat, load, save_prompt_cache
from qwen_mlx.cache.file import read_note
from qwen_mlx.chat.reply import Content
from qwen_mlx.decoding.reuse import PromptCache
from qwen_mlx.errors import PromptCacheError

MODEL, TOKENIZER = load("demo", dtype="float32")


def chat() -> Chat:
    return Chat(MODEL, TOKENIZER, system="Be brief.", temperature=0, max_tokens=30, speculate="off")


def said(conversation: Chat, text: str) -> str:
    return "".join(part.text for part in conversation.send(text) if isinstance(part, Content))


def test_it_goes_on_as_if_it_had_never_left(tmp_path: Path) -> None:
    first, second = chat(), chat()
    said(first, "What is the capital of France?")
    first.save(tmp_path / "talk")
    second.load(tmp_path / "talk")
    assert second.messages == first.messages
    assert said(second, "What is the capital of Italy?") == said(first, "What is the capital of Italy?")
    assert second.last is not None
    assert first.last is not None
    # All that stands before the last answer, which the template writes without its empty thought now.
    assert second.last.cached_tokens == first.last.cached_tokens > 15


def test_a_conversation_in_which_nothing_was_said_yet(tmp_path: Path) -> None:
    chat().save(tmp_path / "talk")
    again = chat()
    again.load(tmp_path / "talk")
    assert again.messages == [{"role": "system", "content": "Be brief."}]


def test_a_prompt_file_without_a_conversation_is_refused(tmp_path: Path) -> None:
    cache = MODEL.make_cache()
    tokens = TOKENIZER.encode("Once upon a time")
    known = PromptCache(tokens, cache, MODEL)
    MODEL(mx.array([tokens]), cache)
    save_prompt_cache(tmp_path / "prompt", known, MODEL, TOKENIZER)
    with pytest.raises(PromptCacheError, match="holds a prompt, and no conversation"):
        chat().load(tmp_path / "prompt")


def test_the_note_is_the_messages(tmp_path: Path) -> None:
    conversation = chat()
    said(conversation, "Who are you?")
    conversation.save(tmp_path / "talk")
    assert json.loads(read_note(tmp_path / "talk")) == {"messages": conversation.messages}


def test_a_note_of_a_file_that_changed(tmp_path: Path) -> None:
    chat().save(tmp_path / "talk")
    data = (tmp_path / "talk").read_bytes()
    (tmp_path / "talk").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PromptCacheError, match="is damaged"):
        read_note(tmp_path / "talk")
