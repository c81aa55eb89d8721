"""A model's own chat template as a prompt: a text with {source} where the input goes.

A chat template is a Jinja program of unknown origin. It runs in Jinja's sandbox, as in transformers, and in a process
of its own (`python -m formats.chat_template`), which may use 3 seconds of the CPU and 1 GiB, and write 64 KiB.
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

from formats.errors import UserError

ROLES = "bos_token", "eos_token", "unk_token", "pad_token"  # the special tokens that templates name
ANSWER = "{answer}"
SECONDS, BYTES, LENGTH = 3, 1 << 30, 1 << 16
TODAY = date(2024, 7, 26)  # for strftime_now: a prompt must not change with the day; Llama 3's without a clock


def prompt(folder, template, controls, system, task):
    """(text with {source}, control token that ends an answer or "") of a model folder's chat template.

    template: the Jinja source, or JSON of several with names. controls: {text: id} of control tokens. system: the
    system text, in front of the user's if the template has no system role. task: the user's text with {source}.
    Thinking is off. Raises UserError if the template raises, does not end, or loses the text.
    """
    variables = special_tokens(Path(folder))
    turns = [{"role": "system", "content": system}, {"role": "user", "content": task}]
    joined = [{"role": "user", "content": f"{system}\n\n{task}"}]
    for messages in (turns, joined):
        text, answered, problem = render(default_of(template), messages, variables)
        if problem.startswith("does not end"):
            break
        if not problem and (system not in text or text.count("{source}") != 1):
            problem = "does not write each message once"
        if not problem:
            after = answered.partition(ANSWER)[2]
            ends = [token for token in controls if token and token in after]
            return text, max(ends, key=lambda token: (-after.index(token), len(token)), default="")
    raise UserError(f"{folder}: its chat template {problem}; choose another prompt: --template NAME or FILE")


def special_tokens(folder):
    """{role: text} of the special tokens that the files beside a tokenizer name."""
    from formats.tokenizer import read_object  # not needed by the process that renders

    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, value in read_object(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if role in ROLES and isinstance(text, str):
                found[role] = text
    return found


def default_of(template):
    """The Jinja source of a folder's template, which may be one of several with names."""
    with suppress(ValueError, TypeError, LookupError):
        named = json.loads(template)
        return {one["name"]: one["template"] for one in named}["default"] if named else ""
    return template


def render(template, messages, variables):
    """(prompt, the same with an answer, "") of a chat template, or ("", "", what went wrong)."""
    if not template:
        return "", "", "does not exist"
    command = [sys.executable, "-m", "formats.chat_template"]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    job = json.dumps({"template": template, "messages": messages, "variables": variables, "seconds": SECONDS})
    try:
        done = subprocess.run(
            command, input=job, env=os.environ | path, capture_output=True, text=True, timeout=20 * SECONDS, check=False
        )
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return "", "", f"does not end within {SECONDS} s and {BYTES >> 30} GiB"


# ----------------------------------------------------------------------------------------------------------------------
# In the process that renders


def environment():
    """Jinja's sandbox with what transformers gives to templates."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks what a model is trained on."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    return found


def written(template, **variables):
    """What a template writes, as long as it is not too long."""
    text = ""
    for part in template.generate(tools=None, documents=None, enable_thinking=False, **variables):
        text += part
        if len(text) > LENGTH:
            raise ValueError(f"writes over {LENGTH >> 10} KiB")
    return text


def main():
    """Render the job on standard input; see `render`."""
    job = json.load(sys.stdin)
    with suppress(ValueError, OSError):  # a system may not limit memory
        resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    messages, variables = job["messages"], job["variables"]
    answer = {"role": "assistant", "content": ANSWER}
    try:
        template = environment().from_string(job["template"])
        text = written(template, messages=messages, add_generation_prompt=True, **variables)
        answered = written(template, messages=[*messages, answer], add_generation_prompt=False, **variables)
        found = text, answered, ""
    except Exception as error:  # noqa: BLE001 - a program of unknown origin may raise anything
        found = "", "", f"fails ({type(error).__name__}: {str(error):.200})"
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
