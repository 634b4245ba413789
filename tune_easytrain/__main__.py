"""`python -m tune_easytrain`: the command line, as a job runs it on a head node."""

import socket
import sys


def main() -> None:
    """Run the command line; a package that this Python lacks is bad input, told without a traceback."""
    try:
        from tune_easytrain.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "tune_easytrain"):
            raise
        sys.exit(_refusal(package))


def _refusal(package: str) -> int:
    print(
        f"error: {sys.executable} on {socket.gethostname()} has no {package}, which tune_easytrain needs; "
        f"install what tune_easytrain requires on every node, or submit with --pip {package}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
