"""Answers kept to a JSON schema: what comes out validates, whatever else is asked for, and what cannot be kept to is
refused by name. The judge is jsonschema."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import Chat, PrefixStore, load, stream_generate
from qwen_mlx.chat.reply import Content, ReplySplitter
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.cli import run
from qwen_mlx.conversation import Cut
from qwen_mlx.decoding.constraint import Constraint, constrain
from qwen_mlx.decoding.drafters import MTPDrafter
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.errors import SchemaError
from qwen_mlx.generate import main
from qwen_mlx.load_mtp import load_mtp

MODEL, TOKENIZER = load("demo")
SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data/schemas.json").read_text(encoding="utf-8"))
ANIMAL = SCHEMAS["three_fields"]
ASKED = [{"role": "user", "content": "Answer in JSON."}]
ENDS = [i for i in MODEL.config.eos_token_ids if i < TOKENIZER.vocab_size]
NO_MORE = mx.array([], mx.uint32)


def answer(schema: Any, **options: Any) -> tuple[str, int]:
    """The text of a whole answer, and how many of its tokens were drafts."""
    said = list(stream_generate(MODEL, TOKENIZER, ASKED, json_schema=schema, **{"max_tokens": 400, **options}))
    assert said[-1].finish_reason == "stop"
    return "".join(each.text for each in said), said[-1].draft_tokens


def validate(text: str, schema: Any) -> None:
    judge = jsonschema.Draft202012Validator
    judge(schema, format_checker=judge.FORMAT_CHECKER).validate(json.loads(text))


def constraint(schema: Any = ANIMAL, **options: Any) -> Constraint:
    return constrain(TOKENIZER, schema, ends=ENDS, **{"thinking": False, **options})


def sampler_with(form: Constraint | None, **params: Any) -> Sampler:
    size = MODEL.config.text.vocab_size
    return Sampler(SamplingParams(**params), [], vocab_size=size, num_real_tokens=TOKENIZER.vocab_size, constraint=form)


def test_the_schemas_are_schemas() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_answer_validates(name: str) -> None:
    text, _ = answer(SCHEMAS[name], temperature=1.0, seed=1)
    validate(text, SCHEMAS[name])


def test_without_the_schema_it_would_not() -> None:
    said = "".join(each.text for each in stream_generate(MODEL, TOKENIZER, ASKED, max_tokens=40))
    with pytest.raises(json.JSONDecodeError):
        json.loads(said)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"logit_bias": {token: 50.0 for token in TOKENIZER.encode(" the fox")}},
        {"top_k": 1, "top_p": 0.1, "temperature": 1.0},
        {"top_k": 0, "top_p": 1.0, "temperature": 3.0, "seed": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_whatever_else_is_asked_for(options: dict[str, Any]) -> None:
    validate(answer(ANIMAL, **options)[0], ANIMAL)


@pytest.mark.parametrize("name", ["three_fields", "weather", "steps_of_a_plan", "linked_list"])
@pytest.mark.parametrize("speculate", ["mtp", "ngram"])
def test_drafts_change_nothing(name: str, speculate: str) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 0.5}
    plain, _ = answer(SCHEMAS[name], speculate="off", **options)
    assert answer(SCHEMAS[name], speculate=speculate, **options)[0] == plain
    validate(answer(SCHEMAS[name], speculate=speculate, temperature=1.0, num_draft_tokens=4)[0], SCHEMAS[name])


OWLS = {"type": "array", "items": {"const": "one owl sat"}, "minItems": 8, "maxItems": 8}


@pytest.mark.parametrize(("speculate", "schema"), [("mtp", ANIMAL), ("ngram", OWLS)])
def test_drafts_stand(speculate: str, schema: Any) -> None:
    text, drafted = answer(schema, speculate=speculate, temperature=0.1, seed=1)  # with a seed there are always drafts
    validate(text, schema)
    assert drafted > 4


def test_drafts_keep_to_the_form_themselves() -> None:
    """Where only digits may follow, the draft head would go on with its tale."""
    head = load_mtp(MODEL.folder, MODEL)  # type: ignore[arg-type]
    assert head is not None
    params, sizes = SamplingParams(), {"vocab_size": MODEL.config.text.vocab_size}
    drafts = {}
    for name, form in {
        "free": None,
        "digits": constraint({"type": "integer", "minimum": 10**8, "maximum": 10**9}),
    }.items():
        drafter, cache = MTPDrafter(MODEL, head), MODEL.make_cache()
        sampler = Sampler(params, [], num_real_tokens=TOKENIZER.vocab_size, constraint=form, **sizes)  # type: ignore[arg-type]
        tokens = mx.array(TOKENIZER.encode("Once upon a time"))
        drafter.take(MODEL.hidden(MODEL.embed(tokens[None]), cache), tokens[1:])
        first = mx.array(TOKENIZER.encode("5"), mx.uint32)
        sampler.observe(first)
        drafter.take(None, first)
        drafts[name] = TOKENIZER.decode(np.array(drafter.draft(sampler, 4)[0]).tolist())
    assert drafts["digits"].isdigit()
    assert len(drafts["digits"]) == 4
    assert not drafts["free"].isdigit()


def test_places_between_drafts_are_those_of_a_sampler_that_was_told_of_them() -> None:
    sampler, told = (sampler_with(constraint(), temperature=1.0, presence_penalty=1.0) for _ in range(2))
    drafts = mx.array(TOKENIZER.encode('{"name": "A'), mx.uint32)
    logits = mx.random.normal((drafts.size + 1, MODEL.config.text.vocab_size))
    places = np.array(sampler.along(drafts).processed_logits(logits))
    for i in range(drafts.size + 1):
        assert np.array_equal(places[i], np.array(told.processed_logits(logits[i : i + 1]))[0])
        if i < drafts.size:
            told.observe(drafts[i : i + 1])
    assert np.isinf(places[0]).sum() > TOKENIZER.vocab_size - 20
    assert np.array_equal(np.array(sampler.processed_logits(logits[:1]))[0], places[0])  # it has not gone along


def test_a_draft_that_breaks_the_form_is_not_allowed_and_nothing_is_asked_behind_it() -> None:
    form, wrong = constraint(), TOKENIZER.encode("Once")[0]
    rows = np.array(form.allowed(TOKENIZER.vocab_size, mx.array([wrong, wrong])))
    assert not rows[0, wrong]
    assert rows[1:].all()
    assert np.array_equal(np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE))[0], rows[0])


def test_a_copy_goes_its_own_way() -> None:
    form = constraint()
    other, first = copy.copy(form), TOKENIZER.encode('{"name')[0]
    other.observe(mx.array([first]))
    here, there = (np.array(each.allowed(TOKENIZER.vocab_size, NO_MORE))[0] for each in (form, other))
    assert here[first]
    assert not there[first]


def test_behind_the_end_all_is_allowed() -> None:
    form = constraint({"const": 1})
    form.observe(mx.array(TOKENIZER.encode("1")))
    last = np.flatnonzero(np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE)))
    assert last.tolist() == sorted(ENDS)
    form.observe(mx.array(ENDS[:1]))
    assert np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE)).all()


@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_a_thought_is_free_and_must_be_ended(speculate: str) -> None:
    text, _ = answer(ANIMAL, thinking=True, speculate=speculate, logit_bias={end: 9.0 for end in ENDS})
    thought, _, said = text.partition("</think>")
    assert thought.strip()
    assert said.startswith("\n\n{")
    validate(said, ANIMAL)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}, "times": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]


def test_tools_may_be_called_instead() -> None:
    """Their names and parameters are those there are."""
    kinds = set()
    for seed in range(8):
        options: dict[str, Any] = {"tools": TOOLS, "temperature": 2.5, "seed": seed, "max_tokens": 100}
        options["logit_bias"] = {TOKENIZER.encode("{")[0]: 5.0, TOKENIZER.encode('{"')[0]: 5.0}
        text = "".join(r.text for r in stream_generate(MODEL, TOKENIZER, ASKED, json_schema=ANIMAL, **options))
        splitter = ReplySplitter(thinking=False, tools=TOOLS)
        for part in [*splitter.feed(text), *splitter.finish()]:
            kinds.add(type(part))
            if isinstance(part, Content):
                validate(text, ANIMAL)
            elif isinstance(part, ToolCall):
                assert part.name in ("lookup", "now")
                assert set(part.arguments) <= ({"word", "times"} if part.name == "lookup" else set())
    assert {Content, ToolCall} <= kinds


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if, then"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "properties": {"deep": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}}, "oneOf"),
        ({"$defs": {"a": {"unevaluatedProperties": False}}, "$ref": "#/$defs/a"}, "unevaluatedProperties"),
        ({"type": "string", "format": "zip-code"}, "zip-code"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-ahead"),
        ({"type": "text"}, "text"),
        ({"enum": []}, "empty"),
        ({"$ref": "https://elsewhere.example/schema"}, "elsewhere"),
        (["type", "string"], "is an object"),
        ({"enum": {1, 2}}, "JSON"),
        ({"const": "\ud800"}, "kept to this JSON schema"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_cannot_be_kept_to_is_refused_by_name(schema: Any, name: str) -> None:
    read: list[int] = []
    with pytest.raises(SchemaError, match=name) as caught:
        next(
            stream_generate(MODEL, TOKENIZER, ASKED, json_schema=schema, progress=lambda done, total: read.append(done))
        )
    assert not read
    assert "\n" not in str(caught.value)


def test_a_form_that_cannot_be_followed_is_told() -> None:
    class Lost:
        def validate_tokens(self, tokens: list[int]) -> int:
            return 1

        def consume_token(self, token: int) -> bool:
            return False

        def get_error(self) -> str:
            return "Parser too complex"

        def deep_copy(self) -> "Lost":
            return self

    form = Constraint(Lost(), ends=ENDS, end_of_thought=None)  # type: ignore[arg-type]
    form.observe(mx.array([5]))
    with pytest.raises(SchemaError, match="no longer be kept to its JSON schema: Parser too complex"):
        form.allowed(TOKENIZER.vocab_size, NO_MORE)


def test_where_all_that_is_allowed_is_ruled_out_it_is_told() -> None:
    """The answer does not go on in another form."""
    form = constraint({"const": 12})
    form.observe(mx.array(TOKENIZER.encode("Once")))
    with pytest.raises(SchemaError, match="every token that it allows was ruled out"):
        form.allowed(TOKENIZER.vocab_size, NO_MORE)


def test_a_stop_string_ends_the_answer() -> None:
    text, _ = answer(ANIMAL, temperature=0.0, stop='"age"')
    assert text.startswith('{"name": ')
    assert text.endswith(", ")


def test_a_prefix_store_changes_nothing() -> None:
    store = PrefixStore(MODEL)
    first, again = (answer(ANIMAL, temperature=0.0, prefix_store=store)[0] for _ in range(2))
    assert first == again == answer(ANIMAL, temperature=0.0)[0]


def test_ends_beyond_the_vocabulary_are_none() -> None:
    form = constrain(TOKENIZER, {"const": 1}, ends=[*ENDS, TOKENIZER.vocab_size, 2**33], thinking=False)
    form.observe(mx.array(TOKENIZER.encode("1")))
    assert np.flatnonzero(np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE))).tolist() == sorted(ENDS)
    with pytest.raises(SchemaError, match="no token that ends an answer"):
        constrain(TOKENIZER, {}, ends=[2**33], thinking=False)


def test_several_replies_have_no_one_form() -> None:
    with pytest.raises(ValueError, match="follows one reply, not 2"):
        sampler_with(constraint()).observe(mx.array([1, 2], mx.uint32))


@pytest.mark.parametrize("tools", [[], [{"type": "function", "function": {"description": "nameless"}}]], ids=str)
def test_tools_that_cannot_be_called_are_none(tools: list[dict[str, Any]]) -> None:
    form = constraint({"const": 1}, tools=tools)
    assert TOKENIZER.decode(np.flatnonzero(np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE))).tolist()) == "1"


@pytest.mark.parametrize(
    ("name", "key"), [("a tool", "x"), ('a"b', "x"), ("a<b", "x"), ("", "x"), ("a", "x>y"), ("a", "x\ny")]
)
def test_a_tool_that_could_not_be_read_back_is_refused(name: str, key: str) -> None:
    parameters = {"type": "object", "properties": {key: {"type": "string"}}}
    with pytest.raises(SchemaError, match="A tool cannot be called by the name"):
        constraint(tools=[{"type": "function", "function": {"name": name, "parameters": parameters}}])


@pytest.mark.parametrize("name", ["a\\b", "größe", "find-it", "🦊", "a.b/c"])
def test_unusual_names_of_tools(name: str) -> None:
    tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {}}}}}
    form = constraint(tools=[tool])
    written = f"<tool_call>\n<function={name}>\n<parameter={name}>\n1\n</parameter>\n</function>\n</tool_call>"
    for token in TOKENIZER.encode(written):
        assert np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE))[0, token]
        form.observe(mx.array([token]))
    assert np.array(form.allowed(TOKENIZER.vocab_size, NO_MORE))[0, ENDS].all()


def test_without_llguidance_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SchemaError, match=r'pip install "qwen-mlx\[json\]"'):
        constraint()


def test_in_a_conversation_with_a_budget_of_thought() -> None:
    options: dict[str, Any] = {
        "json_schema": ANIMAL,
        "preset": "code",
        "temperature": 0.0,
    }  # a preset for thoughts only
    chat = Chat(MODEL, TOKENIZER, thinking=True, thinking_budget=3, **options)
    parts = list(chat.send("Answer in JSON."))
    assert any(isinstance(part, Cut) for part in parts)
    validate(str(chat.messages[-1]["content"]), ANIMAL)


def test_the_command_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(ANIMAL))
    main(["--model", "demo", "--prompt", "Answer in JSON.", "--json-schema", str(file)])
    validate(capsys.readouterr().out, ANIMAL)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), ("{", "is not JSON"), ('{"not": {}}', "cannot be kept to not"), ("[]", "is an object")],
)
def test_the_command_refuses_a_wrong_file(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    assert run(lambda: main(["--model", "demo", "--prompt", "Hello", "--json-schema", str(file)])) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err
