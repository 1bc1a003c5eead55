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
ERRORS, CHANCE = 4, 6e-5  # standard errors that a mean may be off; how often one of many is


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


def error_of(values):
    """The standard error of a mean, bits/dim; of one value not known: 1."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 1.0


def held(value, allowed, error, df):
    """Whether a mean is within four standard errors of what is allowed; OPEN where it is not, but
    may be by chance, for its error was estimated with few degrees of freedom (Student's t).
    """
    if value < allowed + ERRORS * error:
        return True
    if df < 1 or value < allowed + quantile(min(int(df), 200), CHANCE) * error:
        return OPEN
    return False


def largest_of(values):
    """The largest of some numbers, nan where one is; 0 of none."""
    return float(np.max([float(value) for value in values], initial=0.0))


def dequantized(pixels, noise, dtype=torch.float64):
    """x = -1 + (u8 + u) / 127.5, from the formula alone: float (B, C, H, W)."""
    levels = torch.from_numpy(np.array(pixels, float)) + torch.as_tensor(noise).double()
    return (-1 + levels / 127.5).permute(0, 3, 1, 2).to(dtype)
