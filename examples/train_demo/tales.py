"""Small-world English: a seeded generator of short tales.

In: a `random.Random` and, if wanted, whom or what the tale is about. Out: the text of one tale. Every sentence was
written for this project, so the data carries the project's own licence. Sentences are chosen from paraphrases and
filled from one consistent `World` (name, pronouns, friend, place, thing), so that a tiny model can learn to keep track
of who did what.
"""

from random import Random
from typing import Any

PEOPLE = {
    "she": [
        "Anna", "Bella", "Clara", "Daisy", "Emma", "Flora", "Grace", "Holly", "Ivy", "Jane", "Kate", "Lily", "Mary",
        "Nina", "Olive", "Poppy", "Rosa", "Sara", "Tess", "Wendy",
    ],
    "he": [
        "Adam", "Ben", "Charlie", "David", "Edward", "Finn", "George", "Henry", "Isaac", "Jack", "Leo", "Max", "Noah",
        "Oscar", "Peter", "Robin", "Sam", "Tom", "Victor", "Will",
    ],
}  # fmt: skip
# "It was not hers", but nobody writes "it was not its".
OWNED = {"her": "hers", "his": "his", "its": "right"}
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his"), "it": ("it", "it", "its")}
ANIMALS = [
    "fox", "rabbit", "bear", "mouse", "owl", "hedgehog", "squirrel", "frog", "duck", "cat", "dog", "lion", "tiger",
    "turtle", "goat", "horse", "sheep", "donkey", "crow", "wolf", "otter", "badger", "deer", "hen", "goose",
    "elephant", "monkey", "snail", "bee",
]  # fmt: skip
TEMPERS = [
    "little", "clever", "brave", "shy", "kind", "curious", "quiet", "cheerful", "gentle", "young", "old", "lazy",
    "hungry", "proud",
]  # fmt: skip
PLACES = [
    ("forest", "in", "under the tall trees"),
    ("garden", "in", "beside the roses"),
    ("village", "in", "near the old well"),
    ("valley", "in", "by the stony path"),
    ("meadow", "in", "among the yellow flowers"),
    ("farm", "on", "behind the red barn"),
    ("hill", "on", "where the wind was strong"),
    ("island", "on", "close to the sandy shore"),
    ("town", "in", "next to the bakery"),
    ("castle", "in", "below the stone tower"),
    ("harbour", "by", "near the fishing boats"),
    ("river", "by", "where the water was slow"),
    ("lake", "by", "where the reeds grew"),
    ("mill", "at", "beside the turning wheel"),
    ("beach", "on", "between the smooth rocks"),
]
THINGS = {
    "red ball": "bounce", "silver key": "shine", "blue kite": "fly", "wooden boat": "float", "golden bell": "ring",
    "small lamp": "glow", "warm scarf": "flutter", "paper star": "sparkle", "green hat": "stay on",
    "old map": "unroll", "toy drum": "make a sound", "glass marble": "roll", "picture book": "open",
    "tin whistle": "sing", "little clock": "tick", "soft blanket": "keep warm", "wicker basket": "hold apples",
    "brass button": "gleam",
}  # fmt: skip
FOODS = [
    "bread", "apples", "honey", "soup", "berries", "cake", "cheese", "nuts", "pears", "porridge", "plums", "pancakes",
    "carrots", "milk",
]  # fmt: skip
WEATHER = [
    "The sun was shining",
    "A soft rain was falling",
    "The sky was clear and blue",
    "The wind was blowing",
    "Snow lay on the ground",
    "A thick mist covered everything",
    "The air was warm",
]
TIMES = [
    "One morning",
    "One day",
    "One evening",
    "Early one morning",
    "Late one afternoon",
    "One bright spring day",
    "One cold winter day",
    "On a warm summer day",
    "One autumn afternoon",
]
JOBS = ["baker", "farmer", "miller", "teacher", "sailor", "gardener", "shepherd", "carpenter", "painter", "fisherman"]
SKILLS = [
    ("swim", "the water", "kicked and splashed", "swam all the way across the pond"),
    ("sing", "the song", "opened wide and tried", "sang the whole song without a mistake"),
    ("climb", "the apple tree", "held on tight and reached up", "climbed to the very top"),
    ("dance", "the steps", "turned and hopped", "danced until the stars came out"),
    ("read", "the long words", "looked at each letter slowly", "read a whole page aloud"),
    ("whistle", "the tune", "blew as hard as possible", "whistled like a bird"),
    ("bake", "the dough", "mixed and rolled", "baked a fine round loaf"),
    ("row", "the little boat", "pulled on the oars", "rowed to the far side of the lake"),
]
MORALS = {
    "share": [
        "A thing shared is a thing doubled.",
        "It is better to share than to keep everything.",
        "Good things are best when they are shared.",
    ],
    "help": [
        "A small kindness is never wasted.",
        "Those who help others will find help themselves.",
        "Even a small friend can be a great friend.",
    ],
    "try": [
        "Slow and steady work wins in the end.",
        "If at first you do not succeed, try again.",
        "Nothing is hard when you try every day.",
    ],
    "truth": [
        "It is always best to tell the truth.",
        "A true word is worth more than gold.",
        "An honest heart has nothing to fear.",
    ],
    "greed": [
        "Those who want everything may lose everything.",
        "Be happy with what you have.",
        "Greed makes a full basket feel empty.",
    ],
    "pride": [
        "Pride comes before a fall.",
        "Do not laugh at those who are slower than you.",
        "It is wise to be humble.",
    ],
    "brave": [
        "To be brave is to be afraid and to go on.",
        "Courage grows each time you use it.",
        "The dark is only the light asleep.",
    ],
}
FEEL_GOOD = ["happy", "glad", "proud", "pleased", "delighted", "joyful"]
FEEL_BAD = ["sad", "worried", "upset", "unhappy", "sorry"]


