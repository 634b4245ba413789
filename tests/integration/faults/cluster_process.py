"""A cluster in a process of its own: a Ray that this process has had leaves its address in Ray's globals.

Run as a script it serves: `add CPUS GPUS` starts a node and answers with its raylet's pid, `lose PID` unplugs
that node, `lose head` the head; without more lines everything ends.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any


class ClusterProcess:
    """A head without CPUs, and the nodes that are added to it, with GPUs that are none (`fake_gpu`)."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        raise AssertionError("the cluster has ended")

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return self._answer()

    def add_node(self, num: int) -> int:
        """Start a node of so many CPUs and GPUs; return the pid of its raylet."""
        return int(self._ask(f"add {num}"))

    def lose(self, what: int | str) -> None:
        """Unplug the node of that raylet, or the `head`."""
        self._ask(f"lose {what}")

    def shutdown(self) -> None:
        """End it."""
        self._process.communicate()


def serve() -> None:
    """Serve the requests that come in."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes: dict[str, Any] = {}
    print("answer", cluster.address, flush=True)
    for line in sys.stdin:
        what, argument = line.split()
        answer = "done"
        if what == "add":
            node = cluster.add_node(num_cpus=int(argument), resources={"fake_gpu": int(argument)})
            answer = str(node.all_processes["raylet"][0].process.pid)
            nodes[answer] = node
        elif argument == "head":
            for kind in ("gcs_server", "raylet"):
                for started in cluster.head_node.all_processes[kind]:
                    started.process.kill()
        else:
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
        print("answer", answer, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve()
