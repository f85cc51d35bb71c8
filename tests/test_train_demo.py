"""The demo's training data: tales, facts, conversations, chat template, tokenizer and windows; one step of training."""

import calendar
import json
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import tokenizers

from qwen_mlx import load
from qwen_mlx.chat.template import render
from qwen_mlx.errors import PromptError
from tests.real_tokenizer import ADDED_SPECIAL, QWEN35_SPLIT

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "qwen_mlx" / "demo"
SCRIPTS = ROOT / "examples" / "train_demo"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(SCRIPTS))
    import facts
    import tales
    import talk
    import text

TEMPLATE = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
SHE, HE = r"\b(she|her|hers)\b", r"\b(he|him|his)\b"
TOPICS = [*talk.NAMES, *talk.ANIMALS, *talk.THINGS]


@cache
def some_tales() -> list[str]:
    return [tales.tale(Random(seed)) for seed in range(1000)]


@cache
def some_questions(kind: str) -> list[talk.Question]:
    """Enough for every question of the small kinds to be among them."""
    r = Random(kind)
    return [talk.question(r, kind) for _ in range(3000 if kind != "story" else 300)]


@cache
def some_conversations() -> list[dict]:
    return [talk.conversation(Random(seed)) for seed in range(500)]


def matching(texts: list[str], pattern: str) -> list[str]:
    return [text for text in texts if re.search(pattern, text)]


GENERATORS = {
    "tale": tales.tale,
    "question": talk.question,
    "conversation": talk.conversation,
    "unknown_question": facts.unknown_question,
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_a_seed_gives_its_text_again(make) -> None:
    one, other = Random(3), Random(3)
    assert [make(one) for _ in range(50)] == [make(other) for _ in range(50)]


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_another_seed_gives_other_texts(make) -> None:
    one, other = Random(3), Random(4)
    assert [make(one) for _ in range(50)] != [make(other) for _ in range(50)]


UNTIDY = {
    "unfilled": r"[{}]",
    "none": r"None",
    "spaces": r"  | \n|\n |^\s|\s$",
    "punctuation": r" [.,!?]|[.,!?]{2}",
    "same_word_twice": r"\b(\w+) \1\b",
    "article_before_the_wrong_noun": r"\b[Aa] (elephant|owl|otter|apple|oak|old)|\b[Aa]n (fox|bee|little|hungry|red)",
}


@pytest.mark.parametrize("pattern", UNTIDY.values(), ids=UNTIDY)
def test_tales_are_tidy(pattern: str) -> None:
    assert matching(some_tales(), pattern) == []


@pytest.mark.parametrize("pattern", list(UNTIDY.values())[:4], ids=list(UNTIDY)[:4])
@pytest.mark.parametrize("kind", talk.KINDS)
def test_questions_thoughts_and_answers_are_tidy(kind: str, pattern: str) -> None:
    texts = [text for asked in some_questions(kind) for text in (asked.text, asked.thought, *asked.answers)]
    # "3 + 4 = ?" has its space before the mark on purpose.
    assert matching([text.removesuffix(" = ?") for text in texts], pattern) == []


def test_a_paragraph_closes_its_quotes() -> None:
    paragraphs = [paragraph for tale in some_tales() for paragraph in tale.split("\n\n")]
    assert [paragraph for paragraph in paragraphs if paragraph.count('"') % 2] == []


def test_a_tale_ends_with_a_sentence() -> None:
    assert [tale for tale in some_tales() if not re.search(r'[.!?]"?$', tale)] == []


def test_a_tale_has_one_to_three_paragraphs() -> None:
    assert {tale.count("\n\n") + 1 for tale in some_tales()} == {1, 2, 3}


@pytest.mark.parametrize("about", TOPICS)
def test_a_tale_is_about_what_was_asked(about: str) -> None:
    told = [tales.tale(Random(seed), about) for seed in range(40)]
    assert matching(told, rf"\b{about}\b") == told


@pytest.mark.parametrize(("name", "wrong"), [(name, HE) for name in tales.PEOPLE["she"]] + [
    (name, SHE) for name in tales.PEOPLE["he"]
])  # fmt: skip
def test_a_named_hero_keeps_the_pronouns_of_the_name(name: str, wrong: str) -> None:
    # Friends are "the fox" throughout, so that any pronoun of a person is the hero's.
    assert matching([tales.tale(Random(seed), name).lower() for seed in range(40)], wrong) == []


def test_no_tale_mixes_she_and_he() -> None:
    assert matching(matching([tale.lower() for tale in some_tales()], SHE), HE) == []


def test_a_tale_names_one_person_at_most() -> None:
    named = [set(re.findall(rf"\b(?:{'|'.join(talk.NAMES)})\b", tale)) for tale in some_tales()]
    assert max(map(len, named)) == 1


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        ("capital", "What is the capital of Turkey?", "The capital of Turkey is Ankara."),
        ("capital", "Tell me the capital of Australia.", "The capital of Australia is Canberra."),
        ("capital", "Which city is the capital of Switzerland?", "The capital of Switzerland is Bern."),
        ("capital", "What is the capital of Morocco?", "The capital of Morocco is Rabat."),
        ("capital", "What is the capital of Canada?", "The capital of Canada is Ottawa."),
        ("sound", "What does an owl do?", "An owl hoots."),
        ("sound", "What sound does a wolf make?", "A wolf howls."),
        ("colour", "What color is snow?", "Snow is white."),
        ("colour", "What is the colour of a carrot?", "A carrot is orange."),
        ("opposite", "Tell me the opposite of early.", "The opposite of early is late."),
        ("opposite", "What is the opposite of dry?", "The opposite of dry is wet."),
        ("meaning", "What is a bee?", "A bee is a small insect that makes honey."),
        ("saying", "What is a good saying about honesty?", "It is always best to tell the truth."),
        ("introduction", "My name is Anna.", "Hello, Anna! It is nice to meet you."),
        ("liking", "Do you like mice?", "Yes, I know many stories about a mouse."),
        ("liking", "Do you like sheep?", "Yes, I know many stories about a sheep."),
        ("liking", "Do you like owls?", "Yes, I know many stories about an owl."),
        ("thanks", "Thank you!", "You are welcome!"),
        ("goodbye", "Bye!", "Goodbye! Come back soon."),
    ],
)
def test_a_known_question_has_this_answer(kind: str, question: str, answer: str) -> None:
    answers = {asked.answers for asked in some_questions(kind) if asked.text == question}
    assert len(answers) == 1
    assert answer in answers.pop()


WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
WORDS = {word: number for number, word in enumerate([*WORDS, "seventeen", "eighteen"])}


def numbers(sentence: str) -> list[int]:
    found = re.findall(rf"\b(?:\d+|{'|'.join(WORDS)})\b", sentence.lower())
    return [WORDS[number] if number in WORDS else int(number) for number in found]


@pytest.mark.parametrize("part", ["thought", "answer"])
def test_sums_are_right(part: str) -> None:
    said = {
        asked.text: asked.thought if part == "thought" else asked.answers[0]
        for asked in some_questions("add")
    }  # fmt: skip
    wrong = [(text, end) for text, end in said.items() if numbers(end) != [*numbers(text), sum(numbers(text))]]
    assert wrong == []


def test_every_pair_of_digits_is_added() -> None:
    pairs = {tuple(numbers(asked.text)) for asked in some_questions("add")}
    assert pairs == {(a, b) for a in range(10) for b in range(10)}


def test_days_and_months_follow_the_calendar() -> None:
    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    following = {
        (unit, now): f"{then} comes after {now}."
        for unit, names in (("day", days), ("month", months))
        for now, then in zip(names, [*names[1:], names[0]], strict=True)
    }
    asked = some_questions("calendar")
    found = [re.fullmatch(r"(?:What|Which) (\w+) (?:comes|is) after (\w+)\?", each.text).groups() for each in asked]
    assert {key: each.answers[0] for key, each in zip(found, asked, strict=True)} == following


def test_opposites_are_symmetric() -> None:
    said = [asked.answers[0] for asked in some_questions("opposite")]
    pairs = {re.fullmatch(r"The opposite of (\w+) is (\w+)\.", answer).groups() for answer in said}
    assert {(b, a) for a, b in pairs} == pairs
    assert len(dict(pairs)) == len(pairs)


# Kilograms of a grown animal, about.
WEIGHT = {
    "bee": 1e-4, "mouse": 0.02, "cat": 4, "dog": 25, "sheep": 70, "horse": 500, "elephant": 5000, "whale": 50000,
}  # fmt: skip


def test_the_bigger_animal_is_the_heavier() -> None:
    said = {asked.answers[0] for asked in some_questions("bigger")}
    pairs = {re.fullmatch(r"An? (\w+) is bigger than an? (\w+)\.", answer).groups() for answer in said}
    assert pairs == {(a, b) for a in WEIGHT for b in WEIGHT if WEIGHT[a] > WEIGHT[b]}


