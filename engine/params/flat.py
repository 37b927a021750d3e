"""Flat parameters: every trainable weight of a module in one contiguous buffer, and vectors of the same shape.

The parameters become views into the buffer, so `state_dict` and `save_pretrained` are what they were, while a snapshot is
one copy, a pilot step one pass and a norm one reduction. The layout is

    [ vectors (biases, norms: no weight decay) | matrices | embedding tables ]        each at a multiple of ALIGNMENT

and everything before the tables is `dense`. A batch touches a few hundred of a table's thousands of rows, so the gradient
of a table is kept as `Rows`: the looked-up rows are the leaves that autograd differentiates, not the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from engine.params.swapped import every
from engine.params.vectors import Rows, Vector

ALIGNMENT = 16  # elements: 64 bytes of float32, what vector loads like
TABLE_ROWS = 2048  # an embedding with fewer rows is not worth the book-keeping


@dataclass
class Table:
    """An embedding whose weight is looked up by rows."""

    name: str
    modules: list[nn.Embedding]
    weight: Tensor  # [V, H], the view into the flat buffer
    row_wise: bool = True


@dataclass
class Lookups:
    """What a forward looked up: the leaves to differentiate in the tables' stead."""

    hooked: set[int] = field(default_factory=set)  # the tables that were looked up by rows
    ids: list[tuple[int, Tensor, int | None]] = field(default_factory=list)  # table, ids [...], padding id
    leaves: list[Tensor] = field(default_factory=list)  # [..., H]


