"""The card: `README.md` of a run and of its repository on the Hub, written from what the run recorded."""

import json
import re
from pathlib import Path
from typing import Any

from toolkit.models.adapter import adapter_digest
from toolkit.recipe.fields import field_defaults
from toolkit.records.portable import Places, adapter_folder, read_resolved, stages_up_to
from toolkit.records.rundir import ADAPTER, CARD, EVALUATION, MERGED, PICTURES, REPORT, STAGE, read_json, write_text

CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LICENCE_TEXTS = {"apache-2.0": "Apache License Version 2.0", "mit": "MIT License"}
NOT_FOR_VLLM = ("use_dora", "modules_to_save", "trainable_token_indices")
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def write(run: Path, repo_id: str | None = None, stage: str | None = None) -> str:
    """Write `README.md` of a run, and return its text."""
    text = card(run, repo_id, stage)
    write_text(run / CARD, text)
    return text


def card(run: Path, repo_id: str | None = None, stage: str | None = None) -> str:
    """The card of a run.

    Args:
        run: A run directory with a finished adapter.
        repo_id: Where the adapter is on the Hub; without one the card loads it from the run directory.
        stage: The stage whose adapter it is; by default the last one.

    Raises:
        RunError: there is no finished adapter.
    """
    resolved = read_resolved(run)
    adapter = read_json(adapter_folder(run, stage) / "adapter_config.json") or {}
    places = Places(run, resolved)
    kept = stages_up_to(resolved, stage)
    stages = [entry for entry in places.hide(resolved["stages"]) if entry["name"] in kept]
    done = {name: places.hide(read_json(run / name / STAGE) or {}) for name in kept}
    licence = base_licence(resolved["recipe"]["model"]["name_or_path"], resolved["base"].get("commit"))
    facts = places.hide({key: value for key, value in resolved.items() if key != "written"})
    is_local = "sha256" in facts["base"]
    sections = [
        _title(facts, stages, repo_id or run.resolve().name, is_local),
        _loading(facts, adapter, repo_id, stage, is_local),
        _training(stages, done),
        _data(facts, stages),
        _settings(facts, stages),
        _results(run, done),
        _machine(done),
        _reproduction(facts, done, stage),
    ]
    return _metadata(facts, stages, licence, is_local) + "\n\n".join(part for part in sections if part) + "\n"


def base_licence(base: str, commit: str | None) -> dict[str, str]:
    """`license`, and `license_name`, `license_link` where there are such, of the base; empty where nobody says."""
    from huggingface_hub import ModelCard, hf_hub_download

    folder = Path(base)
    try:
        file = folder / CARD if folder.is_dir() else Path(hf_hub_download(base, CARD, revision=_known(commit)))
        data = ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else None
    except Exception:  # not there, no way to the Hub, metadata that cannot be read: then the card names no license
        data = None
    names = ("license", "license_name", "license_link")
    found = {name: str(value) for name in names if data is not None and (value := data.get(name))}
    if not found and folder.is_dir():
        texts = [(folder / name).read_text(errors="replace") for name in LICENCE_FILES if (folder / name).is_file()]
        heads = [" ".join(text[:300].split()) for text in texts]
        known = [name for head in heads for name, words in LICENCE_TEXTS.items() if words in head]
        found = {"license": known[0]} if known else {}
    return found


def vllm_rank(adapter: dict[str, Any]) -> int | None:
    """`--max-lora-rank`: the adapter's largest rank, rounded up to one that vLLM allows; `None` above them all."""
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _metadata(facts: dict[str, Any], stages: list[dict[str, Any]], licence: dict[str, str], is_local: bool) -> str:
    from huggingface_hub import ModelCardData

    base = facts["recipe"]["model"]["name_or_path"]
    sources = [source for i, _ in enumerate(stages) for source in _sources(facts, i) if not source["local"]]
    datasets = [name for name in dict.fromkeys(source["path"] for source in sources) if HUB_ID.match(name)]
    about: dict[str, Any] = {} if is_local else {"base_model": base, "base_model_relation": "adapter"}
    about |= licence
    tags = ["lora", "trl", *dict.fromkeys(stage["type"] for stage in stages)]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=datasets or None,
        **about,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _title(facts: dict[str, Any], stages: list[dict[str, Any]], name: str, is_local: bool) -> str:
    base = facts["recipe"]["model"]["name_or_path"]
    commit = _known(facts["base"].get("commit"))
    kinds = " then ".join(stage["type"].upper() for stage in stages)
    if is_local:
        about = f"`{base}`, a local folder that is not on the Hub (SHA-256 of its files {facts['base']['sha256']})"
    else:
        about = f"[{base}](https://huggingface.co/{base})" + (f" at commit `{commit}`" if commit else "")
    loaded = f"The base was held in {facts['dtype']}"
    if facts.get("quantization"):
        loaded += ", quantized to " + ("4 bits" if facts["quantization"].get("load_in_4bit") else "8 bits")
    return (
        f"# {name}\n\nA LoRA adapter for {about}, trained by {kinds} with TRL. {loaded}; its weights are as they were."
    )


