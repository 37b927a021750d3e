"""What the passes of `kernel_cases.py` have to return, in float64, and how far from it a result may be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases import ALPHA, DTYPES, FUSED, Case, Inputs, T

# Of each tensor, relative to its norm and to its largest number. float32: sums over 130,000 classes and the difference
# of two logarithms, times T^2. bfloat16: the result is rounded to 8 bits (2^-8 at most). With last layers the logits are rounded
# too, and the gradient at them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-3}
FUSED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}
LIGER = 2  # times as much: in bfloat16 it rounds twice, losses of rows and sums over chunks as well
CHUNK = {"cpu": 2**21, "cuda": 2**26}  # logits of the truth at a time


class WrongError(AssertionError):
    """An implementation does not compute the function that it is timed for."""


def validate(name: str, case: Case, x: Inputs, results: dict[str, list[Tensor]]) -> dict[str, float]:
    """The largest error of each implementation's results. Raises WrongError where one is too large or not a number."""
    largest = {}
    for implementation, found in errors(name, case, x, results).items():
        for i, (error, tensor) in enumerate(zip(found, results[implementation], strict=True)):
            allowed = tolerance(name, case, implementation, tensor)
            if not error <= allowed:
                raise WrongError(
                    f"{implementation}, {name} {case.name}: tensor {i} is {error:.1e} from float64, {allowed:.0e} is allowed."
                )
        largest[implementation] = max(found)
    return largest


def tolerance(name: str, case: Case, implementation: str, tensor: Tensor) -> float:
    if name in FUSED:
        allowed = FUSED_TOLERANCE[DTYPES[case.dtype]]
    else:
        allowed = TOLERANCE[DTYPES[case.dtype] if implementation == "liger" else tensor.dtype]
    return allowed * LIGER if implementation == "liger" and case.dtype == "bf16" else allowed


class Distance:
    """Of a tensor from the truth, which comes in parts."""

    def __init__(self):
        self.off = self.norm = self.most = self.largest = 0.0

    def add(self, got: Tensor, right: Tensor) -> None:
        if got.shape != right.shape:
            raise WrongError(f"a result is {tuple(got.shape)} where {tuple(right.shape)} is expected.")
        off = got.double() - right
        self.off += off.square().sum().item()  # NaN where one number is
        self.norm += right.square().sum().item()
        self.most = max(self.most, off.abs().max().item())
        self.largest = max(self.largest, right.abs().max().item())

    def relative(self) -> float:
        """A row that is wrong shows in the norm, a number that is wrong in the maximum."""
        return max((self.off / self.norm) ** 0.5, self.most / self.largest)


def errors(name: str, case: Case, x: Inputs, results: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    distances = {n: [Distance() for _ in found] for n, found in results.items()}
    loss = 0.0
    for rows, expected in truth(name, case, x):
        has_loss = not expected[0].dim()
        loss = loss + expected[0] if has_loss else None
        for n, found in results.items():
            tensors = list(zip(distances[n], found, expected, strict=True))
            for distance, got, right in tensors[has_loss:]:
                distance.add(got[rows], right)
    if loss is not None:
        for n, found in results.items():
            distances[n][0].add(found[0], loss)
    return {n: [d.relative() for d in found] for n, found in distances.items()}


def truth(name: str, case: Case, x: Inputs) -> Iterator[tuple[slice, list[Tensor]]]:
    """What a pass returns, for some rows at a time. A loss [] comes first; it is the part of these rows."""
    if name in FUSED:
        yield slice(None), fused_truth(name, case, x)
        return
    for rows in chunks(case, x.labels.device):
        student, *teachers = (t[rows].detach().double().requires_grad_() for t in (x.student, *x.teachers))
        labels = None if name == "cotangent" else x.labels[rows]
        loss = plain(student, teachers, labels, T, ALPHA) / case.rows
        if name == "forward":
            yield rows, [loss.detach()]
            continue
        (gradient,) = torch.autograd.grad(loss, student, create_graph=name != "backward")
        if name == "backward":
            yield rows, [loss.detach(), gradient]
            continue
        to_student, *to_teachers = torch.autograd.grad(gradient, [student, *teachers], x.tangent[rows].double())
        yield rows, to_teachers if name == "cotangent" else [gradient.detach(), to_student, *to_teachers]


def fused_truth(name: str, case: Case, x: Inputs) -> list[Tensor]:
    temperature, alpha = (T, ALPHA) if name == "fused" else (1.0, 1.0)
    weights = [w.detach().double() for w in x.weights]
    loss, to_hidden, to_weight = 0.0, [], torch.zeros_like(weights[0])
    for rows in chunks(case, x.labels.device):
        hidden = [h[rows].detach().double() for h in x.hidden]
        student, *teachers = (h @ w.T for h, w in zip(hidden, weights, strict=True))
        student.requires_grad_()
        labels = x.labels[rows] if name == "fused" else None
        part = plain(student, teachers, labels, temperature, alpha) / case.rows
        (gradient,) = torch.autograd.grad(part, student)
        loss = loss + part.detach()
        to_hidden.append(gradient @ weights[0])
        to_weight.addmm_(gradient.T, hidden[0])
    return [loss, torch.cat(to_hidden), to_weight]


def plain(student: Tensor, teachers: list[Tensor], labels: Tensor | None, T: float, alpha: float) -> Tensor:
    """The loss's sum over rows; no number of it comes from the code that is checked."""
    log_p, log_q = (F.log_softmax(z / T, -1) for z in (sum(teachers) / len(teachers), student))
    soft = alpha * T * T * (log_p.exp() * (log_p - log_q)).sum()
    if labels is None:
        return soft
    return soft - (1 - alpha) * F.log_softmax(student, -1).gather(-1, labels.unsqueeze(-1)).sum()


def chunks(case: Case, device: torch.device) -> list[slice]:
    size = max(1, CHUNK[device.type] // case.classes)
    return [slice(i, min(i + size, case.rows)) for i in range(0, case.rows, size)]
