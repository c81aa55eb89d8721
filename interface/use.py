"""The commands that use what was trained: sample, predict, merge and tables."""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import data
import model
from beyond import best_of
from formats.columns import encodable, strip
from formats.errors import UserError, name_row
from formats.llama_weights import tensor_not_finite
from formats.tables import read_inputs
from interface import results
from interface.folders import require, stage_folder
from interface.inputs import (
    adapter_folder,
    context_left,
    load_listed,
    load_named,
    load_rows,
    load_trained,
    open_base,
    open_reward,
)
from interface.outputs import save_model, write_card
from interface.plan import end_dry_run
from interface.predictions import Predictions, row_uniform
from lora import lora_layers
from safety import ranks
from safety.terminal import progress, say, visible


def answer(settings, text):
    """Print the outputs for one input; on a terminal, if none is given, for each that is typed."""
    s = settings
    typed = text is None and sys.stdin is not None and sys.stdin.isatty()
    text = None if typed else given_text(text)
    llama, tokenizer = open_base(s)
    adapters = load_listed(s, llama, s.adapter)
    limit = context_left(s, llama)
    end_dry_run(s, llama)
    rngs = {name: data.generator(s.seed, "sample", device=s.device) for name in adapters}

    def answer_one(text):
        prompt = tokenizer.prompts([text])[0]
        if len(prompt) > limit:
            raise UserError(f"{len(prompt)} tokens of text and template, but the limit is {limit}; shorten the text, "
                            f"or lower --max-new-tokens")  # fmt: skip
        for name, adapter in adapters.items():
            print(visible(f"{name}: ") if len(adapters) > 1 else "", end="", flush=True)
            show = printer(tokenizer.decode)
            sampling = (s.max_new_tokens, s.temperature, rngs[name], s.top_k, s.top_p)
            model.sample(llama, [prompt], adapter, *sampling, each=show)
            show()

    if typed:
        converse(answer_one)
    else:
        answer_one(text)


def given_text(text):
    """The text of the command line, or of a pipe or file on standard input."""
    try:
        text = strip(text if text is not None else sys.stdin.read())
    except (AttributeError, UnicodeDecodeError):  # no standard input at all, or bytes
        text = ""
    if not text or not encodable(text):
        raise UserError("no text to summarize, or not UTF-8; give it as an argument or on standard input")
    return text


def converse(answer):
    """Call `answer` with each text typed on the terminal, until Ctrl-D. Ctrl-C ends an output.

    Every text is an input of its own: lastmile's models answer one input, and remember none.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  a line may then be edited, and have more than the terminal's 4096 characters
    say("Type or paste a text, then an empty line; Ctrl-D ends.", file=sys.stderr)
    for text in iter(read_text, ""):
        try:
            answer(given_text(text))
        except UserError as error:
            say(f"lastmile.py: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            say("")


def read_text():
    """The lines up to an empty one, as one text; "" at the end of the input, or if the terminal is gone."""
    lines = []
    with suppress(EOFError, OSError, UnicodeDecodeError):
        while not lines or lines[-1].strip():
            lines.append(input("> " if sys.stdout.isatty() else ""))  # a file of outputs stays one
            if not strip(lines[0]):
                lines.clear()
    return strip("\n".join(lines))


def printer(decode):
    """A function that prints what each next token, (1,), adds to the text; without a token, the end of the text.

    A part of a character waits for the rest of it. decode: list of ids -> text.
    """
    ids = []
    shown = 0  # characters

    def show(token=None):
        nonlocal shown
        if token is not None:
            ids.append(token.item())
        text = decode(ids) if token is None else decode(ids).rstrip("\ufffd")
        print(visible(text[shown:]), end="\n" if token is None else "", flush=True)
        shown = max(shown, len(text))

    return show


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
        with name_row([(inputs[i][0], prompts[i]) for i in short]):
            responses = ranks.sharded(sampler, row_uniform(s, short))([prompts[i] for i in short])
        texts = [tokenizer.decode(response) for response in responses]
        if ranks.first():
            file.append(rows, dict(zip(short, texts, strict=True)))
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

    Raises FloatingPointError if a weight does not fit the dtype.
    """
    for _, layer in lora_layers(llama):
        base = layer.base
        weight = layer.merged(layer.base_weight(torch.float32), adapter).to(dtype)  # (N, K)
        N, K = weight.shape
        dense = nn.Linear(K, N, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.contiguous())
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias)
        layer.base = dense
        layer.lora_A.clear()
        layer.lora_B.clear()
    llama.to(dtype)
    if name := tensor_not_finite(llama):
        raise FloatingPointError(f"{name} has no finite {dtype}; use --dtype float32, or a smaller --learning-rate")


def show_tables(settings):
    """Print the paper's Tables 1 and 2, ours beside the paper's, and write them to eval/tables.md."""
    folder = Path(settings.output_dir) / "eval"
    require(folder, "eval", settings)
    _, text = results.read_scores(folder, settings.beside)
    say(text)
    end_dry_run(settings)
    (folder / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    say(f"\nAll results are in {Path(settings.output_dir).resolve()}; these tables in {folder / 'tables.md'}")


def judge(settings):
    """Best of N by the reward model, beside greedy answers, one sample and the oracle, on validation examples."""
    llama, tokenizer = open_base(settings)
    adapter = load_named(settings, llama, settings.adapter)
    rows = load_rows(settings, settings.split, llama, tokenizer, settings.eval_examples)
    score, _ = open_reward(settings, llama, tokenizer, rows)
    end_dry_run(settings, llama, rows)
    best_of.show(settings, best_of.compare(settings, llama, tokenizer, rows, score, adapter, settings.best_of))