def _loading(
    facts: dict[str, Any], adapter: dict[str, Any], repo_id: str | None, stage: str | None, is_local: bool
) -> str:
    base, commit = facts["recipe"]["model"]["name_or_path"], _known(facts["base"].get("commit"))
    place = repo_id or (f"{stage}/adapter" if stage else "adapter")
    revision = f', revision="{commit}"' if commit and not is_local else ""
    tokens = f'"{place}"' if facts.get("own_tokenizer") else f'"{base}"{revision}'
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="{facts["dtype"]}")',
        f'model = PeftModel.from_pretrained(base, "{place}")',
        f"tokenizer = AutoTokenizer.from_pretrained({tokens})",
        'print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"))[0]))',
    ]
    note = f"`{base}` is the folder of the base; `{place}` the adapter's.\n\n" if is_local or not repo_id else ""
    return "## Use\n\n" + note + "```python\n" + "\n".join(lines) + "\n```\n\n" + _serving(adapter, base, commit, place)


def _serving(adapter: dict[str, Any], base: str, commit: str | None, place: str) -> str:
    rank, in_the_way = vllm_rank(adapter), [key for key in NOT_FOR_VLLM if adapter.get(key)]
    if in_the_way or rank is None:
        why = ", ".join(in_the_way) or f"a rank above {VLLM_RANKS[-1]}"
        return f"vLLM does not serve adapters with {why}: merge it into the base first (`toolkit merge`)."
    revision = f" --revision {commit}" if commit else ""
    name = place.rsplit("/", maxsplit=1)[-1]
    return (
        f"Served by vLLM, whose `--max-lora-rank` is one of {', '.join(map(str, VLLM_RANKS))}; the rank here is "
        f"{adapter['r']}:\n\n```sh\nvllm serve {base}{revision} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {name}={place}\n```"
    )


