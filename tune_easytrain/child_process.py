"""The child process that runs a trial's torch code, and the pipe to it. No torch, no Ray here.

Children come from a `multiprocessing` forkserver that has imported torch but run nothing, so each starts
in a fraction of a second with a clean device. A child that is killed, crashes or hangs takes nothing
else with it, and what it held on the device goes with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import cloudpickle

from tune_easytrain.errors import ChildDiedError, TuneEasyTrainError
from tune_easytrain.orphans import children_awaited, end_with_parent
from tune_easytrain.protocol import Terminated
from tune_easytrain.termination import EndRequested

# Every optimizer imports torch._dynamo: seconds, and after the cap also memory of the trial's budget.
TORCH_MODULES = ("torch", "torch._dynamo", "tune_easytrain.device_session")
"""What the children of every trial with a task need."""

_FORKSERVER_SIGNALS = "tune_easytrain.forkserver_signals"
_FUNCTION_MODULES = ("tune_easytrain.child_service",)
_SLOW_MODULES = (
    "torchvision",
    "torchmetrics",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "peft",
    "timm",
    "av",
    "pandas",
)
_OUR_OWN = ("pandas",)  # loaded by this package wherever it reads results

# Freed blocks go back to the system at once: a cap on a CPU is useless while malloc hoards them.
_MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
# What Ray sets anew for each trial, while the forkserver keeps what it was started with.
_FORWARDED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")

_KILL_WAIT_SECONDS = 10.0
_STACK_SIGNAL = signal.SIGUSR1
_STACK_SECONDS = 0.5
"""How long a child is waited for that writes its stack; it does so at once, or not at all."""

_DEATH_HINTS = {
    "SIGKILL": ", as the kernel does when the machine's memory runs out",
    "SIGALRM": ": it was told to end by SIGTERM and had not done so in trial.grace seconds",
    "SIGSEGV": ": a crash in native code",
}
_main_module_lock = threading.Lock()


def modules_to_preload(task: bytes | None = b"", function: bytes | None = None) -> tuple[str, ...]:
    """Return the modules that a sweep's children are to find imported, since they are slow to import.

    That is torch, unless there is no task and the function does not mention it, and what this process had to
    load for them.

    Args:
        task: `build_task`, pickled by value; None: there is none.
        function: the training function, pickled by value; None: there is none of the user's own.
    """
    payload = (task or b"") + (function or b"")
    if task is None and b"torch" not in payload:
        return (*_FUNCTION_MODULES, *(name for name in _SLOW_MODULES if name.encode() in payload))
    needed = (name for name in _SLOW_MODULES if name not in _OUR_OWN or name.encode() in payload)
    return (*TORCH_MODULES, *(name for name in needed if name in sys.modules))


def forkserver_context(preloaded_modules: Sequence[str] = TORCH_MODULES) -> ForkServerContext:
    """Return the way to start children; the first one of this process starts the forkserver for all.

    The forkserver imports what `preloaded_modules` names; later children find it there.
    """
    os.environ.update(_MALLOC_ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_FORKSERVER_SIGNALS, *preloaded_modules])
    return context


def start_forkserver(preloaded_modules: Sequence[str]) -> None:
    """Start the forkserver of this process, and do not wait until it has imported what it is to import."""
    forkserver_context(preloaded_modules)
    forkserver.ensure_running()


def end_with_owner() -> None:
    """Have the kernel end this child of a forkserver when the process that asked for it is gone.

    The forkserver ends when its owner does; the kernel then ends this process, even inside a C call. It
    knows by a pipe whose other end each child inherits too, and which therefore has to be closed here.
    """
    end_with_parent()
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class RemoteError:
    """An exception that ended the work of a child: itself where it can be pickled, and its traceback."""

    payload: bytes | None
    type_name: str
    message: str
    traceback: str

    @classmethod
    def from_exception(cls, error: BaseException) -> RemoteError:
        """Take down an exception so that it can cross to another process."""
        text = "".join(traceback.format_exception(error))
        try:
            payload: bytes | None = cloudpickle.dumps(error)
            cloudpickle.loads(payload)
        except Exception as pickling_error:  # noqa: BLE001 -- the exception's own code may raise anything
            payload = None
            text += f"(the exception itself could not be pickled: {pickling_error!r})\n"
        return cls(payload, type(error).__name__, str(error), text)

    def exception(self) -> BaseException:
        """Return the exception with its own type, the child's traceback added as a note.

        What could not be pickled comes as a TuneEasyTrainError, and so does what would end this process too,
        such as the SystemExit of a task that calls `sys.exit`.
        """
        error = None if self.payload is None else cloudpickle.loads(self.payload)
        if not isinstance(error, Exception):
            return TuneEasyTrainError(f"{self.type_name}: {self.message}\n{self.traceback}")
        error.add_note(f"in the trial's process:\n{self.traceback}")
        return error


class ChildProcess:
    """One child, and the messages to and from it.

    Raises ChildDiedError wherever the child turns out to be gone.
    """

    def __init__(self, opening: Any, preloaded_modules: Sequence[str] = TORCH_MODULES) -> None:
        """Start a child that serves the device session described by `opening`."""
        context = forkserver_context(preloaded_modules)
        self._connection, theirs = context.Pipe()
        self._stacks, their_stacks = context.Pipe(duplex=False)
        environment = {name: os.environ.get(name) for name in _FORWARDED_VARIABLES}
        self._process = context.Process(
            target=_child_main,
            args=(theirs, their_stacks, cloudpickle.dumps(opening), environment),
            daemon=False,
        )
        with main_module_hidden():
            self._process.start()
        theirs.close()
        their_stacks.close()

    def send(self, message: Any) -> None:
        """Send a message to the child."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """Wait for the child's next message.

        Raises TimeoutError after `timeout_seconds`, and what the child raised, with its own type.
        """
        try:
            if timeout_seconds is not None and not self._connection.poll(timeout_seconds):
                raise TimeoutError(f"no answer from the trial's process in {timeout_seconds:g} s")
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(message, RemoteError):
            raise message.exception()
        return message

    def terminate(self, wait_seconds: float = 0.0) -> None:
        """Tell the child to end, and wait for that; while it trains it first stores a checkpoint."""
        self._process.terminate()
        if wait_seconds:
            self._process.join(wait_seconds)

    def stack(self) -> str:
        """Return where every Python thread of the child is, in a C call too; empty if it does not say."""
        assert self._process.pid is not None
        text = b""
        with contextlib.suppress(OSError, EOFError):
            os.kill(self._process.pid, _STACK_SIGNAL)
            while self._stacks.poll(_STACK_SECONDS) and (part := os.read(self._stacks.fileno(), 2**16)):
                text += part
        return text.decode(errors="replace")

    def kill(self) -> None:
        """End the child now, if it still runs, and wait until it and its loader processes are gone."""
        assert self._process.pid is not None
        with children_awaited(self._process.pid, _KILL_WAIT_SECONDS):
            self._process.kill()
            self._process.join(_KILL_WAIT_SECONDS)
        self._connection.close()
        self._stacks.close()

    def _death(self) -> ChildDiedError:
        self._process.join(_KILL_WAIT_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            number = -code
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            hint = _DEATH_HINTS.get(name, "")
            return ChildDiedError(f"the trial's process was ended by {name}{hint}")
        return ChildDiedError(f"the trial's process ended without a word, exit code {code}")


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep `multiprocessing` from running the caller's script again in the child.

    A child needs nothing of it (tasks travel pickled by value), a Ray worker's main module would drag Ray
    in, and a script without a `__main__` guard would start itself for ever.
    """
    main = sys.modules["__main__"]
    with _main_module_lock:
        names: dict[str, Any] = main.__dict__
        hidden: dict[str, Any] = {name: names[name] for name in ("__file__", "__spec__") if name in names}
        names.pop("__file__", None)
        names["__spec__"] = None
        try:
            yield
        finally:
            names.pop("__spec__")
            names.update(hidden)


def _child_main(
    connection: Connection,
    stacks: Connection,
    opening_payload: bytes,
    environment: dict[str, str | None],
) -> None:
    end_with_owner()
    faulthandler.register(_STACK_SIGNAL, stacks.fileno())
    gc.freeze()  # what was imported is never freed: each collection would look through it for 0.2 s
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from tune_easytrain.child_service import serve

    try:
        serve(connection, cloudpickle.loads(opening_payload))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the owner is gone or has had enough
    except EndRequested as end:
        with contextlib.suppress(OSError):
            connection.send(Terminated(*end.args))
    except BaseException as error:  # noqa: BLE001 -- the owner raises it again
        connection.send(RemoteError.from_exception(error))
        raise SystemExit(0) from None
