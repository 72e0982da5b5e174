"""The embedded U-Net: a Stable Diffusion pipeline of 256 x 256 pixels."""
