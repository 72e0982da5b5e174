"""Runs an image autoencoder in tiles, and says how many there are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

from diffusers import AutoencoderKL

TILE = 512  # pixels; 0.6 GB of activations in the embedded decoder
OVERLAP = 0.125


@contextmanager
def tiled(vae: AutoencoderKL, on_tile: Callable[[str], None]) -> Iterator[None]:
    """Makes `vae` work in blended tiles of 512 pixels, and restores it afterwards.

    Approximates: group norms see one tile instead of the picture; the overlap hides the seam.

    Args:
        vae: The autoencoder.
        on_tile: Called with "encode" or "decode" whenever a tile is done.
    """
    settings = {"use_tiling": True}
    if "block_out_channels" in vae.config:  # that of Qwen-Image has tiles of its own
        settings |= {
            "tile_sample_min_size": TILE,
            "tile_latent_min_size": TILE // 2 ** (len(vae.config.block_out_channels) - 1),
            "tile_overlap_factor": OVERLAP,
        }
    before = {name: getattr(vae, name) for name in settings}
    hooks = [
        vae.encoder.register_forward_hook(lambda *_: on_tile("encode")),
        vae.decoder.register_forward_hook(lambda *_: on_tile("decode")),
    ]
    try:
        for name, value in settings.items():
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
        for hook in hooks:
            hook.remove()


def tile_count(width: int, height: int) -> int:
    """Returns how many tiles a picture of this size in pixels is cut into."""
    if max(width, height) <= TILE:
        return 1
    stride = int(TILE * (1 - OVERLAP))
    return ceil(width / stride) * ceil(height / stride)
