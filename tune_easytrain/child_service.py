"""What a child process of a trial does: serve the requests that come through its pipe. No torch at first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from tune_easytrain.function_session import FunctionSession
from tune_easytrain.protocol import (
    AttemptRequest,
    CheckRequest,
    Continue,
    EstimateRequest,
    Finished,
    Opening,
    PlanChanged,
    Report,
    StoreOpened,
    TrainRequest,
)
from tune_easytrain.termination import Termination


def serve(connection: Connection, opening: Opening | EstimateRequest | CheckRequest) -> None:
    """Answer requests until the owner has had enough; errors are the caller's to send.

    After a trial's training the owner may send another trial's opening.
    """
    if isinstance(opening, CheckRequest):
        from tune_easytrain.task_check import check_task

        connection.send(check_task(opening))
        return
    if isinstance(opening, EstimateRequest):
        from tune_easytrain.device_session import estimate

        connection.send(estimate(opening.opening))
        return
    next_opening = opening
    while True:
        with _kept_surroundings():
            session = open_session(next_opening)
            try:
                _serve_trial(connection, session, next_opening.grace_seconds)
            finally:
                session.memory.uncap()
        connection.send(Finished())
        next_opening = connection.recv()


def open_session(opening: Opening) -> FunctionSession:
    """Return the device side of a trial, opened."""
    if opening.task_payload is None:
        return FunctionSession(opening)
    from tune_easytrain.device_session import DeviceSession

    return DeviceSession(opening)


def _serve_trial(connection: Connection, session: FunctionSession, grace_seconds: float) -> None:
    """Answer a trial's requests until its training function has returned."""
    connection.send(session.opened())

    def send(message: Report | PlanChanged) -> None:
        connection.send(message)
        if isinstance(message, Report):
            reply = connection.recv()
            assert isinstance(reply, Continue)

    while True:
        request = connection.recv()
        ranks = None
        if request.place is not None:
            ranks = session.join(request.place, lambda port: connection.send(StoreOpened(port)))
        if isinstance(request, AttemptRequest):
            reply = session.attempt(request.microbatch_size, ranks)
            connection.send(reply)
            if ranks is not None and reply.attempt.ran:  # else others may still wait for this one
                ranks.leave()
        elif isinstance(request, TrainRequest):
            if ranks is not None:
                session.train(request.microbatch_limit, send, ranks)
                ranks.leave()
                return
            termination = Termination(grace_seconds)
            with termination.watched():
                session.train(request.microbatch_limit, send, termination=termination)
            return


@contextmanager
def _kept_surroundings() -> Iterator[None]:
    """Put the working directory and the environment back, for the next trial in this process."""
    folder, environment = os.getcwd(), dict(os.environ)
    try:
        yield
    finally:
        os.chdir(folder)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
