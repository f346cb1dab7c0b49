"""Diffusion baselines that the papers compare with: an unconditional DDPM and DDNM on top of it."""
