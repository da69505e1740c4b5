"""Held-out metrics of DPO in which every pair counts once, whatever the batch size and the number of processes."""

from typing import Any


class EveryPairOnce:
    """In front of TRL's `DPOTrainer`: its held-out loss and metrics are means over pairs.

    TRL 1.16 takes the mean of the batches' means, so that a pair of a short last batch counts for several; and with
    several processes the rows that accelerate repeats to fill the last batches count as well. A checkpoint chosen by
    such an accuracy may be the wrong one. `_metrics` has no public counterpart. Remove when TRL counts pairs.
    """

    args: Any
    accelerator: Any
    callback_handler: Any
    _metrics: Any
    _pairs: list[int]
    """Pairs behind each value of a metric, in the evaluation that is under way."""

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; then what it logs is weighed by pairs."""
        self._pairs = []
        output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        metrics = self._metrics["eval"]
        for name, values in metrics.items():
            if len(values) == len(self._pairs):
                metrics[name] = [_mean(values, self._pairs)]
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; the last batches of several processes are replaced by the pairs that are left, on each of them."""
        loader, processes = self.callback_handler.eval_dataloader, self.accelerator.num_processes
        each = self.args.eval_batch_size // (processes if self.accelerator.split_batches else 1)
        first, count = sum(self._pairs), len(loader.dataset)
        if processes == 1 or count - first >= each * processes:
            self._pairs.append(min(each * processes, count - first))
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        parts = [range(start, min(start + each, count)) for start in range(first, count, each)]
        self._pairs += [len(part) for part in parts]
        batches = [loader.collate_fn([loader.dataset[i] for i in part]) for part in parts]
        outputs = [super(EveryPairOnce, self).prediction_step(model, batch, *args, **kwargs) for batch in batches]  # type: ignore[misc]
        loss = _mean([output[0] for output in outputs], self._pairs[-len(parts) :])
        return (loss, *outputs[-1][1:])


def _mean(values: list[Any], weights: list[int]) -> Any:
    """Of floats, or of scalar tensors."""
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights)
