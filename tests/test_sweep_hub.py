"""What the sweep's actor keeps, on a real event loop; `tests/integration` has it on a real Ray."""

from __future__ import annotations

import asyncio

import pytest

from tune_easytrain.events import TrainingEnded
from tune_easytrain.sweep_hub import SweepHub


def test_events_are_fetched_once_and_in_the_order_they_were_told_in() -> None:
    async def sweep() -> None:
        hub = SweepHub()
        events = [("a", TrainingEnded(reason="1")), ("b", TrainingEnded(reason="2"))]
        await hub.tell(events[:1])
        await hub.tell(events[1:])
        assert await hub.fetch() == events
        assert await hub.fetch() == []

    asyncio.run(sweep())


@pytest.mark.parametrize(("say", "hear"), [("interrupt", "interruption"), ("conclude", "end")])
def test_everyone_who_waits_is_told_and_those_who_ask_later_too(say: str, hear: str) -> None:
    async def sweep() -> None:
        hub = SweepHub()
        waiting = [asyncio.create_task(getattr(hub, hear)()) for _ in range(3)]
        other = asyncio.create_task(hub.end() if hear == "interruption" else hub.interruption())
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await getattr(hub, say)()
        await asyncio.gather(*waiting)
        await getattr(hub, hear)()
        assert not other.done()
        other.cancel()

    asyncio.run(sweep())
