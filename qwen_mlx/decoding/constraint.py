"""What an answer may be, as the tokens that may come next: JSON of a schema, or calls of tools.

In: the tokens of one answer, as they are chosen. Out: for each place, the tokens that keep the answer in its form. What
is thought before it is free. llguidance follows the grammar (Earley's parser over the bytes of tokens); here is what
the grammar is, and where it begins and ends. Knows neither logits nor the model.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from qwen_mlx.chat.tools import Tools, parameters_of, unreadable
from qwen_mlx.errors import SchemaError
from qwen_mlx.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# One way to set white space, as json.dumps has it: a model that is unsure may otherwise go on with it for ever.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """Follows one answer. What it was told (`observe`) is read when `allowed` is asked for: to read is to wait."""

    def __init__(self, matcher: LLMatcher, *, ends: Sequence[int], end_of_thought: int | None) -> None:
        """`ends`: the tokens that end an answer. `end_of_thought`: the one behind which the form begins, None where
        that is at once."""
        self._matcher, self._ends, self._end_of_thought = matcher, list(ends), end_of_thought
        self._unread: list[mx.array] = []
        self._ended = False

    def __copy__(self) -> Constraint:
        other = object.__new__(Constraint)
        other.__dict__ |= self.__dict__ | {"_matcher": self._matcher.deep_copy(), "_unread": [*self._unread]}
        return other

    def observe(self, tokens: mx.array) -> None:
        """tokens [m]: what comes next in the answer."""
        self._unread.append(tokens)

    def allowed(self, count: int, ahead: mx.array) -> mx.array:
        """Which of the first `count` tokens may come next, and behind each of `ahead` [k]: [k + 1, count] bool.

        Behind the end of the answer, all are. Raises SchemaError where the form is more than llguidance can follow.
        """
        for tokens in self._unread:
            for token in np.array(tokens).tolist():
                if not self._read(token):
                    raise SchemaError(f"The answer can no longer be kept to its JSON schema: {self._trouble()}.")
        self._unread = []
        rows = [self._mask(count)]
        if ahead.size:
            walker = copy.copy(self)
            for token in np.array(ahead).tolist():
                # Where a draft breaks the form, neither it nor those behind it will stand.
                walker._ended = not walker._read(token) or walker._ended
                rows.append(walker._mask(count))
        return mx.array(np.stack(rows))

    def _mask(self, count: int) -> np.ndarray:
        mask = np.ones(count, np.bool_)
        if self._end_of_thought is not None:
            mask[self._ends] = False  # a thought is not the whole answer
        elif not self._ended:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, count=count, bitorder="little").astype(np.bool_)
        return mask

    def _read(self, token: int) -> bool:
        """Whether `token` keeps to the form."""
        if self._end_of_thought is not None:
            if token == self._end_of_thought:
                self._end_of_thought = None
        elif not self._ended:
            self._ended = token in self._ends and self._matcher.is_accepting()
            return self._ended or bool(self._matcher.validate_tokens([token]) and self._matcher.consume_token(token))
        return True

    def _trouble(self) -> str:
        return self._matcher.get_error() or "every token that it allows was ruled out"


def constrain(
    tokenizer: Tokenizer, schema: Mapping[str, Any], *, tools: Tools = (), ends: Sequence[int], thinking: bool
) -> Constraint:
    """For an answer that is JSON of `schema`, or calls `tools`. Where it begins by `thinking`, that comes first.

    Raises SchemaError for a schema that cannot be kept to, naming what cannot, and without llguidance.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise SchemaError(
            'Only llguidance can keep an answer to a JSON schema: pip install "qwen-mlx[json]".'
        ) from None
    if not isinstance(schema, Mapping):
        raise SchemaError(f"A JSON schema is an object, not {schema!r}.")
    ends = [end for end in ends if 0 <= end < tokenizer.vocab_size]
    if not ends:
        raise SchemaError("The model has no token that ends an answer, so none can be kept to a JSON schema.")
    schema = {**schema, "x-guidance": _SPACES}
    vocabulary = _vocabulary(tokenizer, tuple(ends))
    end_of_thought = tokenizer.token_to_id("</think>") if thinking else None
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)  # by itself first, for its errors
        error = LLMatcher.validate_grammar(grammar, vocabulary)
        if not error:
            lark = _grammar(tokenizer, schema, tools, thinking=end_of_thought is not None)
            matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(lark), log_level=0)
            error = matcher.get_error()
    except (ValueError, RecursionError) as wrong:  # what JSON cannot say
        error = str(wrong)
    if error:
        raise SchemaError(_refusal(error))
    return Constraint(matcher, ends=ends, end_of_thought=end_of_thought)


@functools.lru_cache(maxsize=1)
def _vocabulary(tokenizer: Tokenizer, ends: tuple[int, ...]) -> LLTokenizer:
    """It takes a while for a large vocabulary, and is the same for all answers."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=list(ends))


def _grammar(tokenizer: Tokenizer, schema: Mapping[str, Any], tools: Tools, *, thinking: bool) -> str:
    """In llguidance's form of Lark. A template that closes the thought itself puts the empty line behind it, too."""
    functions = parameters_of(tools)
    lines = [
        "start: " + (r'"\n\n" ' if thinking else "") + ("(json | calls)" if functions else "json"),
        f"json: %json {json.dumps(schema)}",
    ]
    if functions:
        begin, end = (_token(tokenizer, tag) for tag in ("<tool_call>", "</tool_call>"))
        lines += [
            r'calls: call ("\n" call)*',
            rf'call: {begin} "\n" ({" | ".join(f"tool{i}" for i in range(len(functions)))}) {end}',
            r'value[suffix="\n</parameter>\n"]: /(?s:.*)/',
        ]
        for i, (name, parameters) in enumerate(functions.items()):
            if (wrong := unreadable(name, parameters)) is not None:
                raise SchemaError(f"A tool cannot be called by the name {wrong!r}: use letters, digits and _.")
            opened = [_quoted(f"<parameter={key}>\n") for key in parameters.get("properties") or {}]
            values = f"(({' | '.join(opened)}) value)*" if opened else ""
            lines.append(rf'tool{i}: {_quoted(f"<function={name}>")} "\n" {values} "</function>\n"')
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _token(tokenizer: Tokenizer, tag: str) -> str:
    token = tokenizer.token_to_id(tag)
    return _quoted(tag) if token is None else f"<[{token}]>"


def _refusal(error: str) -> str:
    if error.startswith("Unimplemented keys: "):
        names = ", ".join(json.loads(error.removeprefix("Unimplemented keys: ")))
    elif error.startswith("oneOf "):
        names = "oneOf"
    else:
        return f"An answer cannot be kept to this JSON schema: {' '.join(error.split())}"
    return f"An answer cannot be kept to {names}, which the JSON schema has: leave it out."
