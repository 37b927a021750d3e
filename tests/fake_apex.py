"""NVIDIA apex's FusedAdam where there is none: its signature and its habits, its arithmetic in plain torch.

Read at NVIDIA/apex, apex/optimizers/fused_adam.py and csrc/multi_tensor_adam.cu. Other than the real one it runs on a CPU,
and also in float64, so that tests can be exact.
"""

import textwrap

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert not amsgrad and not master_weights
        lr = torch.tensor(lr, dtype=torch.float32) if capturable else lr
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode, self.set_grad_none, self.capturable = int(adam_w_mode), set_grad_none, capturable
        if capturable:
            self._step_supports_amp_scaling = True
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        assert all(given is None for given in (closure, grads, output_params, scale, grad_norms))
        for group in self.param_groups:
            device = group["params"][0].device
            # counted by the flag of the group before, or of the step before: too late for this one
            counted = (self._dummy_overflow_buf != 1).to(torch.int32) if self.capturable else 1
            if "step" in group:
                group["step"] += counted
            else:
                group["step"] = torch.tensor([1], dtype=torch.int32) if self.capturable else 1
            factor = torch.ones(())
            if self.capturable:
                found = torch.zeros(1) if grad_scaler is None else grad_scaler._check_inf_per_device(self)[device]
                self._dummy_overflow_buf.copy_(found)
                if grad_scaler is not None:
                    factor = grad_scaler._get_scale_async().double().reciprocal().float()
                assert isinstance(group["lr"], torch.Tensor) and group["step"].dtype == torch.int32
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                self._kernel(group, p.grad.data, p.data, state["exp_avg"], state["exp_avg_sq"], factor)

    def _kernel(self, group, g, p, m, v, factor):
        """Writes behind autograd's back, as a kernel does, and nothing where the flag is 1."""
        (b1, b2), t = group["betas"], torch.as_tensor(group["step"]).reshape(())
        c1, c2 = (1 - torch.tensor(b, dtype=p.dtype) ** t for b in (b1, b2))
        clipped = g * factor
        new_m = b1 * m + (1 - b1) * clipped
        new_v = b2 * v + (1 - b2) * clipped * clipped
        move = (new_m / c1) / ((new_v / c2).sqrt() + group["eps"]) + group["weight_decay"] * p
        new_p = p - group["lr"] * move
        noop = self._dummy_overflow_buf == 1
        for target, new in ((g, clipped), (p, new_p), (m, new_m), (v, new_v)):
            target.data.copy_(torch.where(noop, target, new))


FusedAdam.__module__ = "apex.optimizers.fused_adam"  # by which the pilot knows it


def install(folder, monkeypatch, kernels=True):
    """An apex that can be imported from `folder`, with its compiled `amp_C` or without."""
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "from fake_apex import FusedAdam"}
    if kernels:
        files["amp_C.py"] = ""
    write(folder, files, monkeypatch)


def install_namesake(folder, monkeypatch):
    """The other apex, laid out as it is. To import it would be to run a stranger's code."""
    write(
        folder,
        {"apex/__init__.py": "raise SystemExit('imported')", "apex/views.py": "", "apex/models.py": ""},
        monkeypatch,
    )


def write(folder, files, monkeypatch):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)
