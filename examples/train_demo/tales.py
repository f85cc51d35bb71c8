"""Small-world English: a seeded generator of short tales.

In: a `random.Random` and, if wanted, whom or what the tale is about. Out: the text of one tale. Every sentence was
written for this project, so the data carries the project's own licence. Sentences are chosen from paraphrases and
filled from one consistent `World` (name, pronouns, friend, place, thing), so that a tiny model can learn to keep track
of who did what.
"""

PEOPLE = {
    "she": [
        "Anna",
        "Bella",
        "Clara",
        "Daisy",
        "Emma",
        "Flora",
        "Grace",
        "Holly",
        "Ivy",
        "Jane",
        "Kate",
        "Lily",
        "Mary",
        "Nina",
        "Olive",
        "Poppy",
        "Rosa",
        "Sara",
        "Tess",
        "Wendy",
    ],
    "he": [
        "Adam",
        "Ben",
        "Charlie",
        "David",
        "Edward",
        "Finn",
        "George",
        "Henry",
        "Isaac",
        "Jack",
        "Leo",
        "Max",
        "Noah",
        "Oscar",
        "Peter",
        "Robin",
        "Sam",
        "Tom",
        "Victor",
        "Will",
    ],
}
MINE = {"her": "hers", "his": "his", "its": "right"}
PRON = {"she": ("she", "her", "her"), "he": ("he", "him", "his"), "it": ("it", "it", "its")}
ANIMALS = [
    "fox",
    "rabbit",
    "bear",
    "mouse",
    "owl",
    "hedgehog",
    "squirrel",
    "frog",
    "duck",
    "cat",
    "dog",
    "lion",
    "tiger",
    "turtle",
    "goat",
    "horse",
    "sheep",
    "donkey",
    "crow",
    "wolf",
    "otter",
    "badger",
    "deer",
    "hen",
    "goose",
    "elephant",
    "monkey",
    "snail",
    "bee",
]
ADJ_CH = [
    "little",
    "clever",
    "brave",
    "shy",
    "kind",
    "curious",
    "quiet",
    "cheerful",
    "gentle",
    "young",
    "old",
    "lazy",
    "hungry",
    "proud",
]
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
    "red ball": "bounce",
    "silver key": "shine",
    "blue kite": "fly",
    "wooden boat": "float",
    "golden bell": "ring",
    "small lamp": "glow",
    "warm scarf": "flutter",
    "paper star": "sparkle",
    "green hat": "stay on",
    "old map": "unroll",
    "toy drum": "make a sound",
    "glass marble": "roll",
    "picture book": "open",
    "tin whistle": "sing",
    "little clock": "tick",
    "soft blanket": "keep warm",
    "wicker basket": "hold apples",
    "brass button": "gleam",
}
FOODS = [
    "bread",
    "apples",
    "honey",
    "soup",
    "berries",
    "cake",
    "cheese",
    "nuts",
    "pears",
    "porridge",
    "plums",
    "pancakes",
    "carrots",
    "milk",
]
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


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def cap(s):
    return s[0].upper() + s[1:]


class World:
    def __init__(self, rng, about=None):
        self.rng = rng
        r = rng.random()
        thing = about if about in THINGS else None
        if about in ANIMALS or (not about and r < 0.55) or (thing and r < 0.4):
            kind = about if about in ANIMALS else rng.choice(ANIMALS)
            self.kind = kind
            self.adj = rng.choice(ADJ_CH)
            self.name = None
            self.intro = an(f"{self.adj} {kind}")
            self.ref = f"the {kind}"
            g = rng.choice(["she", "he", "it"])
            if rng.random() < 0.4:
                g = rng.choice(["she", "he"])
                self.name = rng.choice(PEOPLE[g])
                self.intro += f" named {self.name}"
                self.ref = self.name
        else:
            g = rng.choice(["she", "he"])
            self.name = about if about in PEOPLE["she"] + PEOPLE["he"] else rng.choice(PEOPLE[g])
            if self.name in PEOPLE["she"]:
                g = "she"
            elif self.name in PEOPLE["he"]:
                g = "he"
            self.kind = "girl" if g == "she" else "boy"
            self.adj = rng.choice(ADJ_CH)
            if rng.random() < 0.25:
                self.kind = rng.choice(JOBS)
            self.intro = f"{an(self.adj + ' ' + self.kind)} named {self.name}"
            self.ref = self.name
        self.sub, self.obj, self.pos = PRON[g]
        while True:
            self.fr = rng.choice(ANIMALS)
            if self.fr != self.kind:
                break
        self.fadj = rng.choice([a for a in ADJ_CH if a != self.adj])
        self.friend = f"the {self.fr}"
        self.place, self.prep, self.spot = rng.choice(PLACES)
        self.thing = thing or rng.choice(list(THINGS))
        self.verb = THINGS[self.thing]
        self.food, self.food2 = rng.sample(FOODS, 2)

    def p(self, *options):
        return self.rng.choice(options)


