"""What a forward and backward pass needs beyond the weights: the real modules are run on tensors without data.

PyTorch's `FakeTensorMode` runs a model's own code with shapes and types alone. Every storage that comes and goes is
counted, so normalisations in float32, LoRA's extra activations, checkpointing, autocast and the attention of any family
are what they are, and no formula has to be kept for each. It takes seconds, no weights, and no GPU.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from trl.trainer import add_fused_lm_head

from toolkit.models.head import TILE, small_tiles
from toolkit.models.prefix import IDS, backbone_of, causal_of, share_prefix

FEW, MORE = 2, 4  # layers that are run; the others are like them


@dataclass(frozen=True)
class Pass:
    """Bytes that one pass over a batch needs at its worst moment, beyond weights, gradients and optimizer.

    `total` is the peak; it is reached in the head, or while a layer is run again or differentiated.
    """

    activations: float
    """Kept from the backbone's forward for its backward."""
    logits: float
    """What the head adds: hidden states, tiles of logits and their gradients."""
    working: float
    """What the backward of the layers adds beyond that."""

    @property
    def total(self) -> float:
        return self.activations + self.logits + self.working


@dataclass(frozen=True)
class Run:
    """How a pass is run."""

    lora: dict[str, Any]
    dtype: torch.dtype
    """Of the base weights."""
    quantized: tuple[int, torch.dtype] | None = None
    """Bits of the linear layers, and the type they compute in."""
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    outputs: tuple[str, ...] = ("log_probs",)
    """What TRL's head is asked for."""
    cuda: bool = False
    training: bool = True
    stacked: int = 1
    """Adapters that act on every layer."""


