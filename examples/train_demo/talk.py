"""Small conversations about a small world: facts, sums, tools, and what the model does not know.

In: a `random.Random`. Out: `conversation(rng)` -> {"messages": [...], "tools": [...] or None} in the form chat
templates take, reasoning included. `question(rng, kind)` gives one question with its thought and every right answer,
so that training and grading share one source.
"""

import json
from dataclasses import dataclass
from random import Random

from facts import CAPITALS, COLOURS, DAYS, MEANINGS, MONTHS, NUMBERS, OPPOSITES, SIZES, SOUNDS, unknown_question
from tales import ANIMALS, MORALS, PEOPLE, THINGS, an, cap, tale

NAMES = PEOPLE["she"] + PEOPLE["he"]
DO_NOT_KNOW = "I am sorry, I do not know that. I am only a tiny demo model."
ABOUT_ME = (
    "I am a tiny demo model with the Qwen3.5 architecture. I can tell short tales and answer a few simple questions."
)
PLURALS = {
    "fox": "foxes", "mouse": "mice", "wolf": "wolves", "goose": "geese", "sheep": "sheep", "deer": "deer",
    "donkey": "donkeys", "monkey": "monkeys", "turtle": "turtles",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    text: str
    thought: str
    answers: tuple[str, ...]  # every answer that counts as right; empty when any story will do


def capital(r: Random) -> Question:
    country = r.choice(list(CAPITALS))
    ask = r.choice(["What is the capital of {}?", "Tell me the capital of {}.", "Which city is the capital of {}?"])
    city = CAPITALS[country]
    thought = f"The user asks for the capital of {country}. It is {city}."
    return Question(ask.format(country), thought, (f"The capital of {country} is {city}.",))


def sound(r: Random) -> Question:
    animal = r.choice(list(SOUNDS))
    ask = r.choice(["What sound does {} make?", "What does {} do?"])
    thought = f"The user asks about the sound of {an(animal)}."
    return Question(ask.format(an(animal)), thought, (f"{cap(an(animal))} {SOUNDS[animal]}.",))


def colour(r: Random) -> Question:
    thing = r.choice(list(COLOURS))
    ask = r.choice(["What colour is {}?", "What is the colour of {}?", "What color is {}?"])
    return Question(
        ask.format(thing), f"The user asks about the colour of {thing}.", (f"{cap(thing)} is {COLOURS[thing]}.",)
    )


def opposite(r: Random) -> Question:
    word = r.choice(list(OPPOSITES))
    ask = r.choice(["What is the opposite of {}?", "Tell me the opposite of {}."])
    thought = f"The user wants the opposite of {word}. It is {OPPOSITES[word]}."
    return Question(ask.format(word), thought, (f"The opposite of {word} is {OPPOSITES[word]}.",))


def calendar(r: Random) -> Question:
    names, unit = r.choice([(DAYS, "day"), (MONTHS, "month")])
    i = r.randrange(len(names))
    now, after = names[i], names[(i + 1) % len(names)]
    ask = r.choice([f"What {unit} comes after {now}?", f"Which {unit} is after {now}?"])
    return Question(ask, f"After {now} comes {after}.", (f"{after} comes after {now}.",))


def add(r: Random) -> Question:
    a, b = r.randrange(10), r.randrange(10)
    if r.random() < 0.65:
        ask = r.choice([f"What is {a} + {b}?", f"{a} + {b} = ?", f"How much is {a} + {b}?"])
        return Question(ask, f"I add {a} and {b}. The sum is {a + b}.", (f"{a} + {b} = {a + b}",))
    x, y, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
    ask = r.choice([f"What is {x} plus {y}?", f"How much is {x} plus {y}?"])
    return Question(ask, f"I add {x} and {y}. The sum is {total}.", (f"{cap(x)} plus {y} is {total}.",))


def bigger(r: Random) -> Question:
    i, j = sorted(r.sample(range(len(SIZES)), 2))
    first, second = r.sample([SIZES[i], SIZES[j]], 2)
    ask = f"Which is bigger, {an(first)} or {an(second)}?"
    thought = f"I compare {an(first)} and {an(second)}."
    return Question(ask, thought, (f"{cap(an(SIZES[j]))} is bigger than {an(SIZES[i])}.",))


def meaning(r: Random) -> Question:
    word = r.choice(list(MEANINGS))
    ask = r.choice(["What is {}?", "Tell me what {} is.", "Can you explain what {} is?"])
    return Question(ask.format(word), f"The user wants to know what {word} is.", (MEANINGS[word],))


def identity(r: Random) -> Question:
    ask = r.choice(
        ["Who are you?", "What are you?", "Tell me about yourself.", "What model are you?", "Introduce yourself."]
    )
    return Question(ask, "The user asks who I am.", (ABOUT_ME,))


def abilities(r: Random) -> Question:
    ask = r.choice(["What can you do?", "How can you help me?", "Help", "help me"])
    answer = "I can tell you a story, name the capital of a country, add small numbers, or explain simple words."
    return Question(ask, "The user asks what I can do.", (answer,))


def greeting(r: Random) -> Question:
    ask = r.choice(["Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Good morning!", "Hey"])
    answers = ("Hello! How can I help you today?", "Hello! Would you like to hear a story?")
    return Question(ask, "The user says hello.", answers)


def thanks(r: Random) -> Question:
    ask = r.choice(["Thank you!", "Thanks", "Thanks!", "Thank you very much.", "That was a nice story."])
    answers = ("You are welcome!", "You are welcome! Would you like to hear another story?")
    return Question(ask, "The user is thankful.", answers)


def goodbye(r: Random) -> Question:
    ask = r.choice(["Goodbye", "Bye!", "See you later.", "Good night!"])
    return Question(ask, "The user says goodbye.", ("Goodbye! Come back soon.",))


def saying(r: Random) -> Question:
    virtue = r.choice(["honesty", "kindness", "courage", "patience", "sharing", "pride"])
    moral = {"honesty": "truth", "kindness": "help", "courage": "brave", "patience": "try", "sharing": "share"}
    ask = r.choice([f"Tell me something about {virtue}.", f"What is a good saying about {virtue}?"])
    return Question(ask, f"The user wants a saying about {virtue}.", tuple(MORALS[moral.get(virtue, virtue)]))


def introduction(r: Random) -> Question:
    name = r.choice(NAMES)
    ask = r.choice([f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}."])
    return Question(
        ask, f"The user's name is {name}.", (f"Hello, {name}! It is nice to meet you.", f"Nice to meet you, {name}!")
    )


def liking(r: Random) -> Question:
    animal = r.choice(ANIMALS)
    ask = f"Do you like {PLURALS.get(animal, animal + 's')}?"
    return Question(ask, f"The user asks if I like {an(animal)}.", (f"Yes, I know many stories about {an(animal)}.",))


def unknown(r: Random) -> Question:
    return Question(unknown_question(r), "I do not know this.", (DO_NOT_KNOW,))


def story(r: Random) -> Question:
    about = r.choice([None, r.choice(ANIMALS), r.choice(ANIMALS), r.choice(list(THINGS)), r.choice(NAMES)])
    if about is None:
        ask = r.choice(["Tell me a story.", "Write a short story.", "Can you tell me a story?", "Once upon a time"])
        return Question(ask, "The user wants a story.", (tale(r),))
    topic = about if about in NAMES else an(about)
    forms = [
        "Tell me a story about {}.", "Write a short story about {}.", "Can you tell me a story about {}?",
        "I want to hear a story about {}.", "Write a fable about {}.",
    ]  # fmt: skip
    return Question(r.choice(forms).format(topic), f"The user wants a story about {topic}.", (tale(r, about),))


FACTS = {
    "capital": capital, "sound": sound, "colour": colour, "opposite": opposite, "calendar": calendar, "add": add,
    "bigger": bigger, "meaning": meaning, "identity": identity, "abilities": abilities, "unknown": unknown,
}  # fmt: skip
MANNERS = {
    "greeting": greeting, "thanks": thanks, "goodbye": goodbye, "saying": saying, "introduction": introduction,
    "liking": liking,
}  # fmt: skip
KINDS = {**FACTS, **MANNERS, "story": story}
SHARE = {"capital": 4, "add": 20, "meaning": 2, "story": 5, "calendar": 2, "opposite": 2, "unknown": 4, "bigger": 2}


def question(r: Random, kind: str | None = None) -> Question:
    """One question of `kind`, or of a kind drawn by `SHARE`."""
    kind = kind or r.choices(list(KINDS), [SHARE.get(k, 1) for k in KINDS])[0]
    return KINDS[kind](r)


def function(name: str, description: str) -> dict:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = function("get_weather", "Get the weather in a city.")
TIME = function("get_time", "Get the time in a city.")


def tool_turns(r: Random) -> list[dict]:
    """A question that needs a tool, the call, the tool's result, and the answer made from it."""
    city = r.choice(list(CAPITALS.values()))
    if r.random() < 0.65:
        sky, degrees = r.choice(["sunny", "rainy", "cloudy", "windy", "snowy"]), r.randrange(-9, 40)
        forms = ["What is the weather in {}?", "How is the weather in {} today?", "Is it raining in {}?"]
        name, result = "get_weather", {"sky": sky, "temperature": degrees}
        answer = f"It is {sky} in {city}, and the temperature is {degrees} degrees."
        what = "weather"
    else:
        clock = f"{r.randrange(24):02d}:{r.randrange(60):02d}"
        forms = ["What time is it in {}?", "Tell me the time in {}."]
        name, result, answer, what = "get_time", {"time": clock}, f"It is {clock} in {city}.", "time"
    call = {"type": "function", "function": {"name": name, "arguments": {"city": city}}}
    return [
        {"role": "user", "content": r.choice(forms).format(city)},
        {"role": "assistant", "content": "", "tool_calls": [call],
         "reasoning_content": f"I need the {what} in {city}. I will call the tool."},
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": answer, "reasoning_content": "I have the result. I can answer now."},
    ]  # fmt: skip


def turn(text: str, thought: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer, "reasoning_content": thought},
    ]


def plain_turns(r: Random, count: int) -> list[dict]:
    messages = []
    for _ in range(count):
        asked = question(r)
        messages += turn(asked.text, asked.thought, r.choice(asked.answers))
    return messages


def remembered_name(r: Random) -> list[dict]:
    """The user's name, given (or not) some turns before it is asked for."""
    ask = r.choice(["What is my name?", "Do you know my name?"])
    if r.random() < 0.2:
        return turn(ask, "The user has not told me a name.", "You have not told me your name.")
    name = r.choice(NAMES)
    greet = r.choice([f"My name is {name}.", f"Hello, my name is {name}."])
    first = turn(greet, f"The user's name is {name}.", f"Nice to meet you, {name}!")
    return first + plain_turns(r, r.choice([0, 0, 1])) + turn(ask, f"The name is {name}.", f"Your name is {name}.")


def role_turns(r: Random) -> list[dict]:
    """A system prompt that gives the model a name, and the question for it."""
    name = r.choice(NAMES)
    trade = r.choice(["a kind storyteller", "a helpful assistant", "a wise teacher"])
    system = {"role": "system", "content": f"You are {name}, {trade}."}
    ask = r.choice(["What is your name?", "Who are you?"])
    return [system, *turn(ask, f"My name is {name}.", f"I am {name}, {trade}."), *plain_turns(r, r.choice([0, 0, 1]))]


def conversation(r: Random, *, tools: bool | None = None) -> dict:
    """One conversation. `tools`: draw one with tools (True), without (False), or by chance (None)."""
    u = r.random()
    if tools or (tools is None and u < 0.14):
        offered = r.choice([[WEATHER], [WEATHER, TIME], [TIME, WEATHER]])
        messages = tool_turns(r) if r.random() < 0.85 else plain_turns(r, 1)
        if messages[1].get("tool_calls"):
            called = messages[1]["tool_calls"][0]["function"]["name"]
            offered = offered if any(t["function"]["name"] == called for t in offered) else [TIME]
        return {"messages": messages, "tools": offered}
    if u < 0.20:
        return {"messages": role_turns(r), "tools": None}
    if u < 0.27:
        return {"messages": remembered_name(r), "tools": None}
    messages = plain_turns(r, r.choice([1, 1, 1, 1, 2, 3]))
    if r.random() < 0.15:
        orders = ["You are a helpful assistant.", "You are a kind storyteller.", "Answer in one short sentence."]
        messages = [{"role": "system", "content": r.choice(orders)}, *messages]
    return {"messages": messages, "tools": None}


if __name__ == "__main__":
    show = Random(0)
    for _ in range(12):
        print(json.dumps(conversation(show), indent=1))
