"""The fields that a certificate has, each with its rule: nothing else in one is looked at."""
import math

from audit.checks import FAIL, INFO, NOT_APPLICABLE, OPEN, PASS
from audit.outcome import EXIT_CODES
from audit.request import RECORDED
from harness.run_folder import is_fingerprint, is_number, is_step, is_text


def maybe(rule):
    """The rule for a value that may be null."""
    return None, rule


def is_flag(value):
    return type(value) is bool


def is_printable(value):
    return not isinstance(value, str) or is_text(value)


def is_value(value):
    return is_text(value) or is_number(value)


VERDICT = {
    **dict.fromkeys(("claim", "model", "source", "dataset", "result", "sentence"), is_text),
    **dict.fromkeys(("bits_per_dim", "standard_error?", "precision_error?", "outside?"), is_number),
    "interval": [is_number], "mistakes?": [is_text],
    "standard_errors?": lambda value: is_number(value) or value == math.inf}
CERTIFICATE = {
    "format": is_text, "made": is_text, "sha256": is_fingerprint,
    "outcome": lambda value: value in (*EXIT_CODES,), "reasons": [is_text],
    "settings": {
        **dict.fromkeys(RECORDED, is_printable),  # Request has their own rules
        "checkpoint": maybe(is_text), "adapter": maybe(is_text), "model_flags": [is_text],
        "codelength": is_step, "jacobians": maybe(is_step)},
    "weights": {
        "kind": lambda value: value in ("jet", "adapter"), "name": is_text, "path": is_text,
        "weights_sha256": is_fingerprint, "config": lambda value: isinstance(value, dict | None),
        "config_sha256?": is_fingerprint, "num_params?": is_step,
        "source_sha256?": is_fingerprint,
        "files?": [{"path": is_text, "sha256": is_fingerprint}]},
    "data": {
        "name": is_text, "variant": is_text, "split": is_text, "num_images": is_step,
        "shape": [is_step], "whole_split": is_flag, "fingerprint": is_fingerprint},
    **dict.fromkeys(("bits_per_dim", "bits_per_dim_se", "noise_se"), maybe(is_number)),
    "verdict": maybe(VERDICT),
    "checks": [{
        "section": is_text, "name": is_text, "tolerance": is_text, "text": is_text,
        "result": lambda value: value in (PASS, FAIL, OPEN, INFO, NOT_APPLICABLE),
        "value": maybe(is_value),
        "drift": is_value}],
    "made_with": {
        **dict.fromkeys(("git_commit", "hardware", "python", "torch", "numpy"), is_text),
        "git_dirty": maybe(is_flag), "seconds": is_number},
    **dict.fromkeys(("per_image?", "bytes?"), {"file": is_text, "sha256": is_fingerprint})}


def fault_in(value, rule):
    """The first field that is missing, too much or breaks its rule, like ".data.name", or "".

    rule: a function, a list of a rule for each item, a dict of rules, where a name with a ? may be
    missing, or what maybe() makes of one.
    """
    if isinstance(rule, tuple):
        return "" if value is None else fault_in(value, rule[1])
    if callable(rule):
        return "" if rule(value) else "."
    if type(value) is not type(rule):
        return "."
    if isinstance(rule, list):
        parts = [(f".{number}", item, rule[0]) for number, item in enumerate(value)]
    else:
        rules = {name.rstrip("?"): one for name, one in rule.items()}
        if wrong := (value.keys() ^ rules.keys()) - {name.rstrip("?") for name in rule.keys()
                                                     - rules.keys()}:
            return f".{min(wrong)}"
        parts = [(f".{name}", item, rules[name]) for name, item in value.items()]
    for name, item, one in parts:
        if fault := fault_in(item, one):
            return name + fault.rstrip(".")
    return ""