def opening(w):
    A = w.intro
    return w.p(
        f"Once upon a time, there was {A} who lived {w.prep} the {w.place}.",
        f"Once there was {A}. {cap(w.sub)} lived {w.prep} the {w.place}, {w.spot}.",
        f"Once upon a time, {w.prep} the {w.place}, there lived {A}.",
        f"Long ago, {A} lived {w.prep} the {w.place}, {w.spot}.",
        f"There was once {A} who lived {w.prep} the {w.place}.",
    )


def habit(w):
    return w.p(
        f"{cap(w.sub)} loved to eat {w.food} and to play {w.spot}.",
        f"Every day {w.sub} walked {w.spot} and looked at the clouds.",
        f"{cap(w.sub)} had many friends, but {w.pos} best friend was {an(w.fadj + ' ' + w.fr)}.",
        f"Most of all, {w.sub} loved {w.pos} {w.thing}.",
        f"In the morning {w.sub} worked, and in the evening {w.sub} told stories to {w.friend}.",
        "",
    )


def t_lost(w):
    return [
        opening(w),
        habit(w),
        f"{w.p(*TIMES)}, {w.ref} could not find {w.pos} {w.thing}.",
        w.p(
            f"{cap(w.sub)} looked under the bed and behind the door, but it was not there.",
            f"{cap(w.sub)} looked here and there, but the {w.thing} was gone.",
            f"It was not in the house, and it was not {w.spot}.",
        ),
        w.p(
            f'"Where can it be?" {w.sub} said. {cap(w.sub)} felt very {w.p(*FEEL_BAD)}.',
            f'"Oh no," said {w.ref}. "I have lost my {w.thing}!"',
        ),
        w.p(f"Then {an(w.fadj + ' ' + w.fr)} came by.", f"Just then {w.pos} friend {w.friend} came along the path."),
        w.p(
            f'"Do not cry," said {w.friend}. "I will help you look for it."',
            f'"I can help you," said {w.friend}. "Let us look together."',
        ),
        w.p(f"They walked to the {w.place} and looked {w.spot}.", f"Together they looked {w.spot}."),
        w.p(
            f"There was the {w.thing}, lying in the grass!",
            f"At last {w.friend} saw something in the leaves. It was the {w.thing}!",
        ),
        w.p(
            f'"Thank you, my friend," said {w.ref}.',
            f"{cap(w.ref)} was so {w.p(*FEEL_GOOD)} that {w.sub} gave {w.friend} some {w.food}.",
        ),
        w.p(*MORALS["help"])
        if w.rng.random() < 0.5
        else w.p(
            "And they played together until the sun went down.", "From that day on, they were the best of friends."
        ),
    ]


def t_share(w):
    return [
        opening(w),
        habit(w),
        f"{w.p(*TIMES)}, {w.ref} had a big basket of {w.food}.",
        w.p(f"{cap(w.sub)} wanted to eat it all alone.", f'"This is all for me," thought {w.ref}.'),
        w.p(
            f"Then {w.friend} came to the door. {cap(w.friend)} was hungry.",
            f"On the path {w.sub} met {an('hungry ' + w.fr)}.",
        ),
        w.p(
            f'"May I have a little of your {w.food}?" asked {w.friend}.',
            f'"I have had nothing to eat today," said {w.friend}.',
        ),
        w.p(
            f"{cap(w.ref)} thought for a while. Then {w.sub} smiled.",
            f"{cap(w.ref)} looked at the basket and then at {w.friend}.",
        ),
        w.p(
            f'"Yes," {w.sub} said. "There is enough for two."',
            f'"Come and sit with me," {w.sub} said. "We will eat together."',
        ),
        w.p(f"So they sat {w.spot} and ate the {w.food}.", f"They ate and talked and laughed {w.spot}."),
        w.p(
            f"The next day, {w.friend} came back with some {w.food2} for {w.ref}.",
            f"It was the best meal that {w.ref} had ever had.",
        ),
        w.p(*MORALS["share"]),
    ]


