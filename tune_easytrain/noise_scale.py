"""The gradient noise scale, measured in passing from the micro-batches of accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tune_easytrain.batch import count_samples
from tune_easytrain.task import Batch

_DECAY = 0.99
"""What an optimizer step leaves of the averages: they look back over about a hundred steps."""

_PART = 2**16
"""So many numbers of a gradient have their norm taken at once on a CPU."""


@dataclass(frozen=True, slots=True)
class GradientSpread:
    """What the micro-batches of one window say of the gradient's noise; sums, so that workers' add up.

    Attributes:
        num_microbatches: micro-batches with a gradient.
        num_samples: their samples.
        weight: what their mean losses average over, samples or tokens: the sum of their weights `w`.
        weighted_squares: the sum of `w |g|²`, with `g` the gradient of a micro-batch's own mean loss; NaN
            where it is not known.
    """

    num_microbatches: int
    num_samples: int
    weight: float
    weighted_squares: float

    def over_all(self, add_up: Callable[[Sequence[float]], list[float]]) -> GradientSpread:
        """Return the spread over all workers; `add_up` sums each number over them."""
        num_microbatches, num_samples, weight, weighted_squares = add_up(
            [self.num_microbatches, self.num_samples, self.weight, self.weighted_squares]
        )
        return GradientSpread(round(num_microbatches), round(num_samples), weight, weighted_squares)

    def noise_and_signal(self, mean_square: float) -> tuple[float, float]:
        """Return unbiased estimates of `tr Σ` per sample and of `|G|²`, the true gradient's squared norm.

        A micro-batch's gradient has mean `G` and covariance `Σ_w / w`. So `Σ w |g - mean|²` is expected to
        be `(k - 1) tr Σ_w` for `k` micro-batches of any weights, and `|mean|²` to be `|G|² + tr Σ_w / W`.
        With equal weights these are the estimators of McCandlish et al. 2018 (arXiv:1812.06162), appendix
        A.1. Where `w` counts tokens, `tr Σ_w` becomes that of a sample by the mean number of tokens.

        Args:
            mean_square: squared norm of the gradient of the whole window's mean loss.

        Raises ValueError for fewer than two micro-batches.
        """
        if self.num_microbatches < 2:
            raise ValueError("the noise of a gradient takes two micro-batches or more")
        spread = max(0.0, self.weighted_squares - self.weight * mean_square)  # below 0 by rounding alone
        noise = spread / (self.num_microbatches - 1)
        return noise * self.num_samples / self.weight, mean_square - noise / self.weight


class NoiseScale:
    """Moving averages of noise and signal over optimizer steps; their ratio is the noise scale in samples.

    The ratio of averages is used, for the average of ratios would be biased (McCandlish et al. 2018).
    """

    def __init__(self) -> None:
        self._noise = self._signal = 0.0

    @property
    def value(self) -> float | None:
        """`tr Σ / |G|²` in samples; None before the first window, and while noise hides the gradient."""
        return self._noise / self._signal if self._signal > 0 else None

    def add(self, spread: GradientSpread, mean_square: float) -> None:
        """Take one window into account; one of a single micro-batch, or with a NaN, says nothing."""
        if spread.num_microbatches < 2 or math.isnan(spread.weighted_squares):
            return
        noise, signal = spread.noise_and_signal(mean_square)
        # Both begin at 0, which the ratio does not show.
        self._noise = _DECAY * self._noise + (1 - _DECAY) * noise
        self._signal = _DECAY * self._signal + (1 - _DECAY) * signal

    def state(self) -> dict[str, float]:
        """Return what `restore` needs."""
        return {"noise": self._noise, "signal": self._signal}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        self._noise, self._signal = state["noise"], state["signal"]


class SpreadMeter:
    """Takes the squared norm of every micro-batch's gradient while the gradients accumulate.

    A hook sees each parameter's gradient before it is added to those of the micro-batches before it, so
    no copy is made: one number per parameter is kept until the micro-batch is over. `weigh` and `backward`
    are for `accumulate_gradients`.
    """

    def __init__(self, model: nn.Module, weight: Callable[[Batch], int] | None = None) -> None:
        """`weight` says what the mean loss of a batch averages over; default: its samples."""
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._weight = weight
        self._norms: dict[int, Tensor] = {}
        self.begin()
        for number, parameter in enumerate(self._parameters):
            parameter.register_hook(partial(self._see, number))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Begin a window, perhaps one that memory ran out in."""
        self._norms.clear()
        self._microbatch = (0, 0.0)
        self._num_microbatches = self._num_samples = 0
        self._total_weight = 0.0
        self._squares: Tensor | None = None
        self._mean_square: Tensor | None = None
        self._is_whole = True

    def weigh(self, batch: Batch) -> int:
        """Return the weight of the next micro-batch."""
        num_samples = count_samples(batch)
        weight = num_samples if self._weight is None else self._weight(batch)
        self._microbatch = (num_samples, float(weight))
        return weight

    def backward(self, weighted_loss: Tensor) -> None:
        """Run the backward pass of a micro-batch's loss times its weight, and take the gradient's norm."""
        self._norms.clear()
        weighted_loss.backward()  # type: ignore[no-untyped-call]
        num_samples, weight = self._microbatch
        self._num_microbatches += 1
        self._num_samples += num_samples
        self._total_weight += weight
        if self._norms:
            squares = _sum_of_squares(list(self._norms.values())) / weight
            self._squares = squares if self._squares is None else self._squares + squares
        self._norms.clear()

    def measure_mean(self) -> None:
        """Take the norm of the gradients as they are now: those of the window's mean loss."""
        norms = [_norm(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        self._mean_square = _sum_of_squares(norms) if norms else None

    @property
    def mean_square(self) -> float:
        """Squared norm of the gradient that `measure_mean` saw."""
        return 0.0 if self._mean_square is None else float(self._mean_square)

    @property
    def spread(self) -> GradientSpread:
        """What this worker's micro-batches of the window say.

        NaN where a parameter's gradient came in several parts in one pass, as of one that is used within
        and outside of a reentrant checkpoint: their norms do not add up to that of their sum.
        """
        squares = 0.0 if self._squares is None else float(self._squares)
        return GradientSpread(
            self._num_microbatches,
            self._num_samples,
            self._total_weight,
            squares if self._is_whole else math.nan,
        )

    def _see(self, number: int, gradient: Tensor) -> None:
        self._is_whole = self._is_whole and number not in self._norms
        self._norms[number] = _norm(gradient)


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = values.detach()
    if values.device.type == "cpu" and values.is_contiguous():
        # Its kernel adds millions of squares up in a few fp32 numbers: 1e-4 off, and the signal 1e-3.
        parts = torch.split(values.view(-1), _PART)
        norm: Tensor = torch.stack([_own_norm(part) for part in parts]).double().square().sum().sqrt()
        return norm
    return _own_norm(values)


def _own_norm(values: Tensor) -> Tensor:
    is_half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if is_half else None)
    return norm


def _sum_of_squares(norms: list[Tensor]) -> Tensor:
    return torch.stack([norm.double() for norm in norms]).square().sum()
