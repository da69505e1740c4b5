"""What a stage will need: memory of each process, item by item, and disk.

Figures are bytes. The memory of activations and logits comes from `toolkit.resources.memory`, which runs the
model's own code without data on the longest batch there is; everything else is counted.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from toolkit.job import StageJob
from toolkit.launching.division import Sharding
from toolkit.models.prefix import causal_of
from toolkit.recipe.plan import model_dtype, quantization
from toolkit.resources import longest, memory
from toolkit.wording import amount, first_line

CUDA_CONTEXT = 512 * 2**20  # the driver's context and cuBLAS' workspace on each GPU, about
STATES = {"adafactor": 0.05, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}  # copies of the parameters; else Adam's 2
REFERENCE_ROWS = 2  # the reference pass takes so many times the rows of a training step
HEAD = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "entropy", "mean_logits", "is_top1")}


@dataclass(frozen=True)
class Disk:
    """Bytes that a stage writes."""

    checkpoints: int
    """As many as are kept, and one more while it is written."""
    adapters: int
    reference_cache: int
    tokenized_cache: int

    @property
    def output(self) -> int:
        return self.checkpoints + self.adapters


@dataclass(frozen=True)
class StageEstimate:
    """One stage. Memory is that of one process, beyond the interpreter and its libraries, in bytes."""

    name: str
    parameters: int
    trainable: int
    steps: int
    tokens: int
    """Of the training data, in one epoch."""
    batch: tuple[int, int]
    """Rows and columns of the longest batch that the backbone sees."""
    items: dict[str, int]
    """The training step: weights, adapter, gradients, optimizer, activations, logits, working, context."""
    phases: dict[str, int]
    """The peak of each phase of the stage."""
    disk: Disk
    unknown: str = ""
    """Why activations and logits could not be told; they count as nothing then."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class _Fixed:
    """What does not depend on the batch."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    context: int
    largest_layer: int = field(default=0)

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.context + self.largest_layer


def estimate(job: StageJob, empty: PreTrainedModel, sharding: Sharding | None = None) -> StageEstimate:
    """Estimate one stage on the longest batch of its data.

    Args:
        empty: the base on the meta device, `model.empty_base`; it is left as it is.
        sharding: processes and what they divide; by default what this process was launched with.
    """
    sharding = sharding or Sharding.current(job.hardware.processes)
    fixed = _fixed(job, empty, sharding)
    rows = longest.longest_rows(longest.training_rows(job), longest.batch_size(job))
    batch = longest.collated(job, rows, empty)
    unknown = ""
    try:
        step = memory.measure(empty, batch, _run(job))
        phases = {"training step": round(fixed.total + step.total)}
        phases |= _other_phases(job, empty, fixed)
    except Exception as error:  # a model's own code may ask for values that are not there, in ways of its own
        step, unknown = memory.Pass(0, 0, 0), f"{type(error).__name__}: {first_line(error)}"
        phases = {"training step": fixed.total}
    items = {
        "weights": fixed.weights,
        "adapter": fixed.adapter,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "activations": round(step.activations),
        "logits": round(step.logits),
        "working": round(step.working) + fixed.largest_layer,
        "context": fixed.context,
    }
    columns = (batch.get("pair_ids", batch["input_ids"])).shape
    return StageEstimate(
        name=job.plan.name,
        parameters=sum(p.numel() for p in empty.parameters()),
        trainable=job.trainable,
        steps=job.steps,
        tokens=job.data.counts.tokens,
        batch=(columns[0], columns[1]),
        items=items,
        phases=phases,
        disk=disk(job),
        unknown=unknown,
    )


def weight_bytes(empty: PreTrainedModel, dtype: torch.dtype, quantized: dict[str, Any] | None) -> int:
    """Bytes of the base as it is held: linear layers but the head at this quantization, all else in `dtype`."""
    kept = set((quantized or {}).get("llm_int8_skip_modules") or [])
    packed = memory.quantizable(empty) if quantized else {}
    packed = {name: module for name, module in packed.items() if not kept & set(name.split("."))}
    inside = {id(module.weight) for module in packed.values()}
    total = sum(p.numel() * dtype.itemsize for p in empty.parameters() if id(p) not in inside)
    total += sum(b.numel() * b.element_size() for b in empty.buffers())
    for module in packed.values():
        total += _packed_bytes(module.weight.shape, quantized or {})
    return total


def text(found: StageEstimate) -> str:
    """The estimate as a block of lines."""
    rows, columns = found.batch
    lines = [
        f"{found.name:<10} {found.parameters:,} parameters, {found.trainable:,} trainable; {found.steps:,} optimizer "
        f"steps, {found.tokens:,} tokens an epoch",
        f"  memory     {amount(found.peak)} for each process at its peak ({found.worst}), longest batch "
        f"{rows} x {columns} tokens",
    ]
    lines += [f"    {name:<12} {amount(size):>9}" for name, size in found.items.items() if size]
    others = [f"{name} {amount(size)}" for name, size in found.phases.items() if name != "training step"]
    lines += [f"    other phases: {', '.join(others)}"] if others else []
    if found.unknown:
        lines.append(
            f"    activations and logits are not in it: the model cannot be run without data ({found.unknown})"
        )
    disk = found.disk
    lines.append(
        f"  disk       checkpoints {amount(disk.checkpoints)}, adapters {amount(disk.adapters)}, "
        f"tokenized rows {amount(disk.tokenized_cache)}, reference cache {amount(disk.reference_cache)}"
    )
    return "\n".join(lines)


# --- memory ----------------------------------------------------------------------------------------------------------


def _fixed(job: StageJob, empty: PreTrainedModel, sharding: Sharding) -> _Fixed:
    quantized = quantization(job.recipe)
    weights = weight_bytes(empty, _dtype(job), quantized)
    size = 2 if quantized else 4  # TRL holds adapters in bfloat16 on a quantized base; PEFT in float32 otherwise
    trained = job.trainable * size
    copies = 2 if job.plan.mode != "fresh" else 1  # the frozen adapter below, or the frozen copy that is the reference
    gradients = trained * (2 if sharding.processes > 1 and sharding.gradients == 1 else 1)  # and DDP's buckets
    layers = max(len(memory.layers_of(empty)), 1)
    return _Fixed(
        weights=weights // sharding.weights,
        adapter=trained * copies // sharding.weights,
        gradients=gradients // sharding.gradients,
        optimizer=optimizer_bytes(job.plan.trainer.get("optim", "adamw_torch_fused"), job.trainable, size)
        // sharding.optimizer,
        context=CUDA_CONTEXT if job.hardware.device == "cuda" else 0,
        largest_layer=2 * weights // layers if sharding.weights > 1 else 0,  # the one at work, and the next
    )


def optimizer_bytes(optim: str, parameters: int, size: int) -> int:
    """Bytes of optimizer state on the device.

    Args:
        optim: transformers' name, such as `adamw_torch` or `paged_adamw_8bit`.
        size: bytes of one parameter; torch keeps its states in the parameters' type.
    """
    states = next((copies for name, copies in STATES.items() if name in optim), 2)
    if "paged" in optim:
        return 0  # lies in memory of the host, and is fetched when there is room
    if "8bit" in optim:
        return round(parameters * states * (1 + 4 / 256))  # one scale for each 256 values
    return round(parameters * states * (4 if "bnb" in optim else size))


def _other_phases(job: StageJob, empty: PreTrainedModel, fixed: _Fixed) -> dict[str, int]:
    held = fixed.weights + fixed.adapter + fixed.context + fixed.largest_layer
    logits = _whole_logits(job, empty)
    phases = {"verification": held + fixed.optimizer + logits}
    if job.plan.type == "dpo" and job.plan.reference_from == "cached":
        rows = longest.longest_rows(job.data.train, REFERENCE_ROWS * longest.batch_size(job))
        run = replace(_run(job), training=False)
        forward = memory.measure(empty, longest.collated(job, rows, empty), run)
        phases["reference pass"] = round(held + forward.total)
    return phases


def _whole_logits(job: StageJob, empty: PreTrainedModel) -> int:
    """Of one of the rows that proofs compare, by plain transformers: logits, as float32, and their log-softmax."""
    rows = [job.data.train[i] for i in range(min(4, len(job.data.train)))]
    columns = max(longest.columns(row) for row in rows)
    columns = min(columns, job.plan.max_length or columns)
    size = _dtype(job).itemsize
    vocabulary = causal_of(empty).get_output_embeddings().weight.shape[0]
    return columns * vocabulary * (size + (4 if size < 4 else 0) + 4)


def _run(job: StageJob) -> memory.Run:
    quantized = quantization(job.recipe)
    autocast = next((t for name, t in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if _on(job, name)), None)
    bits = None
    if quantized:
        compute = str(quantized.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        four = bool(quantized.get("load_in_4bit"))
        bits = (4, getattr(torch, compute)) if four else (8, _dtype(job))
    return memory.Run(
        lora=_lora(job),
        dtype=_dtype(job),
        quantized=bits,
        autocast=autocast,
        checkpointing=bool(job.plan.trainer.get("gradient_checkpointing", True)),
        outputs=HEAD[job.plan.type],
        cuda=job.hardware.device == "cuda",
        stacked=2 if job.plan.mode == "stack" else 1,
    )


def _lora(job: StageJob) -> dict[str, Any]:
    from toolkit.models.adapter import read_config

    if job.plan.lora:
        return job.plan.lora
    own = job.recipe.lora
    if job.start is not None and (job.start / "adapter_config.json").is_file():
        config = read_config(job.start)
        own = {key: config[key] for key in ("r", "lora_alpha", "target_modules", "lora_dropout")}
    return {"r": 16, "target_modules": "all-linear"} | own


def _dtype(job: StageJob) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, model_dtype(job.recipe, job.hardware))
    return dtype


def _on(job: StageJob, name: str) -> bool:
    return bool(job.plan.trainer.get(name))


def _packed_bytes(shape: Any, quantized: dict[str, Any]) -> int:
    values = int(shape[0]) * int(shape[1])
    if not quantized.get("load_in_4bit"):
        return values + 4 * int(shape[0])  # one scale for each output
    blocks = -(-values // 64)  # one scale for each block, in turn quantized in blocks of 256
    scales = blocks + 4 * -(-blocks // 256) if quantized.get("bnb_4bit_use_double_quant") else 4 * blocks
    return values // 2 + scales


# --- disk ------------------------------------------------------------------------------------------------------------


def disk(job: StageJob) -> Disk:
    """What a stage writes, without a look at its model."""
    trainer, counts = job.plan.trainer, job.data.counts
    size = 2 if quantization(job.recipe) else 4
    saved = job.trainable * size
    one = saved + round(job.trainable * 2 * size)  # the optimizer's state lies on disk wherever it lay in memory
    kept = 0
    if trainer.get("save_strategy") != "no":
        steps = trainer.get("save_steps", 500)
        times = max(round(1 / steps) if steps < 1 else job.steps // int(steps), 1)
        kept = min(times, (trainer.get("save_total_limit") or times) + 1)
    final = job.trainable * 4 * (2 if job.plan.mode == "stack" else 1)
    return Disk(
        checkpoints=kept * one,
        adapters=2 * final,  # the stage's, and the deliverable
        reference_cache=8 * counts.rows if job.plan.reference_from == "cached" else 0,
        tokenized_cache=8 * counts.tokens * (2 if job.plan.type == "sft" else 1),
    )