class FlatParameters:
    """The trainable weights of `module` in `weights` [N], a bf16 `shadow` [N] on demand, gradients in `gradients` [N].

    Raises ValueError for a module without trainable weights, or whose weights differ in dtype or device. Move the module
    to its device, and freeze what is to stay, before: `check` raises RuntimeError where the parameters no longer are views into the
    buffer, or other ones are trainable. Embeddings of `table_rows` rows and more are kept by rows; None keeps none. `sparse` of a
    trained embedding is switched off.
    """

    def __init__(self, module: nn.Module, table_rows: int | None = TABLE_ROWS, name: str = "module"):
        """`name` is what messages call the module."""
        self.module, self.name = module, name
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        for p in self.frozen.values():
            p.grad = None  # an optimizer would go on moving them by it, and a view would keep an older buffer alive
        kinds = {(p.dtype, p.device) for p in self.parameters.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{d} on {device}" for d, device in kinds)) or "none"
            raise ValueError(f"the {name} needs trainable weights of one dtype on one device; found {found}.")
        paths = {name: name.rpartition(".") for name in self.parameters}
        self._owners = {name: (module.get_submodule(path), key) for name, (path, _, key) in paths.items()}
        for m in module.modules():
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.weight.requires_grad:
                m.sparse = False  # a sparse gradient could not be written into a buffer
        embeddings = self._tables(table_rows)
        vectors = [n for n, p in self.parameters.items() if p.ndim < 2]
        matrices = [n for n, p in self.parameters.items() if p.ndim >= 2 and n not in embeddings]
        self.offsets, total = {}, 0
        bounds = []
        for names in (vectors, matrices, embeddings):
            for name in names:
                self.offsets[name] = total
                total += -(-self.parameters[name].numel() // ALIGNMENT) * ALIGNMENT
            bounds.append(total)
        self.no_decay, self.dense = bounds[0], bounds[1]  # elements before the matrices, before the tables
        ((dtype, device),) = kinds
        self.weights = torch.zeros(total, dtype=dtype, device=device)
        for name, view in self.views(self.weights).items():
            p = self.parameters[name]
            view.copy_(p.data)
            p.data = view
        self.tables = [Table(n, modules, self.parameters[n].data) for n, modules in embeddings.items()]
        self.dense_names = [name for name in self.offsets if name not in embeddings]
        ends = [self.offsets[name] + self.parameters[name].numel() for name in self.dense_names]
        gaps = [i for end in ends for i in range(end, -(-end // ALIGNMENT) * ALIGNMENT)]
        self._gaps = torch.tensor(gaps, dtype=torch.int64, device=device)
        self._gradients: Tensor | None = None
        self._touched: list[list[Tensor]] = [[] for _ in self.tables]
        self._shadow: Tensor | None = None
        self._stamp = -1

    def _tables(self, table_rows: int | None) -> dict[str, list[nn.Embedding]]:
        """Big weights that only embeddings hold. One that a forward also uses otherwise is found out by `vector`."""
        if table_rows is None:
            return {}
        holders: dict[int, list[nn.Module]] = {}
        for module in self.module.modules():
            for p in module._parameters.values():
                holders.setdefault(id(p), []).append(module)
        return {
            name: holders[id(p)]
            for name, p in self.parameters.items()
            if p.ndim == 2
            and p.shape[0] >= table_rows
            and all(type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq for m in holders[id(p)])
        }

    def views(self, flat: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`flat` [N] (or [dense]) cut into the parameters' shapes."""
        shapes = {n: self.parameters[n] for n in (self.offsets if names is None else names)}
        return {n: flat[self.offsets[n] :][: p.numel()].view(p.shape) for n, p in shapes.items()}

    def check(self, added: bool = False) -> None:
        """RuntimeError where a parameter was given new storage, as `module.to(device)` does, was exchanged for another, or was
        frozen or unfrozen; with `added` also where the module has others, which takes a walk through it."""
        problem = self._changed() or (self._added() if added else None)
        if problem is not None:
            raise RuntimeError(
                f"the {self.name}: {problem}. Move and freeze modules first, then make one MetaStep (or Learner) of each."
            )

    def holds(self) -> bool:
        """Whether these are the module's trainable weights, by their names, as they now stand."""
        trainable = {name for name, p in self.module.named_parameters() if p.requires_grad}
        return trainable == self.parameters.keys() and self._changed() is None

    def _added(self) -> str | None:
        own = {id(p) for p in self.parameters.values()}
        now = {id(p) for m in every(self.module) for p in m._parameters.values() if p is not None and p.requires_grad}
        return None if now == own else "weights came or went after it was flattened, and no step would train new ones"

    def _changed(self) -> str | None:
        """What no longer fits of the weights that there were."""
        for name, p in self.frozen.items():
            if p.requires_grad:
                return f"{name} was unfrozen after its module was flattened, so no step would train it"
        fake = type(self.weights) is not Tensor  # it stands for one (FakeTensor) and has no address
        base, size = 0 if fake else self.weights.data_ptr(), self.weights.element_size()
        for name, p in self.parameters.items():
            owner, key = self._owners[name]
            if not p.requires_grad:
                return f"{name} was frozen after its module was flattened, and steps would go on moving it"
            if not fake and (owner._parameters.get(key) is not p or p.data_ptr() != base + size * self.offsets[name]):
                return (
                    f"{name} has left the flat buffer: the module was moved after it was flattened, or flattened again (for "
                    "another MetaStep, or because other weights were frozen)")  # fmt: skip
        return None

    # --- what gradients are taken against

    def leaves(self, low_precision: bool = False) -> dict[str, Tensor]:
        """The tensors a forward runs on, by name: the parameters, or the bf16 shadow's views."""
        return self._shadow_leaves() if low_precision else self.parameters

    @property
    def shadow(self) -> Tensor | None:
        """bf16 copy of `weights` [N], once `leaves(low_precision=True)` has been asked for."""
        return self._shadow

    def _shadow_leaves(self) -> dict[str, Tensor]:
        # Writes through the flat buffer keep the shadow themselves; any other in-place write moves a version counter.
        stamp = sum(p._version for p in self.parameters.values())
        if self._shadow is None:
            self._shadow = self.weights.to(torch.bfloat16)
            # `.data`: with a version counter of their own, so that a refresh leaves recorded graphs valid
            self._leaves = {n: v.data.requires_grad_() for n, v in self.views(self._shadow).items()}
        elif stamp != self._stamp:
            with torch.no_grad():
                self._shadow.copy_(self.weights)
        self._stamp = stamp
        return self._leaves

    def stale(self) -> None:
        """The shadow is to be made again from the weights, whatever was written since."""
        self._stamp = -1

    @contextmanager
    def lookups(self, tangents: Vector | None = None, differentiate: bool = True):
        """Row-wise tables for the forwards of the body: yields `Lookups`; with `tangents` the looked-up rows are duals.

        The rows a table's embedding returns are detached from the table and, with `differentiate`, require gradient.
        """
        found, handles = Lookups(), []

        def hook(table: int, padding: int | None) -> Callable:
            def looked_up(module, args, kwargs, out):
                leaf, ids = out.detach().requires_grad_(differentiate), (args[0] if args else kwargs["input"]).long()
                found.ids.append((table, ids, padding))
                if tangents is not None:
                    leaf = forward_ad.make_dual(leaf, tangents.tables[table].lookup(ids).to(leaf.dtype))
                found.leaves.append(leaf)
                return leaf.clone()  # which the forward may write to, and which is constant where it says so

            return looked_up

        try:
            for i, table in enumerate(self.tables):
                if table.row_wise and (tangents is None or isinstance(tangents.tables[i], Rows)):
                    found.hooked.add(i)
                    handles += [  # before hooks that others have left there
                        m.register_forward_hook(hook(i, m.padding_idx), with_kwargs=True, prepend=True)
                        for m in table.modules
                    ]
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def gradients_of(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None] | None, leaves: dict[str, Tensor],
        lookups: Lookups, retain_graph: bool = False,
    ) -> Vector:  # fmt: skip
        """J^T cotangents as a vector, zero where nothing depends on a weight, or where `leaves` does not name it."""
        return self.vector(*self._gradients_of(outputs, cotangents, leaves, lookups, retain_graph))

    def backward(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None] | None, leaves: dict[str, Tensor],
        lookups: Lookups,
    ) -> None:  # fmt: skip
        """Add J^T cotangents to the gradients, straight into their buffer."""
        self.add(*self._gradients_of(outputs, cotangents, leaves, lookups, False))

    def _gradients_of(self, outputs, cotangents, leaves, lookups, retain_graph):
        names = [n for n in (*self.dense_names, *(t.name for t in self.tables)) if n in leaves]
        found = torch.autograd.grad(
            outputs, [*(leaves[n] for n in names), *lookups.leaves], cotangents, retain_graph=retain_graph, allow_unused=True
        )  # fmt: skip
        return dict(zip(names, found, strict=False)), lookups, found[len(names) :]

    @torch.no_grad()
    def vector(
        self, gradients: dict[str, Tensor | None], lookups: Lookups, looked_up: Sequence[Tensor | None]
    ) -> Vector:
        """One vector from the gradients of the weights, by name, and those of the rows looked up."""
        dense = self.weights.new_empty(self.dense)
        given = [n for n in self.dense_names if gradients.get(n) is not None]
        if len(given) < len(self.dense_names):
            dense.zero_()
        else:  # all but the gaps between weights will be written
            dense.index_fill_(0, self._gaps, 0)
        if given:
            torch._foreach_copy_(list(self.views(dense, given).values()), [gradients[n] for n in given])
        return Vector(dense, [self._table(i, t, gradients, lookups, looked_up) for i, t in enumerate(self.tables)])

    def _table(self, i: int, table: Table, gradients, lookups: Lookups, looked_up) -> Rows | Tensor:
        full, dtype, H = gradients.get(table.name), self.weights.dtype, table.weight.shape[1]
        rows, values = [], []
        for (number, ids, padding), gradient in zip(lookups.ids, looked_up, strict=True):
            if number == i and gradient is not None:
                gradient = gradient.to(dtype)
                if padding is not None:  # an embedding gives its padding row no gradient
                    gradient = gradient.masked_fill((ids == padding).unsqueeze(-1), 0)
                rows.append(ids.reshape(-1))
                values.append(gradient.reshape(-1, H))
        found = Rows.summed(torch.cat(rows), torch.cat(values)) if rows else None
        if full is not None:
            if i in lookups.hooked:
                # the forward also uses the table whole (a tied output, say): by rows it would be wrong from here on
                table.row_wise = False
            return full.to(dtype) if found is None else full.to(dtype).index_add(0, found.rows, found.values)
        if found is None:
            found = Rows(torch.empty(0, dtype=torch.int64, device=self.weights.device), self.weights.new_zeros(0, H))
        return found

    def tangents(self, direction: Vector, names: Iterable[str] | None = None, dtype: torch.dtype | None = None):
        """`direction` by name, in `dtype`; a table is there only where `lookups` does not look it up by rows."""
        dense = direction.dense if dtype is None else direction.dense.to(dtype)
        found = self.views(dense, self.dense_names if names is None else names)
        for table, part in zip(self.tables, direction.tables, strict=True) if names is None else ():
            if isinstance(part, Tensor):
                found[table.name] = part if dtype is None else part.to(dtype)
            elif not table.row_wise and len(part.rows):
                raise RuntimeError(f"{table.name} is used whole, its direction is given by rows")
        return found

    # --- gradients for an optimizer

    @property
    def gradients(self) -> Tensor:
        """[N], what `add` or a plain `backward()` added since `clear_gradients`; every `.grad` is a view into it."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.weights)
            # `.data`: with version counters of their own, which tell when somebody else writes
            self._views = {name: view.data for name, view in self.views(self._gradients).items()}
            self._written = [self._views[t.name]._version for t in self.tables]
        for name, p in self.parameters.items():
            view = self._views[name]
            if p.grad is not view:  # new, dropped by `zero_grad`, or made by a `backward()` that found none
                with torch.no_grad():
                    view.zero_() if p.grad is None else view.copy_(p.grad)
                for i, table in enumerate(self.tables):
                    if table.name == name and p.grad is None:  # zero again: nothing is touched
                        self._touched[i].clear()
                        self._written[i] = view._version
                p.grad = view
        for i, table in enumerate(self.tables):
            if self._views[table.name]._version != self._written[i]:
                self._touch(i, torch.arange(len(table.weight), device=self.weights.device))
        return self._gradients

    def release_gradients(self) -> None:
        """Give their memory back, until they are asked for again."""
        self._gradients = None
        for p in self.parameters.values():
            p.grad = None
        for touched in self._touched:
            touched.clear()

    def _touch(self, table: int, rows: Tensor) -> None:
        self._touched[table].append(rows)
        self._written[table] = self._views[self.tables[table].name]._version

    @torch.no_grad()
    def add(self, gradients: dict[str, Tensor | None], lookups: Lookups, looked_up: Sequence[Tensor | None]) -> None:
        """Add what `vector` takes to the gradients, without making a vector of it."""
        self.gradients  # noqa: B018  (makes the buffer)
        given = [n for n in self.dense_names if gradients.get(n) is not None]
        if given:
            torch._foreach_add_([self._views[n] for n in given], [gradients[n] for n in given])
        for i, table in enumerate(self.tables):
            part, grad = self._table(i, table, gradients, lookups, looked_up), self._views[table.name]
            if isinstance(part, Rows):
                grad.index_add_(0, part.rows, part.values)
                self._touch(i, part.rows)
            else:
                grad += part
                self._touch(i, torch.arange(len(grad), device=grad.device))

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Of everything accumulated; device scalar."""
        parts = [self.gradients[: self.dense]]
        for table, touched in zip(self.tables, self._touched, strict=True):
            if touched:
                rows = touched[0] if len(touched) == 1 else torch.cat(touched).unique()
                parts.append(self._views[table.name][rows])
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Zero again: the dense part, and the rows that were touched."""
        self.gradients[: self.dense].zero_()
        for i, table in enumerate(self.tables):
            grad = self._views[table.name]
            for rows in self._touched[i]:
                grad.index_fill_(0, rows, 0)
            self._touched[i].clear()
            self._written[i] = grad._version