def t_learn(w):
    s, what, tryv, done = w.p(*SKILLS)
    return [
        opening(w),
        w.p(f"{cap(w.ref)} wanted to learn to {s}.", f"More than anything, {w.ref} wished to {s}."),
        w.p(f"But {what} seemed too hard for {w.obj}.", f"But every time {w.sub} tried, it went wrong."),
        w.p(
            f'"I will never learn to {s}," {w.sub} said. {cap(w.sub)} was {w.p(*FEEL_BAD)}.',
            f'"It is too hard," said {w.ref}, and {w.sub} sat down on a stone.',
        ),
        f"{cap(an(w.fadj + ' ' + w.fr))} heard this and came closer.",
        w.p(
            f'"I can teach you," said {w.friend}. "We will begin with one small thing each day."',
            f'"You must try again," said {w.friend}. "No one can {s} on the first day."',
        ),
        w.p(f"So {w.ref} tried again. {cap(w.sub)} {tryv}.", f"Every morning {w.ref} {tryv}, and {w.friend} watched."),
        w.p(
            "Day after day, it became a little easier.",
            "After a week it was not so hard any more.",
            "It was slow, but it was better than before.",
        ),
        w.p(f"At last, {w.ref} {done}.", f"Then one day {w.ref} {done}!"),
        w.p(f'"Well done!" cried {w.friend}.', f"Everyone {w.prep} the {w.place} clapped and cheered."),
        w.p(*MORALS["try"]),
    ]


def t_storm(w):
    return [
        opening(w),
        habit(w),
        f"{w.p(*TIMES)}, dark clouds came over the {w.place}.",
        w.p(
            "The thunder was loud and the rain was cold.",
            "The wind howled and the rain fell hard.",
            "Lightning flashed across the sky.",
        ),
        w.p(f"{cap(w.ref)} was afraid, and {w.sub} ran inside.", f"{cap(w.ref)} was safe in {w.pos} warm house."),
        w.p(
            f"But then {w.sub} heard a small voice outside. It was {w.friend}.",
            f"Then {w.sub} heard someone crying. {cap(an('little ' + w.fr))} was outside in the storm.",
        ),
        w.p(f'"Help me, please," called {w.friend}. "I am lost."', f'"I cannot find my way home," said {w.friend}.'),
        w.p(
            f"{cap(w.ref)} was still afraid, but {w.sub} took a lamp and went out into the rain.",
            f"So {w.ref} was brave. {cap(w.sub)} opened the door and ran out.",
        ),
        w.p(
            f"{cap(w.sub)} found {w.friend} {w.spot} and brought {w.p('them', 'the poor animal')} home.",
            f"Holding the lamp high, {w.sub} led {w.friend} back to the house.",
        ),
        w.p(f"They sat by the fire and ate warm {w.food}.", "They drank hot milk and waited for the morning."),
        w.p(*MORALS["brave"]) if w.rng.random() < 0.6 else "In the morning, the sky was clear and blue.",
    ]


def t_race(w):
    return [
        f"{cap(an(w.fadj + ' ' + w.fr))} once laughed at {an(w.adj + ' ' + w.kind)}.",
        w.p(
            f'"How slow you are!" said {w.friend}. "I can run ten times as fast."',
            f'"You are the slowest of all," said {w.friend}.',
        ),
        w.p(
            f'"Let us have a race," said the {w.kind}. "We will run from the {w.place} to the old bridge."',
            f'"Then run with me," said the {w.kind}, "and we will see who wins."',
        ),
        w.p("All the animals came to watch.", "The owl counted to three, and the race began."),
        w.p(
            f"{cap(w.friend)} ran so far ahead that the {w.kind} could not be seen.",
            f"Soon {w.friend} was far in front.",
        ),
        w.p(
            f'"I have plenty of time," said {w.friend}, and lay down {w.spot} to sleep.',
            f"So {w.friend} stopped to eat some {w.food} and fell asleep.",
        ),
        w.p(
            f"But the {w.kind} did not stop. Step by step, {w.sub} went on.",
            f"The {w.kind} kept walking, slowly and steadily.",
        ),
        w.p(
            f"When {w.friend} woke up, it was too late.",
            f"The sun was low when {w.friend} woke up and ran as fast as possible.",
        ),
        w.p(
            f"The {w.kind} had already reached the bridge.",
            f"The {w.kind} was standing at the bridge, and everyone was cheering.",
        ),
        w.p(*MORALS["pride"], MORALS["try"][0]),
    ]


