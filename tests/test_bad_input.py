"""Bad input is answered with file, line, key and the way out, exit code 2, and nothing lost."""

import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from toolkit.cli import main
from toolkit.records.rundir import storage

GOOD = """\
model:
  name_or_path: {base}
  dtype: float32
lora:
  r: 4
stages:
  - type: sft
    data: {folder}/sft.jsonl
    trainer:
      learning_rate: 1.0e-2
      save_steps: 2
      per_device_train_batch_size: 4
      gradient_checkpointing: false
  - type: dpo
    data: {folder}/dpo.jsonl
    trainer:
      beta: 0.1
"""


@pytest.fixture
def answer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `toolkit train` on the good recipe with one line replaced; return what it says on stderr."""
    write_jsonl(tmp_path / "sft.jsonl", messages(12))
    write_jsonl(tmp_path / "dpo.jsonl", pairs(12))

    def _answer(old: str, new: str, *flags: str) -> str:
        assert old in GOOD
        file = tmp_path / "recipe.yaml"
        file.write_text(GOOD.replace(old, new, 1).format(base=base, folder=tmp_path))
        assert main(["train", str(file), "--output", str(tmp_path / "run"), *flags]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.replace(f"{tmp_path}/", "")

    return _answer


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  r: 4", "  r: [4", "recipe.yaml:6:7: not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        ("lora:", "lorra:", "recipe.yaml:4: lorra: unknown key; did you mean 'lora'?"),
        ("learning_rate", "learning_rat", "recipe.yaml:10: stages[0].trainer.learning_rat: unknown key, SFTConfig has no such field; did you mean 'learning_rate'?"),
        ("beta: 0.1", "bta: 0.1", "recipe.yaml:17: stages[1].trainer.bta: unknown key, DPOConfig has no such field; did you mean 'beta'?"),
        ("  - type: dpo", "  - adapter: continue", "recipe.yaml:14: stages[1].type: is missing"),
    ],
)  # fmt: skip
def test_a_defect_in_the_recipe(answer: Any, old: str, new: str, expected: str) -> None:
    """A few, from the command line; `tests/bad_recipes` holds the others."""
    assert expected in answer(old, new)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sft.jsonl", "stf.jsonl", "recipe.yaml:8: stages[0].data[0].path: no such file: stf.jsonl; did you mean 'sft.jsonl'?"),
        ("sft.jsonl", "bad.jsonl", "recipe.yaml:8: stages[0].data[0].path: the format is not recognised; found columns foo, bar"),
        ("dpo.jsonl", "sft.jsonl", "recipe.yaml:15: stages[1].data[0].path: no column chosen, rejected; found columns messages; rename with columns:"),
        ("dpo.jsonl", "empty.jsonl", "recipe.yaml:15: stages[1].data[0].path: 'empty.jsonl'"),
        ("dpo.jsonl", "cut.jsonl", "recipe.yaml:15: stages[1].data[0].path: 'cut.jsonl' cannot be read"),
        ("dpo.jsonl", "blank.jsonl", "recipe.yaml:15: stages[1].data: no row is left to train on (1 empty answer)"),
        ("dtype: float32", "chat_template: chatm", "recipe.yaml:3: model.chat_template: no template is named 'chatm'"),
        ("r: 4", "target_modules: [q_prj]", "recipe.yaml:5: lora.target_modules: Target modules {{'q_prj'}} not found in the base model."),
        ("beta: 0.1", "report_to: clearml", "recipe.yaml:16: stages[1].trainer: ClearMLCallback requires 'clearml' to be installed"),
    ],
)  # fmt: skip
def test_a_defect_in_what_the_recipe_names(answer: Any, tmp_path: Path, old: str, new: str, expected: str) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"foo": "x", "bar": "y"}])
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "blank.jsonl", [{"prompt": "a", "chosen": " ", "rejected": "b"}])
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a", "chosen"')
    assert expected.replace("{{", "{").replace("}}", "}") in answer(old, new)
    assert not (tmp_path / "run" / "sft").exists()


def test_a_model_that_is_not_there(answer: Any) -> None:
    said = answer("name_or_path: {base}", "name_or_path: nobody/nothing")
    assert "recipe.yaml:2: model.name_or_path: no " in said


def test_conversations_need_a_chat_template(answer: Any, tmp_path: Path) -> None:
    from tests.tiny import make_base

    bare = make_base(tmp_path / "bare", chat_template=None)
    said = answer("name_or_path: {base}", f"name_or_path: {bare}")
    assert "the base's tokenizer has no chat template; set model.chat_template, as in chat_template: chatml" in said


def test_every_problem_is_said_at_once(answer: Any) -> None:
    said = answer("  dtype: float32\nlora:\n  r: 4", "  dype: float32\nlora:\n  rr: 4\nsed: 3")
    assert [line.split(": ")[1] for line in said.splitlines()[1:]] == ["model.dype", "sed", "lora.rr"]


def test_bad_input_leaves_earlier_results_alone(answer: Any, base: Path, tmp_path: Path) -> None:
    answer("lora:", "lorra:")
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD.format(base=base, folder=tmp_path))
    toolkit.train(file, output=tmp_path / "run", stage="sft")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for old, new in (("r: 4", "target_modules: [nothing]"), ("sft.jsonl", "gone.jsonl"), ("lora:", "lorra:")):
        answer(old, new)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.dop.trainer.beta=0.2", "--set stages.dop.trainer.beta=0.2: stages: nothing is named 'dop' here; found sft, dpo; did you mean 'dpo'?"),
        ("stages.dpo.trainer.bta=0.2", "stages[1].trainer.bta: unknown key, DPOConfig has no such field; did you mean 'beta'?"),
        ("seed", "expected key=value"),
        ("seed=[1", "--set seed=[1: not valid YAML: while parsing a flow sequence"),
        ("lora.init_lora_weights=pissa", "--set lora.init_lora_weights=pissa: lora.init_lora_weights: 'pissa' is not supported"),
        ("stages.5.trainer.beta=0.2", "stages: nothing is named '5' here; found sft, dpo"),
        ("model.dtype.x=1", "model.dtype: holds text, so it has no key 'x'"),
    ],
)  # fmt: skip
def test_a_bad_override(answer: Any, override: str, expected: str) -> None:
    assert expected in answer("r: 4", "r: 4", "--set", override)


def test_an_output_where_nothing_can_be_written(answer: Any) -> None:
    said = answer("r: 4", "r: 4", "--output", "/sys/run")  # not even by root
    assert said.startswith("error: /sys/run: cannot be written: ")
    assert said.endswith("; choose another directory with --output\n")


def test_too_many_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
        with (
            pytest.raises(toolkit.RunError, match=r"run: too many open files; raise `ulimit -n`"),
            storage(tmp_path / "run"),
        ):
            while True:
                opened.append((tmp_path / f"{len(opened)}").open("w"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for stream in opened:
            stream.close()


@pytest.mark.parametrize(
    ("package", "setting", "expected"),
    [
        (
            "liger_kernel",
            "use_liger_kernel: true",
            "use_liger_kernel: liger-kernel is not installed; pip install liger-kernel",
        ),
        ("torchao", "optim: adamw_torch_8bit", "You need to have `torchao"),
        ("grokadamw", "optim: grokadamw", "Please install grokadamw with `pip install grokadamw`"),
    ],
)
def test_a_package_that_the_last_stage_lacks_is_missed_before_the_first(
    answer: Any, tmp_path: Path, package: str, setting: str, expected: str
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    assert f"error: recipe.yaml:16: stages[1].trainer: {expected}" in answer("beta: 0.1", setting)
    assert not (tmp_path / "run" / "sft").exists()


def test_activations_are_not_moved_from_a_gpu_that_is_not_there(answer: Any) -> None:
    expected = (
        "error: recipe.yaml:10: stages[0].trainer.activation_offloading: moves activations from a GPU to host memory"
    )
    assert expected in answer("learning_rate: 1.0e-2", "activation_offloading: true")


@pytest.mark.parametrize("name", ["nope", "flash_attention_2"])
def test_attention_that_is_not_there_is_said(answer: Any, name: str) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    said = answer("  dtype: float32", f"  dtype: float32\n  attn_implementation: {name}")
    assert said.startswith("error: recipe.yaml:4: model.attn_implementation: ")