def test_the_bigger_of_two_is_one_of_the_two() -> None:
    names = "|".join(WEIGHT)
    asked = some_questions("bigger")
    wrong = [a for a in asked if sorted(re.findall(names, a.text)) != sorted(re.findall(names, a.answers[0]))]
    assert wrong == []


def test_capitals_are_one_to_one() -> None:
    said = {asked.answers[0] for asked in some_questions("capital")}
    pairs = {re.fullmatch(r"The capital of (.+) is (.+)\.", answer).groups() for answer in said}
    assert len({country for country, _ in pairs}) == len({city for _, city in pairs}) == len(pairs) > 30


def test_a_meaning_begins_with_its_word() -> None:
    forms = r"What is (.+)\?|Tell me what (.+) is\.|Can you explain what (.+) is\?"
    said = {asked.text: asked.answers[0] for asked in some_questions("meaning")}
    words = {text: next(filter(None, re.fullmatch(forms, text).groups())) for text in said}
    assert [text for text in said if not said[text].lower().startswith(words[text] + " is ")] == []


def test_a_story_is_about_the_topic_of_its_question() -> None:
    asked = [(re.search(r" about (?:an? )?(.+?)[.?]$", each.text), each.answers[0]) for each in some_questions("story")]
    topics = [(topic[1], tale) for topic, tale in asked if topic]
    assert len(topics) > 100
    assert [(topic, tale) for topic, tale in topics if topic not in tale] == []


@pytest.mark.parametrize("kind", sorted(talk.KINDS.keys() - {"unknown"}))
def test_an_unknown_question_is_of_no_known_kind(kind: str) -> None:
    known = {asked.text for asked in some_questions(kind)}
    assert known & unknown_questions() == set()


@cache
def unknown_questions() -> set[str]:
    r = Random(0)
    return {facts.unknown_question(r) for _ in range(20_000)}


def test_what_is_unknown_is_not_among_the_facts() -> None:
    known = {*talk.MEANINGS, *talk.COLOURS, *talk.OPPOSITES, *(tales.an(animal) for animal in talk.SOUNDS)}
    assert known.isdisjoint(facts.TOPICS)


def called(conversation: dict) -> list[dict]:
    return [c["function"] for m in conversation["messages"] for c in m.get("tool_calls", [])]


@pytest.mark.parametrize("wanted", [True, False])
def test_tools_are_there_as_wanted(wanted: bool) -> None:
    assert {talk.conversation(Random(seed), tools=wanted)["tools"] is not None for seed in range(100)} == {wanted}


def test_a_called_tool_was_offered() -> None:
    calls = [({t["function"]["name"] for t in c["tools"] or []}, f) for c in some_conversations() for f in called(c)]
    assert len(calls) > 30
    assert [(offered, call) for offered, call in calls if call["name"] not in offered] == []


def test_the_answer_after_a_tool_tells_its_result() -> None:
    ends = [c["messages"][-2:] for c in some_conversations() if called(c)]
    values = [(list(json.loads(tool["content"]).values()), answer["content"]) for tool, answer in ends]
    assert [(result, said) for result, said in values if not all(str(value) in said for value in result)] == []


def test_a_remembered_name_is_the_one_given() -> None:
    talks = [talk.remembered_name(Random(seed)) for seed in range(300)]
    given = [re.search(r"name is (\w+)\.", messages[0]["content"]) for messages in talks]
    expected = [f"Your name is {name[1]}." if name else "You have not told me your name." for name in given]
    assert [messages[-1]["content"] for messages in talks] == expected


def test_a_role_is_kept() -> None:
    talks = [talk.role_turns(Random(seed)) for seed in range(100)]
    assert [m[0]["content"].replace("You are", "I am") for m in talks] == [m[2]["content"] for m in talks]


# The chat template: the turns of Qwen3.5.

