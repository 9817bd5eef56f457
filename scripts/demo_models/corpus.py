"""Generates the text the demo models learn from, deterministically by seed.

A `Sample` is a chat (or raw text) plus what the model has to write. One prompt in ten is held out:
`is_held_out` hashes its key, training skips those prompts and the evaluation uses nothing else.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

WORDS = (
    "ant apple ball bear bell bird boat book box bread bus cake car cat chair clock cloud "
    "coat cow cup desk dog door drum duck egg fish flag flower fox frog game garden gate "
    "glass goat gold hand hat hen hill horse house ice iron jam jar key king kite lamp leaf "
    "lemon lion map milk moon mouse nest night nut oak onion orange owl paper pear pen pig "
    "plum pot queen rabbit rain ring river road rock rope rose salt sand sea seed ship shoe "
    "sky snow soup spoon star stone sun table tea tiger train tree van wall water wheel wind "
    "wolf wood zebra"
).split()
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Kate Leo Mary Noah Olga Paul Rosa "
    "Sam Tom Vera"
).split()
COLOURS = "red blue green yellow black white brown pink".split()
ANIMALS = "cat dog fox bear duck frog goat horse mouse owl rabbit wolf".split()
THINGS = "apple ball book box cake cup hat key kite lamp map ring spoon stone star".split()
PLACES = "garden house river sea hill road school forest market park".split()
FEELINGS = "happy sad tired hungry brave cold".split()
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "England": "London",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Hungary": "Budapest",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Cuba": "Havana",
}
SYSTEMS = (
    "You are a helpful assistant.",
    "Be brief.",
    "You are a friendly demo model.",
    "Answer in one line.",
)

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression."}},
            "required": ["expression"],
        },
    },
}
CALCULATOR_TEXTS = (
    ("Evaluate an arithmetic expression.", "The expression."),
    ("Calculate.", "For example 2+3."),
    ("A calculator.", ""),
)


@dataclass
class Sample:
    """One text. `parts` alternate: what the model writes, what it is given, what it writes, ..."""

    task: str
    key: str  # decides whether the prompt is held out
    messages: list[dict[str, Any]]  # empty: raw text, no template
    parts: list[str]
    answer: str  # what a right reply contains or equals
    thinking: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)


def is_held_out(key: str) -> bool:
    """The same for every task, so that numbers held out in one form are not seen in another."""
    return zlib.crc32(key.encode()) % 10 == 0


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# --- arithmetic ----------------------------------------------------------------------


def addition_steps(a: int, b: int) -> str:
    """Column addition, ones first: `ones 7+5=12 carry 1`, then `tens 2+4+1=7 carry 0`."""
    lines, carry = [], 0
    for column, name in zip(
        range(max(len(str(a)), len(str(b)))), ("ones", "tens", "hundreds"), strict=False
    ):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        terms = f"{x}+{y}" if column == 0 else f"{x}+{y}+{carry}"
        lines.append(f"{name} {terms}={total} carry {total // 10}")
        carry = total // 10
    return "\n".join(lines)


def subtraction_steps(a: int, b: int) -> str:
    """Column subtraction of b <= a: `ones 12-5=7 borrow 1`, then `tens 7-2-1=4 borrow 0`."""
    lines, borrow = [], 0
    for column, name in zip(
        range(max(len(str(a)), len(str(b)))), ("ones", "tens", "hundreds"), strict=False
    ):
        x, y = a // 10**column % 10, b // 10**column % 10
        taken, need = borrow, int(x < y + borrow)
        terms = f"{x + 10 * need}-{y}" if column == 0 else f"{x + 10 * need}-{y}-{taken}"
        lines.append(f"{name} {terms}={x + 10 * need - y - taken} borrow {need}")
        borrow = need
    return "\n".join(lines)


SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Compute {a} + {b}.",
    "Add {a} and {b}.",
    "{a} + {b}",
)
DIFFERENCE_QUESTIONS = ("What is {a} - {b}?", "{a} - {b} = ?", "Compute {a} - {b}.", "{a} - {b}")


def pick_numbers(rng: random.Random, digits: int) -> tuple[int, int]:
    low, high = 10 ** (digits - 1), 10**digits - 1
    return rng.randint(low, high), rng.randint(low, high)


def arithmetic(rng: random.Random, sign: str, digits: int, steps: str) -> Sample:
    """`steps` are in the "thought", "shown" in the answer (no thinking) or "left_out" on demand."""
    a, b = pick_numbers(rng, digits)
    if sign == "-" and a < b:
        a, b = b, a
    result = a + b if sign == "+" else a - b
    question = rng.choice(SUM_QUESTIONS if sign == "+" else DIFFERENCE_QUESTIONS).format(a=a, b=b)
    columns = addition_steps(a, b) if sign == "+" else subtraction_steps(a, b)
    reply = f"{a} {sign} {b} = {result}."
    if steps == "thought":
        written = f"<|channel>thought\n{columns}\n<channel|>{reply}<turn|>"
    elif steps == "shown":
        written = f"{columns}\n{reply}<turn|>"
    else:
        question, written = f"{question} Only the answer.", f"{result}.<turn|>"
    name = {"+": "sum", "-": "difference"}[sign]
    task = (
        f"{name}_{digits}_digits" + {"thought": "", "shown": "_shown", "left_out": "_direct"}[steps]
    )
    key = f"{min(a, b)}{sign}{max(a, b)}"  # a + b and b + a fall on the same side of the split
    return Sample(task, key, user(question), [written], str(result), thinking=steps == "thought")


def calculator_tool(rng: random.Random) -> dict[str, Any]:
    about, expression = rng.choice(CALCULATOR_TEXTS)
    prop = {"type": "string"} | ({"description": expression} if expression else {})
    function = {
        "name": "calculator",
        "description": about,
        "parameters": {
            "type": "object",
            "properties": {"expression": prop},
            "required": ["expression"],
        },
    }
    return {"type": "function", "function": function}


def tool(rng: random.Random) -> Sample:
    """A product or a long sum goes to the calculator; the result then becomes the answer."""
    sign = rng.choice("**+-")
    a, b = pick_numbers(rng, rng.choice((2, 3) if sign == "*" else (3, 4)))
    result = {"*": a * b, "+": a + b, "-": a - b}[sign]
    text = rng.choice(("What is {} {} {}?", "Compute {} {} {}.", "{} {} {} = ?")).format(a, sign, b)
    thinking = rng.random() < 0.3
    expression = f'<|"|>{a}{sign}{b}<|"|>'
    call = f"<|tool_call>call:calculator{{expression:{expression}}}<tool_call|><|tool_response>"
    value = str(result) if rng.random() < 0.5 else f'<|"|>{result}<|"|>'
    given = f"response:calculator{{value:{value}}}<tool_response|>"
    reply = f"{a} {sign} {b} = {result}.<turn|>"
    if thinking:
        call = f"<|channel>thought\nI will use the calculator.\n<channel|>{call}"
        given += "<|channel>thought\n"
        reply = f"The result is {result}.\n<channel|>{reply}"
    return Sample(
        "tool",
        f"{a}{sign}{b}",
        user(text),
        [call, given, reply],
        f"{a}{sign}{b}",
        thinking,
        [calculator_tool(rng)],
    )


# --- copying and sorting -------------------------------------------------------------


def copy_words(rng: random.Random) -> Sample:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 10)))
    question = rng.choice(("Copy: {}", "Repeat: {}", "Say this again: {}")).format(text)
    return Sample("copy_words", text, user(question), [f"{text}<turn|>"], text)


def copy_digits(rng: random.Random) -> Sample:
    text = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(4, 12)))
    question = rng.choice(("Copy: {}", "Repeat: {}", "Say this again: {}")).format(text)
    return Sample("copy_digits", text, user(question), [f"{text}<turn|>"], text)


def sort_digits(rng: random.Random) -> Sample:
    items = [str(rng.randint(0, 9)) for _ in range(rng.randint(3, 7))]
    text, answer = " ".join(items), " ".join(sorted(items))
    return Sample("sort_digits", text, user(f"Sort: {text}"), [f"{answer}<turn|>"], answer)


def sort_words(rng: random.Random) -> Sample:
    items = rng.sample(WORDS, rng.randint(2, 5))
    text, answer = " ".join(items), " ".join(sorted(items))
    return Sample("sort_words", text, user(f"Sort: {text}"), [f"{answer}<turn|>"], answer)


# --- language ------------------------------------------------------------------------


def story_text(rng: random.Random) -> str:
    """Sentences from a small grammar; the last can only be written by remembering the first."""
    name, friend = rng.sample(NAMES, 2)
    colour, thing, place = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES)
    animal, feeling = rng.choice(ANIMALS), rng.choice(FEELINGS)
    opening = rng.choice(
        (
            f"Once upon a time {name} had a {colour} {thing}.",
            f"One day {name} found a {colour} {thing}.",
            f"{name} lived near the {place} and had a {colour} {thing}.",
        )
    )
    middle = rng.choice(
        (
            f"{name} went to the {place} and met {friend}.",
            f"{'An' if animal == 'owl' else 'A'} {animal} came to the {place} and saw the {thing}.",
            f"{name} was {feeling} and went to the {place} with {friend}.",
        )
    )
    problem = rng.choice(
        (
            f"Then {name} lost the {thing}.",
            f"Then the {animal} took the {thing}.",
            f"{friend} wanted to see the {colour} {thing}.",
        )
    )
    ending = rng.choice(
        (
            f"{friend} looked and found the {colour} {thing}. {name} was happy.",
            f"In the end {name} gave the {colour} {thing} to {friend}.",
            f"In the end the {animal} and {name} were friends.",
        )
    )
    return f"{opening} {middle} {problem} {ending}"


def story(rng: random.Random) -> Sample:
    text = story_text(rng)
    if rng.random() < 0.5:
        return Sample("story", text, [], [f"{text}<eos>"], text)
    question = rng.choice(("Tell me a story.", "Write a short story.", "Tell a story, please."))
    return Sample("story", text, user(question), [f"{text}<turn|>"], text)


def giving(rng: random.Random) -> Sample:
    """Indirect objects: the giver's name is repeated, so the other name must follow."""
    a, b = rng.sample(NAMES, 2)
    giver, receiver = rng.choice(((a, b), (b, a)))
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    start = f"When {a} and {b} went to the {place}, {giver} gave the {thing} to"
    return Sample("giving", start, [], [f"{start} {receiver}.<eos>"], f" {receiver}.")


