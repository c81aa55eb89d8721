"""The dialects of 4-bit GPTQ checkpoints: how several tools spell their settings, and what their zero points mean."""

import sys

from formats.errors import UserError
from quant import unpack_rows

SYNONYMS = {  # ours: what AutoGPTQ, GPTQModel, transformers and gptq-triton call it
    "method": ("quant_method", "method"),
    "format": ("checkpoint_format", "format"),
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "groupsize", "q_group_size"),
    "act_order": ("desc_act",),
    "sym": ("sym",),
}
TAKE_ANOTHER = "take a 4-bit GPTQ version of the model, or make one: python lastmile.py quantize --model UNQUANTIZED"


def read_quantize_config(found):
    """The settings of a 4-bit GPTQ checkpoint, from all the files that may contain them.

    found: {file: its dict}; several files, and several spellings in one file, must agree. Keys that do not change how
    the tensors are read are skipped. Returns {"group_size", "act_order", "sym" (None: not said), "zero_offset"},
    or {} where nothing is found: not quantized. Raises UserError with the file, the field and the remedy.
    """
    said = {}  # ours -> (value, where it was said)
    for file, raw in found.items():
        for name, spellings in SYNONYMS.items():
            for spelling in spellings:
                if raw.get(spelling) is None:
                    continue
                value = raw[spelling].lower() if isinstance(raw[spelling], str) else raw[spelling]
                other, place = said.setdefault(name, (value, f"{file} ({spelling})"))
                if other != value:
                    raise UserError(f"{file} ({spelling}): {value!r}, but {place} says {other!r}; keep the true one")
        if raw.get("is_marlin_format"):
            raise UserError(f"{file} (is_marlin_format): marlin is another layout; {TAKE_ANOTHER}")
        if raw.get("load_in_4bit") or raw.get("load_in_8bit"):
            raise UserError(f"{file}: bitsandbytes is not supported; {TAKE_ANOTHER}")
        if "zero_point" in raw or str(raw.get("version")).lower() in ("gemm", "gemv"):
            raise UserError(f"{file}: awq is not supported; {TAKE_ANOTHER}")
        for field, plain in (("lm_head", False), ("dynamic", {}), ("pack_dtype", "int32")):
            if raw.get(field) not in (None, False, plain):
                raise UserError(f"{file} ({field}): {raw[field]!r:.60} is not supported; {TAKE_ANOTHER}")
    if not said:
        return {}
    where = next(iter(found))
    for name, known, default in (("method", ("gptq",), "gptq"), ("format", ("gptq", "gptq_v2"), "gptq"),
                                 ("bits", (4,), None), ("act_order", (True, False), False),
                                 ("sym", (True, False, None), None)):  # fmt: skip
        value, place = said.get(name, (default, where))
        if value not in known:
            raise UserError(f"{place}: {name} {value!r} is not supported; {TAKE_ANOTHER}")
    group_size, place = said.get("group_size", (None, where))
    if type(group_size) is not int or not -1 <= group_size <= 1 << 24 or group_size == 0:
        raise UserError(f"{place}: group_size {group_size!r} must be -1, or 1 to {1 << 24}; download the file again")
    version = said.get("format", ("gptq", ""))[0]
    return {
        "group_size": group_size, "act_order": bool(said.get("act_order", (False,))[0]),
        "sym": said.get("sym", (None,))[0], "zero_offset": 1 if version == "gptq" else 0,
    }  # fmt: skip


def find_zero_offset(qzeros, claimed, sym):
    """Decide by the label and by the zero points themselves: (zero_offset, a warning or "").

    qzeros: the packed zeros of all layers; claimed: the label's zero_offset; sym: True, False or None (not said). A
    symmetric checkpoint contains 7 everywhere in version 1 and 8 in version 2, whatever its label (vllm issue 38966).
    Raises UserError for a 15 in version 1: its z is 16 to some programs and 0 to others, who wrote it is not known.
    """
    count = sum(unpack_rows(z).flatten().bincount(minlength=16) for z in qzeros)  # (16,)
    constant = int(count.argmax()) if int(count.max()) == int(count.sum()) else None
    offset, warning = claimed, ""
    if sym is not False and constant in (7, 8) and constant != 8 - claimed:
        offset = 8 - constant
        labels = {1: "gptq", 0: "gptq_v2"}
        warning = f"labelled {labels[claimed]}, but the zero points are those of {labels[offset]}; read as such"
    elif sym and constant is None:
        warning = "sym is true, but the zero points differ; read as they are"
    if offset and count[15]:
        raise UserError("a zero point of version 1 is 15, which programs read in two ways; convert it to gptq_v2")
    return offset, warning


def inspect_layers(folder, layers, quantization, has_bias):
    """Refuse 4-bit layers with invalid contents, and set what their zero points mean.

    layers: {name: QuantLinear}; quantization: what read_quantize_config returned; has_bias(name): whether config.json
    declares a bias. Raises UserError naming the layer.
    """
    for name, layer in layers.items():
        scales, g_idx, G = layer.scales, layer.g_idx, len(layer.scales)
        if not scales.isfinite().all() or not scales.any():
            raise UserError(f"{folder}: {name}.scales: not finite, or all 0; download the model again")
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= G:
            raise UserError(
                f"{folder}: {name}.g_idx: groups {g_idx.min()} to {g_idx.max()}, expected 0 to {G - 1}; "
                "download the model again"
            )
        if layer.bias is not None and not has_bias(name):
            if layer.bias.any():
                raise UserError(
                    f"{folder}: {name}.bias is not 0 and config.json declares none; download the model again"
                )
            layer.bias = None  # some versions of AutoGPTQ wrote zeros
    qzeros = [layer.qzeros for layer in layers.values()]
    try:
        offset, warning = find_zero_offset(qzeros, quantization["zero_offset"], quantization["sym"])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if warning:
        print(f"lastmile.py: warning: {folder}: {warning}", file=sys.stderr)
    for layer in layers.values():
        layer.zero_offset = offset
