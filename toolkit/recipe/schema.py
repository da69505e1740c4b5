"""JSON Schema (draft 2020-12) of recipes: pydantic's own, and the field tables of the installed libraries.

Editors complete and check a recipe by it, from a first line such as
`# yaml-language-server: $schema=../recipe.schema.json`. Rules between fields are `load_recipe`'s alone.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from toolkit.recipe.fields import fields, trackers
from toolkit.recipe.loss_rules import DIVERGENCES, LOSS_TYPES
from toolkit.recipe.refused import LORA_REFUSED
from toolkit.recipe.sections import Recipe
from toolkit.recipe.trainer_rules import ABOVE_ZERO, BOUNDS, CONFIGS, refused

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file; keys that a recipe may not hold are absent from it."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions, top = schema["$defs"], schema["properties"]
    for stage_type, config in CONFIGS.items():
        definitions[config] = _fields(config, refused(stage_type))
    definitions["LoraConfig"] = _fields("LoraConfig", LORA_REFUSED)
    definitions["LoraConfig"]["properties"]["init_lora_weights"] |= {"enum": [True, "gaussian", "orthogonal"]}
    definitions["BitsAndBytesConfig"] = _fields("BitsAndBytesConfig", {})
    top["lora"] = _described(top["lora"], {"$ref": "#/$defs/LoraConfig"})
    top["quantization"] = _described(top["quantization"], _or_null({"$ref": "#/$defs/BitsAndBytesConfig"}))
    top["extends"] = {"type": "string", "description": "Another recipe file that this one changes; mappings merge."}
    del schema["required"]
    stage = definitions["Stage"]
    stage["required"].remove("name")  # which defaults to the type
    stage["properties"]["lora"] = _described(stage["properties"]["lora"], _or_null({"$ref": "#/$defs/LoraConfig"}))
    stage["allOf"] = [_if_type(stage_type, config) for stage_type, config in CONFIGS.items()]
    complete = [{"required": ["model", "stages"]}, {"required": ["extends"]}]
    return {"$schema": DRAFT, **schema, "title": "trl-lora-toolkit recipe", "anyOf": complete}


def schema_text() -> str:
    """The schema as it is printed, and kept in `recipes/recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _if_type(stage_type: str, config: str) -> dict[str, Any]:
    is_type = {"properties": {"type": {"const": stage_type}}, "required": ["type"]}
    properties: dict[str, Any] = {"trainer": {"$ref": f"#/$defs/{config}"}}
    if stage_type == "sft":
        properties |= {"reference": False, "prefix_sharing": False}
    return {"if": is_type, "then": {"properties": properties}}


def _fields(config: str, without: dict[str, str]) -> dict[str, Any]:
    properties = {}
    for name, known in fields(config).items():
        if name in without:
            continue
        properties[name] = TypeAdapter(known.type).json_schema() | _bounds(name) | _values(config, name)
        if known.help:
            properties[name]["description"] = known.help
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _bounds(name: str) -> dict[str, Any]:
    if name in ABOVE_ZERO:
        return {"exclusiveMinimum": 0}
    return {"minimum": BOUNDS[name][0]} if name in BOUNDS else {}


def _values(config: str, name: str) -> dict[str, Any]:
    match config, name:
        case "DPOConfig", "loss_type":
            return {"items": {"enum": LOSS_TYPES}, "minItems": 1}
        case "DPOConfig", "f_divergence_type":
            return {"enum": DIVERGENCES}
        case (("SFTConfig" | "DPOConfig"), "report_to"):
            names = {"enum": ["none", "all", *trackers()]}
            return {"anyOf": [names, {"type": "array", "items": names}, {"type": "null"}]}
        case (("SFTConfig" | "DPOConfig"), "accelerator_config"):
            return _or_null(_fields("AcceleratorConfig", {}))
        case "BitsAndBytesConfig", "bnb_4bit_quant_type":
            return {"enum": ["nf4", "fp4"]}
    return {}


def _described(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {**new, "description": old["description"]} if "description" in old else new


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}
