"""The page of the command line gets typer's own description of every command when the site is built."""

from __future__ import annotations

import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PAGE = "reference/command-line.md"
PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the commands into their place of the page; raises PluginError where they cannot be described."""
    if page.file.src_uri != PAGE:
        return markdown
    if PLACE not in markdown:
        raise PluginError(f"{PAGE} has no line {PLACE}")
    return markdown.replace(PLACE, describe_commands())


def describe_commands() -> str:
    """Return Markdown with a section for each command."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "tune_easytrain.cli",
        "utils",
        "docs",
        "--name",
        "tune-easytrain",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"{' '.join(command)}: {done.stderr}")
    _, heading, commands = done.stdout.partition("## ")  # above it: the program, which the page tells
    return f"{heading}{commands}"
