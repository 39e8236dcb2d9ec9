"""Image World Models (IWM) in one file: a readable PyTorch implementation of

    Garrido, Assran, Ballas, Bardes, Najman, LeCun: "Learning and Leveraging World Models in Visual
    Representation Learning", 2024, https://arxiv.org/abs/2403.00504

An encoder sees a masked, photometrically degraded view x of an image. A predictor that is told the action a
(how to get from x to the view y, which is only colour-jittered) imagines the latents that an EMA teacher gives y at the
masked patches.

    image -- crop, flip --+-- jitter, blur, gray, solarise --> x -- keep the context --> encoder f ---> z
                          |             |                                                               |
                          |             +--> action a(x->y), 7 numbers --------------> predictor p <----+
                          |             |     mask tokens (learned vector + position) ------^  |
                          |             |                                                      v
                          |             |                                                    z_hat
                          |             |                                                      |
                          |             |                                       || z_hat - h ||^2, masked patches
                          |             |                                                      |
                          +---------- jitter --> y -- all patches --> teacher ---------------> h (no gradient)
                                                                         ^
                                                                         +-- moving average (EMA) of the encoder

Symbols of shapes:  B images,  S x S pixels,  N patches of an image,  K context patches,  M masked patches (in training
K + M = N; asked for everything K = M = N),  D encoder width,  W predictor width,  A = 7 numbers of an action,
V variants in a bank.

Sections, in the order of the paper: Config | photometric actions | masks | ViT | predictor | IWM | measures.
Lines tagged "deviation:" depart from the paper or fill in what it does not say; the README lists them with reasons.
"""

import copy
import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

JITTER = ("brightness", "contrast", "saturation", "hue")  # the order in which they are applied, always
ACTION = (*JITTER, "blur", "gray", "solarize")  # the 7 components of an action
IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the jitter parameters that change nothing


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass is the whole experiment; train.py makes its command line from it
# ---------------------------------------------------------------------------------------------------------------------


def setting(default, help, low=None, high=math.inf):
    """A setting, its explanation and its range."""
    return field(default=default, metadata={"help": help, "range": (low, high)})


