"""A module bound to how it reads a batch: `Network` for any module, `Encoder` for the classifiers of transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig

from engine.batch import Batch
from engine.models.compiling import CompiledLayers
from engine.models.encoder_layers import lean_layers
from engine.models.families import family, inputs_of, without_cache
from engine.models.features import SCORES, InnerStates
from engine.params.flat import TABLE_ROWS, FlatParameters
from engine.params.swapped import swapped

UNNAMED = "model"  # the name of a network that was given none


class Outputs(NamedTuple):
    """All that a loss sees of a model."""

    logits: Tensor  # [B, C]
    features: Tensor | None = None  # [B, layers, H] or [B, layers, L, H], states to be matched with another model's
    attention: Tensor | None = None  # [B, layers, heads, L, L], scores likewise
    domain: Tensor | None = None  # [B, H], what domains are compared by (or [B, domains], their classifier's logits)

    def given(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def detached(self, requires_grad: bool = False) -> Outputs:
        return Outputs(*(t if t is None else t.detach().requires_grad_(requires_grad) for t in self))

    @classmethod
    def of(cls, given: Any) -> Outputs:
        """From what a module returns: logits, (logits, features), or an object with `.logits`."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Tensor):
            return cls(given)
        return cls(given.logits) if hasattr(given, "logits") else cls(*given)


class Network:
    """Any module, reading a batch through `call(module, batch)`, by default `module(batch.inputs)`.

    `parameters` may stand in for the module's own weights (name -> tensor), which is how pilot weights and forward-mode
    tangents pass through a model without touching it.
    """

    encoding: str | None = None  # which of a batch's encodings it reads, where there are several
    precision = "fp32"
    inner = InnerStates()  # what it gives beside its logits

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any] | None = None, name: str = UNNAMED):
        self.name, self.module = name, module
        self._call = call or (lambda module, batch: module(batch.inputs))
        self._flat: FlatParameters | None = None

    def __call__(
        self, batch: Any, parameters: dict[str, Tensor] | None = None, *, repeated: bool = False, higher: bool = False,
        precision: str | None = None,
    ) -> Outputs:  # fmt: skip
        """Outputs in the weights' dtype. `repeated` where another forward is to see the same random numbers, `higher` where
        this one is differentiated twice or by forward mode."""
        # a stranger's module may use fused attention, which has neither second derivatives nor forward mode, nor its masks
        math = sdpa_kernel(SDPBackend.MATH) if repeated or higher else nullcontext()
        with math, nullcontext() if parameters is None else swapped(self.module, parameters):
            return Outputs.of(self._call(self.module, batch))

    @property
    def flat(self) -> FlatParameters:
        """The trainable weights in one buffer. RuntimeError before `flatten`, which a Learner and a MetaStep call."""
        if self._flat is None:
            raise RuntimeError(
                f"the weights of the {self.name} are not flat yet; call flatten() once it stands on its device."
            )
        return self._flat

    def flatten(self) -> FlatParameters:
        """`flat`, made where there is none, or anew where the module was moved or other weights are trainable than before.

        What holds an older one, a learner or a meta-step, cannot go on: its `check` raises RuntimeError.
        """
        if self._flat is None or not self._flat.holds():
            trainable = self.trainable()
            # elsewhere a dense gradient costs microseconds, and finding the rows would wait for the device
            on_cpu = all(p.device.type == "cpu" for p in trainable.values())
            self._flat = FlatParameters(self.module, self.table_rows if on_cpu else None, self.name)
        return self._flat

    table_rows = TABLE_ROWS

    def move(self, device: torch.device | str) -> None:
        """The module to `device`, its weights flat there. Where it stood elsewhere, what holds the old buffers cannot go on."""
        self.module.to(device)
        self.flatten()

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that gradients of a forward are taken against, by name."""
        return self.flat.leaves(low_precision=self.precision == "bf16")

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that take gradients, by name, a tied weight once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def copies(self) -> list[Tensor]:
        """Weights that it keeps beside the module's own: bf16 shadow and frozen copies, once a forward has made them."""
        return [] if self._flat is None or self._flat.shadow is None else [self._flat.shadow]

    def size(self) -> int:
        """Number of parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @contextmanager
    def giving(self, inner: InnerStates):
        """Other inner states, or none, beside the logits for the body. A module that is not an `Encoder` gives what it gives."""
        before = self.inner
        self.inner = inner
        try:
            yield
        finally:
            self.inner = before

    @contextmanager
    def in_mode(self, train: bool):
        """Dropout and its like switched for the body, and back as they were."""
        before = [(m, m.training) for m in self.module.modules()]
        self.module.train(train)
        try:
            yield
        finally:
            for m, mode in before:
                m.training = mode


class Encoder(Network):
    """A classifier of transformers. It reads its own encoding of a batch and gives float32 logits (float64 if it is that).

    In bf16 the forward runs on a bf16 copy of the weights, logits and losses are float32. `inner` are the states that it
    gives beside its logits (engine.models.features). `compiled` runs the encoder's layers, except where a pass is `repeated` or
    `higher`, and where it has a `precision` of its own (evaluation). A classifier with `heads` has C outputs for each
    domain, of which an example gets its own domain's.

    Raises UserError for `compiled` and a model whose layers are not known.
    """

    def __init__(
        self, name: str, module: nn.Module, encoding: str, precision: str = "fp32", compiled: CompiledLayers | None = None,
    ):  # fmt: skip
        super().__init__(module, name=name)
        self.encoding, self.precision, self.compiled = encoding, precision, compiled
        self.heads = 1
        self.role: str | None = None  # "teacher" or "student": it reads that role's version where a batch has one
        self._inputs, self._besides = inputs_of(module), without_cache(module)
        self.family = family(module)
        if compiled is not None:
            compiled.check(module, name)
        self._frozen: tuple[dict[str, int], dict[str, Tensor]] | None = None

    def __call__(
        self, batch: Batch, parameters: dict[str, Tensor] | None = None, *, repeated: bool = False, higher: bool = False,
        precision: str | None = None,
    ) -> Outputs:  # fmt: skip
        given = batch.inputs.get(f"{self.encoding}/{self.role}", batch.inputs[self.encoding])
        real, inputs = given["attention_mask"], {k: v for k, v in given.items() if k in self._inputs} | self._besides
        low = (precision or self.precision) == "bf16"
        if low:
            given = {n: t.to(torch.bfloat16) for n, t in (parameters or {}).items()}
            parameters = {**self._frozen_copies(), **self.flat.leaves(low_precision=True), **given}
        dropout = self.module.training and self._drops_attention()
        kind = attention(batch.labels.device, inputs["input_ids"].shape[1], low, dropout, repeated or higher)
        if self.inner.attention:
            kind = SCORES
        if self.family.ready_mask:
            dtype = torch.bfloat16 if low else next(self.module.parameters()).dtype
            inputs["attention_mask"] = attention_mask(real, kind, dtype)
        math = (
            sdpa_kernel(SDPBackend.MATH) if repeated or higher else nullcontext()
        )  # where a model knows no other attention
        compiled = None if repeated or higher or precision is not None else self.compiled
        lean = lean_layers(self.module, self.family.lean, higher, compiled, self.inner.whole)
        own = nullcontext() if self.family.attention_dropout is None else _attending(self.module.config, kind)
        weights = nullcontext() if parameters is None else swapped(self.module, parameters)
        with own, lean, math, self._reading(real, batch), weights:
            out = self.module(**inputs)
        found = {name: _full(t) for name, t in out.items()} if self.inner else {"logits": _full(out.logits)}
        if self.heads > 1:
            each = found["logits"].unflatten(-1, (self.heads, -1))  # [B, heads, C]
            found["logits"] = each[torch.arange(len(each), device=each.device), batch.columns["domain"]]
        return Outputs(**found)

    @contextmanager
    def _reading(self, real: Tensor, batch: Batch):
        """The module's forward gives what `inner` wants, read where its weights are those of the pass."""
        if not self.inner:
            yield
            return
        module, forward, before = self.module, self.module.forward, self.module.__dict__.get("forward")
        domains = batch.columns["domain"] if self.inner.domain else None
        module.forward = lambda **inputs: self.inner.read(module, forward, inputs, real, domains)
        try:
            yield
        finally:
            del module.forward
            if before is not None:
                module.forward = before

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self._frozen = None

    def copies(self) -> list[Tensor]:
        return [*super().copies(), *(() if self._frozen is None else self._frozen[1].values())]

    def _drops_attention(self) -> bool:
        name = self.family.attention_dropout
        return name is not None and getattr(self.module.config, name, 0.0) > 0

    def _frozen_copies(self) -> dict[str, Tensor]:
        """bf16 copies of the weights that are not trained, made again when one was written to."""
        frozen = self.flat.frozen
        stamp = {n: p._version for n, p in frozen.items()}
        if self._frozen is None or self._frozen[0] != stamp:
            self._frozen = stamp, {n: p.detach().to(torch.bfloat16) for n, p in frozen.items()}
        return self._frozen[1]


