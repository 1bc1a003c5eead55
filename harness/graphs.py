"""A function of tensors as a CUDA graph: recorded once, then replayed by one launch.

Small Jets are bound by launches on a GPU: a training step is thousands of kernels, each shorter
than the host needs to start the next. A graph starts all of them at once. Source: PyTorch's notes
on CUDA graphs.
"""
import torch


class Graphed:
    """function(*inputs) -> a tuple of tensors, recorded at its third call, then replayed.

    All that it does must happen on the device: shapes stay the same, and what it reads beside its
    inputs (weights, moments, a learning rate) are tensors that are changed in place. The first
    calls run it as it is, on a stream of their own, so that whatever is made once (moments,
    compiled code, workspaces) is there before the recording; recording runs nothing, so every call
    counts once.
    prepare: called before each of these calls and before the recording.
    Raises ValueError for a tensor of another shape than the one recorded.
    """
    EAGER_CALLS = 2

    def __init__(self, function, prepare=lambda: None):
        self.function, self.prepare = function, prepare
        self.calls, self.stream, self.replay = 0, None, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= self.EAGER_CALLS:
            self.prepare()
            return self._run_aside(*inputs)
        if self.replay is None:
            self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            self.prepare()
            self.replay, self.outputs = record(self.function, *self.inputs)
        for x, ours in zip(inputs, self.inputs, strict=True):
            if x.shape != ours.shape:
                raise ValueError(f"a CUDA graph of a tensor of shape {tuple(ours.shape)}, not "
                                 f"{tuple(x.shape)}")
            with torch.no_grad():
                ours.copy_(x)
        self.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay writes into them

    def _run_aside(self, *inputs):
        device = inputs[0].device
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream(device).wait_stream(self.stream)
        return outputs


def record(function, *inputs):
    """(a function that runs what function(*inputs) does again, the tensors of its results)."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the thread that makes batches ahead may pin memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs
