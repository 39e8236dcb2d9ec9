"""Pictures of a run: views, what is imagined, plans, curves."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import functional as TF

import iwm
from iwm import IDENTITY, IWM, JITTER
from lab.data import to_float
from lab.machine import autocast
from lab.measures import sweep_params


@torch.no_grad()
def fit_decoder(model: IWM, images: Tensor):
    """A linear map from each target to the pixels of its patch, to look at latents.

    Ridge regression on jittered images [n, 3, S, S] in 0..1; the predictor plays no part in it.
    Returns a function: latents [B, N, D] -> images [B, 3, S, S].
    """
    c, generator = model.config, torch.Generator(images.device).manual_seed(0)
    patches = dict(h=c.grid, p=c.patch, q=c.patch)
    images = iwm.jitter(images, iwm.jitter_params(len(images), c, generator, images.device))
    h = F.pad(model.targets(images), (0, 1), value=1.0).flatten(0, 1).cpu().double()
    pixels = rearrange(images.cpu().double(), "b c (h p) (w q) -> (b h w) (c p q)", **patches)
    ridge = 1e-3 * len(images) * torch.eye(h.shape[1]).double()
    weights = torch.linalg.solve(h.T @ h + ridge, h.T @ pixels).to(images)

    def decode(h):
        pixels = F.pad(h.float(), (0, 1), value=1.0) @ weights
        return rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", **patches)

    return decode


def in_words(changes: Tensor, flags=()) -> str:
    """Non-zero jitter changes [4] and destructive flags, one a line."""
    words = [f"{name} {c:+.2f}" for name, c in zip(JITTER, changes) if c.abs() > 0.005]
    words += [f"x: {name}" for name, flag in zip(iwm.ACTION[len(JITTER) :], flags) if flag]
    return "\n".join(words) or "no change"


def sheet(rows: list, path: Path):
    """Draw a row of headings, then rows of texts, images [3, S, S] in 0..1 and (image, framed)."""
    page = Image.new("RGB", (102 * max(map(len, rows)) + 6, 102 * len(rows) - 60), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            left, top = 102 * j + 6, max(102 * i - 60, 6)  # tiles of 96 pixels, headings of 30
            if isinstance(cell, str):
                draw.text((left, top), cell, fill="black")
                continue
            image, framed = cell if isinstance(cell, tuple) else (cell, False)
            picture = TF.to_pil_image(image.float().clamp(0, 1).cpu())
            page.paste(picture.resize((96, 96), Image.Resampling.NEAREST), (left, top))
            if framed:
                box = (left - 2, top - 2, left + 97, top + 97)
                draw.rectangle(box, outline="limegreen", width=3)
    page.save(path)


def draw_views(images: Tensor, recipe, path: Path):
    """image | source | source's context | target | the action, of images [B, 3, S, S] in 0..1."""
    generator, device, g = torch.Generator(images.device).manual_seed(0), images.device, recipe.grid
    source, target, action = iwm.make_views(images, recipe, generator)
    context, _ = iwm.sample_masks(len(images), recipe, generator, device)
    seen = torch.zeros(len(images), g * g, device=device).scatter_(1, context, 1)
    seen = F.interpolate(seen.view(-1, 1, g, g), scale_factor=recipe.patch)  # [B, 1, S, S]
    visible = source * seen + 0.5 * (1 - seen)
    changes = (action[:, : len(JITTER)] * recipe.jitter_strengths.to(device)).cpu()
    words = [in_words(c, a[len(JITTER) :]) for c, a in zip(changes, action)]
    head = ["image", "source x", "context of x", "target y", "action x -> y"]
    sheet([head, *zip(images, source, visible, target, words)], path)


def draw_retrieval(model: IWM, images: Tensor, decode, path: Path):
    """image | action | what is imagined, decoded | nearest of the bank | truth; then sweeps."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(1)
    rows = [["image", "action", "imagined,\ndecoded", "nearest\nin the bank", "truth"]]
    for image in images.split(1):
        # the first is the action shown; the others are its rivals in the bank
        params = iwm.jitter_params(config.bank, config, generator, image.device, always=True)
        pictures, bank, imagined = iwm.variants(model, image, params)
        nearest = int((bank - imagined[:1]).flatten(1).norm(dim=1).argmin())
        rank = iwm.ranks(imagined, bank)[0].item()
        words = in_words(params[0].cpu() - IDENTITY) + f"\n\nrank {rank:g} of {config.bank}"
        found = pictures[nearest], nearest == 0
        rows.append([image[0], words, decode(imagined[:1])[0], found, pictures[0]])
    sheet(rows[:7], path.with_name("strip.png"))
    for i, name in enumerate(JITTER):
        sweep = sweep_params(i, config, n=9)
        pictures, _, imagined = iwm.variants(model, images[:1], sweep)
        low, high = (sweep[[0, -1], i] - IDENTITY[i]).tolist()
        label = f"{name},\n{low:+.2f} to {high:+.2f}"
        rows += [[label, *pictures], ["imagined,\ndecoded", *decode(imagined)]]
    sheet(rows, path)


def draw_plan(model: IWM, images: Tensor, path: Path):
    """image | goal | what the found action makes of the image | both actions in words."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(2)
    params = iwm.jitter_params(len(images), config, generator, images.device, always=True)
    goals = iwm.jitter(images, params)
    found = model.plan(images, goals)
    reached = iwm.jitter(images, found)
    words = [[in_words(p - IDENTITY) for p in actions.cpu()] for actions in (found, params)]
    head = ["image", "goal", "reached", "action found", "true action"]
    sheet([head, *zip(images, goals, reached, *words)], path)


@torch.no_grad()
def draw(model: IWM, data: dict, out: Path):
    """All pictures of a run folder, of the first eight held-out images: uncurated."""
    device = next(model.parameters()).device
    images = to_float(data["val"][0][:8], device)
    draw_views(images, model.config, out / "views.png")
    with autocast(model.config, device), torch.compiler.set_stance("force_eager"):
        decode = fit_decoder(model, to_float(data["train"][0][:500], device))
        draw_retrieval(model, images, decode, out / "retrieval.png")
        draw_plan(model, images, out / "plan.png")


def draw_curves(metrics: list[dict], path: Path):
    try:
        import matplotlib.figure
    except ImportError:  # an optional extra
        return
    errors = " ".join(f"error_{name}" for name in JITTER)
    panels = "loss", "target_std", "rankme", "mrr chance plan_left", "knn linear", errors
    figure = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, panels):
        for name in panel.split():
            axis.plot([m["images"] for m in metrics], [m[name] for m in metrics], ".-", label=name)
        axis.set(xlabel="images seen", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=80)
