"""A run's trainer, as it is before its first step."""

import torch
from rich.console import Console

from fluxfast.train import preflight
from fluxfast.train.control import Requests
from fluxfast.train.run_events import RunEvents
from fluxfast.train.trainer import Trainer


def make_trainer(config):
    console = Console(quiet=True)
    checked = preflight.check(config, torch.device("cpu"))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    requests, events = Requests(config.output_dir), RunEvents(config.output_dir, print)
    return Trainer(config, console, checked, requests, events)
