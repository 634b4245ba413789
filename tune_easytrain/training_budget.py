"""`TrainingBudget`: how much a trial trains, in epochs, samples or optimizer steps. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BudgetUnit = Literal["epochs", "samples", "steps"]


@dataclass(frozen=True, slots=True)
class TrainingBudget:
    """How much a trial trains at most: `amount` epochs, samples or optimizer steps, at least 1.

    Training ends exactly there. With a budget of samples, trials of any effective batch size see the same
    samples, for an epoch's order does not depend on it; with one of steps, they take as many steps.
    """

    unit: BudgetUnit
    amount: int

    @classmethod
    def choose(cls, *, epochs: int | None, num_samples: int | None, num_steps: int | None) -> TrainingBudget:
        """Return the budget that is given.

        Raises ValueError unless exactly one of the three is.
        """
        amounts: dict[BudgetUnit, int | None] = {"epochs": epochs, "samples": num_samples, "steps": num_steps}
        given = [cls(unit, amount) for unit, amount in amounts.items() if amount is not None]
        if len(given) != 1:
            raise ValueError(
                "give one of epochs, num_samples and num_steps, got "
                f"epochs={epochs}, num_samples={num_samples}, num_steps={num_steps}"
            )
        return given[0]

    def samples_left(
        self,
        num_train_samples: int,
        effective_batch_size: int,
        *,
        epoch: int = 0,
        num_samples: int = 0,
        num_steps: int = 0,
    ) -> int:
        """Return how many samples training has yet to see when it stands at an epoch's beginning.

        Args:
            num_train_samples: samples of one whole epoch.
            effective_batch_size: samples behind one optimizer step; an epoch's last may have fewer.
            epoch, num_samples, num_steps: epochs, samples and optimizer steps that are done.
        """
        if self.unit == "epochs":
            left = (self.amount - epoch) * num_train_samples
        elif self.unit == "samples":
            left = self.amount - num_samples
        else:
            steps_per_epoch = -(-num_train_samples // effective_batch_size)
            num_epochs, rest = divmod(max(0, self.amount - num_steps), steps_per_epoch)
            left = num_epochs * num_train_samples + rest * effective_batch_size
        return max(0, left)

    def describe_end(self) -> str:
        """Return why training ends once all of it is used.

        >>> TrainingBudget("steps", 500).describe_end()
        'all 500 optimizer steps done'
        """
        amount = f"{self.amount} {'optimizer ' if self.unit == 'steps' else ''}{self.unit}"
        return f"all {amount} {'seen' if self.unit == 'samples' else 'done'}"


def num_full_windows(num_samples: int, num_train_samples: int, effective_batch_size: int) -> int:
    """Return how many windows of the whole effective batch size follow on another one of their epoch.

    An epoch's first window is left out: it waits for the loader, so that its time says nothing.

    Args:
        num_samples: samples to come, from an epoch's beginning on.
        num_train_samples, effective_batch_size: as for `TrainingBudget.samples_left`.

    >>> num_full_windows(100, num_train_samples=40, effective_batch_size=10)
    7
    """
    num_epochs, rest = divmod(num_samples, num_train_samples)
    in_epoch = max(0, num_train_samples // effective_batch_size - 1)
    return num_epochs * in_epoch + max(0, rest // effective_batch_size - 1)
