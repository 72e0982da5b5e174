"""Ways beyond the size or the length that a model was trained on, as `--recipe` names them."""

IMAGE_RECIPES: dict[str, str] = {
    "direct": "at full size at once",
    "window": "one jump from the native sample, with windows alone",
    "guided": "the same under the low frequencies of the native sample",
    "cascade": "guided, in stages that at most double the sides; the default",
}
VIDEO_RECIPES: dict[str, str] = {
    "freeswim": "for size; the default",
    "windows": "for length",
}