def measure(empty: PreTrainedModel, batch: dict[str, torch.Tensor], run: Run) -> Pass:
    """Run a few layers of the model on a batch of these shapes, and extend to all of its layers.

    Args:
        empty: the base on the meta device; it is left as it is.
        batch: as the trainer's collator makes it, with `labels`, `(batch, seq)`.

    Raises:
        RuntimeError, and others: the model's code asks for values, which are not there.
    """
    layers = len(layers_of(empty))
    every = bool(run.lora.get("layers_to_transform")) or layers <= MORE
    if every:
        return _measure(empty, batch, run, layers)
    few, more = (_measure(empty, batch, run, n) for n in (FEW, MORE))

    def extended(name: str) -> float:
        a, b = getattr(few, name), getattr(more, name)
        return float(a + (b - a) * (layers - FEW) / (MORE - FEW))

    kept = extended("activations")
    logits = max(extended("logits"), 0.0)
    return Pass(kept, logits, max(extended("total") - kept - logits, 0.0))


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The decoder's layers: the longest list of modules in the backbone."""
    lists = [module for module in backbone_of(model).modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


class Live(TorchDispatchMode):
    """Bytes of all storages alive, and the most there ever were in each phase."""

    def __init__(self, known: Iterator[torch.Tensor]):
        super().__init__()
        self.now, self.phase = 0, "forward"
        self.peak: dict[str, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak[self.phase] = max(self.peak.get(self.phase, 0), self.now)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _measure(empty: PreTrainedModel, batch: dict[str, torch.Tensor], run: Run, layers: int) -> Pass:
    model = _model(empty, run, layers)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cpu")
        inputs = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        tensors = [*model.parameters(), *model.buffers(), *inputs.values(), *(p.grad for p in trained)]
        live = Live(tensor for tensor in tensors if tensor is not None)
        sharing = share_prefix(model) if IDS in batch else nullcontext()
        with sharing, live, _autocast(run), torch.set_grad_enabled(run.training):
            return _step(model, inputs, live, run)


def _step(model: Any, inputs: dict[str, Any], live: Live, run: Run) -> Pass:
    """One forward, and one backward where it is a training step."""
    kept = 0

    def head_begins(module: Any, args: Any, output: Any) -> None:
        nonlocal kept
        kept, live.phase = live.now, "head"
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(layers_begin)

    def layers_begin(grad: torch.Tensor) -> None:
        live.phase = "backward"

    handle = backbone_of(model).register_forward_hook(head_begins)
    try:
        with small_tiles("cuda" if run.cuda else "cpu"):
            log_probs = _log_probs(model, inputs, run)
            if run.training:
                log_probs.sum().backward()
    finally:
        handle.remove()
    head, peak = live.peak.get("head", kept), max(live.peak.values())
    return Pass(kept, max(head - kept, 0), max(peak - max(head, kept), 0))


def _log_probs(model: Any, inputs: dict[str, Any], run: Run) -> torch.Tensor:
    if not run.cuda:
        out: torch.Tensor = model(**inputs, fused_lm_head=True, use_cache=False).log_probs
        return out
    given = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = backbone_of(model)(**given, use_cache=False).last_hidden_state
    supervised = inputs["labels"].shape[0] * (inputs["labels"].shape[1] - 1)
    hidden = hidden[:, :-1].reshape(supervised, -1) * 1  # the copy that picking the supervised positions makes
    scored: torch.Tensor = _CudaHead.apply(hidden, causal_of(model).get_output_embeddings().weight, run.autocast)
    return scored


class _CudaHead(torch.autograd.Function):
    """The buffers of TRL's fused head on CUDA, where its kernels fold tiles of logits in place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.vocabulary, ctx.dtype = weight.shape[0], autocast or hidden.dtype
        _CudaHead.tile(ctx, hidden)
        return hidden.new_empty((hidden.shape[0], 8), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        accumulated = hidden.new_empty(hidden.shape, dtype=torch.float32)
        tile = _CudaHead.tile(ctx, hidden)
        del tile
        return accumulated.to(hidden.dtype), None, None

    @staticmethod
    def tile(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens, words = min(hidden.shape[0], TILE[0]), min(ctx.vocabulary, TILE[1])
        return hidden.new_empty((tokens, words), dtype=ctx.dtype)


def _model(empty: PreTrainedModel, run: Run, layers: int) -> Any:
    model = copy.deepcopy(empty).to(run.dtype)
    if model.config._attn_implementation not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")  # keeps for its backward what flash attention keeps
    _cut(model, layers)
    if run.quantized:
        _quantize(model, *run.quantized)
    config = {**run.lora, "init_lora_weights": True}
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config), low_cpu_mem_usage=True)
    for i in range(1, run.stacked):
        adapted.add_adapter(f"start{i}", LoraConfig(task_type="CAUSAL_LM", **config), low_cpu_mem_usage=True)
    if run.stacked > 1:
        adapted.base_model.set_adapter([*(f"start{i}" for i in range(1, run.stacked)), "default"])
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".default." in name and "lora_" in name)
    if run.quantized:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does
    add_fused_lm_head(adapted.get_base_model(), outputs=run.outputs)
    if run.checkpointing and run.training:
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    return adapted.train(run.training)


def _cut(model: Any, layers: int) -> None:
    whole = layers_of(model)
    for module in backbone_of(model).modules():
        for name, child in list(module.named_children()):
            if child is whole:
                setattr(module, name, whole[:layers])


def quantizable(model: Any) -> dict[str, torch.nn.Linear]:
    """The layers that bitsandbytes quantizes: all linear ones but the head."""
    head = causal_of(model).get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def _quantize(model: Any, bits: int, compute: torch.dtype) -> None:
    module: Any
    for module in quantizable(model).values():
        module.forward = _quantized_forward(module, bits, compute)


def _quantized_forward(module: torch.nn.Linear, bits: int, compute: torch.dtype) -> Callable[[torch.Tensor], Any]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Dequantized.apply(x.to(compute), module.out_features, bits)
        return out.to(x.dtype).clone()  # PEFT clones what a 4-bit layer returns

    return forward


class _Dequantized(torch.autograd.Function):
    """A frozen quantized layer: made whole for each product; bitsandbytes keeps the input of 8-bit ones."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int, bits: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        ctx.save_for_backward(x if bits == 8 else None)
        weight = x.new_empty(ctx.shape)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None


@contextmanager
def _autocast(run: Run) -> Iterator[None]:
    with torch.autocast("cpu", dtype=run.autocast or torch.bfloat16, enabled=run.autocast is not None):
        yield
