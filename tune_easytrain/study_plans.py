"""Plans: which batch size to train with, chosen from a study by stated rules, or said to be unknown.

The three plans are those of `001_88b761142d2cd80e.txt`: best quality, faster at a small loss, accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tune_easytrain.study import Arm, Study
from tune_easytrain.study_statistics import CONFIDENCE, FEWEST_SEEDS, Difference, difference, is_within


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, or why there is none.

    Attributes:
        letter: A, B or C.
        goal: what it is for.
        rule: how it is chosen.
        arm: what is chosen; None: it cannot be said.
        reasons: what the choice rests on, a sentence each.
        unknown: what is not known, a sentence each, with what would tell.
    """

    letter: str
    goal: str
    rule: str
    arm: Arm | None
    reasons: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def loss_of(study: Study, arm: Arm, best: Arm) -> Difference:
    """Return how much worse an arm is than the best one; negative where it is better."""
    if study.mode == "max":
        return difference(best.values, arm.values)
    return difference(arm.values, best.values)


def choose_plans(study: Study, allowed_loss: float) -> tuple[Plan, Plan, Plan]:
    """Return the plans A, B and C.

    Args:
        study: what was measured.
        allowed_loss: how much worse than the best the metric may be in plan B, in the metric's own unit.
    """
    best = _plan_a(study)
    return best, _plan_b(study, best.arm, allowed_loss), _plan_c(study)


def _plan_a(study: Study) -> Plan:
    measured = study.measured
    goal, rule = "best quality", f"the best mean {study.metric} over seeds"
    if not measured:
        return Plan(
            letter="A",
            goal=goal,
            rule=rule,
            arm=None,
            unknown=(f"No trial has finished with {study.metric}.",),
        )
    best = max(measured, key=lambda arm: study.better(arm.mean, 0.0))
    unknown = []
    if len(best.values) < FEWEST_SEEDS:
        unknown.append(f"{best.name} was trained with one seed: how much of its lead is chance is not known.")
    alike = [arm for arm in measured if arm is not best and not loss_of(study, arm, best).is_significant]
    reasons = [f"{study.metric} {number(best.mean)}, the best of {len(measured)} measured."]
    told = [arm.name for arm in alike if loss_of(study, arm, best).is_known]
    if told:
        reasons.append(f"Not told apart from it at {CONFIDENCE:.0%}: {'; '.join(told)}.")
    return Plan(letter="A", goal=goal, rule=rule, arm=best, reasons=tuple(reasons), unknown=tuple(unknown))


def _plan_b(study: Study, best: Arm | None, allowed: float) -> Plan:
    goal = f"fastest within a loss of {number(allowed)}"
    rule = (
        f"the least hours among those whose {study.metric} is worse than plan A's by less than "
        f"{number(allowed)}, by Welch's interval at {CONFIDENCE:.0%}"
    )
    if best is None:
        return Plan(
            letter="B", goal=goal, rule=rule, arm=None, unknown=("There is no plan A to be faster than.",)
        )
    faster = sorted(
        (arm for arm in study.measured if arm is not best and arm.hours < best.hours),
        key=lambda arm: arm.hours,
    )
    if not faster:
        reason = f"Nothing measured is faster than plan A ({describe_hours(best.hours)})."
        return Plan(letter="B", goal=goal, rule=rule, arm=best, reasons=(reason,))
    unknown: list[str] = []
    for arm in faster:
        loss = loss_of(study, arm, best)
        verdict = is_within(loss, allowed)
        if verdict:
            reasons = (
                f"{describe_hours(best.hours - arm.hours)} less than plan A "
                f"({1 - arm.hours / best.hours:.0%}); "
                f"the loss is {number(loss.mean)} ({number(loss.low)} to {number(loss.high)}).",
            )
            return Plan(letter="B", goal=goal, rule=rule, arm=arm, reasons=reasons, unknown=tuple(unknown))
        if verdict is None:
            unknown.append(_why_unknown(arm, best, loss, allowed))
    reason = "No faster one is known to lose less than that."
    return Plan(letter="B", goal=goal, rule=rule, arm=None, reasons=(reason,), unknown=tuple(unknown))