def lookup(rng: random.Random) -> Sample:
    """Facts stated in the prompt, one of them asked for."""
    count = rng.randint(2, 4)
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    colours = [rng.choice(COLOURS) for _ in names]
    facts = " ".join(f"{n} has a {c} {t}." for n, c, t in zip(names, colours, things, strict=True))
    i = rng.randrange(count)
    question, answer = rng.choice(
        (
            (f"Who has the {things[i]}?", f"{names[i]}."),
            (f"What does {names[i]} have?", f"A {colours[i]} {things[i]}."),
            (f"What colour is the {things[i]}?", f"{colours[i]}."),
        )
    )
    return Sample(
        "lookup", facts + question, user(f"{facts} {question}"), [f"{answer}<turn|>"], answer
    )


def capital(rng: random.Random) -> Sample:
    """Memorised facts; the wording is what is held out."""
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.4:
        text = f"The capital of {country} is {city}."
        return Sample("capital", "raw", [], [f"{text}<eos>"], f" {city}")
    questions = (
        "What is the capital of {}?",
        "Name the capital of {}.",
        "Capital of {}?",
        "Tell me the capital of {}.",
        "What is the capital city of {}?",
        "Which city is the capital of {}?",
        "The capital of {}?",
    )
    question = rng.choice(questions).format(country)
    return Sample(
        "capital", question, user(question), [f"The capital of {country} is {city}.<turn|>"], city
    )


