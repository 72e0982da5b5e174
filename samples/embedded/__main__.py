"""Runs what makes, measures or compares the embedded models.

    python samples/embedded make image --minutes 100
    python samples/embedded evaluate video pipelines/embedded/video
    python samples/embedded compare guidance --model unet

`--help` behind the two words lists the options.
"""

import sys
from importlib import import_module
from pathlib import Path

MODELS = ("image", "unet", "video", "scorer")
COMMANDS = {
    **{("make", model): f"embedded.{model}.make" for model in MODELS},
    **{("evaluate", model): f"embedded.{model}.evaluate" for model in MODELS},
    ("compare", "methods"): "embedded.compare_methods",
    ("compare", "guidance"): "embedded.compare_guidance",
}

if __name__ == "__main__":
    words = tuple(sys.argv[1:3])
    if words not in COMMANDS:
        sys.exit(f"{__doc__}\nCommands: {', '.join(map(' '.join, COMMANDS))}")
    # The folder is the package `embedded`; its own modules stay off the path.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.argv[:3] = [" ".join(["samples/embedded", *words])]
    import_module(COMMANDS[words]).main()
