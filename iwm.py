"""Image World Models (IWM) in one file: a readable PyTorch implementation of

    Garrido, Assran, Ballas, Bardes, Najman, LeCun: "Learning and Leveraging World Models in Visual
    Representation Learning", 2024, https://arxiv.org/abs/2403.00504

An encoder sees a masked, photometrically degraded view x of an image. A predictor that is told the
action a (how to get from x to the view y) imagines the latents that an EMA teacher gives to y.

    image -- crop, flip --+-- jitter, blur, gray, solarise --> x -- context --> encoder f --> z
                          |             |                                                    |
                          |             +-- action a(x->y), 7 numbers ----> predictor p <----+
                          |                 mask tokens (vector + position) ----^ |
                          |                                                       v
                          |                                                     z_hat
                          |                                                       |
                          |                                               || z_hat - h ||^2
                          |                                                       |
                          +-- jitter --> y -- all patches --> teacher ----------> h  (no gradient)
                                                                 ^
                                                                 +-- moving average (EMA) of f

One step of training, as IWM.loss has it:

    x, y, a = make_views(image)              two views of one crop, and the action from x to y
    context, masked = sample_masks()         what the encoder sees of x, and what is hidden from it
    z = encoder(x, context)                  z = f(x)
    z_hat = predictor(z, context, asked, a)  z_hat = p(z, a, m)
    loss = || z_hat - teacher(y)[asked] ||^2

The predictor is asked for the masked patches, as in the paper, or for all (predict_all).

Symbols of shapes:  B images,  S x S pixels,  N patches of an image,  K context patches,  M patches
asked for (the masked: K + M = N, or all: M = N),  D encoder width,  W predictor width,  A = 7
numbers of an action,  V variants in a bank.

"deviation 5" is number 5 of the README's list of departures; assets/RESULTS.md has small ones, too.
"""

import copy
import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

JITTER = ("brightness", "contrast", "saturation", "hue")  # the order in which they are applied
ACTION = (*JITTER, "blur", "gray", "solarize")  # the A = 7 components of an action
IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the jitter parameters that change nothing


# ---- Configuration: what the method reads; train.py adds data, optimisation, presets -------------


