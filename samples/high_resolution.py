"""Draws three times as large as the model was trained: a small picture, then refined by windows.

Run: .venv/bin/python samples/high_resolution.py
"""

import diffaccel
from diffaccel.pipelines.image import ImageJob, generate_image
from diffaccel.pipelines.image.presets import EMBEDDED
from diffaccel.pipelines.loading import load_image_pipeline

pipe = load_image_pipeline()
method = diffaccel.NeighborhoodAttn(16)  # 16 x 16 tokens: what the model was trained on
job = ImageJob("a red apple and a rocket on a blue background", (768, 768), EMBEDDED, method)
result = generate_image(pipe, job)
result.image.save("high_resolution.png")
print(*result.reports.values(), sep="\n")
