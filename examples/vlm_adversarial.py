"""The adversarial loss of vlm_true_batch.py: two models, two optimizers, one exact accumulation for both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW
from torch.utils.data import DataLoader
from vlm_model import Answers, VisionLanguageModel, cross_entropy, joined
from vlm_questions import IGNORED, NUM_ANSWER_TOKENS, Batch, collate, count_answer_tokens

from tune_easytrain import BadInputError, accumulate_gradients, split_batch


class Adversarial(nn.Module):
    """A model with fewer vision tokens, and a discriminator that tells it from itself with all of them.

    What the discriminator sees is the features that answers are predicted from.
    """

    def __init__(self, generator: VisionLanguageModel, weight: float) -> None:
        """`weight` is that of passing for the model with all vision tokens, beside the answers' loss."""
        super().__init__()
        self.generator, self.weight = generator, weight
        width = generator.llava.get_submodule("lm_head").in_features
        self.discriminator = nn.Sequential(nn.Linear(width, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the generator's loss, the discriminator's), each a mean over the tokens of a batch's answers.

        Neither has a gradient in the other's parameters, so their sum trains both.
        """
        reduced = self.generator(batch)
        with torch.no_grad():
            whole = self.generator(batch, is_reduced=False)
        counts = joined([each.targets.flatten() != IGNORED for each in reduced])
        made, real = _features(reduced), _features(whole)
        fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        judged = torch.func.functional_call(self.discriminator, fixed, (made,))
        return (
            cross_entropy(reduced) + self.weight * _judged_as(1.0, judged, counts),
            _judged_as(1.0, self.discriminator(real), counts)
            + _judged_as(0.0, self.discriminator(made.detach()), counts),
        )


def _features(answers: Sequence[Answers]) -> Tensor:
    features = joined([each.features.flatten(0, 1) for each in answers])
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _judged_as(target: float, scores: Tensor, counts: Tensor) -> Tensor:
    """Mean of what scores (N, 1) lose against the target, where `counts` (N,) is true."""
    scores = scores.squeeze(1).to(torch.promote_types(scores.dtype, torch.float32))
    each = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target), reduction="none")
    return (each * counts).sum() / counts.sum()


def adversarial_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the generator's and the discriminator's loss."""
    generator_loss, discriminator_loss = model(batch)
    total: Tensor = generator_loss + discriminator_loss
    return total


def build_optimizers(config: Mapping[str, Any], model: Adversarial) -> tuple[AdamW, AdamW]:
    """(the generator's optimizer, the discriminator's)."""
    rates = config.get("hp") or {}
    trained = [parameter for parameter in model.generator.parameters() if parameter.requires_grad]
    return (
        AdamW(trained, lr=rates.get("learning_rate", 1e-3)),
        AdamW(model.discriminator.parameters(), lr=rates.get("discriminator_learning_rate", 1e-3)),
    )


def train_adversarial(config: dict[str, Any], trial: Any) -> None:
    """Train generator and discriminator, each by its own optimizer, after every effective batch.

    One accumulation gives the exact gradients of both. Where memory runs out, that window is computed again
    with smaller micro-batches, for both. With fp16 both skip the same steps.

    Raises BadInputError without `loss.adversarial_weight`, and with several workers.
    """
    from tune_easytrain.loss_scale import LossScale

    task, settings = trial.task, trial.settings
    if not (config.get("loss") or {}).get("adversarial_weight"):
        raise BadInputError("train.function: train_adversarial needs loss.adversarial_weight above 0")
    if settings.num_workers > 1:
        raise BadInputError(
            "train.function: train_adversarial trains with one worker; set trial.num_workers: 1"
        )
    torch.manual_seed(settings.seed)
    model = task.model().to(trial.device).train()
    optimizers = build_optimizers(config, model)
    scale = LossScale(settings.precision, trial.batch_plan.microbatch_size * NUM_ANSWER_TOKENS)
    first_epoch = 0
    if (checkpoint := trial.load_checkpoint()) is not None:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scale.restore(checkpoint["scale"])
        first_epoch = checkpoint["epoch"]
    windows = Windows(model, trial, scale)
    for epoch in range(first_epoch, settings.epochs):
        losses = []
        for loss in windows.gradients(epoch):
            losses.append(loss)
            if scale.unscale(model.parameters()):
                for optimizer in optimizers:
                    _step(optimizer, settings.clip_norm)
        counts = windows.vision_tokens
        trial.report(
            {
                "train_loss": statistics.fmean(losses),
                "epoch": epoch + 1,
                "vision_tokens_mean": statistics.fmean(counts),
                "vision_tokens_max": max(counts),
                "vision_tokens_min": min(counts),
            },
            checkpoint={
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scale": scale.state(),
                "epoch": epoch + 1,
            },
        )


def _step(optimizer: AdamW, clip_norm: float | None) -> None:
    if clip_norm is not None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()


class Windows:
    """The effective batches of a trial, each left as gradients.

    Attributes:
        vision_tokens: of every sample of the newest epoch, how many are left in the last layer.
    """

    def __init__(self, model: Adversarial, trial: Any, scale: Any) -> None:
        self._model, self._trial, self._scale = model, trial, scale
        self._rescue = trial.rescue(model)
        self._data = trial.task.train_data()
        self.vision_tokens: list[int] = []

    def gradients(self, epoch: int) -> Any:
        """Yield the loss of each window, in an order of their own in every epoch, gradients in place."""
        order = torch.Generator().manual_seed(self._trial.settings.seed + 1000 * epoch)
        num_samples = self._trial.batch_plan.effective_batch_size
        self.vision_tokens = []
        for window in DataLoader(self._data, num_samples, shuffle=True, collate_fn=collate, generator=order):
            sizes = window["sizes"].tolist()
            self.vision_tokens += [self._model.generator.count_vision_tokens(*size) for size in sizes]

            def compute(plan: Any, window: Batch = window) -> Any:
                return self._accumulate(window, plan)

            yield self._rescue.run(compute, num_samples=len(sizes)).loss

    def _accumulate(self, window: Batch, plan: Any) -> Any:
        from tune_easytrain.batch import move_batch

        parts = split_batch(window, plan.for_window(len(window["sizes"])).microbatch_sizes)
        return accumulate_gradients(
            self._model,
            self._loss,
            (move_batch(part, self._trial.device) for part in parts),
            weight=count_answer_tokens,
            backward=self._scale.backward,
        )

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        from tune_easytrain.precision import autocast

        with autocast(self._trial.device, self._trial.settings.precision):
            return adversarial_loss(model, batch)