def t_greedy(w):
    return [
        f"{cap(an('greedy ' + w.fr))} found a jar of {w.food} {w.spot}.",
        w.p("The jar had a very narrow neck.", "It was a tall jar with a small opening."),
        w.p(
            f"{cap(w.friend)} reached inside and took as much as possible.",
            f"{cap(w.friend)} put one arm inside and held a great handful.",
        ),
        w.p("But the handful was too big, and it would not come out.", "But now the arm was stuck."),
        w.p(f"{cap(w.friend)} pulled and pulled and began to cry.", f'"Help! I am stuck!" cried {w.friend}.'),
        w.p(
            f"{cap(an(w.adj + ' ' + w.kind))} was passing by and saw what had happened.",
            f"{cap(an(w.adj + ' ' + w.kind))} heard the noise and came to see.",
        ),
        w.p(
            f'"Let go of half," said the {w.kind}, "and your hand will come out."',
            f'"Take only a little," said the {w.kind}, "and you will be free."',
        ),
        w.p(
            f"So {w.friend} let go of half, and at once was free.",
            f"{cap(w.friend)} did so, and it was easy after that.",
        ),
        w.p(*MORALS["greed"]),
    ]


def t_find(w):
    return [
        opening(w),
        w.p(
            f"{w.p(*TIMES)}, {w.ref} was walking {w.spot}. {w.p(*WEATHER)}.",
            f"{w.p(*TIMES)}, {w.ref} went for a walk. {w.p(*WEATHER)}.",
        ),
        w.p(f"On the ground {w.sub} saw {an(w.thing)}.", f"Under a stone {w.sub} found {an(w.thing)}."),
        w.p(
            f'"What a fine {w.thing}!" {w.sub} said. "I wonder who lost it."',
            f'"Whose {w.thing} is this?" {w.sub} asked.',
        ),
        w.p(
            f"{cap(w.sub)} wanted to keep it, but it was not {MINE[w.pos]}.",
            f"{cap(w.sub)} could have put it in {w.pos} pocket, and no one would have known.",
        ),
        w.p(f"So {w.sub} asked everyone {w.prep} the {w.place}.", f"So {w.sub} went from door to door and asked."),
        w.p(
            f'"It is not mine," said the {w.p(*JOBS)}.',
            '"I have never seen it before," said the old woman at the well.',
        ),
        w.p(
            f'"It is mine!" said {w.friend}. "I lost it three days ago."',
            f'At last {w.sub} met {an(w.fadj + " " + w.fr)}. "That is my {w.thing}!" cried {w.friend}.',
        ),
        w.p(f"{cap(w.ref)} gave it back at once.", f'"Then here it is," said {w.ref}.'),
        w.p(
            f"{cap(w.friend)} was so {w.p(*FEEL_GOOD)} that they became friends.",
            f'"You are very honest," said {w.friend}, and gave {w.ref} a jar of honey.',
        ),
        w.p(*MORALS["truth"]),
    ]


