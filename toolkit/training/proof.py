"""The proof: log-probabilities of policy, reference and an independently loaded start model, compared."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from toolkit.errors import ProofError
from toolkit.job import StageJob
from toolkit.recipe.plan import model_dtype, quantization
from toolkit.rows.chat import IGNORED

# Largest difference, in nats per completion token, between two computations of the same log-probabilities. The same
# weights on the same path agree to the last bit; another path (TRL's fused head against full logits, another batch
# shape) rounds differently. In 16 bits and on quantized layers that rounding is what it is.
SAME_PATH = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
OTHER_PATH = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
COMPARED_ROWS = 4


def rounding(job: StageJob) -> str:
    """The type whose rounding bounds how well two computations of the stage's model can agree."""
    trainer = job.plan.trainer
    if trainer["bf16"] or trainer.get("fp16") or quantization(job.recipe):
        return "bfloat16"
    return model_dtype(job.recipe, job.hardware)


@dataclass(frozen=True)
class Sequences:
    """Right-padded token ids; `input_ids`, `attention_mask`, `labels` are each `(batch, seq)`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Supervised tokens per sequence, `(batch,)`."""
        return (self.labels[:, 1:] != IGNORED).sum(1)


@dataclass(frozen=True)
class Proof:
    """The reference of a stage, in numbers. Differences are the largest over the batch, in nats per token."""

    sequences: int
    policy_vs_reference: float
    reference_vs_start: float
    first_loss: float
    tolerance_same_path: float
    tolerance_other_path: float

    def as_dict(self) -> dict[str, Any]:
        """For `stage.json`."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"policy = reference to {self.policy_vs_reference:.1e}, reference = start model loaded on its own to "
            f"{self.reference_vs_start:.1e} nats per token, over {self.sequences} sequences; "
            f"first loss {self.first_loss:.4f}"
        )


def sequences(rows: list[dict[str, Any]], pad: int, max_length: int | None) -> Sequences:
    """SFT or DPO rows as one padded batch; of a pair, all `chosen` come first, then all `rejected`."""
    pairs: list[tuple[list[int], list[int]]] = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            if "input_ids" in row:
                pairs += [(row["input_ids"], row["labels"])] if side == "chosen_ids" else []
            else:
                labels = [IGNORED] * len(row["prompt_ids"]) + row[side]
                pairs.append((row["prompt_ids"] + row[side], labels))
    pairs = [(ids[:max_length], labels[:max_length]) for ids, labels in pairs]
    longest = max(len(ids) for ids, _ in pairs)
    return Sequences(
        torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in pairs]),
        torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in pairs]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs]),
    )


def first_rows(job: StageJob) -> list[dict[str, Any]]:
    """The rows that proofs compare: the first few of the training data."""
    return [job.data.train[i] for i in range(min(COMPARED_ROWS, len(job.data.train)))]


def first_sequences(job: StageJob) -> Sequences:
    """Those rows as one batch."""
    return sequences(first_rows(job), job.tokenizer.pad_token_id, job.plan.max_length)


@torch.no_grad()
def completion_logps(model: Any, batch: Sequences) -> torch.Tensor:
    """Sum of the log-probabilities of the supervised tokens, `(batch,)`, in nats, float32, on the CPU.

    Full logits and a plain log-softmax: no code of TRL's, so that it can testify about it. One row at a time.
    """
    was_training = model.training
    model.eval()
    sums = []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        row = ids[None, :length].to(model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        targets = labels[1:length].to(logits.device)
        chosen = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        sums.append(chosen[targets != IGNORED].sum().cpu())
    model.train(was_training)
    return torch.stack(sums)


def per_token_difference(a: torch.Tensor, b: torch.Tensor, batch: Sequences) -> float:
    """Largest difference of two `(batch,)` sums, in nats per supervised token; infinite if either is not finite."""
    difference = ((a - b).abs() / batch.tokens.clamp(min=1)).max().item()
    return difference if math.isfinite(difference) else math.inf


def judge(proof: Proof, policy: str, reference: str) -> None:
    """Stop unless policy, reference and start model agree before the first step.

    Raises:
        ProofError: which two differ, by how much, and what that means.
    """
    numbers = f"(by {{:.3g}} nats per token, at most {{:.0e}} expected, over {proof.sequences} sequences)"
    if not proof.policy_vs_reference <= proof.tolerance_same_path:
        by = numbers.format(proof.policy_vs_reference, proof.tolerance_same_path)
        raise ProofError(
            f"the policy ({policy}) does not start at its reference ({reference}) {by}. The new adapter changes the "
            f"model before it is trained, or disabling it does not give the start model: check init_lora_weights."
        )
    if not proof.reference_vs_start <= proof.tolerance_other_path:
        by = numbers.format(proof.reference_vs_start, proof.tolerance_other_path)
        raise ProofError(
            f"the reference inside the trainer is not the model this stage starts from ({reference}) {by}. Either the "
            f"base weights were changed when the adapter was created (PiSSA, OLoRA and the like do that), or another "
            f"set of adapters is active."
        )
