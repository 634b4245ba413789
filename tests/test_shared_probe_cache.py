"""Leases of the probe cache on a real event loop; `tests/integration` has them on a real Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tune_easytrain.probe_cache import KnownSizes, ProbeEvidence, ProbeQuestion
from tune_easytrain.shared_probe_cache import ProbeLeases

QUESTION = ProbeQuestion(signature="s", budget_bytes=1000, limit=64)
RESULT = ProbeEvidence(signature="s", budget_bytes=1000, fitting=(16,), failing=(20,), result=16)
LONG_SECONDS = 200.0
A_MOMENT_SECONDS = 0.05


async def is_waiting(task: asyncio.Task[Any]) -> bool:
    """Whether the task is still waiting once all others have done what they can."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


def ask(
    leases: ProbeLeases,
    trial: str,
    question: ProbeQuestion = QUESTION,
    wait_seconds: float = LONG_SECONDS,
    lease_seconds: float = LONG_SECONDS,
) -> Coroutine[Any, Any, KnownSizes | None]:
    return leases.acquire(trial, question, wait_seconds, lease_seconds)


def test_one_trial_searches_and_the_others_wait_for_its_result() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        assert await ask(leases, "first") == KnownSizes()
        others = [asyncio.create_task(ask(leases, name)) for name in ("second", "third")]
        assert all([await is_waiting(task) for task in others])
        await leases.publish("first", RESULT)
        assert [known.proposal for known in await asyncio.gather(*others) if known] == [16, 16]

    asyncio.run(sweep())


def test_another_signature_waits_for_nobody() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        await ask(leases, "first")
        other = ProbeQuestion(signature="another", budget_bytes=1000, limit=64)
        assert await ask(leases, "second", other) == KnownSizes()

    asyncio.run(sweep())


def test_a_size_that_fits_answers_small_questions_while_the_search_goes_on() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        await ask(leases, "first")
        small = asyncio.create_task(
            ask(leases, "small", ProbeQuestion(signature="s", budget_bytes=1000, limit=8))
        )
        large = asyncio.create_task(ask(leases, "large"))
        assert await is_waiting(small)
        await leases.publish("first", ProbeEvidence(signature="s", budget_bytes=1000, fitting=(8,)))
        known = await small
        assert known is not None
        assert known.proposal == 8
        assert await is_waiting(large)
        large.cancel()

    asyncio.run(sweep())


def test_after_a_search_without_result_exactly_one_of_those_who_wait_goes_on() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        await ask(leases, "first")
        others = [asyncio.create_task(ask(leases, name)) for name in ("second", "third")]
        await is_waiting(others[0])
        await leases.release("third")  # not its own
        assert all([await is_waiting(task) for task in others])
        await leases.release("first")
        assert [await is_waiting(task) for task in others] == [False, True]
        await leases.release("second")
        assert await others[1] == KnownSizes()

    asyncio.run(sweep())


def test_a_lease_ends_when_nothing_is_heard_of_its_trial() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        await ask(leases, "silent", lease_seconds=A_MOMENT_SECONDS)
        assert await ask(leases, "second") == KnownSizes()

    asyncio.run(sweep())


def test_a_lease_lasts_as_long_as_it_is_renewed_and_a_call_never_waits_longer_than_told() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        await ask(leases, "first", lease_seconds=A_MOMENT_SECONDS)
        await leases.renew("first", LONG_SECONDS)
        assert await ask(leases, "second", wait_seconds=2 * A_MOMENT_SECONDS) is None
        await leases.renew("second", LONG_SECONDS)  # it has none
        await leases.release("first")
        assert await ask(leases, "third") == KnownSizes()

    asyncio.run(sweep())


def test_a_trial_that_asks_again_keeps_its_lease() -> None:
    async def sweep() -> None:
        leases = ProbeLeases()
        assert await ask(leases, "first") == await ask(leases, "first") == KnownSizes()

    asyncio.run(sweep())


def test_what_was_measured_before_is_known_from_the_start() -> None:
    known = asyncio.run(ask(ProbeLeases([RESULT]), "first"))
    assert known is not None
    assert known.proposal == 16