def an(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def cap(text: str) -> str:
    return text[0].upper() + text[1:]


class World:
    """Who and what one tale is about.

    `hero` is how the tale calls its hero, by name or by kind, and `intro` how it first speaks of them; `they`, `them`,
    `their` are the hero's pronouns, whichever they are. The friend is an animal of another kind. `prep` goes with the
    `place` ("in" the garden), `spot` lies within it, and `verb` is what the `thing` can do. `about`: a name, an animal
    or a thing that the tale must have; None leaves all to chance.
    """

    def __init__(self, rng: Random, about: str | None = None) -> None:
        self.rng = rng
        chance = rng.random()
        thing = about if about in THINGS else None
        if about in ANIMALS or (not about and chance < 0.55) or (thing and chance < 0.4):
            gender = self.choose_animal(about)
        else:
            gender = self.choose_person(about)
        self.they, self.them, self.their = PRONOUNS[gender]
        while True:
            self.friend_kind = rng.choice(ANIMALS)
            if self.friend_kind != self.kind:
                break
        friend_temper = rng.choice([temper for temper in TEMPERS if temper != self.temper])
        self.friend, self.friend_intro = f"the {self.friend_kind}", an(f"{friend_temper} {self.friend_kind}")
        self.place, self.prep, self.spot = rng.choice(PLACES)
        self.thing = thing or rng.choice(list(THINGS))
        self.verb = THINGS[self.thing]
        self.food, self.food2 = rng.sample(FOODS, 2)

    def choose_animal(self, about: str | None) -> str:
        self.kind = about if about in ANIMALS else self.rng.choice(ANIMALS)
        self.temper = self.rng.choice(TEMPERS)
        self.intro, self.hero = an(f"{self.temper} {self.kind}"), f"the {self.kind}"
        gender = self.rng.choice(["she", "he", "it"])
        if self.rng.random() < 0.4:
            gender = self.rng.choice(["she", "he"])
            self.hero = self.rng.choice(PEOPLE[gender])
            self.intro += f" named {self.hero}"
        return gender

    def choose_person(self, about: str | None) -> str:
        gender = self.rng.choice(["she", "he"])
        self.hero = about if about in PEOPLE["she"] + PEOPLE["he"] else self.rng.choice(PEOPLE[gender])
        gender = "she" if self.hero in PEOPLE["she"] else "he"
        self.kind = "girl" if gender == "she" else "boy"
        self.temper = self.rng.choice(TEMPERS)
        if self.rng.random() < 0.25:
            self.kind = self.rng.choice(JOBS)
        self.intro = f"{an(f'{self.temper} {self.kind}')} named {self.hero}"
        return gender

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)


