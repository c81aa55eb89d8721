"""The columns of a table: which of them are the input, the target and bad outputs, and their texts.

    row of a file  ->  Layout (the names of the columns)  ->  [Pair, ...]: one true output, and those known to be bad

A column is found by its name, in any case and with blanks around it. What no layout uses is told to the user.
"""

import json
import re
from dataclasses import dataclass

from formats.errors import UserError

PAIRS = [  # (input, target), the names that are found without being named; more than one pair in a row is refused
    ("dialogue", "summary"), ("document", "summary"), ("article", "highlights"),
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"), ("question", "chosen"),
    ("input", "output"), ("question", "answer"), ("query", "response"), ("source", "target"), ("text", "label"),
    ("instruction", "output"), ("instruction", "response"), ("instruction", "chosen"), ("input", "chosen"),
]  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns whose last turn is the target
WHOLE = (*CONVERSATIONS, "chosen", "rejected")  # may repeat the input's turns before the output
CONTEXTS = ("input", "context")  # what an instruction is about: Alpaca's and Dolly's name
OPTIONAL = ("system", "instruction", *CONTEXTS)  # parts that may be empty: an instruction may say all
SPEAKERS = {"user": "user human", "assistant": "assistant gpt chatgpt bing bard model", "system": "system"}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names.split()}
LABELS = {name: label for label, names in ((True, "true 1 good"), (False, "false 0 bad")) for name in names.split()}
RATINGS = r"label|rank|rating|score|quality|reward|kto_tag|weight"  # what may say that an output is bad
TEXT_LIMIT = 1 << 20  # characters in one text; csv's own limit of 128 KiB is below some news articles


@dataclass(frozen=True)
class Names:
    """Columns named by the user; "" or None: found by their names."""

    input: str | None = None
    target: str | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Layout:
    """The columns of a row, by the names that the file gives them."""

    parts: tuple  # of the input, joined by a blank line: system, instruction, the input itself, its context
    target: str
    negatives: tuple = ()  # columns of bad outputs
    label: str | None = None  # KTO's: whether the target is a good output

    @property
    def used(self):
        return {*self.parts, self.target, *self.negatives, self.label}


@dataclass(frozen=True)
class Pair:
    source: str
    target: str
    label: float = 1.0  # 0: the target is known to be a bad output


def find_layout(where, row, names):
    """The Layout of a row: the columns named, or the one pair of PAIRS or conversation that is there."""
    columns = lower_names(where, row)
    if bool(names.input) != bool(names.target):
        raise UserError("--input-column and --target-column go together; name both")
    if names.input:
        parts, target = (find(where, columns, row, names.input),), find(where, columns, row, names.target)
    else:
        found = [(name, target_of(where, columns, row, name)) for name in conversations(columns, row)]
        found += pairs_among(columns, row)
        main, target = only(where, row, found, "pair of columns fits", "input and the target column")
        parts, target = with_context(columns, main), columns[target]
    label = columns.get("kto_tag")
    if "label" in columns:
        is_bool = isinstance(row[columns["label"]], bool)
        replies = {columns.get("response"), *parts} if is_bool else ()  # in parts: a conversation is both
        label = columns["label"] if target == columns.get("completion") or target in replies else label
    negatives = (columns["rejected"],) if "rejected" in columns else ()
    if names.negative:
        negatives = (find(where, columns, row, names.negative),)
    return Layout(parts, target, negatives, label)


def find_inputs(where, row, names):
    """The columns of a row's input, as of Layout.parts; a target may be there or not."""
    columns = lower_names(where, row)
    if names.input:
        return (find(where, columns, row, names.input),)
    found = conversations(columns, row) + [name for name in dict(PAIRS) if name in columns]
    if "instruction" in found:
        found = [name for name in found if name in CONTEXTS] or ["instruction"]
    return with_context(columns, only(where, row, found, "column may be the input", "input column", target=False))


