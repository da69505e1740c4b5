"""How far a merged model is from the policy that was trained, measured on rows of the run."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from toolkit.evaluation import heldout
from toolkit.publishing.saved_run import SavedRun
from toolkit.recipe.plan import Hardware, StagePlan, stage_plans
from toolkit.recipe.sections import Recipe, Source
from toolkit.rows import data
from toolkit.rows.chat import IGNORED
from toolkit.training.proof import Sequences, sequences

ROWS = 32
POSITIONS = 1024  # the policy's log-probabilities are held while the merged model is loaded: 1024 x vocabulary floats


@dataclass(frozen=True)
class Agreement:
    """Policy against merged model, over the same positions; all in float32 from full logits."""

    rows: int
    tokens: int
    """Positions compared."""
    rows_from: str
    """`eval_data`, `evaluate` (prompts only) or `training data`."""
    kl: float
    """Mean of KL(policy || merged), nats per token."""
    kl_max: float
    """Its largest value at one position, nats."""
    top1_agreement: float
    """Share of positions at which both hold the same token most likely."""
    logprob_difference: float
    """Largest difference of two log-probabilities, over positions and vocabulary, nats."""

    def as_dict(self) -> dict[str, Any]:
        """For `merge.json`."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL(policy || merged) {self.kl:.2e} nats per token (largest {self.kl_max:.2e}), same most likely token at "
            f"{self.top1_agreement:.1%} of {self.tokens:,} positions, {self.rows} rows of {self.rows_from}"
        )


def rows_to_compare(run: SavedRun, stage: str, hardware: Hardware, tokenizer: Any) -> tuple[Sequences, str]:
    """Held-out rows of the stage, else prompts of `evaluate`, else the first training rows, and which these are.

    Raises:
        DataError: the rows cannot be read here.
    """
    settings = run.recipe_stage(stage)
    plan = next(plan for plan in stage_plans(run.recipe, hardware) if plan.name == settings.name)
    if settings.eval_data:
        rows, name = _few(run.recipe, plan, settings.eval_data, tokenizer), "eval_data"
    elif run.recipe.evaluate is not None:
        ids = heldout.read(run.recipe, hardware, tokenizer, limit=ROWS).prompts[:ROWS]
        rows, name = [{"input_ids": row, "labels": row} for row in ids], "evaluate"
    else:
        rows, name = _few(run.recipe, plan, settings.data, tokenizer), "training data"
    return sequences(rows, tokenizer.pad_token_id, plan.max_length), name


@torch.no_grad()
def log_probabilities(model: Any, batch: Sequences) -> list[torch.Tensor]:
    """Per row `(positions, vocab)`, before each supervised token; float32, on the CPU; one row at a time."""
    model.eval()
    found, left = [], POSITIONS
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        at = (labels[1:length] != IGNORED).nonzero()[:left, 0]
        if len(at):
            logits = model(input_ids=ids[None, :length].to(model.device), use_cache=False).logits[0]
            found.append(logits[at.to(logits.device)].float().log_softmax(-1).cpu())
        left -= len(at)
    return found


def compare(policy: list[torch.Tensor], merged: list[torch.Tensor], rows_from: str) -> Agreement:
    """Two models' log-probabilities of the same positions, each `(positions, vocab)`."""
    pairs = list(zip(policy, merged, strict=True))
    kl = torch.cat([(p.double().exp() * (p.double() - m.double())).sum(-1) for p, m in pairs])
    same = torch.cat([p.argmax(-1) == m.argmax(-1) for p, m in pairs])
    return Agreement(
        rows=len(pairs),
        tokens=len(kl),
        rows_from=rows_from,
        kl=kl.mean().item(),
        kl_max=kl.max().item(),
        top1_agreement=same.float().mean().item(),
        logprob_difference=max((p - m).abs().max().item() for p, m in pairs),
    )


def _few(recipe: Recipe, plan: StagePlan, sources: list[Source], tokenizer: Any) -> list[dict[str, Any]]:
    """The first rows of a stage's sources, as its trainer sees them, without tokenizing the others."""
    few = [s.model_copy(update={"limit": min(s.limit or ROWS, ROWS), "fraction": None}) for s in sources[:ROWS]]
    stage = recipe.stages[plan.index].model_copy(update={"data": few, "eval_data": []})
    stages = [stage if i == plan.index else other for i, other in enumerate(recipe.stages)]
    rows = data.prepare(recipe.model_copy(update={"stages": stages}), plan, tokenizer).train
    return [rows[i] for i in range(min(ROWS, len(rows)))]
