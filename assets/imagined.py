"""What does a world model see before its inner eye? A linear decoder from latents to pixels shows it.

    python assets/imagined.py runs/shapes/last.pt       # draws imagined.png beside the checkpoint

The decoder is a ridge regression from each of the teacher's targets to the pixels of its own patch, fitted on jittered
training images; the world model plays no part in it. Then it decodes what the world model imagines for actions that
sweep one jitter component, and for views that were blurred, greyed or solarised. Printed: the share of the pixels' variance that is
decoded on test images, from the true targets and from the imagined ones.
"""

import sys
from pathlib import Path

import torch
from einops import rearrange
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune  # noqa: E402
import iwm  # noqa: E402
import train  # noqa: E402


@torch.no_grad()
def fit_decoder(model, images):
    """Images [n, 3, S, S] uint8 -> decode: latents [B, N, D] -> images [B, 3, S, S]."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    gram, cross = 0, 0
    for part in images.split(250):
        part = iwm.jitter(train.to_float(part), iwm.jitter_params(len(part), c, generator))
        h = pad(model.targets(part), (0, 1), value=1.0).flatten(0, 1).double()
        pixels = rearrange(part, "b c (h p) (w q) -> (b h w) (c p q)", p=c.patch, q=c.patch).double()
        gram, cross = gram + h.T @ h, cross + h.T @ pixels
    weights = torch.linalg.solve(gram + 1e-3 * len(images) * torch.eye(len(gram)).double(), cross).float()

    def decode(h):
        pixels = pad(h.float(), (0, 1), value=1.0) @ weights
        return rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", h=c.grid, p=c.patch, q=c.patch)

    return decode


@torch.no_grad()
def draw(model, decode, images, path):
    """Test images [3, 3, S, S]: four sweeps of the first, true and imagined; then of all what was destroyed, undone."""
    rows = []
    for i, name in enumerate(iwm.JITTER):
        true, _, imagined = iwm.variants(model, images[:1], iwm.sweep_params(i, model.config, n=9))
        rows += [[f"{name}:\ntrue variants", *true], ["imagined", *decode(imagined)]]
    rows.append(["", *[word for flag in iwm.ACTION[4:] for word in (f"x: {flag}", "told so", "not told")]])
    for image in images.split(1):
        rows.append([image[0]])
        degraded = (
            iwm.gaussian_blur(image, torch.tensor([1.0])),
            iwm.grayscale(image).expand_as(image),
            iwm.solarize(image),
        )
        flags = torch.eye(len(iwm.ACTION))[len(iwm.JITTER) :]
        for x, told in zip(degraded, flags):  # the action from x to the whole image, and the null action
            rows[-1] += [x[0], *decode(model.imagine(x, torch.stack([told, 0 * told])))]
    train.sheet(rows, path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        train.die("name one checkpoint, such as runs/shapes/last.pt")
    path = Path(sys.argv[1])
    model = finetune.load_checkpoint(path, "cpu")
    data = train.load_data(model.config, torch.device("cpu"), path.parent.parent / "cache")
    decode = fit_decoder(model, data["train"][0][:5000])
    tests, generator = train.to_float(data["test"][0][:64]), torch.Generator().manual_seed(1)
    found = []
    for image in tests.split(1):
        params = iwm.jitter_params(16, model.config, generator, always=True)
        true, targets, imagined = iwm.variants(model, image, params)
        found.append([(decode(h) - true).square().mean().item() for h in (targets, imagined)] + [true.var().item()])
    targets, imagined, variance = torch.tensor(found).mean(dim=0).tolist()
    print(
        f"share of the pixels' variance: {1 - targets / variance:.2f} from the true latents, {1 - imagined / variance:.2f} from the imagined ones"
    )
    draw(model, decode, tests[:3], path.with_name("imagined.png"))
    print(f"drawn: {path.with_name('imagined.png')}")
