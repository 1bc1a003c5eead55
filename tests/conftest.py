import torch

torch.set_num_threads(1)  # tiny models: a second thread gains nothing, and waits where cores are shared
