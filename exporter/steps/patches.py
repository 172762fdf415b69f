"""Patches of a latent (B, C, …, H, W): whatever axes lie before height and width, as a clip's frames do, stay whole."""

from torch import Tensor


def cut(values: Tensor, patch: int) -> Tensor:
    """(…, H, W) → (…, H/p, p, W/p, p)."""
    height, width = values.shape[-2:]
    return values.reshape(*values.shape[:-2], height // patch, patch, width // patch, patch)


def patch_detail(values: Tensor, patch: int) -> Tensor:
    """The values minus the mean of their patch: (…, H, W) → the same shape."""
    grid = cut(values, patch)
    return (grid - grid.mean(dim=(-3, -1), keepdim=True)).reshape(values.shape)


def patch_deviation(values: Tensor, patch: int) -> Tensor:
    """Population standard deviation inside every patch, averaged over channels: (B, C, …, H, W) → (B, …, H/p, W/p)."""
    grid = cut(values, patch)
    centred = grid - grid.mean(dim=(-3, -1), keepdim=True)
    return (centred * centred).mean(dim=(-3, -1)).sqrt().mean(dim=1)


def patch_rms(values: Tensor, patch: int) -> Tensor:
    """Root mean square over the channels and positions of every patch: (B, C, …, H, W) → (B, …, H/p, W/p)."""
    grid = cut(values, patch)
    return (grid * grid).mean(dim=(1, -3, -1)).sqrt()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """A number a sample (B,), to be multiplied with a tensor (B, …): (B, 1, …)."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))
