"""Checkpoints: written whole, read without running anything in them."""

import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from iwm import IWM


@contextmanager
def whole(path: Path):
    """Write to the file it gives, which then becomes `path`: nobody ever sees half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say where
        raise
    finally:
        aside.unlink(missing_ok=True)


def checkpoint_file(path: Path | str) -> Path:
    """A run's folder stands for its last.pt."""
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path


def read_checkpoint(path: Path | str, device, kind) -> dict:
    """A checkpoint of train.py, its config as a `kind`. With weights_only: nothing in it is run."""
    path = checkpoint_file(path)
    if not path.exists():
        sys.exit(f"{path} does not exist: name a run's folder or its last.pt")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        known = {f.name for f in fields(kind)} & {*state["config"]}  # two versions may differ
        return state | {"config": kind(**{name: state["config"][name] for name in known})}
    except Exception as error:  # foreign bytes can raise anything
        sys.exit(f"{path} is no checkpoint of train.py ({type(error).__name__})")


def load_model(path: Path | str, device, kind) -> IWM:
    """A checkpoint of train.py -> IWM, frozen, its config a `kind`."""
    state = read_checkpoint(path, device, kind)
    model = IWM(state["config"]).to(device)
    model.load_state_dict(state["model"])
    return model.requires_grad_(False)
