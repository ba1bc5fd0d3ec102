"""Learning rates as plain functions of the step: f(step) -> lr, steps counted from 0."""

import math

from sparsetrain import checks


def constant(lr):
    """Always lr."""
    lr = checks.number("lr", lr, low=0.0)
    return lambda step: lr


def step(lr, every, factor=0.1):
    """lr, multiplied by factor after every so many steps (PyTorch's StepLR, by step)."""
    lr = checks.number("lr", lr, low=0.0)
    every = checks.integer("every", every, low=1)
    factor = checks.number("factor", factor, low=0.0)
    return lambda step: lr * factor ** (step // every)


def cosine(lr, steps, final=0.0):
    """From lr down to final along half a cosine over so many steps, then final.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, without restarts.
    """
    lr = checks.number("lr", lr, low=0.0)
    steps = checks.integer("steps", steps, low=1)
    final = checks.number("final", final, low=0.0)

    def schedule(step):
        done = min(step / steps, 1.0)
        return final + (lr - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return schedule


def warmup(schedule, steps):
    """The schedule, scaled by 1/steps, 2/steps, ... 1 over its first so many steps.

    The schedule itself still counts from step 0, so its length does not change.
    """
    if not callable(schedule):
        raise TypeError(f"schedule is {schedule!r}, must be a function of the step")
    steps = checks.integer("steps", steps, low=0)
    return lambda step: schedule(step) * (min((step + 1) / steps, 1.0) if steps else 1.0)


def restarts(schedule, period):
    """The first `period` steps of the schedule, again and again.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, for a cosine of so many steps.
    """
    if not callable(schedule):
        raise TypeError(f"schedule is {schedule!r}, must be a function of the step")
    period = checks.integer("period", period, low=1)
    return lambda step: schedule(step % period)
