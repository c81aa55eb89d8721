"""A decoding step as a CUDA graph: captured once, then replayed.

A step launches about a thousand small kernels; launching them one by one takes several times as long as they run. The
shapes of a graph never change, so rows that have ended stay in the batch on a GPU. They cost nothing there: a step's
time goes into reading the weights. Without this, model.sample calls the same step directly.
"""

import torch


def capture(step, cache):
    """step(token) -> logits, as a graph that reads and writes the same tensors each time: a function of the same kind.

    step: appends a token a row to the cache, (B,) -> (B, V). cache: model.KVCache, on a GPU.
    """
    token = torch.zeros_like(cache.length)  # (B,): the graph reads this tensor
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once without a graph: compiles the kernels, allocates cuBLAS' workspace
        step(token)
        cache.length -= 1  # what this step wrote will be overwritten
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(next_token):
        token.copy_(next_token)
        graph.replay()
        return logits

    return replay
