"""A data set that draws itself: objects on textured, lit backgrounds, with all their labels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import iwm

SIZES = {"train": 20_000, "val": 2_000, "test": 2_000}  # a split's position is its seed


def shapes(n: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    """Draw objects on textured, lit backgrounds: images [n, 3, size, size] uint8 and what they
    show, shape (8), colour (8 bins of hue), texture, background (4), all [n] int64; and the
    objects' mask [n, size, size] bool."""
    chunks = [_shapes(min(1000, n - i), seed * 1_000_003 + i, size) for i in range(0, n, 1000)]
    names = "images mask shape colour texture background".split()
    return dict(zip(names, map(torch.cat, zip(*chunks))))


def _shapes(n, seed, size):  # below, a number per image is [n, 1, 1, 1]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    y = x[:, None]

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    def turn(x, y, angle):
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def ramp():  # -1..1 across the image in a random direction
        return turn(x, y, uniform(0, 2 * math.pi))[0] / math.sqrt(2)

    def choose(kinds, *options):
        return torch.stack(options, dim=1)[torch.arange(n), kinds]

    def paint(hue, saturation, value):
        faint = value * (1 - saturation)
        return iwm.shift_hue(torch.cat([value, faint, faint], dim=1), hue[:, 0])

    def pattern(kinds):  # lightness in -1..1: plain, stripes, checks, noise
        along, across = turn(x, y, uniform(0, math.pi))
        phase, pitch = uniform(0, 2 * math.pi), uniform(4, 7)
        wave = torch.sin(pitch * along + phase)
        checks = 4 * wave * torch.sin(pitch * across)
        noise = torch.randn(n, 1, 6, 6, generator=generator)
        noise = F.interpolate(noise, (size, size), mode="bilinear")
        return choose(kinds, 0 * wave, 3 * wave, checks, noise).clamp(-1, 1)

    shape = torch.randint(8, (n,), generator=generator)
    texture, background = torch.randint(4, (2, n), generator=generator)

    # the object in its own coordinates (u, v): each function is positive inside
    radius, angle = uniform(0.55, 0.8), uniform(-0.3, 0.3)
    u, v = turn(x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2), angle)
    u, v = u / radius, v / radius
    r = (u * u + v * v).sqrt()
    thin, box = torch.stack([u.abs(), v.abs()]).sort(dim=0).values
    edge = choose(
        shape,
        0.85 - r,  # disc
        0.78 - box,  # square
        0.5 - torch.maximum(v, 0.866 * u.abs() - 0.5 * v),  # triangle
        0.72 + 0.27 * torch.cos(5 * torch.atan2(v, u)) - r,  # star
        0.24 - (r - 0.74).abs(),  # ring
        torch.minimum(0.92 - box, 0.3 - thin),  # cross
        torch.minimum(0.95 - r, ((u - 0.45) ** 2 + v * v).sqrt() - 0.68),  # crescent
        0.56 * (1 - (1.05 * u) ** 2 - (1.2 * (0.1 - v) - 0.75 * u.abs().sqrt()) ** 2),  # heart
    )
    mask = (edge * radius * size / 2 + 0.5).clamp(0, 1)  # soft edges

    hue = uniform(0, 1)
    thing = paint(hue, uniform(0.4, 0.9), uniform(0.5, 1)) * (1 + 0.2 * pattern(texture))
    one, other = (paint(uniform(0, 1), uniform(0.05, 0.4), uniform(0.1, 0.75)) for _ in range(2))
    scene = torch.lerp(one, other, 0.5 + 0.5 * ramp()) * (1 + 0.15 * pattern(background))
    images = torch.lerp(scene, thing, mask) * (1 + uniform(0, 0.6) * ramp())
    images = (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    images, colour = (255 * images).round().byte(), (8 * hue.flatten()).long()
    return images, mask[:, 0] > 0.5, shape, colour, texture, background


def load_shapes(size: int) -> dict[str, dict[str, Tensor]]:
    """{"train" | "val" | "test": what `shapes` gives, and "segment"}.

    segment is the class of each pixel, [n, size, size] int64: 0 is background, then the shapes.
    """
    splits = {s: shapes(n, seed, size) for seed, (s, n) in enumerate(SIZES.items())}
    for made in splits.values():
        made["segment"] = made["mask"] * (made["shape"] + 1)[:, None, None]
    return splits
