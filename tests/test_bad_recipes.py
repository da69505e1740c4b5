"""Recipes with one defect each: the first line of the file says at which line, for which key, what is answered."""

import re
from pathlib import Path

import pytest

import toolkit

FOLDER = Path(__file__).parent / "bad_recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_many() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_bad_recipe_is_answered_with_line_key_and_way_out(file: Path) -> None:
    expected = file.read_text(encoding="utf-8").splitlines()[0]
    match = re.fullmatch(r"# expect: (?P<line>\d+): (?P<key>[^ ]+: )?(?P<parts>.+)", expected)
    assert match is not None
    with pytest.raises(toolkit.RecipeError) as caught:
        toolkit.load_recipe(file)
    (problem,) = caught.value.problems  # one defect, one answer
    said = re.sub(r"^(\d+):\d+:", r"\1:", str(problem).removeprefix(f"{file}:"))  # YAML's own errors name a column too
    assert said.startswith(f"{match['line']}: {match['key'] or ''}")
    for part in match["parts"].split(" ... "):
        assert part in said
