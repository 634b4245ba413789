"""A process that decodes the videos whose names it is sent,
so that a crash of FFmpeg is seen and survived."""

from __future__ import annotations

import json
import resource
import sys
import traceback
from typing import Any

MOST_BYTES = 3 << 30


def decode(decoder: str, path: str, options: dict[str, Any]) -> str:
    """Return what came of a video: `clip`, `corrupt` where it was refused as it should be, or a traceback."""
    import torch

    from tune_easytrain import torchcodec_decoder, video
    from tune_easytrain.video_clips import find_damage

    try:
        find_damage(path)
        clip = (torchcodec_decoder if decoder == "torchcodec" else video).decode_clip(path, 4, **options)
    except video.CorruptVideoError as error:
        return "corrupt" if error.path == path and path in str(error) and error.why else f"unclear: {error}"
    except BaseException:  # noqa: BLE001 (told to the parent)
        return traceback.format_exc()
    is_clip = clip.dtype == torch.uint8 and clip.ndim == 4 and tuple(clip.shape[:2]) == (4, 3)
    return "clip" if is_clip else f"{clip.dtype} of shape {tuple(clip.shape)}"


def main() -> None:
    """Answer each line of JSON with one."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin:
        print(json.dumps(decode(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
