"""A model's own chat template: the prompt that transformers makes of it, and what a bad one gets."""

import json
import time

import pytest
from test_data import train_bpe
from test_tokenizer import CHATML, TEXTS, config, spm, theirs

import data
import lastmile
from formats import chat_template
from interface import command_line

LLAMA3 = """{{ bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages | length - loop.index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' and loop.index0 > ns.last %}
        {% generation %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
MISTRAL = """{{ bos_token }}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.index0 < 2 else '') + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
NO_SYSTEM = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def bpe(which):
    def write(folder, template):
        train_bpe(folder, which, TEXTS)
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        if which == "llama3":
            tokenizer["bos_token"] = "<|begin_of_text|>"
        config(folder, **tokenizer)

    return write


def sentencepiece(folder, template):
    (folder / "tokenizer.model").write_bytes(spm())
    config(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", legacy=False,
           chat_template=template)  # fmt: skip


TEMPLATES = {  # name: (how its tokenizer is written, template, has a system role, the token that ends an answer)
    "ChatML": (bpe("smollm2"), CHATML, True, "<|im_end|>"),
    "Llama 3": (bpe("llama3"), LLAMA3, True, "<|eot_id|>"),
    "Qwen3": (bpe("smollm2"), QWEN3, True, "<|im_end|>"),
    "Mistral": (sentencepiece, MISTRAL, True, "</s>"),
    "no system role": (sentencepiece, NO_SYSTEM, False, "</s>"),
    "one of several": (bpe("smollm2"), [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}],
                       True, "<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_prompts_are_those_of_apply_chat_template(tmp_path, kind):
    """The ids are transformers', BOS once, thinking off; the system text is in front of the user's where the template
    has no system role, and answers end as the template ends them.
    """
    write, template, has_system, end = TEMPLATES[kind]
    write(tmp_path, template)
    tokenizer = data.load_tokenizer(tmp_path, "model")
    assert tokenizer.eos == tokenizer.controls[end] and tokenizer.end == end
    oracle = theirs(tmp_path)
    for source in ("Amy: Hi!\nBen: Hello.", "x"):
        turns = [{"role": "system", "content": data.SYSTEM}]
        turns.append({"role": "user", "content": data.TASK.replace("{source}", source)})
        if not has_system:
            turns = [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}]
        (prompt,) = tokenizer.prompts([source])
        assert prompt == oracle.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("ChatML", "chatml"),
        ("Llama 3", "llama3"),
        ("Mistral", "llama2"),
        ("Qwen3", "model"),
        ("no system role", "model"),
    ],
)
def test_what_a_model_gets_unasked(tmp_path, kind, name):
    """A built-in prompt where the model's tokens are those of one; its own where they are not (TinyLlama got Llama 2's,
    with a warning), or where its own switches thinking off.
    """
    write, template, *_ = TEMPLATES[kind]
    write(tmp_path, template)
    assert data.load_tokenizer(tmp_path).template == data.load_tokenizer(tmp_path, name).template


BAD = {  # a template: what is said of it
    "{{ raise_exception('no tools') }}": "fails (TemplateError: no tools)",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "does not end within 1 s",
    "{{ 'a' * 10**10 }}": "fails (MemoryError",
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}": "fails (ValueError: writes over 64 KiB)",
    "{{ messages.__class__.__mro__ }}": "fails (SecurityError",
    "{{ messages.clear() }}": "fails (SecurityError",
    "{% include '/etc/passwd' %}": "fails (TypeError: no loader for this environment",
    "{{ messages": "fails (TemplateSyntaxError",
    "{{ messages[-1].content[:20] }}": "does not write each message once",
    "{{ messages[-1].content * 2 }}": "does not write each message once",
    "": "does not exist",
}


@pytest.mark.parametrize("template, said", BAD.items(), ids=list(BAD.values()))
def test_bad_templates_are_refused(tmp_path, monkeypatch, template, said):
    """Whatever a downloaded program does, one line says so and names the way out, with exit code 2; nothing hangs."""
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    bpe("smollm2")(tmp_path, template)
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        data.load_tokenizer(tmp_path, "model")
    assert said in str(error.value) and "--template NAME or FILE" in str(error.value)
    assert command_line.diagnosis(error.value)[0] == 2 and time.monotonic() - start < 10


def test_the_day_is_always_the_same(tmp_path):
    """A prompt with today's date would be another tomorrow, and the adapter of yesterday refused."""
    bpe("smollm2")(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert data.load_tokenizer(tmp_path, "model").template.startswith("26 Jul 2024<|im_start|>")


def test_a_run_with_the_models_own_prompt(fresh_run, run_folder, tmp_path):
    """From training to sampling: the adapter's folder has the prompt as an ordinary template.txt; the sampler, which
    renders it again, finds it the same.
    """
    base = tmp_path / "base"
    base.mkdir()
    for file in (run_folder / "base").iterdir():
        if file.name != "template.txt":
            (base / file.name).write_bytes(file.read_bytes())
    config(base, chat_template=NO_SYSTEM, bos_token="<s>", eos_token="</s>")
    flags = ["--model", base, "--train-examples", 14, "--max-steps", 2, "--max-new-tokens", 24]
    assert fresh_run("mle", *flags) == 0
    text = (fresh_run.folder / "mle/template.txt").read_text()
    assert text.startswith(f"<s><|user|>\n{data.SYSTEM}\n\n") and text.endswith("{source}</s>\n<|assistant|>\n")
    assert json.loads((fresh_run.folder / "mle/config.json").read_text())["template"] == ""
    sample = ["sample", "--model", str(base), "--adapter", str(fresh_run.folder / "mle"), "--output-dir", str(tmp_path)]
    assert lastmile.main([*sample, "Amy: Hi!"]) == 0