@dataclass
class Config:
    """Every setting of a run. The defaults are the preset "shapes": minutes on a CPU."""

    data: str = setting(
        "shapes", "shapes (made on the fly) | cifar10 | cifar100 | a folder: train/<class>/, test/<class>/ (or val/)"
    )
    image_size: int = setting(32, "side of the square views, in pixels; the patch size must divide it", 1)
    # photometric actions (strengths as in torchvision's ColorJitter)
    brightness: float = setting(0.4, "jitter: factor drawn from 1 -+ this", 0, 100)
    contrast: float = setting(0.4, "jitter: factor drawn from 1 -+ this", 0, 100)
    # deviation: three times the paper's 0.2 and 0.1: a small model learns more of its action, at little cost to the probes
    saturation: float = setting(0.6, "jitter: factor drawn from 1 -+ this (the paper: 0.2)", 0, 100)
    hue: float = setting(0.3, "jitter: shift in turns of the colour wheel, at most 0.5 (the paper: 0.1)", 0, 100)
    strength: float = setting(1.0, "multiplies the four above (strong jitter: 2)", 0, 100)
    jitter_prob: float = setting(0.8, "probability that a view is jittered at all", 0, 1)
    blur_prob: float = setting(0.2, "probability of blur on the source view", 0, 1)
    gray_prob: float = setting(0.2, "probability of grayscale on the source view", 0, 1)
    solarize_prob: float = setting(0.1, "probability of solarisation on the source view", 0, 1)
    crop_min: float = setting(0.3, "smallest area drawn for the crop, as a share of the image; 1 is no crop", 1e-3, 1)
    # masks
    blocks: int = setting(4, "rectangles whose union is masked", 1)
    block_min: float = setting(0.15, "smallest area of a rectangle, as a share of the image", 1e-3, 0.99)
    block_max: float = setting(0.20, "largest area of a rectangle, as a share of the image", 1e-3, 0.99)
    context: float = setting(
        0.56, "share of patches the encoder sees; it must suit the blocks: 0.56 these four, 0.82 one", 1e-3, 0.999
    )
    predict_all: bool = setting(False, "take the loss at all patches; the paper: at the masked ones only")
    # encoder
    patch: int = setting(4, "side of a patch, in pixels", 1)
    width: int = setting(128, "width D of the encoder", 1)
    depth: int = setting(4, "blocks of the encoder", 1)
    heads: int = setting(4, "attention heads, of the encoder and of the predictor", 1)
    # predictor, the world model; deviation: nearly as large as the encoder, so that an hour or two teach it much
    conditioning: str = setting("feature", "how the predictor is told the action: none | sequence | feature")
    pred_width: int = setting(96, "width W of the predictor", 1)
    pred_depth: int = setting(6, "blocks of the predictor", 1)
    target_norm: bool = setting(True, "layer-norm the teacher's latents before the loss")
    # optimisation; deviation: fitted to runs of a few thousand steps
    steps: int = setting(2400, "optimiser steps", 1)
    batch_size: int = setting(64, "images a step", 1)
    lr: float = setting(1e-3, "peak learning rate; try lowering it when RankMe falls towards 1 (collapse)", 1e-12, 100)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    weight_decay: float = setting(0.04, "weight decay of AdamW at the start (none on biases and norms)", 0, 100)
    weight_decay_end: float = setting(0.4, "weight decay at the end, reached along a cosine", 0, 100)
    ema: float = setting(0.995, "teacher's first momentum, rises linearly to 1; averages about 1/(1-ema) steps", 0, 1)
    seed: int = setting(0, "seed of the weights, the data order, the views and the masks", 0, 10**9 - 1)
    # measuring
    measurements: int = setting(6, "how many times a run measures itself, the end included", 1)
    bank: int = setting(256, "variants V of an image that MRR ranks", 2)
    mrr_images: int = setting(32, "test images that MRR averages over (while training: at most 16 held-out ones)", 1)
    # machine
    bf16: bool = setting(True, "compute in bfloat16 where the device has it (weights and optimiser stay float32)")
    compile: bool = setting(False, "torch.compile the networks: minutes at the start, faster steps after")

    def __post_init__(self):
        """Raises ValueError with one line that names the setting and its range."""

        def need(ok, message):
            if not ok:
                raise ValueError(message)

        for f in fields(self):
            (low, high), value = f.metadata["range"], getattr(self, f.name)
            allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            need(low is None or low <= value <= high, f"{f.name} is {value}: it must be {allowed}")
        need(self.block_min <= self.block_max, f"block_min {self.block_min} is above block_max {self.block_max}")
        need(self.conditioning in ("none", "sequence", "feature"),
             f"conditioning is {self.conditioning!r}: choose none, sequence or feature")  # fmt: skip
        need(self.image_size % self.patch == 0, f"patch {self.patch} does not divide image_size {self.image_size}")
        need(self.grid >= 2, f"patch {self.patch} leaves one patch of image_size {self.image_size}: make it smaller")
        for name in ("width", "pred_width"):
            w = getattr(self, name)
            need(w % 4 == 0 and w % self.heads == 0, f"{name} {w} must be a multiple of 4 and of heads ({self.heads})")

    @property
    def grid(self) -> int:
        """Patches along one side, so that N = grid * grid."""
        return self.image_size // self.patch

    @property
    def jitter_strengths(self) -> Tensor:
        """[4] float: strengths of brightness, contrast, saturation and hue.

        deviation: strong jitter multiplies all four of them; half a turn already reaches every hue.
        """
        strengths = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue]) * self.strength
        strengths[3] = strengths[3].clamp(max=0.5)
        return strengths

    @property
    def jitter_range(self) -> Tensor:
        """[2, 4] float: lowest and highest jitter parameters. Factors are 0 or more (torchvision's ColorJitter)."""
        low = IDENTITY - self.jitter_strengths
        low[:3].clamp_(min=0)
        return torch.stack([low, IDENTITY + self.jitter_strengths])