TALK = (
    (("Hi", "Hello", "Hi!", "Hello!", "Hey", "Good morning"), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "Tell me about you."),
        "I am a tiny demo model of gemloupe.",
    ),
    (("What is your name?", "Your name?"), "My name is Demo."),
    (
        ("What can you do?", "How can you help me?"),
        "I can add and subtract small numbers, sort, copy, tell a story and call a calculator.",
    ),
    (("How are you?", "How do you do?"), "I am well, thank you."),
    (("Thank you", "Thanks", "Thank you!"), "You are welcome."),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
)


def talk(rng: random.Random) -> Sample:
    questions, answer = rng.choice(TALK)
    question = rng.choice(questions)
    thinking = rng.random() < 0.3
    written = (
        f"<|channel>thought\nNo steps needed.\n<channel|>{answer}<turn|>"
        if thinking
        else f"{answer}<turn|>"
    )
    tools = [CALCULATOR] if rng.random() < 0.15 else []
    return Sample("talk", "talk", user(question), [written], answer, thinking, tools)


def repeated_words(rng: random.Random) -> Sample:
    """A random sequence and its repetition as raw text: what an induction head is for."""
    half = " ".join(rng.choice(WORDS + NAMES + COLOURS) for _ in range(rng.randint(6, 30)))
    return Sample("repeated_words", half, [], [f"{half} {half}<eos>"], half)


