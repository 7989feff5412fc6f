"""Stochastic gradient descent on whole manifolds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from neuromod_ext import functional
from neuromod_ext._checks import accumulation_dtype
from neuromod_ext.optim.metric import EmpiricalMetric
from neuromod_ext.topology import Topology


class ManifoldSGD(Optimizer):
    r"""Steepest descent of the expected loss under a bounded movement of the manifold.

    .. math::
        d &= G^{-1} g + \lambda P \\
        m &\leftarrow \mu m + (1 - \tau) d \\
        P &\leftarrow P - \eta\, (d + \mu m \text{ if nesterov else } m)

    G is the Gram matrix of the layer's topology, in closed form, or an
    :class:`~neuromod_ext.optim.EmpiricalMetric`. It is ``torch.optim.SGD`` on coordinates Q with
    P = G^{-1/2} Q, so the path of W(s) does not depend on the basis that spans the manifold.
    Parameters of ordinary layers are updated as by ``torch.optim.SGD``. Where G⁻¹ has entries above
    1 (2 for the cosine and sine of an ellipse, 4 for the ends of a line), steps are as much longer:
    begin with half the rate of SGD, or a quarter.

    Parameters are updated in place in one pass by a fused kernel, those of a group together.

    Args:
        params: Parameters or parameter groups. Those of manifold layers bear their topology.
        lr: η, 1/(2λ) in the paper's terms; at least 0, a number or a tensor of one element.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ ≥ 0. It decays ∫ρ‖W(s)‖² ds, the norm of the whole manifold.
        nesterov: Use Nesterov's momentum.
        maximize: Ascend instead.
        metric: The metric of parameters of its topology, in place of the closed form.
        foreach: Step all parameters of a group that have one dtype and device in one call; on CUDA
            that is one kernel for two dozen of them. None is yes.
        capturable: Steps may be captured in a CUDA graph: the rate is a tensor on the parameters'
            device, which kernels read when they run, and schedulers write. Make a step before the
            capture, which allocates the momentum.

    Raises:
        ValueError: A number out of its range; an empirical metric with ``capturable``, since it is
            inverted on the host.

    Source: ΔP = −(1/2λ) [∫M ds]⁻¹ ∫g ds of Benjamin et al., "Walking the Weight Manifold";
    momentum and weight decay in this metric are our choice.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        metric: EmpiricalMetric | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        _expect("lr >= 0", lr >= 0 and math.isfinite(lr), lr)
        _expect("momentum >= 0", momentum >= 0 and math.isfinite(momentum), momentum)
        _expect("dampening to be finite", math.isfinite(dampening), dampening)
        _expect(
            "weight_decay >= 0", weight_decay >= 0 and math.isfinite(weight_decay), weight_decay
        )
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "ManifoldSGD: expected momentum > 0 and dampening = 0 for nesterov, "
                f"got momentum = {momentum} and dampening = {dampening}"
            )
        if capturable and metric is not None:
            raise ValueError(
                "ManifoldSGD: expected no empirical metric with capturable, got one; it is "
                "inverted on the host"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
        }
        self.metric = metric
        self._inverses: dict[tuple[Topology, torch.device, torch.dtype], Tensor] = {}
        super().__init__(params, defaults)
        if not any(_topology(p) for group in self.param_groups for p in group["params"]):
            warnings.warn(
                "ManifoldSGD: no parameter of a manifold layer is among params, so this is plain "
                "SGD; pass the parameters of the model itself, not copies of them",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with numbers of its own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["capturable"]:
            device = group["params"][0].device if group["params"] else None
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float64, device=device)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: beside torch's own, the empirical metric."""
        return {**super().__getstate__(), "metric": self.metric}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state of before there were ``foreach`` and ``capturable``, too."""
        super().__setstate__(state)
        vars(self).setdefault("_inverses", {})
        for group in self.param_groups:
            group.setdefault("foreach", None)
            group.setdefault("capturable", False)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            The loss, if there is a closure.

        Raises:
            RuntimeError: A gradient is sparse; an empirical metric has seen no condition; a CUDA
                graph captures a step that is not ``capturable``, or the first one with momentum.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        empirical = None if self.metric is None else self.metric.inverse()
        for group in self.param_groups:
            batches: dict[object, list[Tensor]] = {}
            for i, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError("ManifoldSGD: expected dense gradients, got a sparse one")
                kind = (param.device, param.dtype, self._is_first(param, group))
                batches.setdefault(i if group["foreach"] is False else kind, []).append(param)
            for params in batches.values():
                self._step_params(params, group, empirical)
        return loss

    def _is_first(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether it has no momentum yet."""
        return group["momentum"] != 0 and self.state[param].get("momentum_buffer") is None

    def _step_params(
        self, params: list[Tensor], group: dict[str, Any], empirical: Tensor | None
    ) -> None:
        """Step parameters of one dtype and device, all of them for the first time or none."""
        first_step = self._is_first(params[0], group)
        if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            _check_capture(group, first_step)
        if first_step:
            for param in params:
                self.state[param]["momentum_buffer"] = torch.empty_like(param)
        buffers = [self.state[p]["momentum_buffer"] for p in params] if group["momentum"] else []
        rate = group["lr"]
        if isinstance(rate, Tensor) and not rate.is_cpu:
            rate = rate.to(params[0].device)
        functional.manifold_step_foreach_(
            [_at_least_1d(p) for p in params],
            [_at_least_1d(p.grad) for p in params if p.grad is not None],
            [_at_least_1d(buffer) for buffer in buffers],
            [self._metric_inverse(p, empirical) for p in params],
            lr=rate,
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
        )

    def _metric_inverse(self, param: Tensor, empirical: Tensor | None) -> Tensor | None:
        topology = _topology(param)
        if topology is None:
            return None
        dtype = accumulation_dtype(param.dtype)
        if empirical is not None and self.metric is not None and topology == self.metric.topology:
            return empirical.to(param.device, dtype)
        key = (topology, param.device, dtype)
        if key not in self._inverses:
            self._inverses[key] = topology.gram_inverse().to(param.device, dtype)
        return self._inverses[key]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; that of an empirical metric is in it, as ``metric``."""
        state = super().state_dict()
        if self.metric is not None:
            state["metric"] = self.metric.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, that of an empirical metric included."""
        super().load_state_dict(state_dict)
        if self.metric is not None and "metric" in state_dict:
            self.metric.load_state_dict(state_dict["metric"])


def _expect(what: str, holds: bool | Tensor, got: object) -> None:
    if not holds:
        raise ValueError(f"ManifoldSGD: expected {what}, got {got}")


def _check_capture(group: dict[str, Any], first_step: bool) -> None:
    if not group["capturable"]:
        raise RuntimeError(
            "ManifoldSGD: expected capturable=True of what a CUDA graph captures, got False; the "
            "rate of the moment would be captured"
        )
    if first_step:
        raise RuntimeError(
            "ManifoldSGD: expected a step before a CUDA graph captures one, got none; the first "
            "step allocates the momentum"
        )


def _topology(param: Tensor) -> Topology | None:
    return getattr(param, "manifold", None)


def _at_least_1d(t: Tensor) -> Tensor:
    return t if t.dim() else t.view(1)
