from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.noise_scale import GradientSpread, NoiseScale, SpreadMeter

WIDTH = 5


class Dot(nn.Module):
    """A model whose gradient for a sample is the sample itself, as long as the loss is the mean output."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.rest = nn.Parameter(torch.zeros(WIDTH - 2, dtype=dtype))

    def forward(self, batch: Tensor) -> Tensor:
        return batch[:, :2] @ self.first + batch[:, 2:] @ self.rest


def mean_output(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


def measure(
    samples: Tensor, sizes: Sequence[int], model: nn.Module | None = None, weight: int | None = None
) -> tuple[GradientSpread, float]:
    """Accumulate over micro-batches of these sizes; return the spread and the squared norm of the mean."""
    model = Dot() if model is None else model
    meter = SpreadMeter(model, None if weight is None else lambda batch: weight * len(batch))
    parts = torch.split(samples, list(sizes))
    meter.begin()
    accumulate_gradients(model, mean_output, parts, weight=meter.weigh, backward=meter.backward)
    meter.measure_mean()
    return meter.spread, meter.mean_square


several_sizes = st.lists(st.integers(1, 6), min_size=2, max_size=6)


@given(several_sizes, st.integers(0, 1000))
def test_the_noise_is_the_variance_between_microbatches_of_any_sizes(sizes: list[int], seed: int) -> None:
    samples = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    spread, mean_square = measure(samples, sizes)
    means = [part.mean(0) for part in torch.split(samples, sizes)]
    mean = samples.mean(0)
    between = sum(size * float((each - mean).square().sum()) for size, each in zip(sizes, means, strict=True))
    noise, signal = spread.noise_and_signal(mean_square)
    assert noise == pytest.approx(between / (len(sizes) - 1), rel=1e-9, abs=1e-12)
    assert signal == pytest.approx(float(mean.square().sum()) - noise / len(samples), rel=1e-9, abs=1e-12)


@given(st.integers(2, 6), st.integers(1, 6), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_with_equal_sizes_it_is_the_estimator_of_the_paper(
    num_parts: int, size: int, small_square: float, big_square: float
) -> None:
    """Equations A.2 and A.3 with B_small = size and B_big = num_parts * size."""
    big = num_parts * size
    expected_signal = (big * big_square - size * small_square) / (big - size)
    expected_noise = (small_square - big_square) / (1 / size - 1 / big)
    spread = GradientSpread(num_parts, big, big, num_parts * size * small_square)
    noise, signal = spread.noise_and_signal(big_square)
    if small_square >= big_square:  # as it is for any real gradients: the norm is convex
        assert noise == pytest.approx(expected_noise, rel=1e-9, abs=1e-9)
        assert signal == pytest.approx(expected_signal, rel=1e-9, abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=2, max_size=5), st.integers(0, 10**6))
def test_both_estimates_are_unbiased_for_a_known_covariance(sizes: list[int], seed: int) -> None:
    """Gradients are normal with mean μ and variances s². Over T windows of n samples in k parts

    the noise has variance 2 Σs⁴ / (k - 1) / T, and the signal, whose two terms are independent,
    (4 Σμ²s² / n + 2 Σs⁴ / n²) / T + that of the noise / n². Six standard deviations are allowed.
    """
    num_windows, num_samples, k = 400, sum(sizes), len(sizes)
    mu = torch.tensor([1.0, -0.5, 0.0, 0.25, 2.0], dtype=torch.float64)
    s = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    estimates = torch.tensor(
        [
            GradientSpread.noise_and_signal(
                *measure(mu + s * torch.randn(num_samples, WIDTH, generator=generator), sizes)
            )
            for _ in range(num_windows)
        ]
    )
    noise, signal = estimates.double().mean(0).tolist()
    noise_variance = float(2 * (s**4).sum()) / (k - 1) / num_windows
    mean_variance = float(4 * (mu**2 * s**2).sum() / num_samples + 2 * (s**4).sum() / num_samples**2)
    signal_variance = mean_variance / num_windows + noise_variance / num_samples**2
    assert abs(noise - float((s**2).sum())) < 6 * math.sqrt(noise_variance)
    assert abs(signal - float((mu**2).sum())) < 6 * math.sqrt(signal_variance)


def test_the_scale_of_a_linear_model_with_gaussian_noise_is_the_known_one() -> None:
    """Targets x·θ* + ε, loss (x·θ - y)²: with δ = θ - θ* and d inputs of unit variance the gradient is 2δ,

    and its covariance has trace 4 ((d + 1) |δ|² + d σ²).
    """
    generator = torch.Generator().manual_seed(0)
    d, sigma = 4, 1.5
    model = nn.Linear(d, 1, bias=False).double()
    delta = model.weight.detach().flatten()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch[:, :d]).squeeze(1) - batch[:, d]).square().mean()  # θ* is 0

    meter, scale, ratios = SpreadMeter(model), NoiseScale(), []
    noises, signals = [], []
    for _ in range(3000):
        inputs = torch.randn(30, d, generator=generator).double()
        targets = sigma * torch.randn(30, 1, generator=generator).double()
        meter.begin()
        parts = torch.split(torch.cat([inputs, targets], 1), [11, 11, 8])
        accumulate_gradients(model, loss, parts, weight=meter.weigh, backward=meter.backward)
        meter.measure_mean()
        noise, signal = meter.spread.noise_and_signal(meter.mean_square)
        noises.append(noise)
        signals.append(signal)
        scale.add(meter.spread, meter.mean_square)
        ratios.append(scale.value)
    square = float(delta.square().sum())
    for values, expected in (
        (noises, 4 * ((d + 1) * square + d * sigma**2)),
        (signals, 4 * square),
    ):
        found = torch.tensor(values)
        standard_error = float(found.std()) / math.sqrt(len(values))
        assert abs(float(found.mean()) - expected) < 5 * standard_error
        assert standard_error < 0.1 * expected  # or the test would say nothing
    # The averages look back over (1 + 0.99) / (1 - 0.99) = 199 windows: their standard errors follow.
    errors = [float(torch.tensor(values).std() / torch.tensor(values).mean()) for values in (noises, signals)]
    relative_error = math.hypot(*errors) / math.sqrt(199)
    expected_scale = ((d + 1) * square + d * sigma**2) / square
    last = scale.value
    assert last is not None
    assert abs(last / expected_scale - 1) < 5 * relative_error


@given(several_sizes, st.integers(1, 9))
def test_a_scale_in_samples_does_not_depend_on_how_many_tokens_each_has(
    sizes: list[int], tokens: int
) -> None:
    samples = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(1)).double()
    by_sample, by_token = measure(samples, sizes), measure(samples, sizes, weight=tokens)
    assert by_token[0].weight == tokens * by_sample[0].weight
    assert GradientSpread.noise_and_signal(*by_token) == pytest.approx(
        GradientSpread.noise_and_signal(*by_sample), rel=1e-9, abs=1e-12
    )


@given(several_sizes, several_sizes)
def test_the_sums_of_several_workers_are_those_of_one_that_has_it_all(
    first: list[int], second: list[int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(sum(first) + sum(second), WIDTH, generator=generator).double()
    whole, mean_square = measure(samples, [*first, *second])
    ranks = [measure(part, sizes)[0] for part, sizes in zip(
        torch.split(samples, [sum(first), sum(second)]), (first, second), strict=True
    )]  # fmt: skip
    other = [ranks[1].num_microbatches, ranks[1].num_samples, ranks[1].weight, ranks[1].weighted_squares]
    added = ranks[0].over_all(lambda own: [a + b for a, b in zip(own, other, strict=True)])
    assert added.noise_and_signal(mean_square) == pytest.approx(whole.noise_and_signal(mean_square))


def test_a_window_of_one_microbatch_says_nothing() -> None:
    spread, mean_square = measure(torch.ones(4, WIDTH).double(), [4])
    with pytest.raises(ValueError, match="two micro-batches or more"):
        spread.noise_and_signal(mean_square)
    scale = NoiseScale()
    scale.add(spread, mean_square)
    assert scale.value is None


def test_noise_that_hides_the_gradient_gives_no_scale() -> None:
    scale = NoiseScale()
    scale.add(GradientSpread(2, 2, 2.0, weighted_squares=2.0), mean_square=0.1)
    assert scale.value is None


def test_the_ratio_of_averages_is_kept_by_a_state() -> None:
    scale, other = NoiseScale(), NoiseScale()
    for squares in (4.0, 6.0):
        scale.add(GradientSpread(2, 2, 2.0, squares), mean_square=1.9)
    # Noise 0.2 and 2.2, signal 1.8 and 0.8.
    assert scale.value == pytest.approx((0.99 * 0.2 + 2.2) / (0.99 * 1.8 + 0.8))
    other.restore(scale.state())
    assert other.value == scale.value


def test_a_window_begun_again_counts_once() -> None:
    model, samples = Dot(), torch.randn(6, WIDTH).double()
    meter = SpreadMeter(model)
    for sizes in ([3, 3], [2, 2, 2]):
        meter.begin()
        parts = torch.split(samples, sizes)
        accumulate_gradients(model, mean_output, parts, weight=meter.weigh, backward=meter.backward)
    assert meter.spread == measure(samples, [2, 2, 2])[0]


def test_microbatches_without_weight_and_frozen_parameters_are_left_out() -> None:
    model, samples = Dot(), torch.randn(6, WIDTH).double()
    model.rest.requires_grad_(False)
    meter = SpreadMeter(model, lambda batch: int(batch[0, 0] != 0) * len(batch))
    parts = [samples[:4], torch.zeros(3, WIDTH).double(), samples[4:]]
    meter.begin()
    accumulate_gradients(model, mean_output, parts, weight=meter.weigh, backward=meter.backward)
    meter.measure_mean()
    assert (meter.spread.num_microbatches, meter.spread.num_samples, meter.spread.weight) == (2, 6, 6.0)
    squares = 4 * samples[:4, :2].mean(0).square().sum() + 2 * samples[4:, :2].mean(0).square().sum()
    assert meter.spread.weighted_squares == pytest.approx(float(squares))
    assert meter.mean_square == pytest.approx(float(samples[:, :2].mean(0).square().sum()))


def test_gradients_are_watched_and_not_copied() -> None:
    model, seen = Dot(), {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(
            lambda gradient, name=name: seen.setdefault(name, gradient.data_ptr()) and None
        )
    measure(torch.randn(4, WIDTH).double(), [4], model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == seen[name]


def test_the_norm_of_millions_of_numbers_is_that_of_their_precision() -> None:
    model = nn.Linear(2048, 2048, bias=False)
    model.weight.grad = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    meter = SpreadMeter(model)
    meter.measure_mean()
    assert meter.mean_square == pytest.approx(float(model.weight.grad.double().square().sum()), rel=2e-6)


def test_norms_of_half_precision_are_taken_in_single() -> None:
    samples = torch.full((2, WIDTH), 300.0, dtype=torch.float16)  # whose squares float16 does not hold
    spread, mean_square = measure(samples, [1, 1], Dot(torch.float16))
    assert spread.weighted_squares == pytest.approx(2 * WIDTH * 300.0**2, rel=1e-3)
    assert mean_square == pytest.approx(WIDTH * 300.0**2, rel=1e-3)


class Twice(nn.Module):
    """Uses its weight in a reentrant checkpoint and outside of it."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        self._reentrant = reentrant

    def forward(self, batch: Tensor) -> Tensor:
        batch = batch.requires_grad_()
        inner: Tensor = checkpoint(self.linear, batch, use_reentrant=self._reentrant)
        outer: Tensor = self.linear(inner)
        return outer.square().mean(1)


def test_a_gradient_that_comes_in_parts_is_not_taken_for_whole() -> None:
    samples = torch.randn(4, WIDTH).double()
    broken, mean_square = measure(samples, [2, 2], Twice(reentrant=True))
    assert math.isnan(broken.weighted_squares)
    scale = NoiseScale()
    scale.add(broken, mean_square)
    assert scale.value is None
    assert not math.isnan(measure(samples, [2, 2], Twice(reentrant=False))[0].weighted_squares)


def test_sparse_gradients_count() -> None:
    """Both samples of the first micro-batch look up the same row, so its gradient is 1 there."""
    model = nn.Embedding(10, 1, sparse=True).double()
    meter = SpreadMeter(model)
    meter.begin()
    parts = [torch.tensor([3, 3]), torch.tensor([3, 4])]
    accumulate_gradients(model, mean_output, parts, weight=meter.weigh, backward=meter.backward)
    meter.measure_mean()
    assert meter.spread.weighted_squares == pytest.approx(2 * 1.0 + 2 * 0.5)
    assert meter.mean_square == pytest.approx(0.75**2 + 0.25**2)
