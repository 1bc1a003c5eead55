"""What is computed from a configuration: FLOPs, parameters, the share of the log-det's cap."""
import math


def forward_flops(config):
    """FLOPs of one image's forward pass: products and convolutions, a multiply-add is two."""
    N, D, E = config.num_tokens, config.token_dim, config.emb_dim
    in_dim, out_dim = (D, 2 * D) if config.split_mode == "masking" else (D // 2, D)
    if config.block == "vit":  # qkv, out, MLP: 4 + 8 matrices of E x E; scores and their use
        block = 2 * N * 12 * E * E + 2 * 2 * N * N * E
    else:
        block = 2 * N * 2 * 9 * E * E
    coupling = 2 * N * E * (in_dim + out_dim) + config.block_depth * block
    if C := config.context_dim:  # of one context token: query and out, key and value, scores
        coupling += 2 * N * 2 * E * E + 2 * 2 * C * E + 2 * 2 * N * E
    dense = 2 * N * D * D if config.invertible_dense else 0  # building W, once a batch, aside
    return config.num_couplings * (coupling + dense)


def train_flops(config):
    """Training FLOPs of a TrainConfig: three forward passes (backward counts two) an image seen."""
    return 3 * forward_flops(config.model) * config.batch_size * config.total_steps


def logdet_cap_share(model, logdet_nats):
    """log-det over the most that the couplings can reach; None where other layers add to it."""
    if model.actnorm or model.invertible_dense or model.scale_factor <= 1:
        return None
    return logdet_nats / logdet_cap_nats(model)


def num_parameters(config):
    """Trainable parameters of a JetConfig."""
    N, D, E = config.num_tokens, config.token_dim, config.emb_dim
    in_dim, out_dim = (D, 2 * D) if config.split_mode == "masking" else (D // 2, D)
    if config.block == "vit":  # two norms; qkv, out, MLP with their biases
        block = 4 * E + 12 * E * E + 9 * E
    else:  # two norms, two convolutions
        block = 4 * E + 2 * (9 * E * E + E)
    ends = (in_dim + 1) * E + N * E + 2 * E + (E + 1) * out_dim  # what is before and after them
    actnorm = 2 * D if config.actnorm else 0
    dense = D + 2 * D * D if config.invertible_dense else 0
    return config.num_couplings * (ends + config.block_depth * block + actnorm + dense)


def logdet_cap_nats(model):
    """The largest log-det that a JetConfig's couplings can reach: each scales half by m."""
    moved = model.num_couplings * model.num_tokens * model.token_dim / 2
    return moved * math.log(model.scale_factor)