def opening(w: World) -> str:
    return w.pick(
        f"Once upon a time, there was {w.intro} who lived {w.prep} the {w.place}.",
        f"Once there was {w.intro}. {cap(w.they)} lived {w.prep} the {w.place}, {w.spot}.",
        f"Once upon a time, {w.prep} the {w.place}, there lived {w.intro}.",
        f"Long ago, {w.intro} lived {w.prep} the {w.place}, {w.spot}.",
        f"There was once {w.intro} who lived {w.prep} the {w.place}.",
    )


def habit(w: World) -> str:
    return w.pick(
        f"{cap(w.they)} loved to eat {w.food} and to play {w.spot}.",
        f"Every day {w.they} walked {w.spot} and looked at the clouds.",
        f"{cap(w.they)} had many friends, but {w.their} best friend was {w.friend_intro}.",
        f"Most of all, {w.they} loved {w.their} {w.thing}.",
        f"In the morning {w.they} worked, and in the evening {w.they} told stories to {w.friend}.",
        "",
    )


def lost(w: World) -> list[str]:
    return [
        opening(w),
        habit(w),
        f"{w.pick(*TIMES)}, {w.hero} could not find {w.their} {w.thing}.",
        w.pick(
            f"{cap(w.they)} looked under the bed and behind the door, but it was not there.",
            f"{cap(w.they)} looked here and there, but the {w.thing} was gone.",
            f"It was not in the house, and it was not {w.spot}.",
        ),
        w.pick(
            f'"Where can it be?" {w.they} said. {cap(w.they)} felt very {w.pick(*FEEL_BAD)}.',
            f'"Oh no," said {w.hero}. "I have lost my {w.thing}!"',
        ),
        w.pick(
            f"Then {w.friend_intro} came by.",
            f"Just then {w.their} friend {w.friend} came along the path.",
        ),
        w.pick(
            f'"Do not cry," said {w.friend}. "I will help you look for it."',
            f'"I can help you," said {w.friend}. "Let us look together."',
        ),
        w.pick(f"They walked to the {w.place} and looked {w.spot}.", f"Together they looked {w.spot}."),
        w.pick(
            f"There was the {w.thing}, lying in the grass!",
            f"At last {w.friend} saw something in the leaves. It was the {w.thing}!",
        ),
        w.pick(
            f'"Thank you, my friend," said {w.hero}.',
            f"{cap(w.hero)} was so {w.pick(*FEEL_GOOD)} that {w.they} gave {w.friend} some {w.food}.",
        ),
        w.pick(*MORALS["help"])
        if w.rng.random() < 0.5
        else w.pick(
            "And they played together until the sun went down.", "From that day on, they were the best of friends."
        ),
    ]


def share(w: World) -> list[str]:
    return [
        opening(w),
        habit(w),
        f"{w.pick(*TIMES)}, {w.hero} had a big basket of {w.food}.",
        w.pick(f"{cap(w.they)} wanted to eat it all alone.", f'"This is all for me," thought {w.hero}.'),
        w.pick(
            f"Then {w.friend} came to the door. {cap(w.friend)} was hungry.",
            f"On the path {w.they} met {an('hungry ' + w.friend_kind)}.",
        ),
        w.pick(
            f'"May I have a little of your {w.food}?" asked {w.friend}.',
            f'"I have had nothing to eat today," said {w.friend}.',
        ),
        w.pick(
            f"{cap(w.hero)} thought for a while. Then {w.they} smiled.",
            f"{cap(w.hero)} looked at the basket and then at {w.friend}.",
        ),
        w.pick(
            f'"Yes," {w.they} said. "There is enough for two."',
            f'"Come and sit with me," {w.they} said. "We will eat together."',
        ),
        w.pick(f"So they sat {w.spot} and ate the {w.food}.", f"They ate and talked and laughed {w.spot}."),
        w.pick(
            f"The next day, {w.friend} came back with some {w.food2} for {w.hero}.",
            f"It was the best meal that {w.hero} had ever had.",
        ),
        w.pick(*MORALS["share"]),
    ]


