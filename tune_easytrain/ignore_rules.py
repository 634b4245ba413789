"""What the ignore files of a folder leave out, as git reads them (gitignore(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_TOKENS = re.compile(r"\\(?P<escaped>.)|(?P<stars>\*+)|(?P<any>\?)|\[(?P<set>[!^]?\]?[^\]]*)\]|(?P<plain>.)")


@dataclass(frozen=True, slots=True)
class IgnoreRule:
    """One line of an ignore file: which paths it speaks of, from the file's folder, and what it says."""

    pattern: re.Pattern[str]
    leaves_out: bool
    only_folders: bool

    @classmethod
    def parse(cls, line: str) -> IgnoreRule | None:
        """Return the rule of a line, None for a comment and an empty line."""
        text = re.sub(r"(?<!\\) +$", "", line)
        if not text or text.startswith("#"):
            return None
        negated = text.startswith("!")
        text = text.removeprefix("!")
        only_folders = text.endswith("/")
        text = text.removesuffix("/")
        if "/" not in text:  # a name, at whatever depth
            text = f"**/{text}"
        parts = text.removeprefix("/").split("/")
        *above, last = parts
        expression = "".join(r"(?:.*/)?" if part == "**" else f"{_translate(part)}/" for part in above)
        expression += ".+" if last == "**" else _translate(last)
        try:
            return cls(re.compile(expression), not negated, only_folders)
        except re.error:  # such as a set of characters that runs backwards: it matches nothing
            return None


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The rules of the ignore files of one folder, in their order."""

    folder: PurePosixPath
    rules: tuple[IgnoreRule, ...]

    @classmethod
    def load(cls, folder: PurePosixPath, *files: Path) -> IgnoreRules:
        """Read the rules of those files that exist; `folder` is what their paths start from."""
        lines = [
            line
            for file in files
            if file.is_file()
            for line in file.read_text("utf-8", "replace").split("\n")
        ]
        return cls(folder, tuple(rule for line in lines if (rule := IgnoreRule.parse(line.rstrip("\r")))))

    def verdict(self, path: PurePosixPath, is_folder: bool) -> bool | None:
        """Return whether the last rule that speaks of a path leaves it out, None where none does.

        What is in a folder that is left out is not asked about: nothing brings it back.
        """
        name = str(path.relative_to(self.folder))
        for rule in reversed(self.rules):
            if (is_folder or not rule.only_folders) and rule.pattern.fullmatch(name):
                return rule.leaves_out
        return None


def _translate(part: str) -> str:
    """Return the regular expression of a pattern between two slashes."""
    expression = ""
    for token in _TOKENS.finditer(part):
        if token["stars"]:
            expression += "[^/]*"
        elif token["any"]:
            expression += "[^/]"
        elif token["set"] is not None:
            is_negated = token["set"][:1] in ("!", "^")
            characters = re.sub(r"[\[\]&~|^]", r"\\\g<0>", token["set"][is_negated:])
            expression += f"(?!/)[{'^' if is_negated else ''}{characters}]"
        else:
            expression += re.escape(token["escaped"] or token["plain"])
    return expression
