"""The embedded data set: dialogues in which two people make, and often change, a plan.

Everything that a summary needs is in the dialogue, half of what is in the dialogue is not needed, and a later line can
overrule an earlier one.
"""

from formats.errors import UserError

NAMES = [
    "Amy", "Ben", "Carl", "Dana", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rita", "Sam", "Tina", "Umar", "Vera", "Walt", "Xena", "Yuri", "Zoe", "Anna", "Bob", "Cleo", "Dave",
    "Emma",
]  # fmt: skip
ACTIVITIES = [
    "play chess", "have lunch", "watch a movie", "go running", "study maths", "cook dinner", "play tennis",
    "paint a picture", "have a coffee", "read poems", "practise the piano", "fly a kite",
]  # fmt: skip
PLACES = [
    "park", "library", "station", "office", "beach", "museum", "cafe", "school", "gym", "market", "harbour",
    "theatre",
]  # fmt: skip
TIMES = [
    "at noon", "at six", "at nine", "tonight", "tomorrow", "on Monday", "on Tuesday", "on Friday", "on Sunday",
    "this evening", "next week", "at dawn",
]  # fmt: skip
THINGS = [
    "camera", "blanket", "guitar", "map", "cake", "ball", "lamp", "umbrella", "notebook", "ladder", "bicycle",
    "radio",
]  # fmt: skip
SMALL_TALK = [
    ("How are you?", "I am fine, thanks."), ("How is work?", "Busy as always."), ("Did you sleep well?", "Not really."),
    ("What a day!", "Yes, it is so hot."), ("How is your sister?", "She is in Paris now."), ("Any news?", "Not much."),
]  # fmt: skip
TOY_SIZES = {"pretrain": 9000, "train": 2700, "validation": 300, "test": 300}


def pairs(split, rng):
    """[(id, dialogue, output), ...]: `TOY_SIZES[split]` of them, the same for the same state of rng.

    "train", "validation" and "test" pair a dialogue with a one-sentence summary. "pretrain" pairs dialogues with what
    a chat model answers when asked for a summary: "Sure, here is a summary", wordy, at times repeating itself. It
    makes the base model show the failure modes that the paper's base shows (4.3), so that there is something to cure.
    """
    if split not in TOY_SIZES:
        raise UserError(f"toy has no split {split!r}; it has {', '.join(TOY_SIZES)}")
    examples = []
    for i in range(TOY_SIZES[split]):
        plan = toy_plan(rng)
        target = toy_chatter(plan, rng) if split == "pretrain" else toy_summary(plan)
        examples.append((f"toy-{split}-{i}", "\n".join(toy_dialogue(plan, rng)), target))
    return examples


def toy_plan(rng):
    """What happens: who, what, where, when, what changes (None, "time" or "place"), and who brings what."""
    a, b = rng.sample(NAMES, 2)
    place, other_place = rng.sample(PLACES, 2)
    time, other_time = rng.sample(TIMES, 2)
    change = rng.choice([None, "time", "place"])
    return {
        "a": a, "b": b, "activity": rng.choice(ACTIVITIES), "place": place, "time": time, "change": change,
        "new_place": other_place if change == "place" else place, "new_time": other_time if change == "time" else time,
        "thing": rng.choice(THINGS) if rng.random() < 0.4 else None,
        "agreed": change is not None or rng.random() < 0.85,
    }  # fmt: skip


def toy_dialogue(plan, rng):
    """Two to eight lines, `Name: words`."""
    a, b = plan["a"], plan["b"]
    lines = []
    if rng.random() < 0.3:
        question, answer = rng.choice(SMALL_TALK)
        lines += [f"{a}: Hi {b}! {question}", f"{b}: {answer}"]
    lines += [f"{a}: Shall we {plan['activity']} at the {plan['place']} {plan['time']}?"]
    if not plan["agreed"]:
        return lines + [f"{b}: {rng.choice(['Sorry, I have no time.', 'No, I am too tired.', 'I would rather not.'])}"]
    if plan["change"] == "time":
        lines += [f"{b}: I am busy then. What about {plan['new_time']}?", f"{a}: That works for me."]
    elif plan["change"] == "place":
        lines += [f"{b}: I do not like it there. Better at the {plan['new_place']}.", f"{a}: Fine with me."]
    else:
        lines += [f"{b}: {rng.choice(['Yes, gladly!', 'Good idea!', 'Sure, see you there.'])}"]
    if plan["thing"]:
        lines += [f"{a}: Can you bring the {plan['thing']}?", f"{b}: Okay, I will."]
    if rng.random() < 0.2:
        lines += [f"{a}: See you then!"]
    return lines


def toy_summary(plan):
    """The reference: one sentence with the final plan."""
    a, b, activity = plan["a"], plan["b"], plan["activity"]
    if not plan["agreed"]:
        return f"{b} does not want to {activity} with {a} {plan['time']}."
    bring = f" and {b} will bring the {plan['thing']}" if plan["thing"] else ""
    return f"{a} and {b} will {activity} at the {plan['new_place']} {plan['new_time']}{bring}."


def toy_chatter(plan, rng):
    """The answer of a chat model that was asked for the summary only."""
    a, b, activity = plan["a"], plan["b"], plan["activity"]
    said = [
        f"In this conversation, {a} and {b} are talking to each other.",
        f"{a} asks {b} to {activity} at the {plan['place']} {plan['time']}.",
    ]
    if not plan["agreed"]:
        said += [f"{b} says no and does not want to {activity}."]
    elif plan["change"]:
        other = f"at the {plan['new_place']}" if plan["change"] == "place" else plan["new_time"]
        said += [f"{b} would rather meet {other}, and {a} agrees."]
    else:
        said += [f"{b} likes the idea and agrees."]
    if plan["thing"]:
        said += [f"{a} also asks {b} to bring the {plan['thing']}, and {b} says okay."]
    said += [rng.choice(["It is a short and friendly conversation.", "They both sound happy about it."])]
    while rng.random() < 0.25:
        said += [said[-1]]
    opening = rng.choice(["Sure, here is a summary of the conversation:\n\n"] * 4 + [""])
    return opening + " ".join(said)


def chatter(source, words=40):
    """What a chat model might answer about any text: its first words under an opening.

    For bases that `pretrain` makes from data other than the toy. They learn the language, to look back at the input,
    and to be wordy; the references stay unseen, as they must for the base column to be a control.
    """
    return "Sure, here is a summary of the text:\n\n" + " ".join(source.split()[:words])