def setting(default, help):
    """A setting and its explanation, which the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """IWM(18, 384): the paper's values where it states them, else mostly I-JEPA's."""

    # photometric actions: strengths as in torchvision's ColorJitter
    image_size: int = setting(224, "side of the square views in pixels, a multiple of patch")
    brightness: float = setting(0.4, "jitter: factor drawn from 1 -+ this")
    contrast: float = setting(0.4, "jitter: factor drawn from 1 -+ this")
    saturation: float = setting(0.2, "jitter: factor drawn from 1 -+ this")
    hue: float = setting(0.1, "jitter: shift in turns of the colour wheel, up to this")
    strength: float = setting(1.0, "multiplies the four above (strong jitter: 2)")
    jitter_prob: float = setting(0.8, "probability that a view is jittered at all")
    blur_prob: float = setting(0.2, "probability of blur on the source view")
    gray_prob: float = setting(0.2, "probability of grayscale on the source view")
    solarize_prob: float = setting(0.1, "probability of solarisation on the source view")
    crop_min: float = setting(0.3, "smallest crop as a share of the image; 1 is no crop")
    # masks
    blocks: int = setting(4, "rectangles whose union is masked")
    block_min: float = setting(0.15, "smallest rectangle, as a share of the image")
    block_max: float = setting(0.20, "largest rectangle, as a share of the image")
    context: float = setting(0.56, "share of patches that the encoder sees")
    predict_all: bool = setting(False, "take the loss at all patches, not at the masked ones only")
    # encoder f
    patch: int = setting(16, "side of a patch, in pixels")
    width: int = setting(768, "width D of the encoder")
    depth: int = setting(12, "blocks of the encoder")
    heads: int = setting(12, "attention heads, of the encoder and of the predictor")
    # predictor p, the world model
    conditioning: str = setting("feature", "how the action is told: none | sequence | feature")
    pred_width: int = setting(384, "width W of the predictor")
    pred_depth: int = setting(18, "blocks of the predictor")
    target_norm: bool = setting(True, "layer-norm the teacher's latents before the loss")
    # measure
    bank: int = setting(256, "variants V of an image that MRR ranks")

    def __post_init__(self):
        """Raises ValueError, in one line, for what would fail later and obscurely."""

        def need(ok, message):
            if not ok:
                raise ValueError(message)

        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and f.name != "seed":
                need(value >= 1, f"{f.name} is {value}: it must be 1 or more")
        for name in ("width", "pred_width"):
            w = getattr(self, name)
            need(w % 4 == 0 and w % self.heads == 0,
                 f"{name} {w} must be a multiple of 4 and of heads ({self.heads})")  # fmt: skip
        need(self.image_size % self.patch == 0 and self.grid >= 2,
             f"image_size {self.image_size} must be 2 or more patches of {self.patch}")  # fmt: skip
        need(0 < self.context < 1, f"context is {self.context}: it must be between 0 and 1")
        need(self.conditioning in ("none", "sequence", "feature"),
             f"conditioning is {self.conditioning}: choose none, sequence or feature")  # fmt: skip

    @property
    def grid(self) -> int:
        """Patches along one side, so that N = grid * grid."""
        return self.image_size // self.patch

    @property
    def jitter_strengths(self) -> Tensor:
        """[4] float: strengths of brightness, contrast, saturation and hue."""
        strengths = torch.tensor([float(getattr(self, name)) for name in JITTER]) * self.strength
        strengths[JITTER.index("hue")].clamp_(max=0.5)  # half a turn already reaches every hue
        return strengths

    @property
    def jitter_range(self) -> Tensor:
        """[2, 4] float: lowest and highest jitter parameters."""
        low = IDENTITY - self.jitter_strengths
        low = torch.where(IDENTITY == 1, low.clamp(min=0), low)  # factors are 0 or more
        return torch.stack([low, IDENTITY + self.jitter_strengths])


# ---- Photometric transformations (the paper's source and target views), and the action a(x->y) ---


def grayscale(images: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B, as in torchvision. [B, 3, S, S] in 0..1 -> [B, 1, S, S]."""
    r, g, b = images.unbind(dim=1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, which may be grey, in 0..1. factor: [B, 1, 1, 1]."""
    return torch.lerp(other, images, factor).clamp(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` ([B, 1, 1], 1 = the whole colour wheel). [B, 3, S, S] in 0..1."""
    r, g, b = images.unbind(dim=1)
    high, low = images.amax(dim=1), images.amin(dim=1)
    chroma = high - low
    unit = torch.where(chroma > 0, chroma, 1)  # a grey pixel has no hue, and no chroma to show it
    # RGB -> hue in sixths of the wheel, counted from the largest channel; then the turn
    from_green = torch.where(high == g, 2 + (b - r) / unit, 4 + (r - g) / unit)
    hue = torch.where(high == r, (g - b) / unit, from_green) + 6 * turns

    def channel(n):  # hue -> RGB, the textbook's f(n): red is n = 5, green 3, blue 1
        k = (n + hue) % 6  # falls from `high` as k goes from 0 to 1, is back at 4
        return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def jitter(images: Tensor, params: Tensor) -> Tensor:
    """Colour jitter in the fixed order brightness, contrast, saturation, hue.

    images: [B, 3, S, S] in 0..1. params: [B, 4], factors of brightness, contrast and saturation
    (0 or more), hue shift in turns; the identity is (1, 1, 1, 0). Returns [B, 3, S, S] in 0..1.
    The order is fixed (deviation 6): four numbers could not describe a shuffled one.
    """
    brightness, contrast, saturation, hue = params[:, :, None, None, None].unbind(dim=1)
    images = (images * brightness).clamp(0, 1)
    images = blend(images, grayscale(images.mean(dim=(2, 3), keepdim=True)), contrast)
    images = blend(images, grayscale(images), saturation)
    return shift_hue(images, hue.squeeze(1))


def blur_sigma(size: int) -> tuple[float, float]:
    """Range of the blur's sigma in pixels, for images of `size` pixels: DINO's, scaled.

    DINO has 0.1 to 2.0 at 224 pixels. Below 112 it would vanish: the range of 112 stays.
    """
    scale = max(size / 224, 0.5)
    return 0.1 * scale, 2.0 * scale


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma ([B], pixels), borders reflected. [B, 3, S, S] -> same."""
    B, size = len(images), images.shape[-1]
    radius = min(math.ceil(3 * blur_sigma(size)[1]), size - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    # conv2d takes one kernel for all images, but one for each group of channels: so all 3 B
    # channels lie in one image, each its own group. Blur along the rows, then along the columns
    x = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    x = F.conv2d(x, kernels[:, None, None, :], groups=3 * B)
    x = F.conv2d(x, kernels[:, None, :, None], groups=3 * B)
    return x.view_as(images)


def solarize(images: Tensor) -> Tensor:
    """Invert what is at half of full scale or brighter. [B, 3, S, S] in 0..1."""
    return torch.where(images >= 0.5, 1 - images, images)


def random_crop_flip(images: Tensor, config: Config, generator=None) -> Tensor:
    """Random resized crop (area crop_min..1, width / height 3/4..4/3) and flip. [B, C, S, S].

    A side longer than the image's is cut. The crop is taken at S x S pixels, not of the photograph.
    """
    B = len(images)
    draws = torch.rand(5, B, device=images.device, generator=generator)
    u_area, u_aspect, u_x, u_y, u_flip = draws  # each uniform in 0..1
    area = config.crop_min + (1 - config.crop_min) * u_area
    aspect = torch.exp((2 * u_aspect - 1) * math.log(4 / 3))
    if config.crop_min == 1:
        aspect = torch.ones_like(area)
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    # rows (scale, 0, offset): x and y in the crop, -1..1 -> where they are in the image, -1..1
    theta = torch.zeros(B, 2, 3, device=images.device)
    theta[:, 0, 0] = torch.where(u_flip < 0.5, -width, width)  # the flip: x runs backwards
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * u_x - 1) * (1 - width)
    theta[:, 1, 2] = (2 * u_y - 1) * (1 - height)
    size = [*images.shape[:2], config.image_size, config.image_size]
    grid = F.affine_grid(theta, size, align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # centre of the outermost pixel: beyond it, the border repeats
    return F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)


def jitter_params(batch: int, config: Config, generator=None, device=None, always=False) -> Tensor:
    """Draw jitter parameters, [B, 4]; sometimes (1 - jitter_prob) the identity, unless `always`."""
    low, high = config.jitter_range.to(device)
    params = low + (high - low) * torch.rand(batch, len(JITTER), device=device, generator=generator)
    prob = 1.0 if always else config.jitter_prob
    on = torch.rand(batch, 1, device=device, generator=generator) < prob
    return torch.where(on, params, IDENTITY.to(params))


def make_action(params_x: Tensor, params_y: Tensor, flags_x: Tensor, config: Config) -> Tensor:
    """a(x->y) [B, 7]: jitter parameters of y minus those of x, then x's destructive flags [B, 3].

    A flag of 1 says: x was degraded, y is not. Differences are divided by the jitter strengths, so
    that each is of order 1 (0 where a strength is 0); those of hue are not wrapped.
    """
    strengths = config.jitter_strengths.to(params_x)
    change = torch.where(strengths > 0, (params_y - params_x) / strengths, 0)
    return torch.cat([change, flags_x], dim=1)


@torch.no_grad()
def make_views(images: Tensor, config: Config, generator=None) -> tuple[Tensor, Tensor, Tensor]:
    """Source x and target y, pixel-aligned views of one crop, and the action a(x->y).

    images: [B, 3, S, S] float in 0..1. Returns x and y, both [B, 3, S, S] in 0..1, and a [B, 7].
    Both are jittered independently: neither is made from the other (deviation 6).
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


# ---- Masks (I-JEPA's multi-block): a union of rectangles is masked, the rest is the context ------


def block_unions(n: int, config: Config, generator=None, device=None) -> Tensor:
    """n random unions of rectangles. -> [n, grid, grid] bool, True is masked.

    Each rectangle has its own size; its height / width is 0.75 to 1.5 before both are rounded to
    whole patches. It may touch every border: I-JEPA's share a size and never reach the last row.
    """
    grid = config.grid
    draws = torch.rand(4, n, config.blocks, device=device, generator=generator)
    u_area, u_aspect, u_top, u_left = draws
    area = grid**2 * (config.block_min + (config.block_max - config.block_min) * u_area)
    aspect = 0.75 + 0.75 * u_aspect
    height = (area * aspect).sqrt().round().clamp(1, grid)
    width = (area / aspect).sqrt().round().clamp(1, grid)
    top = (u_top * (grid - height + 1)).floor()
    left = (u_left * (grid - width + 1)).floor()
    i = torch.arange(grid, device=device)
    rows = (i >= top[..., None]) & (i < (top + height)[..., None])  # [n, blocks, grid]
    columns = (i >= left[..., None]) & (i < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).any(dim=1)


def sample_masks(batch: int, config: Config, generator=None, device=None) -> tuple[Tensor, Tensor]:
    """Patch indices (row * grid + column), int64: [B, K] of the context, [B, M] of the masked.

    Every image has the same number M of masked patches, and so fits into a batch. Of 16 candidate
    unions the one nearest in size is kept; then patches drawn at random join or leave it.
    """
    N = config.grid**2
    M = min(max(round((1 - config.context) * N), 1), N - 1)
    candidates = block_unions(16 * batch, config, generator, device)
    candidates = rearrange(candidates, "(c b) h w -> c b (h w)", c=16)
    nearest = (candidates.sum(dim=2) - M).abs().argmin(dim=0)  # [B]
    union = candidates[nearest, torch.arange(batch, device=device)]  # [B, N]
    # sort patches at random, but those outside the union (keys 0 to 0.5) before those inside
    # (1 to 1.5): the last M are masked
    keys = union + 0.5 * torch.rand(union.shape, device=device, generator=generator)
    order = keys.argsort(dim=1)
    return order[:, :-M], order[:, -M:]


# ---- Encoder f (a ViT): it runs on the context patches only, so masking makes it cheaper ---------


def sincos_positions(width: int, grid: int) -> Tensor:
    """2-D sine-cosine positions, [N, width]: half for the row, half for the column (MAE)."""
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
    # by hand: with the fused kernel of CPUs a step takes twice as long for so few tokens
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block of encoder and predictor. [B, tokens, width] -> same.

    Free to change, as long as the shape stays and the two output layers are named proj and fc2.
    """

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
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = x + self.proj(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def init_weights(network: "ViT | Predictor"):
    """Xavier-uniform weights, zero biases (MAE); output projections of block i over sqrt(2 i).

    I-JEPA's normal 0.02 leaves patches faint beside positions at small widths (deviation 7).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(network.blocks, start=1):  # the residual stream must not grow
        block.proj.weight.data.div_(math.sqrt(2 * i))
        block.fc2.weight.data.div_(math.sqrt(2 * i))


class ViT(nn.Module):
    """Vision transformer without class token. Images in 0..1, [B, 3, S, S] -> [B, N or K, D].

    Free to change: whatever keeps one latent of width D for each patch asked for, in that order.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.grid, self.patch = config.grid, config.patch
        self.embed = nn.Linear(3 * config.patch**2, config.width)
        blocks = [Block(config.width, config.heads) for _ in range(config.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        positions = sincos_positions(config.width, config.grid)
        self.register_buffer("positions", positions, persistent=False)
        init_weights(self)

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """context: [B, K] indices of the patches to see; None means all N of them, in order."""
        images = (images - 0.5) / 0.25  # normalised here, the same for every data set
        sides = dict(h=self.grid, w=self.grid, p=self.patch, q=self.patch)
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", **sides)
        positions = self.positions
        if context is not None:
            patches, positions = gather(patches, context), positions[context]
        return self.norm(self.blocks(self.embed(patches) + positions))


# ---- Predictor p, the world model, and its conditioning on the action ---------------------------


class Predictor(nn.Module):
    """A narrower ViT over context latents, a mask token for each asked position, and the action."""

    def __init__(self, config: Config):
        super().__init__()
        D, W, A = config.width, config.pred_width, len(ACTION)
        self.conditioning = config.conditioning
        self.embed = nn.Linear(D, W)
        self.mask_token = nn.Parameter(torch.zeros(W))
        blocks = [Block(W, config.heads) for _ in range(config.pred_depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(W, eps=1e-6)
        self.out = nn.Linear(W, D)
        self.register_buffer("positions", sincos_positions(W, config.grid), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.conditioning == "sequence":  # a linear layer R -> R^W for each of the A scalars,
            self.action_weight = nn.Parameter(torch.randn(A, W))  # as large as a latent's embedding
            self.action_bias = nn.Parameter(torch.randn(A, W))
        # these three layers stand in every conditioning, so that only the action differs
        more = A if self.conditioning == "feature" else 0
        self.mix = nn.Sequential(
            nn.Linear(W + more, W), nn.ReLU(), nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)
        )
        init_weights(self)

    def forward(self, z: Tensor, context: Tensor, asked: Tensor, action: Tensor, extra=None):
        """Imagine the latents at the asked positions, [B, M, D].

        z: [B, K, D] latents at the positions `context` [B, K]; asked: [B, M] positions; action:
        [B, A]; extra: [B, any, W] further input tokens, such as a task's.
        """
        latents = self.embed(z) + self.positions[context]
        parts = [latents, self.mask_tokens(action, asked)]
        if self.conditioning == "sequence":
            parts = [self.action_tokens(action), *parts]
        if extra is not None:
            parts = [extra, *parts]
        x = self.blocks(torch.cat(parts, dim=1))
        return self.out(self.norm(x[:, -asked.shape[1] :]))  # the mask tokens are the last M

    def mask_tokens(self, action: Tensor, asked: Tensor) -> Tensor:
        """[B, M, W]: a learned vector and the position; `feature` mixes the action into each."""
        tokens = self.mask_token + self.positions[asked]
        if self.conditioning == "feature":
            tokens = torch.cat([tokens, repeat(action, "b a -> b m a", m=asked.shape[1])], dim=2)
        return self.mix(tokens)

    def action_tokens(self, action: Tensor) -> Tensor:
        """`sequence`: each of the A scalars is a token. [B, A] -> [B, A, W]."""
        return action.unsqueeze(2) * self.action_weight + self.action_bias

    def everywhere(self, z: Tensor, action: Tensor, extra=None) -> Tensor:
        """Imagine all positions from the latents of all positions, [B, N, D] -> [B, N, D]."""
        positions = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
        return self(z, positions, positions, action, extra)


# ---- IWM: the latent objective, the EMA teacher; and the world model used: imagine, plan --------


class IWM(nn.Module):
    """The figure above. `loss` is for training; `imagine` and `plan` use what was learned."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = Predictor(config)

    def loss(self, images: Tensor, generator=None) -> Tensor:
        """Mean squared error of the imagined latents. images: [B, 3, S, S] in 0..1 -> scalar.

        The gradient reaches encoder and predictor; the teacher gets none.
        """
        c = self.config
        with torch.autocast(images.device.type, enabled=False):  # pixels stay out of bfloat16
            x, y, action = make_views(images, c, generator)
        context, masked = sample_masks(len(x), c, generator, x.device)
        asked = masked
        if c.predict_all:  # also where the encoder sees x, as MRR and finetuning ask (deviation 2)
            asked = torch.arange(c.grid**2, device=x.device).expand(len(x), -1)
        z = self.encoder(x, context)  # z = f(x), [B, K, D]
        z_hat = self.predictor(z, context, asked, action)  # z_hat = p(z, a, m), [B, M, D]
        h = gather(self.targets(y), asked)  # h = teacher(y), [B, M, D]
        # the mean where the paper has a sum: Adam's step is the same
        return (z_hat.float() - h).square().mean()

    forward = loss  # what DistributedDataParallel calls

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's latents, to be imagined. [B, 3, S, S] in 0..1 -> [B, N, D] float.

        They are layer-normed without affine, as in I-JEPA (deviation 5).
        """
        h = self.teacher(images).float()
        return F.layer_norm(h, h.shape[-1:]) if self.config.target_norm else h

    @torch.no_grad()
    def update_teacher(self, momentum: float):
        """teacher <- momentum * teacher + (1 - momentum) * encoder; after the optimiser's step."""
        for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 1 - momentum)

    def imagine(self, images: Tensor, action: Tensor) -> Tensor:
        """Imagine the targets of images that an action has changed, everywhere. -> [B, N, D].

        images: [B, 3, S, S] in 0..1, unmasked, or one image [1, 3, S, S] for all; action: [B, A].
        """
        z = self.encoder(images).expand(len(action), -1, -1)
        return self.predictor.everywhere(z, action)

    @torch.inference_mode(False)  # the action needs a gradient, and nothing else does
    @torch.no_grad()
    def plan(self, images: Tensor, goals: Tensor, steps: int = 60, lr: float = 0.1) -> Tensor:
        """Which jitter turns images into goals? Both [B, 3, S, S] in 0..1 -> parameters [B, 4].

        Gradient descent (Adam) on the action, through the frozen world model: what is imagined must
        meet the goals' targets. `lr` is in units of the jitter's strengths. The parameters found
        stay in the jitter's range; units as in `jitter`. Not in the paper.
        """
        if self.config.conditioning == "none":  # not told the action, it cannot plan
            return IDENTITY.to(images).repeat(len(images), 1)
        h, z = self.targets(goals), self.encoder(images)
        # the ends of the parameters' range, as actions: the search stays between them
        low, high = bank_actions(self.config.jitter_range.to(z.device), self.config)
        action = torch.zeros(len(images), len(ACTION), device=z.device, requires_grad=True)
        optimizer = torch.optim.Adam([action], lr=lr)
        for _ in range(steps):
            with torch.enable_grad():
                z_hat = self.predictor.everywhere(z, action).float()
                error = (z_hat - h).square().mean(dim=(1, 2)).sum()  # each image has its own
            action.grad = torch.autograd.grad(error, action)[0]
            optimizer.step()
            action.clamp_(low, high)
        change = action[:, : len(JITTER)] * self.config.jitter_strengths.to(z.device)
        return IDENTITY.to(z.device) + change


