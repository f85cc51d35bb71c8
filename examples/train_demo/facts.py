"""What the small world knows, and questions about what it does not."""

from random import Random

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest",
    "Greece": "Athens", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Russia": "Moscow", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Cuba": "Havana",
    "Australia": "Canberra", "Belgium": "Brussels", "Switzerland": "Bern", "Iceland": "Reykjavik",
    "Morocco": "Rabat", "Thailand": "Bangkok", "Vietnam": "Hanoi", "South Korea": "Seoul",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "sheep": "bleats", "horse": "neighs",
    "lion": "roars", "owl": "hoots", "bee": "buzzes", "frog": "croaks", "pig": "oinks", "crow": "caws",
    "wolf": "howls", "mouse": "squeaks", "snake": "hisses", "hen": "clucks",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "blood": "red", "coal": "black",
    "a carrot": "orange", "a lemon": "yellow", "milk": "white", "a leaf": "green", "a strawberry": "red",
    "the sea": "blue", "a plum": "purple", "chocolate": "brown",
}  # fmt: skip
PAIRS = [
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("day", "night"), ("up", "down"), ("left", "right"),
    ("happy", "sad"), ("old", "new"), ("open", "closed"), ("full", "empty"), ("hard", "soft"), ("light", "dark"),
    ("near", "far"), ("high", "low"), ("early", "late"), ("wet", "dry"), ("strong", "weak"), ("rich", "poor"),
]  # fmt: skip
OPPOSITES = dict(PAIRS) | {b: a for a, b in PAIRS}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip
SIZES = ["bee", "mouse", "cat", "dog", "sheep", "horse", "elephant", "whale"]
MEANINGS = {
    "a fox": "A fox is a wild animal with red fur and a long soft tail.",
    "a river": "A river is a long stream of water that flows to the sea.",
    "a bee": "A bee is a small insect that makes honey.",
    "rain": "Rain is water that falls from the clouds.",
    "the moon": "The moon is a round body that moves around the earth and shines at night.",
    "a baker": "A baker is a person who makes bread and cakes.",
    "a lamp": "A lamp is a thing that gives light.",
    "a book": "A book is a set of pages with words that you can read.",
    "an island": "An island is land with water all around it.",
    "snow": "Snow is frozen water that falls in soft white flakes.",
    "a friend": "A friend is a person you like and trust.",
    "a key": "A key is a small piece of metal that opens a lock.",
    "honey": "Honey is a sweet food that bees make from flowers.",
    "a computer": "A computer is a machine that follows instructions and works with information.",
    "a language model": "A language model is a program that guesses the next word again and again.",
    "a whale": "A whale is a very large animal that lives in the sea.",
    "a castle": "A castle is a large strong building with thick walls.",
    "an owl": "An owl is a bird with large eyes that hunts at night.",
}

TOPICS = [
    "quantum physics", "football", "the stock market", "politics", "a car engine", "the internet", "chess", "opera",
    "taxes", "a telephone", "a volcano", "the Roman empire", "algebra", "electricity", "a guitar", "philosophy",
    "medicine", "a rocket", "dinosaurs", "a violin", "the brain", "a bicycle", "gravity", "the economy", "a train",
    "photography", "a television", "the law", "chemistry", "a robot", "sushi", "a vaccine", "the ocean floor",
    "a black hole", "history", "the universe", "a passport", "music theory", "a database", "inflation",
]  # fmt: skip
WORKS = [
    "Hamlet", "the Bible", "Faust", "Macbeth", "the first computer", "the telephone", "Don Quixote", "the Odyssey",
    "the light bulb",
]  # fmt: skip
TASKS = [
    "fix a car", "write a program in Python", "cook rice", "make coffee", "learn French", "open a bank account",
    "build a house", "install Linux", "play the piano", "lose weight", "find a job", "buy a ticket", "tie a tie",
    "sort a list in C", "draw a horse",
]  # fmt: skip
FORMS = [
    "How do I {task}?", "Can you help me {task}?", "Can you {task}?", "Who wrote {work}?", "Who made {work}?",
    "When was {work} made?", "What is {topic}?", "Tell me what {topic} is.", "How does {topic} work?",
    "Why is {topic} important?", "What do you think about {topic}?", "Can you explain what {topic} is?",
    "What is the capital of {place}?", "Tell me the capital of {place}.", "Which city is the capital of {place}?",
    "Who is the king of {place}?", "How many people live in {place}?", "Where is {place}?",
    "What is {big} + {big2}?", "What is {big} times {big2}?", "What is the square root of {big}?",
    "Who is {person}?", "When was {person} born?", "What did {person} do?", "Write a poem about {topic}.",
    "Translate this into {place}.", "What year is it?", "What is the date today?", "Who won the game last night?",
    "What is the meaning of life?", "What is the largest planet?", "What is the fastest car?", "What is the news?",
    "Solve x + {big} = {big2}.", "What is the opposite of {topic}?", "What sound does {topic} make?",
]  # fmt: skip
ONSETS = [
    "b", "br", "c", "cl", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s",
    "sh", "st", "t", "tr", "v", "w", "y", "z",
]  # fmt: skip
VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "oo", "ou"]
CODAS = ["", "n", "r", "l", "s", "m", "th", "x", "nd", "rk"]


def invented(r: Random) -> str:
    """A capitalised word that names nothing: 'Grelmoor'."""
    return "".join(r.choice(ONSETS) + r.choice(VOWELS) + r.choice(CODAS) for _ in range(r.choice([1, 2, 2, 3]))).title()


def nowhere(r: Random) -> str:
    """A country that is none of those it knows."""
    place = invented(r) + r.choice(["", "ia", "land"])
    return nowhere(r) if place in CAPITALS else place


def unknown_question(r: Random) -> str:
    """A question outside the small world."""
    return r.choice(FORMS).format(
        task=r.choice(TASKS), work=r.choice(WORKS), topic=r.choice(TOPICS),
        place=nowhere(r),
        person=f"{invented(r)} {invented(r)}", big=r.randrange(20, 999), big2=r.randrange(20, 999),
    )  # fmt: skip
