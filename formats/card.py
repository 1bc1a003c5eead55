"""A model card: what weights are, and what is known of them, as a page for people and hubs."""
import json
from pathlib import Path

from harness.checkpoint import weights_checksum
from harness.errors import printable
from harness.files import read_json
from harness.host import ROOT, code_version

AUDITS = ROOT / "results/audits"


def model_card(jet, done, name, loading, license):
    """The text of a card, Markdown with the front matter of model hubs.

    done: what the finished run recorded (done.json), or None: then nothing of it is claimed.
    loading: the arguments of load_jet. license: of the weights, as hubs name it.
    """
    config, unknown = jet.config, "not recorded: these weights are of no finished run of ours"
    weights = weights_checksum(jet)
    what = (f"a Jet: {config.num_couplings} couplings x depth {config.block_depth}, width "
            f"{config.emb_dim}, {sum(weight.numel() for weight in jet.parameters()):,} parameters, "
            f"images of {' x '.join(map(str, config.image_shape))}")
    if config.context_dim:
        what += f", conditional on {config.context_dim} classes"
    lines = {"model": what, "images": unknown, "bits/dim": unknown, "training": unknown,
             "audit": audits_of(weights), "licence": license, "weights": f"SHA-256 `{weights}`",
             "written by": f"commit `{code_version()['git_commit'] or 'unknown'}`"}
    if done:
        run, told = done["config"], "labels given, " if config.context_dim else ""
        lines["images"] = (f"{done['dataset']}, variant {done['variant']}: trained on fingerprint "
                           f"`{done['train_fingerprint']}`, measured on "
                           f"`{done['test_fingerprint']}`")
        lines["bits/dim"] = (f"{done['bits_per_dim']:.4f} ± {done['bits_per_dim_se']:.4f} on "
                             f"{done['num_images']:,} test images ({told}one uniform draw an "
                             "image: an upper bound; standard error over images)")
        begun = run.get("extends", 0)
        of_it = f", the last {run['total_steps'] - begun:,} on from another run" if begun else ""
        lines["training"] = (f"{run['total_steps']:,} steps of {run['batch_size']} images{of_it}, "
                             f"learning rate {run['lr']:g}, {run['precision']}, seed "
                             f"{run['seed']}, on {done['hardware']}, commit "
                             f"`{done['git_commit'] or 'unknown'}`")
    table = "".join(f"| {what} | {printable(text).replace('|', '/')} |\n"
                    for what, text in lines.items())
    arguments = "".join(f", {field}={value!r}" for field, value in loading.items())
    return (f"---\nlicense: {license}\ntags: [normalizing-flow, density-estimation, jet]\n---\n\n"
            f"# {name}\n\n| | |\n| --- | --- |\n{table}\n"
            f"```python\nfrom convert import load_jet\n\njet = load_jet({name!r}{arguments})\n"
            "```\n\nThe model is Jet (arXiv 2412.15129); the settings are\n\n```json\n"
            f"{json.dumps(vars(config), indent=1)}\n```\n")


def audits_of(weights):
    """What the certificates in results/audits say of weights of this checksum."""
    found = []
    for path in sorted(AUDITS.glob("*.json")):
        try:
            certificate = read_json(path)
            if certificate["weights"]["weights_sha256"] == weights:
                result = "passed" if certificate["passed"] is True else "FAILED"
                found.append(f"{result} on {certificate['data']['name']} "
                             f"{certificate['data']['split']} (`{Path(path).name}`)")
        except (OSError, ValueError, KeyError, TypeError):  # no certificate
            continue
    return ", ".join(found) or "none of these weights: `python experiments/audit_bpd.py` makes one"