HELLO = {"role": "user", "content": "  Hello \n"}
HELLO_TURN = "<|im_start|>user\nHello<|im_end|>\n"
TOOL = {"type": "function", "function": {"name": "sky", "description": "<für> 天"}}
TOOL_SYSTEM = (
    "<|im_start|>system\n# Tools\n\nYou may call these functions:\n<tools>\n"
    '{"type": "function", "function": {"name": "sky", "description": "<für> 天"}}\n</tools>\n\n'
    "To call one, write:\n<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
ASK_SKY = {"name": "sky", "arguments": {"city": "Zürich", "days": [1, 2], "at": {"h": 7}, "exact": True, "unit": None}}
ASK_SKY_TEXT = (
    "<tool_call>\n<function=sky>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n"
    '<parameter=at>\n{"h": 7}\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=unit>\nNone\n'
    "</parameter>\n</function>\n</tool_call>"
)


def assistant(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def rendered(*messages: dict, **settings) -> str:
    return render(TEMPLATE, messages, **{"add_generation_prompt": False, **settings})


def reply(content: str) -> str:
    return f"<|im_start|>assistant\n{content}<|im_end|>\n"


@pytest.mark.parametrize(
    ("thinking", "opened"), [(None, EMPTY_THOUGHT), (False, EMPTY_THOUGHT), (True, "<think>\n")], ids=str
)
def test_the_demo_thinks_only_when_asked(thinking: bool | None, opened: str) -> None:
    prompt = rendered(HELLO, thinking=thinking, add_generation_prompt=True)
    assert prompt == f"{HELLO_TURN}<|im_start|>assistant\n{opened}"


SYSTEM = {"role": "system", "content": " Be brief. "}
GOLDEN = {
    "no_system_prompt_of_its_own": ([HELLO], None, HELLO_TURN),
    "system": ([SYSTEM, HELLO], None, "<|im_start|>system\nBe brief.<|im_end|>\n" + HELLO_TURN),
    "empty_system": ([{"role": "system", "content": " "}, HELLO], None, HELLO_TURN),
    "text_parts": ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], None, HELLO_TURN),
    "tools": ([HELLO], [TOOL], f"{TOOL_SYSTEM}<|im_end|>\n{HELLO_TURN}"),
    "tools_before_system": ([SYSTEM, HELLO], [TOOL], f"{TOOL_SYSTEM}\n\nBe brief.<|im_end|>\n{HELLO_TURN}"),
    "last_reasoning_stays": (
        [HELLO, assistant("Hi", reasoning_content="\nGreet.\n")],
        None,
        HELLO_TURN + reply("<think>\nGreet.\n</think>\n\nHi"),
    ),
    "no_reasoning_is_an_empty_thought": ([HELLO, assistant("Hi")], None, HELLO_TURN + reply(EMPTY_THOUGHT + "Hi")),
    "earlier_reasoning_is_dropped": (
        [HELLO, assistant("Hi", reasoning_content="Greet."), HELLO],
        None,
        HELLO_TURN + reply("Hi") + HELLO_TURN,
    ),
    "earlier_reasoning_in_the_content_is_dropped": (
        [HELLO, assistant("<think>\nGreet.\n</think>\n\nHi"), HELLO],
        None,
        HELLO_TURN + reply("Hi") + HELLO_TURN,
    ),
    "last_reasoning_in_the_content_stays": (
        [HELLO, assistant("<think>\nGreet.\n</think>\n\nHi")],
        None,
        HELLO_TURN + reply("<think>\nGreet.\n</think>\n\nHi"),
    ),
    "unclosed_thought_is_left_in": (
        [HELLO, assistant("<think>\nHm"), HELLO],
        None,
        HELLO_TURN + reply("<think>\nHm") + HELLO_TURN,
    ),
    "call": (
        [HELLO, assistant(None, tool_calls=[{"type": "function", "function": ASK_SKY}])],
        None,
        HELLO_TURN + reply(EMPTY_THOUGHT + ASK_SKY_TEXT),
    ),
    "call_without_wrapper_and_as_json_text": (
        [HELLO, assistant(None, tool_calls=[{**ASK_SKY, "arguments": json.dumps(ASK_SKY["arguments"])}])],
        None,
        HELLO_TURN + reply(EMPTY_THOUGHT + ASK_SKY_TEXT),
    ),
    "text_and_two_calls": (
        [HELLO, assistant("I look.", tool_calls=[ASK_SKY, ASK_SKY])],
        None,
        HELLO_TURN + reply(f"{EMPTY_THOUGHT}I look.\n\n{ASK_SKY_TEXT}\n{ASK_SKY_TEXT}"),
    ),
    "results_share_a_user_turn_and_reasoning_stays_in_the_loop": (
        [
            HELLO,
            assistant("Hm", reasoning_content="Look."),
            {"role": "tool", "content": " sunny\n"},
            {"role": "tool", "content": "warm"},
            assistant("Fine.", reasoning_content="Done."),
        ],
        None,
        HELLO_TURN
        + reply("<think>\nLook.\n</think>\n\nHm")
        + "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        + "<tool_response>\nwarm\n</tool_response><|im_end|>\n"
        + reply("<think>\nDone.\n</think>\n\nFine."),
    ),
    "a_written_tool_response_is_no_query": (
        [
            HELLO,
            assistant("Hm", reasoning_content="Look."),
            {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"},
        ],
        None,
        HELLO_TURN
        + reply("<think>\nLook.\n</think>\n\nHm")
        + "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n",
    ),
}


@pytest.mark.parametrize(("messages", "tools", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_template_writes(messages: list[dict], tools: list[dict] | None, expected: str) -> None:
    assert rendered(*messages, tools=tools) == expected


REFUSED = {
    "late_system": ([HELLO, SYSTEM], "The system message must be the first one"),
    "no_user": ([SYSTEM, assistant("Hi")], "There is no user message to answer"),
    "only_a_tool_response": (
        [{"role": "user", "content": "<tool_response>\n1\n</tool_response>"}],
        "There is no user message",
    ),
    "unknown_role": ([HELLO, {"role": "critic", "content": "Bad."}], 'Unknown role "critic"'),
    "image": ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "reads text only, not image"),
}


@pytest.mark.parametrize(("messages", "reason"), REFUSED.values(), ids=REFUSED)
def test_template_refuses(messages: list[dict], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        rendered(*messages)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("tools", [True, False])
def test_training_and_running_write_the_same_prompt(thinking: bool, tools: bool) -> None:
    template = text.Template()
    talks = [talk.conversation(Random(seed), tools=tools) for seed in range(60)]
    trained = [template(each, add_generation_prompt=True, enable_thinking=thinking) for each in talks]
    run = [rendered(*c["messages"], tools=c["tools"], thinking=thinking, add_generation_prompt=True) for c in talks]
    assert trained == run


@pytest.fixture(scope="module")
def committed() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def retrained() -> tokenizers.Tokenizer:
    return text.train_tokenizer(2048)


def test_the_split_is_that_of_qwen35() -> None:
    assert text.SPLIT == QWEN35_SPLIT


@pytest.mark.parametrize("which", ["committed", "retrained"])
def test_combining_marks_stay_with_their_letters(which: str, request: pytest.FixtureRequest) -> None:
    split = request.getfixturevalue(which).pre_tokenizer
    assert [span for _, span in split.pre_tokenize_str("हिन्दी 12")] == [(0, 6), (6, 7), (7, 8), (8, 9)]


@pytest.mark.parametrize("which", ["committed", "retrained"])
def test_added_tokens_come_last_in_the_order_of_qwen35(which: str, request: pytest.FixtureRequest) -> None:
    added = request.getfixturevalue(which).get_added_tokens_decoder()
    expected = [(name, special) for name, special in ADDED_SPECIAL.items() if not re.search("audio|tts", name)]
    assert {id: (token.content, token.special) for id, token in added.items()} == dict(enumerate(expected, 2022))


MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.mark.parametrize("mark", [*MARKS, "<tool_response>", "</tool_response>"])
def test_a_mark_is_one_token_amid_text(committed: tokenizers.Tokenizer, mark: str) -> None:
    around = committed.encode("a").ids
    assert committed.encode(f"a{mark}a").ids == [*around, committed.token_to_id(mark), *around]


def test_the_committed_tokenizer_was_made_this_way(
    committed: tokenizers.Tokenizer, retrained: tokenizers.Tokenizer
) -> None:
    """All but the learned merges: these follow the shares of the kinds of questions, which may change later."""
    one, other = (json.loads(each.to_str()) for each in (committed, retrained))
    for part in (one, other):
        del part["model"]["vocab"], part["model"]["merges"]
    assert one == other


def test_a_trained_tokenizer_fills_the_vocabulary(retrained: tokenizers.Tokenizer) -> None:
    assert retrained.get_vocab_size() == 2048


def test_text_comes_back_from_its_tokens(committed: tokenizers.Tokenizer) -> None:
    told = [*some_tales()[:100], *text.alice()[:100], "Ünïcode 天 🙂\r\n\t x"]
    assert [committed.decode(committed.encode(each).ids) for each in told] == told


def said(messages: list[dict], thoughts: bool) -> str:
    """What the assistant says in them, as the template writes it."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    words = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i > last:
            words += f"<think>\n{message['reasoning_content'] if thoughts else ''}\n</think>\n\n"
        words += message["content"]
        for call in message.get("tool_calls", []):
            name, city = call["function"]["name"], call["function"]["arguments"]["city"]
            words += (
                f"<tool_call>\n<function={name}>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"
            )
        words += "<|im_end|>"
    return words


@pytest.mark.parametrize("seed", range(60))
def test_the_loss_counts_what_the_assistant_says(committed: tokenizers.Tokenizer, seed: int) -> None:
    ids, mask = text.Windows(committed, seed=seed).conversation()
    counted = committed.decode([id for id, counts in zip(ids, mask, strict=True) if counts], skip_special_tokens=False)
    messages = talk.conversation(Random(seed))["messages"]  # the same draw
    assert counted in (said(messages, thoughts=True), said(messages, thoughts=False))


def test_the_loss_counts_thoughts_in_a_part_of_the_conversations(committed: tokenizers.Tokenizer) -> None:
    windows = text.Windows(committed, seed=0)
    drawn = [committed.decode(windows.conversation()[0], skip_special_tokens=False) for _ in range(300)]
    assert 0.5 < sum("<think>\n\n</think>" in each for each in drawn) / len(drawn) < 0.7


@pytest.mark.parametrize(("tales_share", "prose"), [(1.0, 0.0), (0.0, 1.0)], ids=["tale", "prose"])
def test_the_loss_counts_all_of_a_text_and_its_end(
    committed: tokenizers.Tokenizer, tales_share: float, prose: float
) -> None:
    ids, mask = text.Windows(committed, seed=0, tales=tales_share, prose=prose).document()
    assert set(mask) == {1}
    assert len(mask) == len(ids)
    assert [i for i, id in enumerate(ids) if id == committed.token_to_id("<|endoftext|>")] == [len(ids) - 1]


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 17), (2, 513)])
def test_a_batch_has_the_size_that_was_asked(committed: tokenizers.Tokenizer, rows: int, length: int) -> None:
    windows = text.Windows(committed, seed=1)
    for part in windows.batch(rows, length) + windows.batch(rows, length):
        assert [len(row) for row in part] == [length] * rows


class Counted(text.Windows):
    """Documents of seven numbers that count on."""

    count = 0

    def document(self) -> tuple[list[int], list[int]]:
        self.count += 7
        return list(range(self.count - 7, self.count)), [1] * 7


def test_a_window_goes_on_with_the_last_or_begins_with_a_document(committed: tokenizers.Tokenizer) -> None:
    windows = Counted(committed, seed=2)
    rows = [windows.row(0, 10)[0] for _ in range(400)]
    # The last token of a window is the first of the next: predicted in one, read in the other.
    on = [after[0] == before[-1] for before, after in pairwise(rows)]
    assert all(went_on or row[0] % 7 == 0 for went_on, row in zip(on, rows[1:]))
    assert 0.4 < sum(on) / len(on) < 0.6


def test_alice_is_whole_and_clean() -> None:
    paragraphs = text.alice()
    assert paragraphs[0].startswith("Alice was beginning to get very tired of sitting by her sister on the bank")
    assert paragraphs[-1].endswith("remembering her own child-life, and the happy summer days.")
    assert matching(paragraphs, r"  |\n|`|\* *\*|^$|\bCHAPTER\b|THE END") == []


def test_held_out_paragraphs_are_in_no_training_window(committed: tokenizers.Tokenizer) -> None:
    windows = text.Windows(committed, seed=0, tales=0.0, prose=1.0)
    read = "\n\n".join(committed.decode(windows.document()[0]) for _ in range(300))
    known, held_out = text.alice()[:-120], text.alice()[-120:]
    seen = [p for p in known if len(p) > 60 and p[:60] in read]
    assert len(seen) > 200
    assert [p for p in held_out if len(p) > 60 and p[:60] in read] == []


def test_train_runs_one_step_and_saves_what_load_reads(tmp_path: Path) -> None:
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="train.py needs the [train] extra")
    command = [sys.executable, SCRIPTS / "train.py", "--out", tmp_path, "--steps", "1", "--no-compile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^check step 1 loss \d\.\d+ ", (tmp_path / "log.txt").read_text(encoding="utf-8"), re.MULTILINE)
    _, tokenizer = load(str(tmp_path / "model"))
    assert len(tokenizer.encode("<|im_start|>")) == 1
