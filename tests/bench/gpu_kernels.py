"""The part K of gpu.py: a product with 4-bit weights, against the same with bf16 weights by cuBLAS.

K1  at 1 to 16 rows: packed bytes a second over those of a large copy.
K2  the same, its speed over cuBLAS; and over gptq-triton's kernel (fp16) on the same packed weights, if installed.
K4  at 1,024 to 10,500 rows, and its backward to the input (forward and backward together less forward), over cuBLAS.
K5  unpacking to bf16: bytes read and written a second over those of a large copy.

Each over the four products of a block, q k v and gate up side by side, added up. The weights take turns, 512 MB of them
up to 16 rows: a cold L2. Outputs and gradients are first compared with fp32 products of what quant.dequantize, plain
torch, makes of the packed words.
"""

import torch
import torch.nn.functional as F

import quant

GROUP = 128
GOALS = {1024: (0.80, 0.93), 3500: (0.92, 0.97), 10500: (0.96, 0.99)}  # K4, by rows


def random_packed(K, N, device):
    """The four tensors of a GPTQ layer, version 1, symmetric, random; weights of standard deviation 1/sqrt(K)."""
    qweight = torch.randint(-(2**31), 2**31 - 1, (K // 8, N), dtype=torch.int32, device=device)
    qzeros = torch.full((K // GROUP, N // 8), 0x77777777, dtype=torch.int32, device=device)
    scales = (torch.rand(K // GROUP, N, device=device) + 0.5) / (4.6 * K**0.5)
    return qweight, qzeros, scales.half(), torch.arange(K, device=device, dtype=torch.int32) // GROUP


def packed_bytes(K, N):
    return K * N / 2 + K // GROUP * (2 * N + N / 2)


def fill(layer, packed):
    """Give a QuantLinear its tensors, as loading a checkpoint does."""
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = packed
    return layer


def layers_of(bench, K, N):
    """(QuantLinears of one shape, what they were made of), as many as fill `rotate` bytes, after a check of forward,
    backward and unpacking.
    """
    count = max(2, int(bench.rotate / packed_bytes(K, N)) + 1)
    packed = [random_packed(K, N, bench.device) for _ in range(count)]
    weight = quant.dequantize(*packed[-1], 1)  # (K, N) fp32, the definition
    layers = [fill(quant.QuantLinear(K, N, GROUP).to(bench.device), p) for p in packed]
    for M in (1, 7, 16, 300):
        x = torch.randn(M, K, device=bench.device, dtype=bench.dtype, requires_grad=True)
        dy = torch.randn(M, N, device=bench.device, dtype=bench.dtype)
        y = layers[-1](x)
        (dx,) = torch.autograd.grad(y, x, dy)
        close(y, x.float() @ weight, f"{M} rows x ({K}, {N})")
        close(dx, dy.float() @ weight.T, f"backward of {M} rows x ({K}, {N})")
    close(layers[-1].weight(bench.dtype), weight, f"weight ({K}, {N})")
    return layers, packed


def close(found, expected, what):
    error = ((found.float() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"{what}: relative error {error:.1e}"  # NaN fails too


def graphed(run, bench):
    """run as a CUDA graph: launching kernels of a few microseconds one by one would take longer than they do."""
    if bench.device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once without: kernels are compiled, workspaces taken
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()  # noqa: F841 all outputs alive at once, so that none is written over in the cache

    return graph.replay


def random_rows(bench, M, K, **how):
    return torch.randn(M, K, device=bench.device, dtype=bench.dtype, **how)


def gptq_triton(bench):
    """gptq-triton's product, (x fp16, packed) -> y, tuned as it tunes itself; None where it is not installed."""
    try:
        from gptq_triton.quant_linear import matmul4_kernel, triton_matmul4
    except ImportError:
        return None

    def interpreted(x, packed):  # without a GPU, where nothing is to be timed: its kernel in one of its configurations
        (qweight, qzeros, scales, _), M, (K, N) = packed, len(x), (x.shape[1], packed[0].shape[1])
        y = torch.empty(M, N, dtype=x.dtype)
        strides = [stride for tensor in (x, qweight, y, scales, qzeros) for stride in tensor.stride()]
        blocks = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=256, BLOCK_SIZE_K=128, GROUP_SIZE_M=8)
        matmul4_kernel.fn[(-(-M // 16) * (N // 256),)](
            x, qweight, y, scales, qzeros, M, N, K, *strides, GROUP, K == GROUP, **blocks
        )
        return y

    if bench.device == "cpu":
        return interpreted
    return lambda x, packed: triton_matmul4(GROUP, x, packed[0], packed[2], packed[1])


def few_rows(bench, layers, packed, dense, M):
    """Seconds a product, lap by lap: {"ours": [...], "cublas": [...], and "gptq-triton" where it is installed}."""
    x = random_rows(bench, M, layers[0].in_features)
    contestants = {
        "ours": (len(layers), lambda: [layer(x) for layer in layers]),
        "cublas": (len(dense), lambda: [F.linear(x, w) for w in dense]),
    }
    if peer := gptq_triton(bench):
        half = x.half()
        close(peer(half, packed[-1]), half.float() @ quant.dequantize(*packed[-1], 1), f"gptq-triton, {M} rows")
        contestants["gptq-triton"] = len(packed), lambda: [peer(half, p) for p in packed]
    laps = bench.race({name: graphed(run, bench) for name, (_, run) in contestants.items()}, seconds=2)
    return {name: [t / contestants[name][0] for t in laps[name]] for name in laps}


def many_rows(bench, layers, dense, M):
    """{(way, whose): seconds a product, lap by lap}, way being "forward" or "dX"."""
    layer = layers[0]
    x, dy = random_rows(bench, M, layer.in_features), random_rows(bench, M, layer.out_features)
    learning = random_rows(bench, M, layer.in_features, requires_grad=True)
    contestants = {
        "forward": lambda: [layer(x) for layer in layers],
        "both": lambda: [torch.autograd.grad(layer(learning), learning, dy) for layer in layers],
        "cublas forward": lambda: [F.linear(x, w) for w in dense],
        "cublas dX": lambda: [dy @ w for w in dense],
    }
    laps = bench.race({name: graphed(run, bench) for name, run in contestants.items()}, seconds=3)
    n = len(layers)
    return {
        ("forward", "ours"): [t / n for t in laps["forward"]],
        ("dX", "ours"): [(b - f) / n for b, f in zip(laps["both"], laps["forward"], strict=True)],
        ("forward", "cublas"): [t / len(dense) for t in laps["cublas forward"]],
        ("dX", "cublas"): [t / len(dense) for t in laps["cublas dX"]],
    }


def kernels(bench):
    C, F_ = bench.C, bench.F
    shapes = [(C, 3 * C), (C, C), (C, 2 * F_), (F_, C)]  # the products of one block: q k v, o, gate up, down
    few = {M: [] for M in ((1, 7) if bench.tiny else (1, 7, 14, 16))}  # what the functions above return, shape by shape
    many = {M: [] for M in ((64,) if bench.tiny else GOALS)}
    unpack = []
    for K, N in shapes:
        layers, packed = layers_of(bench, K, N)
        dense = [layer.weight(bench.dtype).T.contiguous() for layer in layers[: len(layers) // 4 + 2]]
        for M, found in few.items():
            found.append(few_rows(bench, layers, packed, dense, M))
        run = graphed(lambda layers=layers: [layer.weight(bench.dtype) for layer in layers], bench)
        unpack.append([t / len(layers) for t in bench.race({"unpack": run}, seconds=2)["unpack"]])
        for M, found in many.items():
            found.append(many_rows(bench, layers[:4], dense[:4], M))
        del layers, packed, dense, run
    report(bench, shapes, few, many, unpack)


def report(bench, shapes, few, many, unpack):
    block = lambda laps: [sum(lap) for lap in zip(*laps, strict=False)]  # noqa: E731 all shapes' seconds, lap by lap
    over = lambda theirs, ours: [t / o for t, o in zip(theirs, ours, strict=False)]  # noqa: E731
    packed = sum(packed_bytes(K, N) for K, N in shapes)
    for M, found in few.items():
        ours, cublas = (block([laps[whose] for laps in found]) for whose in ("ours", "cublas"))
        rate = [packed / t / bench.copy for t in ours]
        bench.line("K1", f"M = {M}, packed bytes/s over copy", rate, 0.60, 0.80, laps=found)
        bench.line("K2", f"M = {M}, over cuBLAS bf16", over(cublas, ours), 2.5, 3.2, unit="x")
        if "gptq-triton" in found[0]:
            bench.line(
                "K2", f"M = {M}, over gptq-triton", over(block([laps["gptq-triton"] for laps in found]), ours), unit="x"
            )
    for M, found in many.items():
        for way in ("forward", "dX"):
            ours, cublas = (block([laps[way, whose] for laps in found]) for whose in ("ours", "cublas"))
            laps = {"ours": ours, "cublas": cublas}
            bench.line("K4", f"M = {M}, {way}, over cuBLAS bf16", over(cublas, ours), *GOALS.get(M, ()), unit="x",
                       laps=laps)  # fmt: skip
    moved = packed + sum(bench.dtype.itemsize * K * N for K, N in shapes)
    rate = [moved / t / bench.copy for t in block(unpack)]
    bench.line("K5", "unpacking, bytes/s over copy", rate, 0.80, 0.92, laps=unpack)