def lower_names(where, row):
    """{name in lower case, without blanks: name in the file}."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with an input and a target column, found {row!r:.40}")
    columns = {}
    for name in row:
        columns.setdefault(str(name).strip().lower(), name)
    return columns


def find(where, columns, row, name):
    """The column that the user named, by its exact name or else in any case."""
    if name in row:
        return name
    if name.strip().lower() in columns:
        return columns[name.strip().lower()]
    raise UserError(
        f"{where}: no column {name!r} among {', '.join(map(str, row))}; correct --input-column, --target-column or "
        f"--negative-column{hint_of_delimiter(row)}"
    )


def only(where, row, found, what, which, target=True):
    """The one thing that was found. Raises UserError with the columns if there is none, or more than one."""
    if len(found) == 1:
        return found[0]
    flags = "them: --input-column NAME --target-column NAME" if target else "it: --input-column NAME"
    problem = f"more than one {what}" if found else f"cannot tell the {which}"
    raise UserError(f"{where}: {problem} among {', '.join(map(str, row))}; name {flags}{hint_of_delimiter(row)}")


def conversations(columns, row):
    return [name for name in CONVERSATIONS if isinstance(row.get(columns.get(name)), list)]


def target_of(where, columns, row, name):
    """The target of a conversation: its last turn or, if that is the user's, `chosen` beside it."""
    reply = row.get(columns.get("chosen"))
    ends = messages(where, columns[name], row[columns[name]])[-1]["role"] == "assistant"
    return "chosen" if isinstance(reply, (dict, str)) and not ends else name


def pairs_among(columns, row):
    """The pairs of PAIRS that a row has. An instruction goes before an input: the two are no rivals."""
    found = [pair for pair in PAIRS if set(pair) <= set(columns)]
    if "instruction" in columns and any(main != "instruction" for main, _ in found):
        found = [pair for pair in found if pair[0] != "instruction"]
    inputs = {"prompt", "question", "input", "instruction"} & set(columns)
    whole = isinstance(row.get(columns.get("chosen")), list) and not inputs
    return [*found, ("chosen", "chosen")] if whole else found  # TRL's implicit prompt: the whole conversation


def with_context(columns, main):
    """The columns of an input: system text and instruction before the main one, what it is about behind it."""
    after = CONTEXTS if main == "instruction" else ("context",) if main == "question" else ()
    names = [*("system", "instruction"), main, *after]
    return tuple(dict.fromkeys(columns[name] for name in names if name in columns))


def hint_of_delimiter(row):
    """The flag that splits a header which is one cell with a delimiter in it, or ""."""
    if len(row) == 1:
        for delimiter in ";\t|,":
            if delimiter in str(next(iter(row))):
                return f"; or the header's one cell is several: --delimiter '{delimiter}'".replace("\t", "\\t")
    return ""


def input_of(where, row, parts):
    """The text of an input. Of a conversation that ends with the assistant, what stands before that."""
    values = {}
    for name in parts:
        values[name] = row[name]
        if isinstance(row[name], list):
            turns = messages(where, name, row[name])
            values[name] = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return joined(where, values)


def pairs_of(where, row, layout):
    """The Pairs of a row: its target, and its bad outputs with label 0; none if the target's own weight is 0.

    Raises UserError naming row and column.
    """
    last = row[layout.target][-1:] if isinstance(row[layout.target], list) else [row[layout.target]]
    if any(isinstance(turn, dict) and "role" in turn and turn.get("weight") == 0 for turn in last):
        return []
    values = {name: row[name] for name in layout.parts}
    if layout.target in values:
        values[layout.target] = messages(where, layout.target, row[layout.target])[:-1]
    source = joined(where, values)
    label = 1.0 if layout.label is None else float(read_label(where, layout.label, row[layout.label]))
    found = [Pair(source, answer(where, layout.target, row[layout.target]), label)]
    for name in layout.negatives:
        for output in outputs(row[name]):
            found.append(Pair(source, answer(where, name, output), 0.0))
    return found


def unused(row, layout):
    """What of a row no model sees: columns, and fields of messages as "column.field"."""
    found = [name for name in row if name not in layout.used and name != "id"]
    for name in layout.used & set(row):
        for turn in row[name] if isinstance(row[name], list) else [row[name]]:
            fields = turn if is_message(turn) else {}
            found += [f"{name}.{key}" for key, value in fields.items() if value and key not in TURN]
    return found