def learn(w: World) -> list[str]:
    skill, what, tried, done = w.pick(*SKILLS)
    return [
        opening(w),
        w.pick(f"{cap(w.hero)} wanted to learn to {skill}.", f"More than anything, {w.hero} wished to {skill}."),
        w.pick(f"But {what} seemed too hard for {w.them}.", f"But every time {w.they} tried, it went wrong."),
        w.pick(
            f'"I will never learn to {skill}," {w.they} said. {cap(w.they)} was {w.pick(*FEEL_BAD)}.',
            f'"It is too hard," said {w.hero}, and {w.they} sat down on a stone.',
        ),
        f"{cap(w.friend_intro)} heard this and came closer.",
        w.pick(
            f'"I can teach you," said {w.friend}. "We will begin with one small thing each day."',
            f'"You must try again," said {w.friend}. "No one can {skill} on the first day."',
        ),
        w.pick(
            f"So {w.hero} tried again. {cap(w.they)} {tried}.",
            f"Every morning {w.hero} {tried}, and {w.friend} watched.",
        ),
        w.pick(
            "Day after day, it became a little easier.",
            "After a week it was not so hard any more.",
            "It was slow, but it was better than before.",
        ),
        w.pick(f"At last, {w.hero} {done}.", f"Then one day {w.hero} {done}!"),
        w.pick(f'"Well done!" cried {w.friend}.', f"Everyone {w.prep} the {w.place} clapped and cheered."),
        w.pick(*MORALS["try"]),
    ]


def storm(w: World) -> list[str]:
    return [
        opening(w),
        habit(w),
        f"{w.pick(*TIMES)}, dark clouds came over the {w.place}.",
        w.pick(
            "The thunder was loud and the rain was cold.",
            "The wind howled and the rain fell hard.",
            "Lightning flashed across the sky.",
        ),
        w.pick(
            f"{cap(w.hero)} was afraid, and {w.they} ran inside.", f"{cap(w.hero)} was safe in {w.their} warm house."
        ),
        w.pick(
            f"But then {w.they} heard a small voice outside. It was {w.friend}.",
            f"Then {w.they} heard someone crying. {cap(an('little ' + w.friend_kind))} was outside in the storm.",
        ),
        w.pick(f'"Help me, please," called {w.friend}. "I am lost."', f'"I cannot find my way home," said {w.friend}.'),
        w.pick(
            f"{cap(w.hero)} was still afraid, but {w.they} took a lamp and went out into the rain.",
            f"So {w.hero} was brave. {cap(w.they)} opened the door and ran out.",
        ),
        w.pick(
            f"{cap(w.they)} found {w.friend} {w.spot} and brought {w.pick('them', 'the poor animal')} home.",
            f"Holding the lamp high, {w.they} led {w.friend} back to the house.",
        ),
        w.pick(f"They sat by the fire and ate warm {w.food}.", "They drank hot milk and waited for the morning."),
        w.pick(*MORALS["brave"]) if w.rng.random() < 0.6 else "In the morning, the sky was clear and blue.",
    ]


def race(w: World) -> list[str]:
    return [
        f"{cap(w.friend_intro)} once laughed at {an(w.temper + ' ' + w.kind)}.",
        w.pick(
            f'"How slow you are!" said {w.friend}. "I can run ten times as fast."',
            f'"You are the slowest of all," said {w.friend}.',
        ),
        w.pick(
            f'"Let us have a race," said the {w.kind}. "We will run from the {w.place} to the old bridge."',
            f'"Then run with me," said the {w.kind}, "and we will see who wins."',
        ),
        w.pick("All the animals came to watch.", "The owl counted to three, and the race began."),
        w.pick(
            f"{cap(w.friend)} ran so far ahead that the {w.kind} could not be seen.",
            f"Soon {w.friend} was far in front.",
        ),
        w.pick(
            f'"I have plenty of time," said {w.friend}, and lay down {w.spot} to sleep.',
            f"So {w.friend} stopped to eat some {w.food} and fell asleep.",
        ),
        w.pick(
            f"But the {w.kind} did not stop. Step by step, {w.they} went on.",
            f"The {w.kind} kept walking, slowly and steadily.",
        ),
        w.pick(
            f"When {w.friend} woke up, it was too late.",
            f"The sun was low when {w.friend} woke up and ran as fast as possible.",
        ),
        w.pick(
            f"The {w.kind} had already reached the bridge.",
            f"The {w.kind} was standing at the bridge, and everyone was cheering.",
        ),
        w.pick(*MORALS["pride"], MORALS["try"][0]),
    ]


