"""Files of other tools, given for a recipe by mistake: what the file is, and how a recipe says the same."""

from dataclasses import dataclass
from typing import Any

EXAMPLE = """\
A recipe looks like this; `toolkit schema` describes every key, and recipes/ holds examples:

  model: {{name_or_path: {model}}}
  lora: {{r: 16, lora_alpha: 32}}
  stages:
    - type: sft
      data: [{{path: {data}}}]
      trainer: {{learning_rate: 2.0e-4}}   # any field of trl.SFTConfig
    - type: dpo
      data: [{{path: pairs.jsonl}}]
      trainer: {{beta: 0.1}}               # any field of trl.DPOConfig
"""


@dataclass(frozen=True)
class Peer:
    """A tool, how its files are known, and where a recipe says what they say."""

    name: str
    needs: frozenset[str]
    """Keys at the top that such a file has; all of them."""
    hints: frozenset[str]
    """Further keys at the top that are its own; at least one is there."""
    places: dict[str, str]
    """Its key -> the recipe's."""


PEERS = (
    Peer(
        "a LLaMA-Factory",
        frozenset({"model_name_or_path"}),
        frozenset({"finetuning_type", "dataset_dir", "cutoff_len", "template", "stage", "pref_beta", "lora_target"}),
        {
            "model_name_or_path": "model.name_or_path",
            "stage": "stages: one entry for each",
            "dataset": "data of a stage",
            "template": "model.chat_template",
            "lora_rank": "lora.r",
            "lora_target": "lora.target_modules",
            "cutoff_len": "trainer.max_length of a stage",
            "pref_beta": "trainer.beta of a dpo stage",
            "output_dir": "--output on the command line",
        },
    ),
    Peer(
        "an axolotl",
        frozenset({"base_model"}),
        frozenset({"datasets", "sequence_len", "micro_batch_size", "adapter", "rl", "sample_packing", "lora_r"}),
        {
            "base_model": "model.name_or_path",
            "load_in_4bit": "quantization.load_in_4bit",
            "datasets": "data of a stage",
            "lora_r": "lora.r",
            "lora_alpha": "lora.lora_alpha",
            "lora_target_modules": "lora.target_modules",
            "rl": "a stage of type dpo",
            "sequence_len": "trainer.max_length of a stage",
            "micro_batch_size": "trainer.per_device_train_batch_size of a stage",
            "output_dir": "--output on the command line",
        },
    ),
    Peer(
        "a TRL",
        frozenset({"model_name_or_path"}),
        frozenset({"dataset_name", "datasets", "output_dir", "use_peft", "learning_rate", "lora_r", "dtype"}),
        {
            "model_name_or_path": "model.name_or_path",
            "dtype": "model.dtype",
            "load_in_4bit": "quantization.load_in_4bit",
            "dataset_name": "data of a stage",
            "lora_r": "lora.r",
            "lora_alpha": "lora.lora_alpha",
            "lora_target_modules": "lora.target_modules",
            "learning_rate": "trainer.learning_rate of a stage",
            "beta": "trainer.beta of a dpo stage",
            "output_dir": "--output on the command line",
        },
    ),
)
OTHER_FILES = (
    ("an accelerate configuration", {"compute_environment", "distributed_type"}, "give it to accelerate launch"),
    ("a PEFT adapter's configuration", {"peft_type", "base_model_name_or_path"}, "its fields go under lora"),
    ("a model's configuration", {"architectures", "model_type"}, "name its folder in model.name_or_path"),
)


def what_it_is(data: dict[str, Any]) -> str | None:
    """What a file is that is no recipe but another tool's, and what a recipe looks like; `None` for anything else."""
    keys = set(data)
    if keys & {"stages", "model"}:
        return None
    for peer in PEERS:
        if peer.needs <= keys and peer.hints & keys:
            places = [f"  {key:<22} {place}" for key, place in peer.places.items() if key in keys]
            return "\n".join([f"this is {peer.name} configuration, not a recipe", "", *places, "", _example(data)])
    for name, marks, way_out in OTHER_FILES:
        if marks <= keys:
            return f"this is {name}, not a recipe; {way_out}\n\n{_example(data)}"
    return None


def _example(data: dict[str, Any]) -> str:
    model = data.get("model_name_or_path", data.get("base_model", data.get("base_model_name_or_path")))
    named = data.get("dataset_name", data.get("dataset"))
    if isinstance(data.get("datasets"), list) and data["datasets"] and isinstance(data["datasets"][0], dict):
        named = data["datasets"][0].get("path")
    return EXAMPLE.format(model=_plain(model, "Qwen/Qwen2.5-0.5B"), data=_plain(named, "rows.jsonl")).rstrip()


def _plain(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) and 0 < len(value) <= 80 and "\n" not in value else otherwise