def attention(device: torch.device, length: int, low_precision: bool, dropout: bool, unfused: bool) -> str:
    """Which attention of transformers a pass over `length` tokens takes: "eager" or "sdpa" (fused).

    Fused kernels have neither forward mode nor second derivatives, and a repeated pass would see other dropout masks
    (`unfused`). On the CPU none does dropout, and plain matrix products are the faster ones in bf16 and below 64 tokens
    (docs/log.md).
    """
    if unfused:
        return "eager"
    return "eager" if device.type == "cpu" and (low_precision or dropout or length < 64) else "sdpa"


def describe_attention(device: torch.device, low_precision: bool) -> str:
    """What `attention` chooses in a meta-step, for a reader."""
    if device.type == "cpu" and low_precision:
        return "plain in every pass"
    longer = "for 64 tokens and more" if device.type == "cpu" else "in every other pass"
    return f"plain in the student's pilot and its forward-mode pass, fused {longer}"


def attention_mask(mask: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """[B, L] of 0 and 1 -> what that attention takes as it is: bool [B, 1, L, L], true where a query may look at a key, or
    for "eager" what is added to the scores, [B, 1, 1, L]."""
    if kind == "sdpa":
        return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


@contextmanager
def _attending(config: PretrainedConfig, kind: str):
    before = config._attn_implementation
    if before == kind:
        yield
        return
    config._attn_implementation = kind
    try:
        yield
    finally:
        config._attn_implementation = before


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