def _training(stages: list[dict[str, Any]], done: dict[str, dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        reference = stage["reference"] or "none: SFT has no reference"
        proof = done[stage["name"]].get("proof") or {}
        if "reference_vs_start" in proof:
            reference += f"; equal to the start model to {proof['reference_vs_start']:.1e} nats per token"
        rows.append([stage["name"], stage["type"], stage["policy"], reference, f"{stage['steps']:,}"])
    return "## What was trained\n\n" + _table(["stage", "type", "policy", "reference", "optimizer steps"], rows)


def _data(facts: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    rows = []
    for i, stage in enumerate(stages):
        for source in _sources(facts, i):
            where = "a local file" if source["local"] else source.get("commit") or source["revision"] or "not recorded"
            split = f" ({source['split']})" if not source["local"] else ""
            drawn = f"{source['rows']:,}" if "rows" in source else "not recorded"
            rows.append([stage["name"], f"`{source['path']}`{split}", where, drawn])
        counts = stage["rows"]
        text = f"{counts['tokens']:,} tokens, {counts['supervised']:,} of them supervised"
        text += f"; {counts['truncated']:,} rows truncated" if counts["truncated"] else ""
        text += "".join(f"; {n:,} rows dropped: {reason}" for reason, n in counts["dropped"].items())
        rows.append([stage["name"], "**in all**", text, f"{counts['rows']:,}"])
    return "## Data\n\n" + _table(["stage", "source", "revision", "rows"], rows)


def _sources(facts: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """The data sources of a stage, as asked for and as found."""
    asked = facts["recipe"]["stages"][index]["data"]
    found = facts["stages"][index].get("sources") or [{"local": not HUB_ID.match(s["path"])} for s in asked]
    return [a | f for a, f in zip(asked, found, strict=True)]


def _settings(facts: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    model = facts["recipe"]["model"]
    general = {key: model[key] for key in ("dtype", "attn_implementation", "chat_template") if model.get(key)}
    rows = [["model", key, _value(value), ""] for key, value in general.items() if value != "auto"]
    defaults = field_defaults("BitsAndBytesConfig") if facts.get("quantization") else {}
    rows += _changed("quantization", facts.get("quantization") or {}, defaults)
    for i, stage in enumerate(stages):
        name = stage["name"]
        rows += _changed(f"{name}: lora", stage["lora"], field_defaults("LoraConfig"))
        rows += _changed(f"{name}: trainer", stage["trainer"], field_defaults(CONFIGS[stage["type"]]))
        asked = facts["recipe"]["stages"][i]
        own = {"adapter": "new"} | ({"reference": "cached", "prefix_sharing": True} if stage["type"] == "dpo" else {})
        rows += _changed(name, {key: asked[key] for key in own if key in asked}, own)
    rows.append(["", "seed", _value(facts["recipe"]["seed"]), "42"])
    head = "## Settings\n\nEvery setting that differs from the default of TRL, PEFT, transformers or the toolkit.\n\n"
    return head + _table(["of", "setting", "value", "default"], rows)


def _changed(of: str, settings: dict[str, Any], defaults: dict[str, Any]) -> list[list[str]]:
    return [
        [of, key, _value(value), _value(defaults[key]) if key in defaults else ""]
        for key, value in settings.items()
        if key not in defaults or defaults[key] != value
    ]


def _results(run: Path, done: dict[str, dict[str, Any]]) -> str:
    evaluation = read_json(run / EVALUATION) or {}
    scores = {t: s for t, s in (evaluation.get("scores") or {}).items() if isinstance(s, dict)}
    parts = []
    if scores:
        models = list(dict.fromkeys(name for score in scores.values() for name in score))
        rows = [[name, *(_score(score.get(name)) for score in scores.values())] for name in models]
        prompts = f"{evaluation['prompts']:,} held-out prompts, greedy answers.\n\n" if "prompts" in evaluation else ""
        parts.append(prompts + _table(["model", *scores], rows))
    measured = [[n, *(_number(r, key) for key in ("train_loss", "eval_loss"))] for n, r in done.items()]
    if any(any(row[1:]) for row in measured):
        parts.append(_table(["stage", "mean training loss", "evaluation loss"], measured))
    parts += _merged(run)
    pictures = sorted((run / PICTURES).glob("*.png"))
    parts += [f"![{p.stem.replace('_', ' ').replace('-', ' ')}]({PICTURES}/{p.name})" for p in pictures]
    if (run / REPORT).is_file():
        parts.append(f"More in `{REPORT}`.")
    return "## Results\n\n" + "\n\n".join(parts) if parts else ""


def _merged(run: Path) -> list[str]:
    """How far the merged model is from the policy, where `toolkit merge` has measured it for this adapter."""
    merged = read_json(run / MERGED) or {}
    found = merged.get("agreement")
    if not found or not (run / ADAPTER).is_dir() or merged.get("adapter_digest") != adapter_digest(run / ADAPTER):
        return []
    return [
        f"Merged into the base as {merged['dtype']}, it differs from the policy that was trained by a KL of "
        f"{max(found['kl'], 0):.2g} nats per token, and has the same most likely token at "
        f"{found['top1_agreement']:.1%} of {found['tokens']:,} held-out positions."
    ]


def _score(value: Any) -> str:
    """A share, or an object that holds one and its bounds."""
    if isinstance(value, dict):
        share = next((value[key] for key in ("share", "value", "mean") if _is_number(value.get(key))), None)
        bounds = [value[key] for key in ("low", "high") if _is_number(value.get(key))]
        text = _score(share)
        return f"{text} ({bounds[0]:.1%} to {bounds[1]:.1%})" if text and len(bounds) == 2 else text
    return f"{value:.1%}" if _is_number(value) else ""


def _machine(done: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, record in done.items():
        hardware = (record.get("provenance") or {}).get("hardware") or {}
        n = hardware.get("processes", 1)
        where = hardware.get("name", "not recorded") + (f", {n} processes" if n > 1 else "")
        time = f"{record['seconds']:,.0f} s" if "seconds" in record else "not recorded"
        memory = f"{record['peak_memory'] / 1e9:.2f} GB" if "peak_memory" in record else "not recorded"
        rows.append([name, where, time, memory])
    note = "Time with loading, proof and verification; memory of one process, on its GPU or, without one, in all."
    return f"## Hardware\n\n{note}\n\n" + _table(["stage", "hardware", "time", "peak memory"], rows)


def _reproduction(facts: dict[str, Any], done: dict[str, dict[str, Any]], stage: str | None) -> str:
    last = list(done.values())[-1].get("provenance") or {}
    versions = last.get("versions") or facts["versions"]
    lines = [", ".join(f"{name} {number}" for name, number in versions.items()) + "."]
    git = last.get("git")
    if git:
        tree = "with uncommitted changes" if git["dirty"] else "the tree was clean"
        lines.append(f"The recipe was at git commit `{git['commit']}`, {tree}.")
    else:
        lines.append("The recipe was not under git.")
    if last.get("command"):
        lines.append(f"It was launched as `{last['command']}`.")
    processes = (last.get("hardware") or {}).get("processes", 1)
    launch = f"accelerate launch --num_processes {processes} -m toolkit" if processes > 1 else "toolkit"
    command = f"{launch} train recipe.yaml" + (f" --stage {stage}" if stage else "")
    return "## Reproduce\n\n" + "\n".join(lines) + f"\n\n```sh\n{command}\n```"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _number(record: dict[str, Any], key: str) -> str:
    value = (record.get("metrics") or {}).get(key)
    return f"{value:.4g}" if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(commit: Any) -> str | None:
    return commit if commit and commit != "None" else None