def _why_unknown(arm: Arm, best: Arm, loss: Difference, allowed: float) -> str:
    if not loss.is_known:
        few = [side.name for side in (arm, best) if len(side.values) < FEWEST_SEEDS]
        return f"Whether {arm.name} is good enough is not known: {' and '.join(few)} had one seed."
    return (
        f"Whether {arm.name} is good enough is not known: its loss is between {number(loss.low)} and "
        f"{number(loss.high)}, and {number(allowed)} is allowed; more seeds would tell."
    )


def _plan_c(study: Study) -> Plan:
    goal = "a larger batch in the same memory"
    rule = "the best of those that accumulate micro-batches, beside the same batch size in one piece"
    accumulated = [arm for arm in study.measured if arm.is_accumulated]
    if not accumulated:
        return Plan(
            letter="C", goal=goal, rule=rule, arm=None, unknown=("No trial accumulated micro-batches.",)
        )
    best = max(accumulated, key=lambda arm: study.better(arm.mean, 0.0))
    whole = whole_counterpart(study, best)
    if whole is None:
        text = f"What accumulation itself does to {best.name} is not known: in one piece it was not measured."
        return Plan(letter="C", goal=goal, rule=rule, arm=best, unknown=(text,))
    return Plan(
        letter="C", goal=goal, rule=rule, arm=best, reasons=tuple(describe_counterpart(study, best, whole))
    )


def whole_counterpart(study: Study, arm: Arm) -> Arm | None:
    """Return the arm of the same setting and batch size in one piece; None: it was not measured."""
    return next(
        (
            other
            for other in study.measured
            if not other.is_accumulated
            and other.setting == arm.setting
            and other.effective_batch_size == arm.effective_batch_size
        ),
        None,
    )


def describe_counterpart(study: Study, arm: Arm, whole: Arm) -> list[str]:
    """Return what accumulation changed against the same batch in one piece, a sentence each."""
    loss = loss_of(study, arm, whole)
    sentences = []
    if loss.is_significant:
        word = "worse" if loss.mean > 0 else "better"
        sentences.append(f"{study.metric} is {number(abs(loss.mean))} {word} than in one piece.")
    elif loss.is_known:
        sentences.append(
            f"{study.metric} is not told apart from that in one piece: its loss is {number(loss.low)} to "
            f"{number(loss.high)}."
        )
    else:
        sentences.append(
            f"{study.metric} is {number(arm.mean)} against {number(whole.mean)} in one piece; with one seed "
            "no more can be said."
        )
    if whole.hours and not math.isnan(arm.hours):
        sentences.append(f"It took {arm.hours / whole.hours:.2f} × the time.")
    if arm.peak_memory_bytes and whole.peak_memory_bytes:
        sentences.append(f"It took {arm.peak_memory_bytes / whole.peak_memory_bytes:.2f} × the memory.")
    return sentences


def unmeasured(study: Study) -> Sequence[Arm]:
    """Return the arms of which no trial has finished with the metric."""
    return [arm for arm in study.arms if not arm.values]


def metric_text(arm: Arm) -> str:
    """Return an arm's mean with its standard deviation over seeds."""
    if not arm.values:
        return "unknown"
    if math.isnan(arm.deviation):
        return number(arm.mean)
    digits = max(0, -math.floor(math.log10(arm.deviation))) if arm.deviation > 0 else 4
    return f"{arm.mean:.{digits}f} ± {arm.deviation:.{digits}f}"


def describe_hours(hours: float) -> str:
    """Return a time in seconds, minutes or hours, whichever reads best; `unknown` for NaN."""
    if math.isnan(hours) or hours >= 2:
        return "unknown" if math.isnan(hours) else f"{hours:.4g} h"
    seconds = hours * 3600
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def cost_text(arm: Arm, price_per_hour: float) -> str:
    """Return what a trial costs, in hundredths."""
    cost = arm.cost(price_per_hour)
    return "unknown" if math.isnan(cost) else f"{cost:.2f}"


def counted(value: float, noun: str) -> str:
    """Return a number with what is counted: `1 epoch`, `2.5 epochs`."""
    shown = str(value) if isinstance(value, int) else number(value)
    return f"{shown} {noun}{'' if value == 1 else 's'}"


def number(value: float) -> str:
    """Return a number with four digits; `unknown` for NaN."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"
