"""The loss scale of fp16: gradients too small for its range are brought into it, and too large ones skipped.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2, with the dynamic scale of torch's GradScaler.
That one looks at the parameters of one optimizer on one worker; here all workers have to skip the same steps,
also where each steps over a part of the parameters only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tune_easytrain.errors import NonFiniteLossError
from tune_easytrain.settings import Precision

_FIRST_SCALE_LOG2 = 16
_SMALLEST_SCALE = 2.0**-24
"""fp16 has no smaller number: what overflows here is not for want of range."""

_GROWTH_INTERVAL = 2000


class LossScale:
    """Multiplies losses before the backward pass and divides gradients after it; 1 but for fp16.

    Halved when a gradient is not finite, and doubled after 2000 steps without one that is not.

    Attributes:
        scale: what losses are multiplied by.
        num_skipped_steps: windows that were not followed by an optimizer step.
    """

    def __init__(self, precision: Precision, microbatch_weight: int) -> None:
        """Losses are multiplied by their micro-batch's weight too, which the first scale allows for."""
        self.is_on = precision == "fp16"
        weight_log2 = (microbatch_weight - 1).bit_length()
        self.scale = 2.0 ** (_FIRST_SCALE_LOG2 - weight_log2) if self.is_on else 1.0
        self.num_skipped_steps = 0
        self._num_good_steps = 0

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss times the scale."""
        if not self.is_on:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divide the gradients by the scale; return whether they are finite, and may be stepped with.

        The scale for the next window follows from it. Raises NonFiniteLossError where they are not at the
        smallest scale either.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)
        norms = torch._foreach_norm(gradients, float("inf"))
        is_finite = bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
        if is_finite:
            self._num_good_steps += 1
            if self._num_good_steps == _GROWTH_INTERVAL:
                self.scale, self._num_good_steps = 2.0 * self.scale, 0
            return True
        if self.scale <= _SMALLEST_SCALE:
            raise NonFiniteLossError(
                f"gradients are not finite at a loss scale of {self.scale:g} either; use train.precision: "
                "bf16, lower the learning rate, or look for bad samples"
            )
        self.scale, self._num_good_steps = self.scale / 2.0, 0
        self.num_skipped_steps += 1
        return False

    def state(self) -> dict[str, float]:
        """Return what `restore` needs."""
        return {
            "scale": self.scale,
            "num_skipped_steps": self.num_skipped_steps,
            "num_good_steps": self._num_good_steps,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a state, unless precision is another one now."""
        if self.is_on:
            self.scale = state["scale"]
            self.num_skipped_steps = int(state["num_skipped_steps"])
            self._num_good_steps = int(state["num_good_steps"])
