"""The commands that use what was trained: sample, predict, merge and tables."""

from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import data
import model
from formats.errors import UserError
from formats.tables import read_inputs
from interface import chat, results
from interface.folders import require, stage_folder
from interface.inputs import adapter_folder, context_left, load_listed, load_named, load_trained, open_base
from interface.outputs import save_model, write_card
from interface.plan import end_dry_run
from interface.predictions import Predictions, row_uniform
from lora import lora_layers
from safety import ranks
from safety.terminal import progress, say


def answer(settings, text):
    """Print the outputs for one input; in a terminal, where none is given, for each that is typed."""
    s = settings
    text = chat.given_text(text)
    llama, tokenizer = open_base(s)
    adapters = load_listed(s, llama, s.adapter)
    limit = context_left(s, llama)
    end_dry_run(s, llama)
    rngs = {name: data.generator(s.seed, "sample", device=s.device) for name in adapters}

    def answer_one(text):
        prompt = tokenizer.prompts([text])[0]
        if len(prompt) > limit:
            raise UserError(
                f"{len(prompt)} tokens of text and template and {s.max_new_tokens} new ones, but the model reads "
                f"{llama.config.max_position_embeddings}; shorten the text, or lower --max-new-tokens"
            )
        for name, adapter in adapters.items():
            output = chat.Output(tokenizer.decode, label=f"{name}: " if len(adapters) > 1 else "")
            sampling = (s.max_new_tokens, s.temperature, rngs[name], s.top_k, s.top_p)
            response = model.sample(llama, [prompt], adapter, *sampling, each=output.add)
            output.end(response[0])

    if text is None:
        chat.converse(answer_one)
    else:
        answer_one(text)


def predict(settings):
    """Outputs for a file of inputs, in its order; what an earlier call has written is kept."""
    s = settings
    inputs = read_inputs(s.input, s.input_column, s.delimiter)
    llama, tokenizer = open_base(s)
    adapter = load_named(s, llama, s.adapter)
    prompts = tokenizer.prompts([source for _, source in inputs])
    limit = context_left(s, llama)
    end_dry_run(s, llama, [data.Datum("", "", "", prompt, []) for prompt in prompts if len(prompt) <= limit])
    file = Predictions(s, inputs, llama, tokenizer) if ranks.first() else None
    for rows in progress("predict")(ranks.from_first(file and file.batches())):
        short = [i for i in rows if len(prompts[i]) <= limit]
        limits = {"max_new_tokens": s.max_new_tokens, "top_k": s.top_k, "top_p": s.top_p}
        sampler = partial(model.sample, llama, adapter=adapter, temperature=s.temperature, **limits)
        responses = ranks.sharded(sampler, row_uniform(s, short))([prompts[i] for i in short])
        texts = [tokenizer.decode(response) for response in responses]
        if ranks.first():
            file.append(rows, dict(zip(short, texts, strict=True)))
    if file:
        file.close()
    long = sum(len(prompt) > limit for prompt in prompts)
    written = f"{len(inputs)} rows in {file.path}" if file else ""
    say(f"predict: {written}, {long} of them over {limit} tokens and without an output")


def merge(settings):
    """Base and adapter as one dense Hugging Face folder, for tools that know no adapters and no GPTQ."""
    with stage_folder(settings, "merge") as folder:
        llama, tokenizer = open_base(settings)
        load_trained(llama, "merged", adapter_folder(settings, settings.adapter), any_base=True)
        if llama.resolve("merged")[0] is not llama:
            raise UserError(f"--adapter {settings.adapter}: is a whole model already; there is nothing to merge")
        end_dry_run(settings, llama)
        merge_adapter(llama, "merged", getattr(torch, settings.dtype))
        save_model(settings, llama, tokenizer, folder)
        write_card(settings, llama.folder, folder, "merge")


@torch.no_grad()
def merge_adapter(llama, adapter, dtype=torch.float16):
    """Fold an adapter into its base, in place: a dense Llama of that dtype without adapters, 4-bit layers written out.

    Raises UserError where a weight does not fit the dtype.
    """
    for path, layer in lora_layers(llama):
        base = layer.base
        weight = layer.merged(layer.base_weight(torch.float32), adapter).to(dtype)  # (N, K)
        if not weight.isfinite().all():
            raise UserError(f"{path}: a merged weight does not fit {dtype}; train with a smaller --learning-rate")
        N, K = weight.shape
        dense = nn.Linear(K, N, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.contiguous())
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias)
        layer.base = dense
        layer.lora_A.clear()
        layer.lora_B.clear()
    llama.to(dtype)


def show_tables(settings):
    """Print the paper's Tables 1 and 2, ours beside the paper's, and write them to eval/tables.md."""
    folder = Path(settings.output_dir) / "eval"
    require(folder, "eval", settings)
    _, text = results.read_scores(folder, settings.beside)
    say(text)
    end_dry_run(settings)
    (folder / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    say(f"\nAll results are in {Path(settings.output_dir).resolve()}; these tables in {folder / 'tables.md'}")
