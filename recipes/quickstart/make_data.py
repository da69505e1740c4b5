"""Writes the quickstart's jsonl files from the invented world of world.py; takes about a second.

sft.jsonl                  {"messages": [user, assistant]}: questions with terse or full answers, about half of each
preferences.jsonl          {"prompt", "chosen", "rejected"}: full answer chosen over terse, both right
preferences_heldout.jsonl  the same for facts found in no other file
heldout.jsonl              {"prompt", "answer"}: questions on facts found in no other file

Run from anywhere: `python make_data.py`.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from world import QUESTIONS, Fact, all_facts

SEED = 42
OUT = Path(__file__).parent
HELDOUT, PREFERENCES_HELDOUT, PREFERENCES = 100, 60, 320  # rows
# By phrasing: the style follows the wording of the question, so greedy answers come in both styles after SFT.
FULL_SHARE = (0.9, 0.9, 0.2, 0.2, 0.2)


def user(fact: Fact, phrasing: int) -> dict[str, str]:
    return {"role": "user", "content": fact.question(phrasing)}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def sft_row(rng: random.Random, fact: Fact, phrasing: int) -> dict:
    answer = fact.full if rng.random() < FULL_SHARE[phrasing] else fact.terse
    return {"messages": [user(fact, phrasing), assistant(answer)]}


def preference_row(fact: Fact, phrasing: int) -> dict:
    return {"prompt": [user(fact, phrasing)], "chosen": [assistant(fact.full)], "rejected": [assistant(fact.terse)]}


def heldout_row(fact: Fact, phrasing: int) -> dict:
    return {"prompt": [user(fact, phrasing)], "answer": fact.answer}


def phrased(rng: random.Random, facts: list[Fact]) -> list[tuple[Fact, int]]:
    """Pairs shuffled facts with phrasings, each phrasing used equally often."""
    return [(fact, index % len(QUESTIONS)) for index, fact in enumerate(rng.sample(facts, len(facts)))]


def write(name: str, rows: Iterable[dict]) -> None:
    (OUT / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    rng, facts = random.Random(SEED), all_facts()
    rng.shuffle(facts)
    cut = HELDOUT + PREFERENCES_HELDOUT
    heldout, preferences_heldout, seen = facts[:HELDOUT], facts[HELDOUT:cut], facts[cut:]
    write("sft.jsonl", (sft_row(rng, *pair) for pair in phrased(rng, seen)))
    write("preferences.jsonl", (preference_row(*pair) for pair in phrased(rng, seen)[:PREFERENCES]))
    write("preferences_heldout.jsonl", (preference_row(*pair) for pair in phrased(rng, preferences_heldout)))
    write("heldout.jsonl", (heldout_row(*pair) for pair in phrased(rng, heldout)))


if __name__ == "__main__":
    main()
