"""Where a sweep's functions come from: `file.py:function` or `module:function`, pickled by value."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import os
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle

from tune_easytrain.errors import TaskError, did_you_mean
from tune_easytrain.task import BuildTask

if TYPE_CHECKING:
    from tune_easytrain.config import SweepConfig  # pydantic, which a GPU image may lack


def load_sweep_functions(
    config: SweepConfig, build_task: BuildTask | None = None
) -> tuple[bytes | None, bytes | None]:
    """Return the pickled `build_task` and training function of a sweep, each None where there is none.

    Raises TaskError where one cannot be loaded or pickled.
    """
    sweep_dir = config.project_root if config.source_path is None else config.source_path.parent
    places = {"project_root": config.project_root, "sweep_dir": sweep_dir}
    if build_task is None and config.task is not None:
        build_task = load_function(config.task, key="task", **places)
    function = None
    if config.train.own_function is not None:
        function = load_function(config.train.own_function, key="train.function", **places)
    if build_task is None and function is None:
        raise TaskError("task: the sweep names no task; add `task: file.py:function`, or pass build_task")
    return (
        None if build_task is None else pickle_function(build_task, "task"),
        None if function is None else pickle_function(function, "train.function"),
    )


def load_function(name: str, *, key: str, project_root: Path, sweep_dir: Path) -> Callable[..., Any]:
    """Return the function that a sweep file names.

    A file is looked for from the sweep file's own folder upwards to the project root; whatever it imports
    from beside itself is found as with `python file.py`.

    Args:
        name: `path/file.py:function` or `package.module:function`.
        key: the sweep file's key, for messages.
        project_root, sweep_dir: where to look.

    Raises TaskError where the file, the module or the function is not there, or its import fails.
    """
    place, _, function_name = name.rpartition(":")
    if place.endswith(".py"):
        module = _import_file(find_file(place, key, project_root, sweep_dir).resolve(), key, name)
    else:
        module = _import_module(place, key, name, project_root)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        remedy = did_you_mean(function_name, names)
        raise TaskError(f"{key}: {name!r}: {place} has no function {function_name!r}; {remedy}")
    loaded: Callable[..., Any] = function
    return loaded


def pickle_function(function: Callable[..., Any], key: str) -> bytes:
    """Pickle a function so that another machine can load it without its file.

    The function's module travels by value unless it is an installed package, and so do the modules it uses
    from its own folder or below. Raises TaskError where one holds something that cannot be pickled.
    """
    modules = _modules_by_value(sys.modules.get(getattr(function, "__module__", "")))
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        with io.BytesIO() as file:
            _Pickler(file).dump(function)
            return file.getvalue()
    except Exception as error:
        raise TaskError(
            f"{key}: {function!r} cannot be sent to a worker: {type(error).__name__}: {error}; keep open "
            "files, locks and data sets out of the module's globals; build them inside the task's functions"
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Sends functions under `functools.cache` by value too, with an empty cache, where their module is."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _CACHED) and obj.__module__ in cloudpickle.list_registry_pickle_by_value():
            options = obj.cache_parameters()
            return _cached, (obj.__wrapped__, options["maxsize"], options["typed"])
        return super().reducer_override(obj)


_CACHED = type(functools.cache(len))


def _cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Callable[..., Any]:
    return functools.lru_cache(maxsize, typed)(function)


def find_file(place: str, key: str, project_root: Path, sweep_dir: Path) -> Path:
    """Return the file that a sweep file names under `key`; raises TaskError where there is none."""
    path = Path(place).expanduser()
    if path.is_absolute():
        candidates = [path]
    else:
        within = [
            p for p in (sweep_dir, *sweep_dir.parents) if p == project_root or project_root in p.parents
        ]
        candidates = [folder / path for folder in dict.fromkeys([*within, project_root])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise TaskError(f"{key}: there is no file {place}; looked for {looked}")


def _import_file(path: Path, key: str, name: str) -> ModuleType:
    module_name = f"tune_easytrain_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failed(key, name, error) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _import_module(module_name: str, key: str, name: str, project_root: Path) -> ModuleType:
    sys.path.insert(0, str(project_root))
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise _import_failed(key, name, error) from error
    finally:
        sys.path.remove(str(project_root))


def _import_failed(key: str, name: str, error: Exception) -> TaskError:
    where = ""
    if error.__traceback__ is not None:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        where = f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})"
    return TaskError(f"{key}: importing {name!r} failed: {type(error).__name__}: {error}{where}")


def _modules_by_value(module: ModuleType | None) -> list[ModuleType]:
    """Return the module and what is loaded from beside it; nothing where workers have it anyway."""
    if module is None or _is_installed(module):
        return []
    file = getattr(module, "__file__", None)
    if file is None:
        return [module]
    folder = Path(file).parent
    within = f"{folder}{os.sep}"
    package = __name__.partition(".")[0]
    beside = [
        other
        for other in list(sys.modules.values())
        if isinstance(other, ModuleType)
        and str(getattr(other, "__file__", None)).startswith(within)
        and other.__name__.partition(".")[0] not in (package, "__main__", "__mp_main__")
        and sys.modules.get(other.__name__) is other
        and not _is_installed(other)
    ]
    return [module, *(other for other in beside if other is not module)]


def _is_installed(module: ModuleType) -> bool:
    """Return whether a worker has the module anyway: built in, of the standard library, or a package."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ != "__main__"
    roots = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_paths()["stdlib"]]
    return module.__name__ != "__main__" and any(Path(file).is_relative_to(root) for root in roots)
