"""Pictures of a run, or of a photograph (its middle square; no data set, no labels):

    python -m lab.pictures assets/cifar.pt photo.jpg           # imagine.gif and all others
    python -m lab.pictures assets/cifar.pt photo.jpg goal.jpg  # plan.png: only colours can follow

They go to runs/photo-NAME, or to --out FOLDER. A linear decoder makes latents visible; here it is
fitted on random crops of the photograph.

A sheet is {name: column of cells}; a cell is text, an image [3, S, S] or (image, framed).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import iwm
from iwm import IDENTITY, IWM, JITTER
from lab.checkpoints import load_model
from lab.data import read_image, to_float
from lab.machine import set_up
from lab.measures import sweep_params


def fit_decoder(model: IWM, images: Tensor, generator=None):
    """A linear map from latents [B, N, D] to images [B, 3, S, S], patch by patch.

    Ridge regression from the targets of jittered images; the predictor plays no part in it.
    """
    c, sides = model.config, dict(kernel_size=model.config.patch, stride=model.config.patch)
    images = iwm.jitter(images, iwm.jitter_params(len(images), c, generator, images.device))
    pixels = F.unfold(images, **sides).mT.flatten(0, 1).cpu().double()
    h = F.pad(model.targets(images), (0, 1), value=1.0).flatten(0, 1).cpu().double()
    ridge = 1e-3 * len(images) * torch.eye(h.shape[1])
    weights = torch.linalg.solve(h.T @ h + ridge, h.T @ pixels).to(images)

    def decode(h):
        return F.fold((F.pad(h, (0, 1), value=1.0) @ weights).mT, c.image_size, **sides)

    return decode


def in_words(changes: Tensor) -> list[str]:
    """What is not 0 in changes of jitter parameters [B, 4] or in actions [B, 7]."""
    named = [zip(iwm.ACTION, change) for change in changes.tolist()]
    words = [[f"{name} {c:+.2f}" for name, c in pairs if abs(c) > 0.005] for pairs in named]
    return ["\n".join(lines) or "no change" for lines in words]


def paint(sheet: dict, tile: int = 96) -> Image.Image:
    """Draw a sheet, the names above its columns."""
    step, top, font = tile + 6, tile * 3 // 8 + 6, ImageFont.load_default(tile // 8)
    rows = max(map(len, sheet.values()))
    page = Image.new("RGB", (step * len(sheet) + 6, step * rows + top), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, column) in enumerate(sheet.items()):
        for j, cell in enumerate([name, *column]):
            x, y = step * i + 6, max(step * (j - 1) + top, 6)
            if isinstance(cell, str):
                pen.text((x, y), cell, "black", font)
                continue
            image, framed = cell if isinstance(cell, tuple) else (cell, False)
            if framed:
                pen.rectangle((x - 3, y - 3, x + tile + 2, y + tile + 2), "limegreen")
            picture = to_pil_image(image.clamp(0, 1).cpu())
            page.paste(picture.resize((tile, tile), Image.Resampling.BOX), (x, y))
    return page


def views(images: Tensor, recipe, generator=None) -> dict:
    """What training makes of images [B, 3, S, S] in 0..1."""
    source, target, action = iwm.make_views(images, recipe, generator)
    context, _ = iwm.sample_masks(len(images), recipe, generator, images.device)
    g, p = recipe.grid, recipe.patch
    seen = images.new_zeros(len(images), g * g).scatter(1, context, 1).view(-1, 1, g, g)
    visible = 0.5 + (source - 0.5) * torch.kron(seen, seen.new_ones(p, p))
    action[:, : len(JITTER)] *= recipe.jitter_strengths.to(action)
    sheet = {"image": images, "source x": source, "context of x": visible}
    return sheet | {"target y": target, "action x -> y": in_words(action)}


def retrieval(model: IWM, images: Tensor, decode, generator=None) -> dict:
    """An action for each image: what is imagined, and which variant in a bank is nearest to it."""
    V, rows = model.config.bank, []
    for image in images.split(1):
        # the first is the action shown; the others are its rivals in the bank
        params = iwm.jitter_params(V, model.config, generator, image.device, always=True)
        pictures, bank, imagined = iwm.variants(model, image, params)
        nearest = int((bank - imagined[:1]).flatten(1).norm(dim=1).argmin())
        rank = f"\n\nrank {iwm.ranks(imagined, bank)[0]:g} of {V}"
        words = in_words(params[:1].cpu() - IDENTITY)[0] + rank
        found = pictures[nearest], nearest == 0
        rows.append([image[0], words, decode(imagined[:1])[0], found, pictures[0]])
    names = "image", "action", "imagined,\ndecoded", "nearest\nin the bank", "truth"
    return dict(zip(names, zip(*rows)))


def plans(model: IWM, images: Tensor, goals: Tensor) -> dict:
    """The action found that turns images into goals, both [B, 3, S, S], and what it reaches."""
    found = model.plan(images, goals)
    sheet = {"image": images, "goal": goals, "reached": iwm.jitter(images, found)}
    return sheet | {"action found": in_words(found.cpu() - IDENTITY)}


def frames(model: IWM, images: Tensor, decode) -> list[dict]:
    """The sheets of a film: hue, then brightness, goes through its range and back."""
    film = []
    for name in ("hue", "brightness"):
        sweep = sweep_params(JITTER.index(name), model.config, n=9)
        words = in_words(sweep - IDENTITY)
        label = f"imagined,\ndecoded\n\n{words[0]}\nto {words[-1].split()[-1]}\nand back"
        for t in (4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3):  # 4 is no change
            params = sweep[t].to(images).expand(len(images), -1)
            imagined = decode(model.imagine(images, iwm.bank_actions(params, model.config)))
            pairs = enumerate(zip(imagined, iwm.jitter(images, params)), start=1)
            film.append({words[t]: [label, "truth"], **{f"image {i}": pair for i, pair in pairs}})
    return film


def save_gif(film: list[dict], path: Path):
    """It rests where nothing is changed, and never ends. One palette: under a megabyte."""
    pages = [paint(sheet, tile=128) for sheet in film]
    palette = Image.fromarray(np.vstack(pages)[::4, ::4])
    palette = palette.quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=4)
    first, *rest = [page.quantize(palette=palette, dither=0) for page in pages]
    times = [600 if "no change" in sheet else 90 for sheet in film]  # milliseconds
    first.save(path, save_all=True, append_images=rest, duration=times, loop=0)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def draw(model: IWM, data: dict, out: Path):
    """All pictures of a run folder, of the first eight held-out images: uncurated."""
    device = next(model.parameters()).device
    first, second, third = (torch.Generator(device).manual_seed(i) for i in range(3))
    images = to_float(data["val"][0][:8], device)
    decode = fit_decoder(model, to_float(data["train"][0][:500], device), first)
    params = iwm.jitter_params(len(images), model.config, third, device, always=True)
    sheets = {
        "views": views(images, model.config, first),
        "retrieval": retrieval(model, images, decode, second),
        "plan": plans(model, images, iwm.jitter(images, params)),
    }
    sheets["plan"]["true action"] = in_words(params.cpu() - IDENTITY)
    sheets["strip"] = {name: column[:6] for name, column in sheets["retrieval"].items()}
    for name, sheet in sheets.items():
        paint(sheet).save(out / f"{name}.png")
    save_gif(frames(model, images[:4], decode), out / "imagine.gif")


def draw_curves(metrics: list[dict], path: Path):
    try:
        from matplotlib.figure import Figure
    except ImportError:  # an optional extra
        return
    errors = " ".join(f"error_{name}" for name in JITTER)
    panels = "loss", "target_std", "rankme", "mrr chance plan_left", "knn linear", errors
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, panels):
        for name in panel.split():
            axis.plot([m["images"] for m in metrics], [m[name] for m in metrics], ".-", label=name)
        axis.set(xlabel="images seen", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=80)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("photo", nargs="+")
    parser.add_argument("--out", type=Path)
    args, device, photos = parser.parse_args(), set_up(None), []
    model = load_model(args.checkpoint, device, iwm.Config)
    for file in args.photo:
        try:
            photos.append(torch.from_numpy(read_image(file, model.config.image_size)))
        except Exception as error:  # foreign bytes can raise anything
            sys.exit(f"{file} cannot be read as an image: {error}")
    photo, goals = to_float(torch.stack(photos), device).tensor_split([1])

    out = args.out or Path("runs") / f"photo-{Path(args.photo[0]).stem}"
    out.mkdir(parents=True, exist_ok=True)
    if len(goals):
        paint(plans(model, photo.expand_as(goals), goals)).save(out / "plan.png")
    else:
        torch.manual_seed(0)
        crops = iwm.random_crop_flip(photo.expand(500, -1, -1, -1), model.config)
        draw(model, {"train": [255 * crops], "val": [255 * photo]}, out)
    print(f"see {out}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # of the disk: full, or a folder without access
        sys.exit(f"{error}")