PRESETS = {
    # a CPU with bfloat16, two cores: 6 to 8 minutes (without: three to four times as long), 1.5 GiB, MRR 0.60 +- 0.04
    "shapes": Config(),
    # the same CPU, one core: 2 hours, 1.6 to 2 GiB, MRR 0.56 +- 0.05, pooled 0.87 +- 0.02
    "cifar": Config(data="cifar10", steps=28_000, ema=0.99, measurements=10, mrr_images=128),
    "imagenet100": Config(  # not run yet
        data="", image_size=160, patch=16, width=384, depth=12, heads=6, pred_width=192, pred_depth=12,
        saturation=0.2, hue=0.1, steps=100_000, batch_size=256, ema=0.996,
    ),
    "paper": Config(  # not run yet; the paper's sizes and schedule, our batch size, init, beta2, mask counts and crop
        data="", image_size=224, patch=16, width=768, depth=12, heads=12, pred_width=384, pred_depth=18,
        saturation=0.2, hue=0.1, steps=375_000, batch_size=1024, warmup=40 / 300, ema=0.996,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Photometric actions: each image of a batch has its own parameters, which are kept: they are the action
# ---------------------------------------------------------------------------------------------------------------------


def grayscale(images: Tensor) -> Tensor:
    """Luma (ITU-R 601-2) of RGB images in 0..1. [B, 3, S, S] -> [B, 1, S, S]."""
    r, g, b = images.unbind(dim=1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, in 0..1. images, other: [B, 3, S, S] or broadcast, factor: [B, 1, 1, 1]."""
    return torch.lerp(other, images, factor).clamp(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` ([B, 1, 1], 1 = the whole colour wheel). images: [B, 3, S, S] in 0..1 -> same."""
    r, g, b = images.unbind(dim=1)
    low = images.amin(dim=1)
    chroma = images.amax(dim=1) - low
    # RGB -> hue, in sixths of the wheel: how far from red (0 to 3), and on which side of it, green's or blue's
    from_red = 1 + ((g - low) + (b - r)) / chroma.clamp(min=1e-30)  # a grey pixel has no hue, and no chroma to show it
    hue = (torch.copysign(from_red, g - b) + 6 * turns) % 6
    # hue -> RGB: each channel rises from `low` by up to `chroma`, the more the nearer the hue is to its colour
    near_red, near_green, near_blue = (hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()
    return torch.stack([low + chroma * near.clamp(0, 1) for near in (near_red, near_green, near_blue)], dim=1)


def jitter(images: Tensor, params: Tensor) -> Tensor:
    """Colour jitter in the fixed order brightness, contrast, saturation, hue; the identity is (1, 1, 1, 0).

    images: [B, 3, S, S] in 0..1. params: [B, 4] factors of brightness, contrast and saturation (0 or more) and hue
    shift in turns. Returns [B, 3, S, S] in 0..1. Each operation equals torchvision.transforms.v2.functional's.
    deviation: the order is fixed; a shuffled one could not be described by four numbers.
    """
    brightness, contrast, saturation, hue = params[:, :, None, None, None].unbind(dim=1)
    images = (images * brightness).clamp(0, 1)
    images = blend(images, grayscale(images.mean(dim=(2, 3), keepdim=True)), contrast)
    images = blend(images, grayscale(images), saturation)
    return shift_hue(images, hue.squeeze(1))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma ([B], pixels) and reflected borders. images: [B, 3, S, S] -> same.

    A blur is linear and separable, so it is two products with an [S, S] matrix: no loop and no gather over the batch.
    """
    size = images.shape[-1]
    radius = min(math.ceil(3 * blur_sigma(size)[1]), size - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    # reads[p, s, t]: does tap t of blurred pixel s read pixel p? matrix[b, s, p]: how much of pixel p is in s
    reads = F.pad(torch.eye(size, device=images.device), (radius, radius), mode="reflect").unfold(1, 2 * radius + 1, 1)
    matrix = torch.einsum("bt,pst->bsp", weights, reads).unsqueeze(1)  # applied to the rows, then to the columns
    return matrix @ images @ matrix.mT


def blur_sigma(size: int) -> tuple[float, float]:
    """Range of sigma in pixels for images of `size`.

    deviation: 0.1-2.0 at 224 pixels (DINO) scaled to 32 would be at most 0.3 pixels, no blur at all: never below half.
    """
    scale = max(size / 224, 0.5)
    return 0.1 * scale, 2.0 * scale


def solarize(images: Tensor) -> Tensor:
    """Invert what is brighter than half of full scale. [B, 3, S, S] in 0..1."""
    return torch.where(images >= 0.5, 1 - images, images)


def random_crop_flip(images: Tensor, config: Config, generator=None) -> Tensor:
    """Random resized crop (area crop_min..1, width / height 3/4..4/3) and flip. -> [B, 3, S, S], S = image_size.

    deviation: the paper's scale and aspect are not known; these are I-JEPA's scale and torchvision's aspect. A side
    longer than the image's is cut to it, where torchvision draws again: some crops are smaller than drawn. Cropped from
    the image at `image_size` and resized back, not from the original file.
    """
    B = len(images)
    u_area, u_aspect, u_x, u_y, u_flip = torch.rand(5, B, device=images.device, generator=generator)  # uniform in 0..1
    area = config.crop_min + (1 - config.crop_min) * u_area
    aspect = torch.exp((2 * u_aspect - 1) * math.log(4 / 3)) if config.crop_min < 1 else torch.ones_like(area)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(B, 2, 3, device=images.device)  # maps the crop's coordinates, -1..1, to the image's
    theta[:, 0, 0] = torch.where(u_flip < 0.5, -width, width)  # a negative width mirrors
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * u_x - 1) * (1 - width)
    theta[:, 1, 2] = (2 * u_y - 1) * (1 - height)
    grid = F.affine_grid(theta, [B, 3, config.image_size, config.image_size], align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # centre of the outermost pixel: beyond it the border is repeated
    return F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)


def jitter_params(batch: int, config: Config, generator=None, device=None, always: bool = False) -> Tensor:
    """Draw jitter parameters, [B, 4]: identity with probability 1 - jitter_prob unless `always`."""
    low, high = config.jitter_range.to(device)
    params = low + (high - low) * torch.rand(batch, len(JITTER), device=device, generator=generator)
    on = torch.rand(batch, 1, device=device, generator=generator) < (1.0 if always else config.jitter_prob)
    return torch.where(on, params, IDENTITY.to(params))


def make_action(params_x: Tensor, params_y: Tensor, flags_x: Tensor, config: Config) -> Tensor:
    """a(x->y) [B, 7]: jitter differences from x to y in units of their strengths, then x's destructive flags [B, 3].

    A flag of 1 says: x was degraded, y is not. deviation: divided by the strengths (config.strength included), so that
    each number is of order 1. Differences of hue are not wrapped: half a turn either way is one change, two actions.
    """
    strengths = config.jitter_strengths.to(params_x)
    return torch.cat([(params_y - params_x) / strengths.clamp(min=1e-8), flags_x], dim=1)


@torch.no_grad()
def make_views(images: Tensor, config: Config, generator=None) -> tuple[Tensor, Tensor, Tensor]:
    """One shared crop and flip, then two views of it.

    images: [B, 3, S, S] float in 0..1. Returns source x and target y, both [B, 3, S, S] in 0..1 and pixel-aligned,
    and the action a(x->y) [B, 7]. deviation: both views are jittered independently, neither is made from the other.
    """
    images = random_crop_flip(images, config, generator)
    B, device = len(images), images.device

    params_y = jitter_params(B, config, generator, device)
    y = jitter(images, params_y)  # nothing destructive: the target keeps its information

    params_x = jitter_params(B, config, generator, device)
    probs = torch.tensor([config.blur_prob, config.gray_prob, config.solarize_prob], device=device)
    flags = torch.rand(B, len(probs), device=device, generator=generator) < probs
    blurred, gray, solarized = flags[:, :, None, None, None].unbind(dim=1)
    low, high = blur_sigma(config.image_size)
    sigma = low + (high - low) * torch.rand(B, device=device, generator=generator)
    x = jitter(images, params_x)
    x = torch.where(blurred, gaussian_blur(x, sigma), x)
    x = torch.where(gray, grayscale(x), x)
    x = torch.where(solarized, solarize(x), x)
    return x, y, make_action(params_x, params_y, flags, config)


# ---------------------------------------------------------------------------------------------------------------------
# Masks: the union of 4 rectangles is masked, the rest is context; the same counts for every image and every step
# ---------------------------------------------------------------------------------------------------------------------


def block_unions(n: int, grid: int, config: Config, generator=None, device=None) -> Tensor:
    """n random unions of rectangles on a grid x grid board. -> [n, grid, grid] bool, True is masked.

    Sides are whole patches: on an 8x8 grid 15 to 20 % become 14 to 25 %.
    """
    u_area, u_aspect, u_top, u_left = torch.rand(4, n, config.blocks, device=device, generator=generator)
    area = grid**2 * (config.block_min + (config.block_max - config.block_min) * u_area)  # in patches
    aspect = 0.75 + 0.75 * u_aspect  # height / width
    height = (area * aspect).sqrt().round().clamp(1, grid)
    width = (area / aspect).sqrt().round().clamp(1, grid)
    top = (u_top * (grid - height + 1)).floor()
    left = (u_left * (grid - width + 1)).floor()
    i = torch.arange(grid, device=device)
    rows = (i >= top[..., None]) & (i < (top + height)[..., None])  # [n, blocks, grid]
    columns = (i >= left[..., None]) & (i < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).any(dim=1)


def sample_masks(batch: int, grid: int, config: Config, generator=None, device=None) -> tuple[Tensor, Tensor]:
    """Patch indices (row * grid + column) that the encoder sees, and those to imagine. -> [B, K], [B, M] int64.

    deviation: equal counts for all images, which batches need: of 16 candidate unions (c) per image the one whose size
    is nearest to M is kept, and the patches too many or too few (few, if `context` suits the blocks) are chosen at
    random, not in raster order. Like any whole rectangles they mask the middle more often than the corners (86 % and
    8 % on an 8x8 grid). Placed evenly, as here, unions leave 50 % context on that grid; I-JEPA's, which avoid the last
    row and column, leave about 56 %.
    """
    M = min(max(round((1 - config.context) * grid**2), 1), grid**2 - 1)
    unions = rearrange(block_unions(16 * batch, grid, config, generator, device), "(c b) h w -> c b (h w)", c=16)
    nearest = (unions.sum(dim=2) - M).abs().argmin(dim=0)  # [B]
    union = unions[nearest, torch.arange(batch, device=device)]  # [B, N]
    # keys 0..0.5 outside the union, 1..1.5 inside: the M largest are masked, random ones join or leave to make it M
    order = (union + 0.5 * torch.rand(union.shape, device=device, generator=generator)).argsort(dim=1)
    return order[:, :-M], order[:, -M:]


# ---------------------------------------------------------------------------------------------------------------------
# ViT: the encoder f. It runs on the patches it is given, so masking makes it cheaper
# ---------------------------------------------------------------------------------------------------------------------


def sincos_positions(width: int, grid: int) -> Tensor:
    """2-D sine-cosine position embedding, [N, width]: half for the row, half for the column (MoCo v3, MAE)."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # [grid, width / 4]
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = repeat(one_axis, "h d -> (h w) d", w=grid)
    columns = repeat(one_axis, "w d -> (h w) d", h=grid)
    return torch.cat([rows, columns], dim=1)


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens [B, N, D] at indices [B, K] -> [B, K, D]."""
    return tokens.gather(1, indices.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for [B, heads, tokens, d]."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    # elsewhere by hand: on a CPU, for the few dozen tokens here, the fused kernel is up to ten times slower in bfloat16
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block. [B, tokens, width] -> same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = x + self.proj(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def init_weights(network: "ViT | Predictor"):
    """Linear layers Xavier-uniform, biases 0 (MAE); output projections of block i divided by sqrt(2 i) (I-JEPA).

    deviation: I-JEPA's normal 0.02 suits width 768. At width 128 it makes the patch embedding so small beside the
    positions that 80 % of the targets' variance is where a patch is, not what it shows, and training starts slowly.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(network.blocks, start=1):  # so that the residual stream does not grow with depth
        block.proj.weight.data.div_(math.sqrt(2 * i))
        block.fc2.weight.data.div_(math.sqrt(2 * i))


class ViT(nn.Module):
    """Vision transformer without class token. Images in 0..1, [B, 3, S, S] -> latents [B, N or K, D]."""

    def __init__(self, config: Config):
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(3 * config.patch**2, config.width)
        self.blocks = nn.Sequential(*[Block(config.width, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.register_buffer("positions", sincos_positions(config.width, config.grid), persistent=False)
        init_weights(self)

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """context: [B, K] indices of the patches to see; None means all N of them, in order."""
        images = (images - 0.5) / 0.25  # deviation: normalised here, last, and the same for every data set
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        positions = self.positions
        if context is not None:
            patches, positions = gather(patches, context), positions[context]
        return self.norm(self.blocks(self.embed(patches) + positions))


# ---------------------------------------------------------------------------------------------------------------------
# Predictor: the world model p. Context latents and an action in, imagined latents at the asked positions out
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A narrower ViT over the context latents, one mask token per position to imagine, and the action."""

    positions: Tensor  # [N, W]

    def __init__(self, config: Config):
        super().__init__()
        D, W, A = config.width, config.pred_width, len(ACTION)
        self.conditioning = config.conditioning
        self.embed = nn.Linear(D, W)
        self.mask_token = nn.Parameter(torch.zeros(W))
        self.blocks = nn.Sequential(*[Block(W, config.heads) for _ in range(config.pred_depth)])
        self.norm = nn.LayerNorm(W, eps=1e-6)
        self.out = nn.Linear(W, D)
        self.register_buffer("positions", sincos_positions(W, config.grid), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.conditioning == "sequence":  # one linear layer R -> R^W for each of the A scalars
            # deviation: initial scale 1, as large as a latent's embedding, so that the action is heard from the start
            self.action_weight = nn.Parameter(torch.randn(A, W))
            self.action_bias = nn.Parameter(torch.randn(A, W))
        # three layers, the same for every mask token; `feature` mixes the action into them: R^(W + A) -> R^W
        # deviation: the other modes have them too, without the action; without them they learn less of it
        more = A if self.conditioning == "feature" else 0
        self.mix = nn.Sequential(nn.Linear(W + more, W), nn.ReLU(), nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))
        init_weights(self)

    def forward(self, z: Tensor, context: Tensor, masked: Tensor, action: Tensor, extra=None) -> Tensor:
        """z: [B, K, D] latents of the context patches [B, K]; masked: [B, M] positions to imagine; action: [B, A];
        extra: [B, any, W] further input tokens, such as a task's. Returns the imagined latents, [B, M, D].
        """
        x = self.embed(z) + self.positions[context]
        tokens = self.mask_token + self.positions[masked]  # [B, M, W]
        if self.conditioning == "feature":  # the action is mixed into every mask token
            tokens = torch.cat([tokens, repeat(action, "b a -> b m a", m=masked.shape[1])], dim=2)
        x = torch.cat([x, self.mix(tokens)], dim=1)
        if self.conditioning == "sequence":  # the action joins as A tokens of its own
            tokens = action.unsqueeze(2) * self.action_weight + self.action_bias  # [B, A, W]
            # deviation: once for every N others, twice where all is asked: about as large a share as in training
            x = torch.cat([tokens.repeat(1, math.ceil(x.shape[1] / len(self.positions)), 1), x], dim=1)
        if extra is not None:
            x = torch.cat([extra, x], dim=1)
        x = self.blocks(x)[:, -masked.shape[1] :]  # of [extra, action, context, mask tokens] only the last, [B, M, W]
        return self.out(self.norm(x))

    def everywhere(self, z: Tensor, action: Tensor, extra=None) -> Tensor:
        """Imagine all positions from the latents of all positions, z: [B, N, D] -> [B, N, D].

        deviation: in training (without predict_all) a mask token never stands where the encoder sees; here each does.
        """
        positions = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
        return self(z, positions, positions, action, extra)


# ---------------------------------------------------------------------------------------------------------------------
# IWM: encoder, teacher, predictor and the loss
# ---------------------------------------------------------------------------------------------------------------------


class IWM(nn.Module):
    """The figure above. `loss` is one training step's forward; `imagine` uses the world model afterwards."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = Predictor(config)

    def loss(self, images: Tensor, generator=None) -> Tensor:
        """Mean squared error of the imagined latents at the masked patches. images: [B, 3, S, S] in 0..1 -> scalar.

        The context of x goes to the encoder, all of y to the teacher. The gradient reaches encoder and predictor; the
        teacher gets none. With predict_all the error is that at all patches.
        """
        c = self.config
        with torch.autocast(images.device.type, enabled=False):  # pixels stay out of bfloat16
            x, y, action = make_views(images, c, generator)
        context, masked = sample_masks(len(x), c.grid, c, generator, x.device)
        if c.predict_all:  # also where the encoder sees x, as MRR and finetuning will ask
            masked = torch.arange(c.grid**2, device=x.device).expand(len(x), -1)
        z = self.encoder(x, context)  # z = f(x), [B, K, D]
        z_hat = self.predictor(z, context, masked, action)  # z_hat = p(z, a, m), [B, M, D]
        h = gather(self.targets(y), masked)  # h = teacher(y), [B, M, D]
        # deviation: the mean where the paper has a sum; Adam's step is the same
        return (z_hat.float() - h).square().mean()

    forward = loss  # what DistributedDataParallel calls

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """What the world model has to imagine: the teacher's latents. [B, 3, S, S] in 0..1 -> [B, N, D] float.

        deviation: layer-normed without affine, as I-JEPA does; the paper does not say. So all latents have one length,
        and the loss cannot fall by shrinking them. They could still become all the same: RankMe and target std show it.
        """
        h = self.teacher(images).float()
        return F.layer_norm(h, h.shape[-1:]) if self.config.target_norm else h

    @torch.no_grad()
    def update_teacher(self, momentum: float):
        """teacher <- momentum * teacher + (1 - momentum) * encoder; call it after the optimiser's step."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - momentum)

    def imagine(self, images: Tensor, action: Tensor) -> Tensor:
        """Imagine, at all positions, the targets of images after an action.

        images: [B, 3, S, S] in 0..1, unmasked (B may be 1 for many actions: it is encoded once); action: [B, A].
        Returns [B, N, D].
        """
        return self.predictor.everywhere(self.encoder(images).expand(len(action), -1, -1), action)


# ---------------------------------------------------------------------------------------------------------------------
# Measures: is it a world model (MRR)? and what do the teacher's latents hold?
# ---------------------------------------------------------------------------------------------------------------------


def ranks(imagined: Tensor, bank: Tensor) -> Tensor:
    """Rank of each true variant among its bank by L2 distance, 1 = nearest. deviation: ties get their mean rank.

    imagined, bank: [V, ...]; imagined[i] should be nearest to bank[i]. Returns [V] float on the CPU.
    """
    a, b = imagined.flatten(1).cpu().double(), bank.flatten(1).cpu().double()
    distance = torch.cdist(a, b).nan_to_num(nan=1e300, posinf=1e300)  # NaN must not help: it is the farthest
    true = distance.diagonal().unsqueeze(1)
    # cdist rounds: distances that differ by less than a millionth of the bank's norm are a tie
    tolerance = 1e-6 * b.square().sum(dim=1).mean().sqrt().nan_to_num()
    nearer, tied = distance < true - tolerance, (distance - true).abs() <= tolerance
    return nearer.sum(dim=1) + (tied.sum(dim=1) + 1) / 2


def mean_reciprocal_rank(imagined: Tensor, bank: Tensor) -> float:
    """Mean of 1 / rank over the V variants of one image: 1 is perfect, H(V)/V is chance. Arguments as in `ranks`."""
    return (1 / ranks(imagined, bank)).mean().item()


def chance(variants: int) -> float:
    """MRR of an action-blind predictor: H(V)/V, 0.0239 for V = 256."""
    return sum(1 / i for i in range(1, variants + 1)) / variants


def bank_actions(params: Tensor, config: Config) -> Tensor:
    """Actions that take a clean image to variants with these jitter parameters. [V, 4] -> [V, 7]."""
    not_degraded = params.new_zeros(len(params), len(ACTION) - len(JITTER))
    return make_action(IDENTITY.to(params).expand_as(params), params, not_degraded, config)


def sweep_params(component: int, config: Config, n: int = 16) -> Tensor:
    """Jitter parameters that sweep one component over its range, the others at identity. -> [n, 4].

    A hue of half a turn either way is one image, at both ends of such a sweep: error_hue then cannot be 0.
    """
    params = IDENTITY.repeat(n, 1)
    low, high = config.jitter_range[:, component].tolist()
    params[:, component] = torch.linspace(low, high, n)
    return params


@torch.no_grad()
def variants(model: IWM, image: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One clean image [1, 3, S, S] under jitter `params` [V, 4]: the variants themselves [V, 3, S, S], their targets
    (the bank) and what the world model imagines for each action, both [V, N, D]."""
    params = params.to(image.device)
    images = jitter(image.expand(len(params), -1, -1, -1), params)
    return images, model.targets(images), model.imagine(image, bank_actions(params, model.config)).float()


@torch.no_grad()
def measure_world_model(model: IWM, images: Tensor, generator=None) -> dict[str, float]:
    """MRR, H@1, H@5, pooled MRR, chance, the error of each jitter component, over clean images [B, 3, S, S] in 0..1.

    deviation: the paper names neither distance nor pooling nor encoder. Here: the teacher's targets of a bank of
    jittered variants, the student's latents of the clean image, all positions, L2. mrr, hit1 and hit5 compare patch by
    patch, mrr_pooled the means over the patches: that is easier, errors that differ from patch to patch cancel. The
    bank is jittered only, and always, so that it has no duplicates. error_<component>: how far the nearest variant is
    from the true one when only that component sweeps its range, as a share of the range (no knowledge: 0.27 if it
    always imagines the middle, 0.5 if an end, and where a component has no range).
    """
    config, found, pooled, errors = model.config, [], [], {name: [] for name in JITTER}
    for image in images.split(1):
        params = jitter_params(config.bank, config, generator, image.device, always=True)
        _, bank, imagined = variants(model, image, params)
        found.append(ranks(imagined, bank))
        pooled.append(ranks(imagined.mean(dim=1), bank.mean(dim=1)))
        for i, name in enumerate(JITTER):
            _, bank, imagined = variants(model, image, sweep_params(i, config))
            nearest = torch.cdist(imagined.flatten(1), bank.flatten(1)).argmin(dim=1).cpu()
            errors[name].append((nearest - torch.arange(len(bank))).abs().float().mean() / (len(bank) - 1))
    rank = torch.cat(found)
    result = {"mrr": 1 / rank, "hit1": rank <= 1, "hit5": rank <= 5, "mrr_pooled": 1 / torch.cat(pooled)}
    result |= {f"error_{name}": torch.stack(error) for name, error in errors.items()}
    return {name: value.double().mean().item() for name, value in result.items()} | {"chance": chance(config.bank)}


def rankme(features: Tensor) -> float:
    """Effective rank of features [n, D]: exp of the entropy of their singular values (RankMe).

    Between 1 (collapsed) and min(n, D), up to the 1e-7; NaN if a feature is not finite or all are 0.
    """
    if not features.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals(features.float().cpu())
    p = s / s.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def knn_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20) -> float:
    """Cosine kNN classifier, votes weighted by exp(similarity / 0.07) (DINO). Features [n, D], labels [n] int64."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    similarity, neighbours = (test @ train.T).topk(min(k, len(train)), dim=1)
    votes = test.new_zeros(len(test), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[neighbours], (similarity / 0.07).exp())
    return (votes.argmax(dim=1) == test_labels).float().mean().item()


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, ridge: float = 1e-3) -> float:
    """Linear probe; deviation: in closed form, ridge regression to one-hot labels on standardised features [n, D]."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = ((F.pad((f - mean) / std, (0, 1), value=1.0)).cpu().double() for f in (train, test))
    gram = train.T @ train + ridge * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.T @ F.one_hot(labels.cpu()).double())
    return ((test @ weights).argmax(dim=1) == test_labels.cpu()).double().mean().item()