def greedy(w: World) -> list[str]:
    return [
        f"{cap(an('greedy ' + w.friend_kind))} found a jar of {w.food} {w.spot}.",
        w.pick("The jar had a very narrow neck.", "It was a tall jar with a small opening."),
        w.pick(
            f"{cap(w.friend)} reached inside and took as much as possible.",
            f"{cap(w.friend)} put one arm inside and held a great handful.",
        ),
        w.pick("But the handful was too big, and it would not come out.", "But now the arm was stuck."),
        w.pick(f"{cap(w.friend)} pulled and pulled and began to cry.", f'"Help! I am stuck!" cried {w.friend}.'),
        w.pick(
            f"{cap(an(w.temper + ' ' + w.kind))} was passing by and saw what had happened.",
            f"{cap(an(w.temper + ' ' + w.kind))} heard the noise and came to see.",
        ),
        w.pick(
            f'"Let go of half," said the {w.kind}, "and your hand will come out."',
            f'"Take only a little," said the {w.kind}, "and you will be free."',
        ),
        w.pick(
            f"So {w.friend} let go of half, and at once was free.",
            f"{cap(w.friend)} did so, and it was easy after that.",
        ),
        w.pick(*MORALS["greed"]),
    ]


def find(w: World) -> list[str]:
    return [
        opening(w),
        w.pick(
            f"{w.pick(*TIMES)}, {w.hero} was walking {w.spot}. {w.pick(*WEATHER)}.",
            f"{w.pick(*TIMES)}, {w.hero} went for a walk. {w.pick(*WEATHER)}.",
        ),
        w.pick(f"On the ground {w.they} saw {an(w.thing)}.", f"Under a stone {w.they} found {an(w.thing)}."),
        w.pick(
            f'"What a fine {w.thing}!" {w.they} said. "I wonder who lost it."',
            f'"Whose {w.thing} is this?" {w.they} asked.',
        ),
        w.pick(
            f"{cap(w.they)} wanted to keep it, but it was not {OWNED[w.their]}.",
            f"{cap(w.they)} could have put it in {w.their} pocket, and no one would have known.",
        ),
        w.pick(f"So {w.they} asked everyone {w.prep} the {w.place}.", f"So {w.they} went from door to door and asked."),
        w.pick(
            f'"It is not mine," said the {w.pick(*JOBS)}.',
            '"I have never seen it before," said the old woman at the well.',
        ),
        w.pick(
            f'"It is mine!" said {w.friend}. "I lost it three days ago."',
            f'At last {w.they} met {w.friend_intro}. "That is my {w.thing}!" cried {w.friend}.',
        ),
        w.pick(f"{cap(w.hero)} gave it back at once.", f'"Then here it is," said {w.hero}.'),
        w.pick(
            f"{cap(w.friend)} was so {w.pick(*FEEL_GOOD)} that they became friends.",
            f'"You are very honest," said {w.friend}, and gave {w.hero} a jar of honey.',
        ),
        w.pick(*MORALS["truth"]),
    ]


def gift(w: World) -> list[str]:
    return [
        opening(w),
        f"Tomorrow was the birthday of {w.their} friend {w.friend}.",
        w.pick(
            f'"What shall I give to {w.friend}?" {w.they} asked.',
            f"{cap(w.hero)} wanted to give {w.friend} something special, but {w.they} had no money.",
        ),
        w.pick(
            f"{cap(w.they)} thought and thought. Then {w.they} had an idea.",
            f"{cap(w.they)} looked around the house, and then {w.they} smiled.",
        ),
        w.pick(f'"I will make {an(w.thing)}," {w.they} said.', f"{cap(w.they)} decided to make {an(w.thing)}."),
        w.pick(
            f"{cap(w.they)} worked all night until it could {w.verb}.",
            f"{cap(w.they)} worked for hours, and at last it could {w.verb}.",
        ),
        w.pick(
            f"In the morning, {w.they} carried it to {w.friend}.",
            f"The next day {w.they} went to the party with the gift.",
        ),
        w.pick(f'"Did you make this for me?" asked {w.friend}.', f'"Happy birthday!" said {w.hero}.'),
        w.pick(
            f'"It is the best gift of all," said {w.friend}.',
            f"{cap(w.friend)} was very {w.pick(*FEEL_GOOD)} and hugged {w.them}.",
        ),
        w.pick(f"Then they ate {w.food} and danced {w.spot}.", "And they were friends for ever and ever."),
    ]


