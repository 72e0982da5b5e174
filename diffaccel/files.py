"""Writes results so that a reader never sees half of one: beside the target, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import imageio.v3 as iio
import imageio_ffmpeg
from PIL import Image

from diffaccel.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_image_path(path: Path) -> None:
    """Raises InputError unless an image can be written to `path`, before any work is done."""
    if path.suffix.lower() not in IMAGE_FORMATS:
        known = ", ".join(IMAGE_FORMATS)
        raise InputError(f"the output must end in one of {known}, got {str(path)!r}; rename it")
    if path.is_dir():
        raise InputError(f"the output must be a file, got the folder {str(path)!r}; name a file")
    check_folder_of(path)


def check_video_path(path: Path) -> None:
    """Raises InputError unless a video, or a folder of its frames, can be written to `path`."""
    if path.suffix.lower() not in (".mp4", ""):
        raise InputError(
            f"the output of a video must end in .mp4, or have no ending for a folder of frames, "
            f"got {str(path)!r}; rename it"
        )
    if path.is_dir():
        raise InputError(
            f"the output must not exist as a folder, got {str(path)!r}; name a new one"
        )
    check_folder_of(path)
    if path.suffix:
        try:
            imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise InputError(
                "an .mp4 needs ffmpeg, which imageio-ffmpeg does not find here; install it, set "
                "IMAGEIO_FFMPEG_EXE, or name a folder for frames as .png"
            ) from error


def check_folder_of(path: Path) -> None:
    """Raises InputError unless a file can be written beside `path`."""
    if not path.parent.is_dir():
        raise InputError(
            f"the output folder must exist, got {str(path.parent)!r}; create it or choose another"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"the output folder must be writable, got {str(path.parent)!r} "
            f"({error.strerror}); choose another"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block succeeds, and else vanishes.

    Raises:
        InputError: The block or this could not write, as when the disk is full.
    """
    with _writing(path):
        descriptor, name = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{str(path)!r} could not be written ({error.strerror or error}), nothing is left of "
            "it; make room or choose another place"
        ) from error


def write_image(image: Image.Image, path: Path) -> None:
    """Writes an image in the format that the name of `path` asks for."""
    with replacing(path) as temporary:
        # compress_level 4: the default takes three times as long on a 4K picture, for 3 % of size.
        options = {"compress_level": 4} if path.suffix.lower() == ".png" else {"quality": 95}
        image.save(temporary, format=IMAGE_FORMATS[path.suffix.lower()], **options)


def write_video(frames: Tensor, path: Path, fps: int) -> None:
    """Writes frames (F, 3, H, W) in [0, 1] as H.264, or as a folder of PNG pictures."""
    pictures = (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    if path.suffix:
        with replacing(path) as temporary:
            # H.264 halves the colour planes, so that sides need be even, not multiples of 16
            iio.imwrite(temporary, pictures, fps=fps, quality=8, macro_block_size=2)
        return
    with _writing(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for number, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{number:04d}.png", compress_level=4)
            folder.chmod(0o777 & ~_umask())
            folder.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_sound(sound: Tensor, path: Path, rate: int) -> None:
    """Writes a sound (channels, samples) in [-1, 1] as WAV of 16 bits, `rate` samples a second."""
    samples = (sound.clamp(-1, 1) * 32767).round().short().T.contiguous().numpy()
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_sidecar(record: dict[str, object], path: Path) -> Path:
    """Writes the record of a run beside its output, as `<output name>.json`."""
    sidecar = path.with_name(path.name + ".json")
    with replacing(sidecar) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return sidecar


def _umask() -> int:
    """Returns the permission mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
