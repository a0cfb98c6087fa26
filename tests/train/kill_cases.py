"""Runs that die in the middle."""

from fluxfast.train.trainer import Trainer


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing in a run may catch it and tidy up."""


def kill_at(monkeypatch, step, action=None):
    """Do something (die, by default) at the start of a step, once."""
    original = Trainer.train_step

    def train_step(self, number):
        if number == step:
            monkeypatch.setattr(Trainer, "train_step", original)
            if action is None:
                raise Killed
            action()
        return original(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def same_files(a, b):
    return a.read_bytes() == b.read_bytes()
