"""Measures: does planning work, which component is modelled, what do the latents hold?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import iwm
from iwm import IDENTITY, IWM, JITTER, Config, jitter, jitter_params, variants
from lab.data import to_float
from lab.machine import autocast


def sweep_params(component: int, config: Config, n: int = 16) -> Tensor:
    """Jitter parameters that sweep one component over its range, the others at identity. [n, 4]."""
    params = IDENTITY.repeat(n, 1)
    low, high = config.jitter_range[:, component].tolist()
    params[:, component] = torch.linspace(low, high, n)
    return params


def measure_components(model: IWM, images: Tensor) -> dict[str, float]:
    """error_<component>: how badly a component alone is modelled, over images as in `measure_mrr`.

    The component sweeps its range; the error is how far the nearest variant to the imagined one is
    from the true one, as a share of the range. No knowledge: 0.27 (always the middle) and more.
    """
    errors = {f"error_{name}": 0.0 for name in JITTER}
    for image in images.split(1):
        for i, name in enumerate(JITTER):
            _, bank, imagined = variants(model, image, sweep_params(i, model.config))
            nearest = torch.cdist(imagined.flatten(1), bank.flatten(1)).argmin(dim=1).cpu()
            miss = (nearest - torch.arange(len(bank))).abs().double().mean() / (len(bank) - 1)
            errors[f"error_{name}"] += miss.item() / len(images)
    return errors


@torch.no_grad()
def measure_planning(model: IWM, images: Tensor, generator=None) -> dict[str, float]:
    """Clean images [B, 3, S, S] are jittered into goals; `plan` has to find how.

    plan_left: pixel error after the found action over that of doing nothing, 0 perfect, 1 useless.
    plan_error_<component>: mean error of the parameter found, as a share of its range.
    """
    params = jitter_params(len(images), model.config, generator, images.device, always=True)
    goals = jitter(images, params)
    found = model.plan(images, goals)
    left, nothing = (jitter(images, found) - goals).abs().mean(), (images - goals).abs().mean()
    low, high = model.config.jitter_range.to(images.device)
    miss = (found - params).abs().mean(dim=0) / (high - low).clamp(min=1e-8)
    result = {"plan_left": ((left + 1e-8) / (nothing + 1e-8)).item()}
    return result | {f"plan_error_{name}": miss[i].item() for i, name in enumerate(JITTER)}


def rankme(features: Tensor) -> float:
    """Effective rank of features [n, D]: exp of the entropy of their singular values (RankMe).

    Between 1 (collapsed) and min(n, D); NaN if a feature is not finite or all are 0.
    """
    if not features.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals(features.float().cpu())
    p = s / s.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def knn_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k=20) -> float:
    """Cosine kNN, votes weighted by exp(similarity / 0.07) (DINO). [n, D], labels [n] int64."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    right = 0
    for part, truth in zip(test.split(1000), test_labels.split(1000)):
        similarity, neighbours = (part @ train.T).topk(min(k, len(train)), dim=1)
        votes = part.new_zeros(len(part), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[neighbours], (similarity / 0.07).exp())
        right += (votes.argmax(dim=1) == truth).sum().item()
    return right / len(test)


def linear_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, ridge: float = 1e-3
) -> float:
    """Linear probe on standardised features [n, D], labels [n] int64.

    It is ridge regression to one-hot labels, in closed form: nothing to tune.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0) + 1e-6
    standardised = [F.pad((f - mean) / std, (0, 1), value=1.0) for f in (train, test)]
    train, test = (f.cpu().double() for f in standardised)
    gram = train.T @ train + ridge * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.T @ F.one_hot(labels.cpu()).double())
    return ((test @ weights).argmax(dim=1) == test_labels.cpu()).double().mean().item()


def mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes of intersection / union, over all pixels of int tensors of one shape.

    A class that neither of them has does not count.
    """
    pairs = (truth.long() * classes + predicted.long()).flatten().bincount(minlength=classes**2)
    confusion = pairs.view(classes, classes).cpu().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    return (confusion.diagonal() / union)[union > 0].mean().item()


@torch.no_grad()
def pooled(encode, images: Tensor, config, device) -> Tensor:
    """Mean over the patches of what `encode` makes of uint8 images [n, 3, S, S] -> [n, D] float."""
    with autocast(config, device):
        parts = [encode(to_float(part, device)).float().mean(dim=1) for part in images.split(250)]
    return torch.cat(parts)


@torch.no_grad()
def probe(row: str, model: IWM, data: dict, seed: int) -> dict[str, float]:
    """Accuracy, by split, of the probe that a row names: "knn, WHOSE" or "linear, WHOSE".

    It reads mean-pooled latents and is fitted on training images.
    WHOSE: random init | teacher | predictor, on the null action | K imagined, the mean of what the
    predictor imagines for K random actions. As in finetuning it gets the teacher's latents.
    """
    kind, whose = row.split(", ")
    config, device = model.config, next(model.parameters()).device
    torch.manual_seed(seed)
    random, generator = IWM(config).to(device), torch.Generator(device).manual_seed(seed)
    networks = {"random init": random.encoder, "teacher": model.teacher}

    def imagined(images):
        z, params = model.teacher(images), [IDENTITY.to(device).expand(len(images), -1)]
        if whose != "predictor":
            draw = dict(generator=generator, device=device, always=True)
            params = [jitter_params(len(z), config, **draw) for _ in range(int(whose.split()[0]))]
        actions = (iwm.bank_actions(p, config) for p in params)
        return sum(model.predictor.everywhere(z, a).float() for a in actions) / len(params)

    encode = networks.get(whose, imagined)
    read = {s: (pooled(encode, images, config, device), labels.to(device))
            for s, (images, labels) in data.items()}  # fmt: skip
    accuracy = knn_accuracy if kind == "knn" else linear_accuracy
    return {split: accuracy(*read["train"], *read[split]) for split in ("val", "test")}


@torch.no_grad()
def measure(model: IWM, data: dict, split: str, mrr_images: int, probe_images=None) -> dict:
    """MRR, components and planning on clean images of a split; probes on more of them, or on all.

    mrr is on a bank of the model's own jitter, mrr_paper on one of the paper's. The probes read the
    teacher's mean-pooled latents and are fitted on as many training images.
    """
    config, device = model.config, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    images = to_float(data[split][0][:500], device)
    with autocast(config, device), torch.compiler.set_stance("force_eager"):
        clean = to_float(data[split][0][:mrr_images], device)
        result = iwm.measure_mrr(model, clean, generator) | measure_components(model, clean)
        result |= measure_planning(model, clean, generator)
        paper = iwm.measure_mrr(model, clean, generator, jitter_of=Config())
        result |= {f"{name}_paper": paper[name] for name in ("mrr", "hit1")}
        result["target_std"] = model.targets(images).std(dim=(0, 1)).mean().item()
        parts = ((of[:probe_images] for of in data[s]) for s in ("train", split))
        known, asked = ((pooled(model.teacher, x, config, device), y.to(device)) for x, y in parts)
    result["rankme"] = rankme(asked[0])
    result["knn"] = knn_accuracy(*known, *asked)
    return result | {"linear": linear_accuracy(*known, *asked)}
