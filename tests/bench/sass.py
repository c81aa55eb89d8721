"""Machine instructions that the 4-bit kernels spend a weight on a Hopper, counted without one: `make sass`.

Such kernels are bound by what they issue before they are bound by memory: at 4.3 TB/s and 0.53 bytes a weight an H200
is sent 8.1 T weights a second, and issues 29.7 T instructions (132 multiprocessors x 128 lanes x 1.755 GHz), 3.7 a
weight. Less is better, as no kernel issues one every cycle. Dequantizing writes 2 bytes a weight more, and may take 17.

Triton compiles for sm_90 on any machine and brings a disassembler. Of the product the inner loop is counted, of the
dequantizing kernel all of it. Exits with 1 where a kernel needs more than its goal, spills registers, or sends its
weights through shared memory once they are unpacked (STS in the loop).
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import quant  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"words": "*i32", "scale_zero": "*i32", "order": "*i32"}


def build(kernel, types, constants, warps):
    """Compile a kernel: (its instructions, {label: index of the instruction after it}, registers, stack, shared bytes).

    types: of the pointers to floats. Pointers and sizes but M and T count as multiples of 16: in a Llama they are.
    """
    signature = {name: (types | POINTERS).get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(signature) if name not in (*constants, "M", "T")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, HOPPER, {"num_warps": warps, **quant.FUSED})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
    instructions, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+ ", "", found[1]))  # without its predicate
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return instructions, labels, registers, stack, compiled.metadata.shared


def inner_loop(instructions, labels):
    """The longest stretch that a branch jumps back over."""
    jumps = ((re.search(r"^BRA.*`\((\.L_x_\d+)\)", line), i) for i, line in enumerate(instructions))
    loops = (instructions[labels[jump[1]] : i + 1] for jump, i in jumps if jump)
    return max(loops, key=len)


def count(instructions, *names):
    return sum(line.startswith(names) for line in instructions)


def products():
    """(name, goal, instructions a weight, the loop, registers, stack, shared) of the product's configurations."""
    cases = [(config, "bf16", 4) for config in quant.CONFIGS] + [(config, "fp16", 4) for config in quant.CONFIGS[:2]]
    cases += [(config, "bf16", slots) for slots in (2, 1) for config in quant.CONFIGS[:2]]
    for (BLOCK_M, BLOCK_N, warps, stages), dtype, slots in cases:
        constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "STAGES": stages, "SLOTS": slots}
        types = {"x": f"*{dtype}", "out": "*fp32"}
        instructions, labels, *sizes = build(quant._matmul_kernel, types, constants, warps)
        loop = inner_loop(instructions, labels)
        weights = BLOCK_N * 128 / (32 * warps)  # a thread
        yield (
            f"product, M <= {BLOCK_M}, {dtype}, group {32 * slots}",
            3.7 if BLOCK_M <= 16 else None,
            len(loop) / weights,
            loop,
            *sizes,
        )


def dequantizers():
    for slots, goal in ((4, 5.0), (2, None), (1, None)):
        constants = {"BLOCK_N": 128, "SLOTS": slots}
        instructions, _, *sizes = build(quant._dequantize_kernel, {"out": "*bf16"}, constants, warps=2)
        body = [line for line in instructions if not line.startswith("NOP")]
        yield f"dequantize to bf16, group {32 * slots}", goal, len(body) / (128 * 128 / 64), body, *sizes


def main():
    print(f"{'':36}a weight  goal  registers  stack  shared  HMMA  HGMMA  STS")
    failed = False
    for name, goal, spent, body, registers, stack, shared in (*products(), *dequantizers()):
        hmma, hgmma, sts, spills = (count(body, *names) for names in (("HMMA",), ("HGMMA",), ("STS",), ("LDL", "STL")))
        bad = bool(stack or spills or (goal and spent > goal) or (hmma + hgmma and sts))
        failed |= bad
        print(f"{name:36}{spent:8.2f}{goal or '':>6}{registers:11}{stack:7}{shared:8}{hmma:6}{hgmma:7}{sts:5}"
              f"{'  <- bad' if bad else ''}")  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
