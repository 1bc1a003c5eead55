"""One line of an audit, and what all checks share.

A check looks at a model and images, and yields Checks. A model is a Jet, or any torch module with
forward(x) -> (z, logdet) and inverse(z) -> (x, logdet) like one: prior N(0, I), x as dequantize
makes it, float (B, C, H, W), logdet (B,) in nats.
"""
import copy
import dataclasses
import functools
import math

import numpy as np
import torch

from harness.errors import UserError
from harness.progress import progress
from paper_figures.inference import quantile

PASS, FAIL, NOT_APPLICABLE = "pass", "FAIL", "n/a"
OPEN, INFO = "open", "info"  # could not be checked, though it matters; nothing hangs on it
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
BAR = functools.partial(progress, leave=False, unit="")
CHANCE = 6e-5  # of an honest model to fail a check of a mean: four standard errors of many values


class AuditError(UserError):
    """A request that cannot be audited, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of an audit."""
    section: str
    name: str
    value: float | str | None
    tolerance: str  # what is allowed, in words
    result: str
    text: str  # what it means
    drift: float | str = 0.0  # a later audit may differ by so much


def check(section, name, value, holds, tolerance, text, drift=0.0):
    """A Check; holds: True, False, None (not applicable), OPEN or INFO."""
    result = {True: PASS, False: FAIL, None: NOT_APPLICABLE}.get(holds, holds)
    if isinstance(value, float) and not math.isfinite(value):
        value, result = str(value), result if result in (INFO, OPEN) else FAIL
    return Check(section=section, name=name, value=value, tolerance=tolerance, result=result,
                 text=text, drift=drift)


def at_precision(model, name):
    """A copy of the model in a precision, the type of its weights, and the context to run it in."""
    dtype, is_mixed = PRECISIONS[name], name == "bfloat16"  # which is for the networks alone
    context = torch.autocast(device_of(model).type, torch.bfloat16, enabled=is_mixed)
    return copy.deepcopy(model).to(dtype), dtype, context


def attempt(function):
    """A result, or the error that stands for it: a model need not run in every precision."""
    try:
        return function()
    except (RuntimeError, ValueError, UserError) as error:
        return error


def counted(number, noun):
    """"1 draw", "4 draws"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def device_of(model):
    return next(model.parameters(), torch.empty(0)).device


def errors_of(df):
    """How many standard errors a mean may be off: they are of so many degrees of freedom."""
    return quantile(min(df, 200), CHANCE)


def margin_of(values):
    """How far the mean of an array may be off: of one value that is not known, inf."""
    if len(values) < 2:
        return math.inf
    return errors_of(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def largest_of(values):
    """The largest of some numbers, nan where one is; 0 of none."""
    return float(np.max([float(value) for value in values], initial=0.0))


def dequantized(pixels, noise, dtype=torch.float64):
    """x = -1 + (u8 + u) / 127.5, from the formula alone: float (B, C, H, W)."""
    levels = torch.from_numpy(np.array(pixels, float)) + torch.as_tensor(noise).double()
    return (-1 + levels / 127.5).permute(0, 3, 1, 2).to(dtype)
