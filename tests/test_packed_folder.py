from __future__ import annotations

import os
import subprocess
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tune_easytrain.errors import BadInputError
from tune_easytrain.packed_folder import PackedFolder

NAMES = ["a", "b", "data", "x.py", "y.bin", "z.py", "a b", "-", "n1", "[x]"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
PARTS = st.sampled_from(
    ["a", "b", "data", "x.py", "*.py", "*", "**", "?.bin", "?", "[ab]", "[!a]", "[^a]", "[a-z]", "n[0-9]",
     "z*", "a b", "\\a", "-", "[-a]", "[]x]", "\\[x]", "**a", "*.p?"]
)  # fmt: skip
RULES = st.one_of(
    st.sampled_from(["", "# a", "\\#", " ", "a ", "a\\ b"]),
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["", "", "!"]),
        st.sampled_from(["", "", "/"]),
        st.lists(PARTS, min_size=1, max_size=3).map("/".join),
        st.sampled_from(["", "", "/"]),
    ).filter(lambda rule: not rule.endswith("**/")),  # pathspec takes it for the folder above too
)


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(packed: PackedFolder) -> list[str]:
    return [str(path) for path in packed.sizes]


def files_for_git(folder: Path) -> set[str]:
    """What git would add to a repository made of the folder."""
    git = ["git", "-c", "core.excludesFile=", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard", "-z"], check=True, capture_output=True, text=True
    )
    return set(listed.stdout.split("\0")) - {""}


@settings(max_examples=60)
@given(
    paths=st.sets(PATHS, min_size=1, max_size=12),
    rules=st.dictionaries(st.sampled_from(["", "a", "data", "a/b"]), st.lists(RULES, max_size=5), max_size=3),
)
@example(paths={"a/a"}, rules={"": ["a", "!a/"]})
@example(paths={"a/b"}, rules={"": ["b", "!a"]})
@example(paths={"a/b"}, rules={"": ["a", "!a/**"]})
def test_what_gitignore_leaves_out_is_what_git_leaves_out(
    paths: set[str], rules: dict[str, list[str]]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in sorted(paths):
            if not any((folder / parent).is_file() for parent in PurePosixPath(path).parents):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.is_dir():
                    file.write_text(path)
        for place, lines in rules.items():
            if (folder / place).is_dir():
                (folder / place / ".gitignore").write_text("\n".join(lines) + "\n")
        assert set(names(PackedFolder.scan(folder))) == files_for_git(folder)


def test_environments_caches_and_what_rayignore_names_stay_here(tmp_path: Path) -> None:
    make(
        tmp_path,
        {
            "task.py": "",
            ".git/HEAD": "",
            "pkg/__pycache__/task.pyc": "",
            "pkg/__init__.py": "",
            "my_env/pyvenv.cfg": "",
            "my_env/lib/big.so": "",
            "clips/a.avi": "",
            "runs/one/sweep.json": "",
            ".rayignore": "clips/\n",
        },
    )
    (tmp_path / "lost").symlink_to("nowhere")
    packed = PackedFolder.scan(tmp_path, leave_out=["runs"])
    assert names(packed) == [".rayignore", "pkg/__init__.py", "task.py"]


def test_links_are_followed_and_circles_of_them_end(tmp_path: Path) -> None:
    make(tmp_path, {"lib/code.py": "x", "project/task.py": ""})
    (tmp_path / "project/lib").symlink_to(tmp_path / "lib")
    (tmp_path / "lib/again").symlink_to(tmp_path / "lib")
    assert names(PackedFolder.scan(tmp_path / "project")) == ["lib/code.py", "task.py"]


def test_a_folder_too_big_names_what_is_big_in_it(tmp_path: Path) -> None:
    make(
        tmp_path, {"task.py": "", "data/a.bin": "x" * 5000, "data/b.bin": "x" * 3000, "notes.txt": "x" * 2500}
    )
    packed = PackedFolder.scan(tmp_path)
    packed.check_size(max_bytes=packed.num_bytes)
    with pytest.raises(BadInputError) as caught:
        packed.check_size(max_bytes=packed.num_bytes - 1)
    text = str(caught.value)
    assert f"{tmp_path} is too big to send with a job: 10.3 KiB in 4 files, at most 10.3 KiB may be" in text
    assert (
        "7.8 KiB of it in data/; the biggest files: data/a.bin (4.9 KiB), data/b.bin (2.9 KiB), notes" in text
    )
    assert ".gitignore" in text
    assert "--working-dir" in text


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="missing is not a folder"):
        PackedFolder.scan(tmp_path / "missing")


def test_the_archive_is_the_folder_and_depends_on_nothing_but_content(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "project", {"task.py": "print()\n", "pkg/run.sh": "#!/bin/sh\n", "näme.txt": "ä"}
    )
    (folder / "pkg/run.sh").chmod(0o755)
    packed = PackedFolder.scan(folder)
    packed.write(tmp_path / "one.zip", [PurePosixPath(".git"), PurePosixPath("sub/.git")])
    for file in folder.rglob("*"):
        os.utime(file, (1, 2_000_000_000))
    packed.write(tmp_path / "two.zip", [PurePosixPath(".git"), PurePosixPath("sub/.git")])
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()

    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.getinfo("pkg/run.sh").external_attr >> 16 == 0o755
        archive.extractall(tmp_path / "there")
    assert (tmp_path / "there/.git").is_dir()
    assert (tmp_path / "there/sub/.git").is_dir()
    assert {str(path): (tmp_path / "there" / path).read_bytes() for path in packed.sizes} == {
        str(path): (folder / path).read_bytes() for path in packed.sizes
    }
    assert len(packed.sizes) == 3


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    packed = PackedFolder.scan(make(tmp_path, {"task.py": "", "gone.txt": ""}))
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(BadInputError, match=r"gone\.txt cannot be sent with the job: No such file"):
        packed.write(tmp_path / "packed.zip")


def test_a_line_that_is_no_pattern_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path, {"sub/.rayignore": "*.bin\n!\n", "sub/a": ""})
    with pytest.raises(BadInputError, match=r"sub/\.rayignore:2: '!' is no pattern; remove the line"):
        PackedFolder.scan(folder)
