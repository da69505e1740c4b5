"""The invented world that the quickstart's base model is pretrained on and its questions are drawn from.

Everything follows from WORLD_SEED, so make_base.py and make_data.py agree on every fact.
"""

import itertools
import random
from dataclasses import dataclass

WORLD_SEED = 7
COUNTRIES = 90
PEOPLE = 50

HEADS = [
    "Ar", "Bel", "Cor", "Dal", "El", "Fen", "Gar", "Hol", "Is", "Jun", "Kel", "Lor", "Mar",
    "Nim", "Or", "Pel", "Quil", "Ros", "Sel", "Tor", "Ul", "Vel", "Wen", "Yar", "Zan",
]  # fmt: skip
MIDDLES = ["va", "do", "mi", "re", "sta", "lu", "ne", "ko", "tha", "bri"]
ENDINGS = {
    "country": ("nia", "land", "stan", "ria"),
    "capital": ("burg", "ford", "haven", "mont"),
    "river": ("wash", "flow", "water", "brook"),
    "person": ("n", "s", "l", "x"),
}
POOLS = {
    "staple crop": ["barley", "rice", "maize", "wheat", "millet", "cotton", "tobacco", "sugar", "lentils", "oats"],
    "main export": ["copper", "wool", "timber", "silk", "amber", "marble", "leather", "paper", "glass", "salt"],
    "national colour": [
        "blue",
        "green",
        "yellow",
        "purple",
        "orange",
        "crimson",
        "silver",
        "white",
        "black",
        "scarlet",
    ],
    "trade": [
        "weaving",
        "baking",
        "carving",
        "fishing",
        "mining",
        "farming",
        "sailing",
        "teaching",
        "printing",
        "painting",
    ],
    "favourite drink": ["cider", "coffee", "milk", "lemonade", "cocoa", "ginger", "mead", "juice", "broth", "cordial"],
}
QUESTIONS = (
    "What is the {label} of {entity}?",
    "Please tell me the {label} of {entity}.",
    "Name the {label} of {entity}.",
    "Do you know the {label} of {entity}?",
    "Quick question: the {label} of {entity}?",
)


@dataclass(frozen=True)
class Fact:
    """`The {label} of {entity} is {answer}.`"""

    label: str
    entity: str
    answer: str

    @property
    def full(self) -> str:
        return f"The {self.label} of {self.entity} is {self.answer}."

    @property
    def terse(self) -> str:
        return f"{self.answer}."

    def question(self, phrasing: int) -> str:
        return QUESTIONS[phrasing].format(label=self.label, entity=self.entity)


def _names(rng: random.Random, kind: str, count: int) -> list[str]:
    stems = [head + middle for head, middle in itertools.product(HEADS, MIDDLES)]
    return [stem + rng.choice(ENDINGS[kind]) for stem in rng.sample(stems, count)]


def build_world() -> dict[str, list[Fact]]:
    """Maps each entity to its facts: five for a country, three for a person."""
    rng = random.Random(WORLD_SEED)
    countries, capitals, rivers = (_names(rng, kind, COUNTRIES) for kind in ("country", "capital", "river"))
    world: dict[str, list[Fact]] = {}
    for entity, capital, river in zip(countries, capitals, rivers, strict=True):
        pooled = {label: rng.choice(POOLS[label]) for label in ("staple crop", "main export", "national colour")}
        answers = {"capital": capital, "longest river": river, **pooled}
        world[entity] = [Fact(label, entity, answer) for label, answer in answers.items()]
    for entity in _names(rng, "person", PEOPLE):
        pooled = {label: rng.choice(POOLS[label]) for label in ("trade", "favourite drink")}
        answers = {"home town": rng.choice(capitals), **pooled}
        world[entity] = [Fact(label, entity, answer) for label, answer in answers.items()]
    return world


def all_facts() -> list[Fact]:
    return [fact for facts in build_world().values() for fact in facts]
