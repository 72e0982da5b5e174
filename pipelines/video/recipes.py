"""Ways beyond what a video model knows, as `--recipe` names them."""

VIDEO_RECIPES: dict[str, str] = {
    "freeswim": "for size, in one jump; the default",
    "cascade": "for size, in stages that at most double the sides",
    "windows": "for length",
}
