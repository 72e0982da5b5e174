"""Makes a clip of twice the size that the model was trained on: a small clip, then refined.

Run: .venv/bin/python samples/video.py
"""

from pathlib import Path

from PIL import Image

from diffaccel.files import write_video
from diffaccel.pipelines.embedded import EMBEDDED_VIDEO
from diffaccel.pipelines.loading import load_video_pipeline
from diffaccel.pipelines.video import VideoJob, generate_video
from diffaccel.pipelines.video.presets import video_preset
from diffaccel.quality.contact_sheet import grid

pipe = load_video_pipeline(EMBEDDED_VIDEO)
preset = video_preset(EMBEDDED_VIDEO)
job = VideoJob(
    "a red apple turns on a blue background",
    (256, 256),
    frames=17,  # what the model was trained on
    native=preset.size_for(pipe),
    steps=12,
    recipe=preset.recipe,
)
result = generate_video(pipe, job)
clip = result.frames[0]  # (F, 3, H, W) in 0 to 1
write_video(clip, Path("video.mp4"), fps=12)
pixels = (255 * clip).round().byte().permute(0, 2, 3, 1).numpy()
grid([Image.fromarray(frame) for frame in pixels[::4]], 5).save("video.png")
print(*result.reports.values(), sep="\n")
