"""Writing results: whole or not at all, and one sentence where it fails."""

import errno
import wave

import imageio_ffmpeg
import pytest
import torch
from PIL import Image

from diffaccel.errors import InputError
from diffaccel.files import check_video_path, replacing, write_image, write_sound, write_video

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(*_args, **_options):
    raise FULL


@pytest.mark.parametrize("name", ["out.png", "out.mp4", "frames"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image.Image, "save", failing)
    monkeypatch.setattr("diffaccel.files.iio.imwrite", failing)
    path = tmp_path / name
    with pytest.raises(InputError, match="could not be written .No space left on device"):
        if name == "out.png":
            write_image(Image.new("RGB", (8, 8)), path)
        else:
            write_video(torch.zeros(2, 3, 16, 16), path, 8)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "old.txt"
    path.write_text("old")
    with pytest.raises(InputError, match="make room"), replacing(path) as temporary:
        temporary.write_text("new")
        raise FULL
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["old.txt"]


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "x.txt"):
        raise KeyError("mine")
    assert not list(tmp_path.iterdir())


def test_missing_ffmpeg_is_said_before_any_work(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(InputError, match="needs ffmpeg"):
        check_video_path(tmp_path / "clip.mp4")
    check_video_path(tmp_path / "frames")


def test_a_clip_is_written_and_read(tmp_path):
    frames = torch.rand(5, 3, 32, 48)
    write_video(frames, tmp_path / "clip.mp4", 8)
    assert (tmp_path / "clip.mp4").stat().st_size > 500
    write_video(frames, tmp_path / "frames", 8)
    assert len(list((tmp_path / "frames").iterdir())) == 5


def test_a_sound_keeps_its_channels_and_its_order(tmp_path):
    sound = torch.tensor([[0.0, 0.5, 1.0], [-1.0, -0.5, 2.0]])
    write_sound(sound, tmp_path / "x.wav", 24000)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 24000, 3)
        read = torch.frombuffer(bytearray(file.readframes(3)), dtype=torch.int16).view(3, 2).T
    torch.testing.assert_close(read / 32767, sound.clamp(-1, 1), atol=1e-4, rtol=0)