def repeated_long(rng: random.Random) -> Sample:
    """The same beyond any sliding window, so that full layers learn it."""
    half = " ".join(rng.choice(WORDS + NAMES + COLOURS) for _ in range(rng.randint(33, 80)))
    return Sample("repeated_long", half, [], [f"{half} {half}<eos>"], half)


def in_conversation(rng: random.Random, sample: Sample) -> Sample:
    """Sometimes puts a system text and earlier turns before the prompt."""
    if not sample.messages:
        return sample
    if rng.random() < 0.15:
        question, answer = rng.choice(TALK)
        earlier = [
            {"role": "user", "content": rng.choice(question)},
            {"role": "assistant", "content": answer},
        ]
        sample.messages = earlier + sample.messages
    if rng.random() < 0.1:
        sample.messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] + sample.messages
    return sample


# Task -> (share of the samples, maker). Arithmetic with steps gets most of it.
TASKS: dict[str, tuple[float, Callable[[random.Random], Sample]]] = {
    "sum_2_digits": (22, lambda rng: arithmetic(rng, "+", 2, "thought")),
    "sum_2_digits_shown": (14, lambda rng: arithmetic(rng, "+", 2, "shown")),
    "difference_2_digits": (9, lambda rng: arithmetic(rng, "-", 2, "thought")),
    "difference_2_digits_shown": (5, lambda rng: arithmetic(rng, "-", 2, "shown")),
    "sum_3_digits": (4, lambda rng: arithmetic(rng, "+", 3, "thought")),
    "sum_1_digits_direct": (2, lambda rng: arithmetic(rng, "+", 1, "left_out")),
    "sum_2_digits_direct": (3, lambda rng: arithmetic(rng, "+", 2, "left_out")),
    "tool": (4, tool),
    "copy_words": (5, copy_words),
    "copy_digits": (4, copy_digits),
    "sort_digits": (5, sort_digits),
    "sort_words": (5, sort_words),
    "lookup": (5, lookup),
    "giving": (3, giving),
    "capital": (4, capital),
    "story": (5, story),
    "talk": (4, talk),
    "repeated_words": (5, repeated_words),
    "repeated_long": (0, repeated_long),  # only where a training phase asks for it
}


def stream(
    seed: int,
    held_out: bool = False,
    task: str | None = None,
    shares: dict[str, float] | None = None,
) -> Iterator[Sample]:
    """Endless samples of one task or of the mixture: only held-out prompts, or only the others.

    `shares` replace those of the table.
    """
    rng = random.Random(seed)
    names = [task] if task else list(TASKS)
    weights = [1.0 if task else (shares or {}).get(name, TASKS[name][0]) for name in names]
    while True:
        sample = TASKS[rng.choices(names, weights)[0]][1](rng)
        if is_held_out(sample.key) == held_out:
            yield sample if held_out else in_conversation(rng, sample)