def has_several_answers(where, row, layout):
    """Whether a conversation has answers before the last one, which is the output."""
    turns = messages(where, layout.target, row[layout.target]) if layout.target in layout.parts else []
    return sum(turn["role"] == "assistant" for turn in turns) > 1


TURN = ("role", "from", "content", "value", "weight")


def is_message(value):
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def joined(where, values):
    """The text of an input from its parts, {column: text or conversation}. Those of OPTIONAL may be empty, but a system
    text alone is no input.
    """
    texts = {}
    for name, value in values.items():
        texts[name] = conversation(where, name, value, may_be_empty=name.strip().lower() in OPTIONAL)
    if not any(text for name, text in texts.items() if len(texts) == 1 or name.strip().lower() != "system"):
        raise UserError(f"{where}: column {list(texts)[-1]!r} is empty or not text; fix or remove that row")
    return "\n\n".join(text for text in texts.values() if text)


def outputs(value):
    """The bad outputs of a cell: one text or conversation, or a list of texts; none where it is empty."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    empty = value is None or value == [] or (isinstance(value, str) and not value.strip())
    return [] if empty else [value]


def read_label(where, name, value):
    """KTO's label: whether an output is good."""
    if isinstance(value, bool):
        return value
    if str(value).strip().lower() not in LABELS:
        raise UserError(f"{where}: column {name!r} is {value!r:.40}, neither true nor false; fix or remove that row")
    return LABELS[str(value).strip().lower()]


def answer(where, name, value):
    """The text of an output: a text, or the assistant's message; of a whole conversation its last one."""
    value = [value] if is_message(value) else value
    if isinstance(value, list):
        turns = messages(where, name, value)
        alone = len(turns) == 1 or name.strip().lower() in WHOLE
        if turns[-1]["role"] != "assistant" or not alone:
            raise UserError(f"{where}: the last message must be one of role 'assistant'; fix or remove that row")
        value = turns[-1]["content"]
    return clean(where, name, value)


def conversation(where, name, value, may_be_empty=False):
    """The text of an input: a text, or messages.

    System messages at the start come first, unchanged; one further message is the text itself, several become
    "role: text" lines: lastmile learns one answer to one input, and its template, not the data, says who speaks.
    """
    if isinstance(value, list):
        turns = messages(where, name, value)
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        system, turns = [turn["content"] for turn in turns[:first]], turns[first:]
        lines = [turn["content"] if len(turns) == 1 else f"{turn['role']}: {turn['content']}" for turn in turns]
        value = "\n\n".join([*system, "\n".join(lines)])
    if may_be_empty and (value is None or value == ""):
        return ""
    return clean(where, name, value, may_be_empty)


def messages(where, name, value):
    """A list of {"role", "content"}, also from ShareGPT's {"from", "value"}; contents of text parts are joined."""
    found = []
    for turn in value:
        turn = turn if isinstance(turn, dict) else {}
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list) and content and all(is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: column {name!r} is empty or not text: expected messages with a role and a text as content; "
                f"fix or remove that row"
            )
        found.append({"role": ROLES.get(role.strip().lower(), role), "content": content})
    if not found:
        raise UserError(f"{where}: column {name!r} is empty or not text; fix or remove that row")
    return found


def is_text_part(part):
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def clean(where, name, text, may_be_empty=False):
    """A text, stripped and with "\n" line ends; an object as JSON. Raises UserError if it is none or not UTF-8."""
    if isinstance(text, dict):
        text = json.dumps(text, ensure_ascii=False, default=str)
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        number = " (a number: write it in quotes)" if isinstance(text, (int, float)) else ""
        raise UserError(f"{where}: column {name!r} is empty or not text{number}; fix or remove that row")
    if len(text) > TEXT_LIMIT:
        raise UserError(f"{where}: column {name!r} is longer than {TEXT_LIMIT} characters; cut or remove it")
    if not encodable(text):
        raise UserError(f"{where}: column {name!r} contains an unpaired surrogate; fix or remove that row")
    return strip(text)


def strip(text):
    """The text without blanks around it and with "\n" line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def encodable(text):
    """Whether a text is Unicode: JSON can spell half a surrogate pair, which no tokenizer takes."""
    return not re.search("[\ud800-\udfff]", text)
