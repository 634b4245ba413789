"""Asks a dashboard, as its pages do, for what it shows first; a program that needs nothing but Python.

python shown_runs.py http://127.0.0.1:8300
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any


def shown_first(url: str) -> str:
    """The page and what the answers to its first questions hold."""
    found = [_ask(url)]
    values = dict(_properties(json.loads(_ask(f"{url}/_dash-layout"))))
    values |= {("address", "pathname"): "/", ("address", "search"): "", ("tick", "n_intervals"): 0}
    for callback in json.loads(_ask(f"{url}/_dash-dependencies")):
        if callback["prevent_initial_call"] or callback["clientside_function"] is not None:
            continue
        outputs = [name.rsplit(".", 1) for name in callback["output"].strip(".").split("...")]
        question = {
            "output": callback["output"],
            "outputs": [{"id": name, "property": part.partition("@")[0]} for name, part in outputs],
            "changedPropIds": [f"{given['id']}.{given['property']}" for given in callback["inputs"]],
        }
        for kind in ("inputs", "state"):
            question[kind] = [
                {**given, "value": values.get((given["id"], given["property"]))} for given in callback[kind]
            ]
        found.append(_ask(f"{url}/_dash-update-component", question))
    return "\n".join(found)


def _ask(url: str, question: Any = None) -> str:
    content = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def _properties(element: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    if isinstance(element, list):
        for each in element:
            yield from _properties(each)
    elif isinstance(element, dict):
        properties = element.get("props", {})
        for name, value in properties.items():
            if isinstance(properties.get("id"), str):
                yield (properties["id"], name), value
        yield from _properties(properties.get("children"))


if __name__ == "__main__":
    print(shown_first(sys.argv[1]))