def t_gift(w):
    return [
        opening(w),
        f"Tomorrow was the birthday of {w.pos} friend {w.friend}.",
        w.p(
            f'"What shall I give to {w.friend}?" {w.sub} asked.',
            f"{cap(w.ref)} wanted to give {w.friend} something special, but {w.sub} had no money.",
        ),
        w.p(
            f"{cap(w.sub)} thought and thought. Then {w.sub} had an idea.",
            f"{cap(w.sub)} looked around the house, and then {w.sub} smiled.",
        ),
        w.p(f'"I will make {an(w.thing)}," {w.sub} said.', f"{cap(w.sub)} decided to make {an(w.thing)}."),
        w.p(
            f"{cap(w.sub)} worked all night until it could {w.verb}.",
            f"{cap(w.sub)} worked for hours, and at last it could {w.verb}.",
        ),
        w.p(
            f"In the morning, {w.sub} carried it to {w.friend}.",
            f"The next day {w.sub} went to the party with the gift.",
        ),
        w.p(f'"Did you make this for me?" asked {w.friend}.', f'"Happy birthday!" said {w.ref}.'),
        w.p(
            f'"It is the best gift of all," said {w.friend}.',
            f"{cap(w.friend)} was very {w.p(*FEEL_GOOD)} and hugged {w.obj}.",
        ),
        w.p(f"Then they ate {w.food} and danced {w.spot}.", "And they were friends for ever and ever."),
    ]


def t_seed(w):
    crop = w.p("sunflower", "apple tree", "pumpkin", "rose", "oak tree", "bean plant")
    return [
        opening(w),
        w.p(
            f"{w.p(*TIMES)}, {w.friend} gave {w.ref} a tiny seed.",
            f"{w.p(*TIMES)}, {w.sub} found a tiny seed {w.spot}.",
        ),
        w.p(
            f"{cap(w.ref)} put the seed in the earth and gave it some water.",
            f"{cap(w.sub)} made a small hole, put in the seed, and covered it up.",
        ),
        w.p("Every day it was given water, but nothing happened.", "For many days there was nothing to see."),
        w.p(f'"It will never grow," said {w.ref}.', f"{cap(w.ref)} began to feel {w.p(*FEEL_BAD)}."),
        w.p(
            f'"You must wait," said {w.friend}. "Good things take time."',
            f'"Be patient," said {w.friend}. "It is only sleeping."',
        ),
        w.p("Then one morning there was a small green leaf.", "When spring came, a small green shoot came up."),
        w.p(f"It grew and grew until it was {an(crop)}.", f"It became a fine tall {crop}, as high as the house."),
        w.p(f"Everyone came to look at the {crop}.", f"The birds came to rest on the {crop} and sing."),
        w.p(
            "Good things come to those who wait.",
            f"{cap(w.ref)} was {w.p(*FEEL_GOOD)}, and {w.sub} gave a new seed to {w.friend}.",
        ),
    ]


def t_bed(w):
    return [
        opening(w),
        f"It was late, and the moon was high over the {w.place}.",
        w.p(f"But {w.ref} could not sleep.", f"{cap(w.ref)} lay in bed with open eyes."),
        w.p(f'"Tell me a story," {w.sub} said to {w.friend}.', f'"Why can I not sleep?" {w.sub} asked {w.friend}.'),
        w.p(
            f'"I will tell you about {an(w.thing)}," said {w.friend}.',
            f'"Close your eyes," said {w.friend}, "and think about {an(w.thing)}."',
        ),
        w.p(
            f'"Far away, {w.prep} another {w.place}, there was {an(w.thing)} that could {w.verb} all night long."',
            f'"Once it began to {w.verb}, the whole {w.place} became quiet."',
        ),
        w.p(
            f"{cap(w.ref)} listened. {cap(w.pos)} eyes became heavy.", f"{cap(w.ref)} smiled and pulled up the blanket."
        ),
        w.p("Outside, the wind was soft, and the stars were bright.", "The owl called once, and the night was still."),
        w.p(f"Soon {w.ref} was fast asleep.", f'"Good night," said {w.friend}. And {w.ref} slept until the morning.'),
    ]


TYPES = [t_lost, t_share, t_learn, t_storm, t_race, t_greedy, t_find, t_gift, t_seed, t_bed]


def tale(rng, about=None):
    w = World(rng, about)
    fns = TYPES
    if about in THINGS:
        fns = [t_lost, t_find, t_gift, t_bed]
    elif about and about not in ANIMALS:
        fns = [f for f in TYPES if f not in (t_race, t_greedy)]
    parts = [s for s in rng.choice(fns)(w) if s]
    cut = sorted(rng.sample(range(2, len(parts) - 1), rng.choice([0, 1, 2])))
    paras, last = [], 0
    for c in [*cut, len(parts)]:
        paras.append(" ".join(parts[last:c]))
        last = c
    return "\n\n".join(paras)