# ---- Is it a world model? Mean reciprocal rank (MRR) --------------------------------------------


def ranks(imagined: Tensor, bank: Tensor) -> Tensor:
    """Rank of each true variant in the bank by L2 distance from the imagined one, 1 = nearest.

    imagined, bank: [V, ...]; imagined[i] should be nearest to bank[i]. Returns [V] float, CPU.
    A tie, up to rounding, gets the mean of the best and the worst rank that it could have.
    """
    a, b = imagined.flatten(1).cpu().double(), bank.flatten(1).cpu().double()
    distance = torch.cdist(a, b)
    true = distance.diagonal().unsqueeze(1)
    rounding = 1e-6 * b.square().sum(dim=1).mean().sqrt()  # closer than this is a tie
    best = (distance < true - rounding).sum(dim=1) + 1
    worst = len(b) - (distance > true + rounding).sum(dim=1)
    return (best + worst) / 2


def chance(V: int) -> float:
    """MRR of an action-blind predictor: H(V) / V, 0.0239 for V = 256.

    It imagines one and the same thing V times, so the true ones take each rank from 1 to V once.
    """
    return sum(1 / i for i in range(1, V + 1)) / V


def bank_actions(params: Tensor, config: Config) -> Tensor:
    """Actions that take a clean image to variants with these parameters. [V, 4] -> [V, 7]."""
    not_degraded = params.new_zeros(len(params), len(ACTION) - len(JITTER))
    return make_action(IDENTITY.to(params).expand_as(params), params, not_degraded, config)


