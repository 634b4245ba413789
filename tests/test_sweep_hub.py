"""What the sweep's actor keeps, on a real event loop; `tests/integration` has it on a real Ray."""

from __future__ import annotations

import asyncio

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
