"""Whatever a recipe file holds: `load_recipe` returns a Recipe or raises a RecipeError, and does so soon."""

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toolkit

SECONDS = 5
GOOD: dict[str, Any] = {
    "model": {"name_or_path": "some/model", "dtype": "bfloat16", "chat_template": "chatml"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}},
    "stages": [
        {
            "name": "sft",
            "type": "sft",
            "data": [{"path": "rows.jsonl", "columns": {"prompt": "question"}, "limit": 5}],
            "trainer": {"packing": True, "max_length": 64, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        },
        {
            "type": "dpo",
            "data": "pairs.jsonl",
            "eval_data": ["held_out.jsonl"],
            "lora": {"r": 4},
            "trainer": {
                "loss_type": ["sigmoid", "sft"],
                "loss_weights": [1.0, 0.5],
                "save_steps": 0.25,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "optim": "adamw_torch",
                "report_to": ["none"],
            },
        },
    ],
    "evaluate": {"data": "questions.jsonl", "scores": {"right": {"column": "answer"}}},
    "hub": {"repo_id": "me/mine"},
    "seed": 1,
}
KEYS = sorted({"beta", "from", "adapter", "optim_args", "fp16", "", "a.b", "é", "x" * 500, *GOOD, *GOOD["model"]})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["no", "./x", "../\0", "(", "steps", "lm_head", "1e999", 10**300, -1, 0, "x" * 5000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


def answer(file: Path, *overrides: str) -> str:
    """What is said about the file; empty for a good recipe."""
    began = time.monotonic()
    try:
        toolkit.load_recipe(file, overrides)
        said = ""
    except toolkit.RecipeError as error:
        said = str(error)
        assert said
    assert time.monotonic() - began < SECONDS
    return said


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (mapping or list, key or index) in a recipe."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    inner = [place for _, item in items if isinstance(item, dict | list) for place in places(item)]
    return [(value, key) for key, _ in items] + inner


@st.composite
def mutated(draw: Any) -> dict[str, Any]:
    """The good recipe with one to four keys dropped, renamed, moved or given another value."""
    recipe = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        spots = places(recipe)
        if not spots:
            break
        inside, key = spots[draw(st.integers(0, len(spots) - 1))]
        match draw(st.sampled_from(["drop", "rename", "value", "move"])):
            case "drop":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                inside[draw(st.sampled_from(KEYS))] = inside.pop(key)
            case "move":
                target, place = spots[draw(st.integers(0, len(spots) - 1))]
                target[place] = copy.deepcopy(inside[key])
            case _:
                inside[key] = draw(VALUES)
    return recipe


def test_the_recipe_that_is_mutated_is_good(write: Any) -> None:
    assert answer(write(GOOD)) == ""


@settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=mutated())
def test_a_mutated_recipe_is_answered(recipe: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        answer(file)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet="ab1.:-?!&*<|>[]{}#'\"%@`,~ \n\t\\", max_size=60))
def test_any_text_is_answered(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(text.encode())
        assert answer(file)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.lists(st.sampled_from([*KEYS, "0", "sft", "dpo", "stages", "trainer"]), max_size=4), value=SCALARS)
def test_any_override_is_answered(path: list[str], value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(GOOD, sort_keys=False))
        answer(file, f"{'.'.join(path)}={value}")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
