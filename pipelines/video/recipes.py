"""Ways beyond what a video model knows, as `--recipe` names them."""

VIDEO_RECIPES: dict[str, str] = {
    "freeswim": "for size; the default",
    "windows": "for length",
}