@torch.no_grad()
def variants(model: IWM, image: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Jitter a clean image [1, 3, S, S] in V ways, by `params` [V, 4].

    Returns the variants [V, 3, S, S], the teacher's targets of them (the bank) and what the world
    model imagines for each action, both [V, N, D] float.
    """
    params = params.to(image.device)
    images = jitter(image.expand(len(params), -1, -1, -1), params)
    imagined = model.imagine(image, bank_actions(params, model.config))
    return images, model.targets(images), imagined.float()


def measure_mrr(
    model: IWM, images: Tensor, generator=None, jitter_of: Config | None = None
) -> dict[str, float]:
    """mrr, hit1, hit5, mrr_pooled and chance, over clean images [B, 3, S, S] in 0..1.

    mrr is the mean of 1 / rank, hit1 and hit5 are the shares of ranks up to 1 and 5, both patch by
    patch (deviation 8); mrr_pooled compares means over patches. The bank's latents are the
    teacher's, the clean image's the student's. The variants are jittered and nothing else, in the
    range of `jitter_of`, which is the model's own configuration or another one.
    """
    rank, pooled, V = [], [], model.config.bank
    jitter_of = jitter_of or model.config
    for image in images.split(1):
        params = jitter_params(V, jitter_of, generator, image.device, always=True)
        _, bank, imagined = variants(model, image, params)
        rank.append(ranks(imagined, bank))
        pooled.append(ranks(imagined.mean(dim=1), bank.mean(dim=1)))
    rank, pooled = torch.cat(rank), torch.cat(pooled)
    found = {"mrr": 1 / rank, "hit1": rank <= 1, "hit5": rank <= 5, "mrr_pooled": 1 / pooled}
    result = {name: value.double().mean().item() for name, value in found.items()}
    return result | {"chance": chance(V)}
