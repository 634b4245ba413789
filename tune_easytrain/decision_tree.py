"""A decision tree in text: which plan to take, with the numbers of the study it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.study import Arm, Study
from tune_easytrain.study_plans import Plan, counted, describe_hours, metric_text, number

_QUICK_SHARE = 3
"""A quick look takes that part of the epochs, as ten of thirty."""


def decision_tree(study: Study, plans: Sequence[Plan], allowed_loss: float) -> Iterator[str]:
    """Yield the lines of a decision tree with a study's own numbers."""
    best, fast, larger = (plan.arm for plan in plans)
    if best is None:
        yield "Nothing can be decided yet: no trial has finished."
        return
    yield "Do you need the best quality?"
    yield f"├─ yes → plan A: {_branch(best)}"
    yield "└─ no → is it a quick look?"
    quick = min(study.measured, key=lambda arm: arm.epoch_seconds)
    num_epochs = max(1, round(best.num_epochs / _QUICK_SHARE))
    hours = num_epochs * quick.epoch_seconds / 3600
    yield f"   ├─ yes → {quick.name}, {counted(num_epochs, 'epoch')}: about {describe_hours(hours)}"
    yield f"   └─ no → may {study.metric} lose {number(allowed_loss)}?"
    if fast is None:
        yield "      ├─ yes → plan B cannot be said yet; see what is not known"
    elif fast is best:
        yield "      ├─ yes → plan A all the same: nothing measured is faster"
    else:
        yield f"      ├─ yes → plan B: {_branch(fast)}"
    memory = "" if best.peak_memory_bytes is None else f" (it needs {format_bytes(best.peak_memory_bytes)})"
    if larger is not None and larger is not best:
        yield f"      └─ no → does plan A fit your GPU{memory}?"
        yield "         ├─ yes → plan A"
        yield f"         └─ no → the same batch in smaller micro-batches; plan C: {_branch(larger)}"
    else:
        yield "      └─ no → plan A; if it does not fit, the probe makes it of smaller micro-batches"


def _branch(arm: Arm) -> str:
    return f"{arm.name}: {metric_text(arm)}, {describe_hours(arm.hours)}"