MERGE_BOMB = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 20)}]}}\n" for i in range(10)
)
HOSTILE = {
    "alias bomb": (BOMB, "more than 20,000 values"),
    "merge bomb": (MERGE_BOMB, "merges more than 20,000 values"),
    "an alias inside itself": ("a: &a [*a]", "recipe.yaml:1: a[0]: an alias stands inside of what it names"),
    "a mapping inside itself": ("a: &a\n  b: *a", "recipe.yaml:1: a.b: an alias stands inside of what it names"),
    "a mapping merged into itself": ("a: &a\n  <<: *a\n  b: 1", "a mapping is merged into itself"),
    "merging text": ("a:\n  <<: text", "not valid YAML"),
    "nested lists": ("a: " + "[" * 50_000, "nested too deeply"),
    "nested mappings": ("a: " + "{a: " * 20_000, "nested too deeply"),
    "nested by indentation": ("\n".join(" " * i + "a:" for i in range(600)), "nested too deeply"),
    "a long number": ("seed: " + "9" * 5000, "a number of too many digits"),
    "a long hexadecimal number": ("seed: 0x" + "f" * 5000, "a number of too many digits"),
    "a large float": ("seed: 1e999", "seed: found a number inf, expected a valid integer"),
    "a date": ("seed: 2026-11-23", "seed: found text '2026-11-23', expected a valid integer"),
    "many keys": ("".join(f"key{i}: x\n" for i in range(15_000)), "key0: unknown key"),
    "many typos": ("".join(f"stage{i}: x\n" for i in range(9_000)), "did you mean 'stages'?"),
    "many stages": ("stages:\n" + "- {}\n" * 9_000, "stages[0].type: is missing"),
    "many overlong keys": ("".join(f"{'y' * 90}{i}: x\n" for i in range(1_500)), "unknown key"),
    "a Python object": ("model: !!python/object:os.system x", "could not determine a constructor"),
    "an unknown tag": ("model: !mine x", "could not determine a constructor"),
    "binary": ("model: !!binary aGk=", "model: found bytes b'hi'"),
    "a set": ("model: !!set {a, b}", "model"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "a tab": ("model:\n\tname_or_path: x", "recipe.yaml:2:1: not valid YAML"),
    "a NUL": ("model: \0", "not valid YAML"),
    "a control character": ("model: \x07", "not valid YAML"),
    "an empty file": ("", "found nothing, expected a mapping"),
    "spaces": (" \n \n", "found nothing, expected a mapping"),
    "a list for a key": ("? [a]\n: b", "expected text"),
    "a mapping for a key": ("? {a: 1}\n: b", "not valid YAML|expected text"),
    "null for a key": ("~: b", "the key None is nothing, expected text"),
    "extends a number": ("extends: 3", "extends: found a whole number, expected the name of a recipe file"),
    "extends itself": ("extends: recipe.yaml", "extend each other in a circle"),
    "extends nothing": ("extends: nothing.yaml", "nothing.yaml: cannot be read"),
    "extends a NUL": ('extends: "a\\0b"', "cannot be read"),
    "extends a name of 5,000 letters": ("extends: " + "a" * 5000, "cannot be read"),
    "extends a device": ("extends: /dev/zero", "/dev/zero: is not a plain file"),
    "a path with a NUL": ('model: {name_or_path: "./a\\0b"}\nstages: [{type: sft, data: x}]', ""),
    "a bad regular expression": ("lora: {target_modules: '('}", "'(' is not a regular expression"),
    "a slow regular expression": ("lora: {target_modules: '(a+)+(a+)+(a+)+$'}", "is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_answered(tmp_path: Path, name: str) -> None:
    text, expected = HOSTILE[name]
    (tmp_path / "recipe.yaml").write_bytes(text.encode())
    said = answer(tmp_path / "recipe.yaml")
    assert any(part in said for part in expected.split("|")), said[:500]
    assert len(said) < 100_000


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"model:\n  name: \xff\xfe", "r.yaml:2: byte 0xff is not UTF-8"),
        ("model: x".encode("utf-16"), "r.yaml:1: byte 0xff is not UTF-8"),
        (b"x" * 10_000_000, "10,000,000 bytes; a recipe has at most 200,000"),
        (bytes(range(256)), "is not UTF-8"),
    ],
    ids=["latin", "utf-16", "10 MB", "bytes"],
)
def test_a_file_that_is_no_text_is_answered(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "r.yaml").write_bytes(raw)
    assert expected in answer(tmp_path / "r.yaml")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path, end: str, mark: bytes) -> None:
    text = "model: {name_or_path: some/model}\nstages:\n  - {type: sft, data: rows.jsonl}\nlorra: {}\n"
    (tmp_path / "r.yaml").write_bytes(mark + text.replace("\n", end).encode())
    assert "r.yaml:4: lorra: unknown key; did you mean 'lora'?" in answer(tmp_path / "r.yaml")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is a folder; expected a recipe" in answer(tmp_path)
    assert "/dev/zero: is not a plain file" in answer(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is not a plain file" in answer(tmp_path / "pipe")
    (tmp_path / "recipe.yaml").write_text("")
    assert "cannot be read (no such file or directory)" in answer(tmp_path / "recip.yaml")
    assert "did you mean 'recipe.yaml'?" in answer(tmp_path / "recip.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "cannot be read" in answer(tmp_path / "loop.yaml")
    assert "cannot be read" in answer(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: x")
    (tmp_path / "r.yaml").chmod(0)
    assert "cannot be read (permission denied)" in answer(tmp_path / "r.yaml")