def seed(w: World) -> list[str]:
    crop = w.pick("sunflower", "apple tree", "pumpkin", "rose", "oak tree", "bean plant")
    return [
        opening(w),
        w.pick(
            f"{w.pick(*TIMES)}, {w.friend} gave {w.hero} a tiny seed.",
            f"{w.pick(*TIMES)}, {w.they} found a tiny seed {w.spot}.",
        ),
        w.pick(
            f"{cap(w.hero)} put the seed in the earth and gave it some water.",
            f"{cap(w.they)} made a small hole, put in the seed, and covered it up.",
        ),
        w.pick("Every day it was given water, but nothing happened.", "For many days there was nothing to see."),
        w.pick(f'"It will never grow," said {w.hero}.', f"{cap(w.hero)} began to feel {w.pick(*FEEL_BAD)}."),
        w.pick(
            f'"You must wait," said {w.friend}. "Good things take time."',
            f'"Be patient," said {w.friend}. "It is only sleeping."',
        ),
        w.pick("Then one morning there was a small green leaf.", "When spring came, a small green shoot came up."),
        w.pick(f"It grew and grew until it was {an(crop)}.", f"It became a fine tall {crop}, as high as the house."),
        w.pick(f"Everyone came to look at the {crop}.", f"The birds came to rest on the {crop} and sing."),
        w.pick(
            "Good things come to those who wait.",
            f"{cap(w.hero)} was {w.pick(*FEEL_GOOD)}, and {w.they} gave a new seed to {w.friend}.",
        ),
    ]


def bed(w: World) -> list[str]:
    return [
        opening(w),
        f"It was late, and the moon was high over the {w.place}.",
        w.pick(f"But {w.hero} could not sleep.", f"{cap(w.hero)} lay in bed with open eyes."),
        w.pick(
            f'"Tell me a story," {w.they} said to {w.friend}.', f'"Why can I not sleep?" {w.they} asked {w.friend}.'
        ),
        w.pick(
            f'"I will tell you about {an(w.thing)}," said {w.friend}.',
            f'"Close your eyes," said {w.friend}, "and think about {an(w.thing)}."',
        ),
        w.pick(
            f'"Far away, {w.prep} another {w.place}, there was {an(w.thing)} that could {w.verb} all night long."',
            f'"Once it began to {w.verb}, the whole {w.place} became quiet."',
        ),
        w.pick(
            f"{cap(w.hero)} listened. {cap(w.their)} eyes became heavy.",
            f"{cap(w.hero)} smiled and pulled up the blanket.",
        ),
        w.pick(
            "Outside, the wind was soft, and the stars were bright.", "The owl called once, and the night was still."
        ),
        w.pick(
            f"Soon {w.hero} was fast asleep.", f'"Good night," said {w.friend}. And {w.hero} slept until the morning.'
        ),
    ]


PLOTS = [lost, share, learn, storm, race, greedy, find, gift, seed, bed]


def tale(rng: Random, about: str | None = None) -> str:
    """One tale, in one to three paragraphs. `about`: a name, an animal or a thing that it must have."""
    plots = PLOTS
    if about in THINGS:
        plots = [lost, find, gift, bed]
    elif about and about not in ANIMALS:
        plots = [plot for plot in PLOTS if plot not in (race, greedy)]  # those two have no names
    world = World(rng, about)
    sentences = [sentence for sentence in rng.choice(plots)(world) if sentence]
    cuts = sorted(rng.sample(range(2, len(sentences) - 1), rng.choice([0, 1, 2])))
    return "\n\n".join(" ".join(sentences[a:b]) for a, b in zip([0, *cuts], [*cuts, len(sentences)]))
