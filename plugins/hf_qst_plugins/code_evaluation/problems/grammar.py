"""The grammar of the project's own problems. `draw` returns the `Specification` of one function.

There are three kinds of functions: a stream (a source of elements, a condition, a change, a result), a branch on one
number, and an operation on a list.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

HELD_OUT_SHARE = 0.1
LETTERS = "aeiorst"


@dataclass(frozen=True)
class Specification:
    """One function without a name: a key that identifies it, and all that is needed to write and to test it.

    `solutions` are equivalent bodies, each the lines without the outer indentation. `call` draws the arguments of one
    test.
    """

    key: tuple
    words: tuple[str, ...]
    arguments: tuple[str, ...]
    docstring: str
    solutions: tuple[tuple[str, ...], ...]
    call: Callable[[random.Random], tuple]

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(repr(self.key).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


# (word for the function's name, the condition in English, in Python). {k} is a constant, {v} the element.
NUMBER_CONDITIONS = [
    ("even", "are even", "{v} % 2 == 0"),
    ("odd", "are odd", "{v} % 2 == 1"),
    ("positive", "are positive", "{v} > 0"),
    ("negative", "are negative", "{v} < 0"),
    ("above", "are greater than {k}", "{v} > {k}"),
    ("below", "are less than {k}", "{v} < {k}"),
    ("at_least", "are at least {k}", "{v} >= {k}"),
    ("multiples", "are multiples of {k}", "{v} % {k} == 0"),
    ("other_than", "are not {k}", "{v} != {k}"),
]
NUMBER_CHANGES = [
    ("squares", "square", "{v} * {v}"),
    ("doubled", "double", "{v} * 2"),
    ("negated", "negate", "-{v}"),
    ("absolute", "take the absolute value of", "abs({v})"),
    ("plus", "add {k} to", "{v} + {k}"),
    ("minus", "subtract {k} from", "{v} - {k}"),
    ("times", "multiply by {k}", "{v} * {k}"),
    ("remainders", "take the remainder by {k} of", "{v} % {k}"),
]
WORD_CONDITIONS = [
    ("longer", "are longer than {k}", "len({v}) > {k}"),
    ("shorter", "are shorter than {k}", "len({v}) < {k}"),
    ("starting", "start with {c}", "{v}.startswith({c})"),
    ("ending", "end with {c}", "{v}.endswith({c})"),
    ("containing", "contain {c}", "{c} in {v}"),
    ("without", "do not contain {c}", "{c} not in {v}"),
]
WORD_CHANGES = [
    ("upper", "uppercase", "{v}.upper()"),
    ("capitalized", "capitalize", "{v}.capitalize()"),
    ("reversed", "reverse", "{v}[::-1]"),
    ("initials", "take the first {k} characters of", "{v}[:{k}]"),
    ("marked", "append {c} to", "{v} + {c}"),
    ("repeated", "repeat {k} times", "{v} * {k}"),
]
CHARACTER_CONDITIONS = [
    ("vowels", "are vowels", '{v} in "aeiou"'),
    ("digits", "are digits", "{v}.isdigit()"),
    ("capitals", "are uppercase", "{v}.isupper()"),
    ("letters", "are letters", "{v}.isalpha()"),
    ("without", "are not {c}", "{v} != {c}"),
    ("equal_to", "are {c}", "{v} == {c}"),
]
CHARACTER_CHANGES = [
    ("upper", "uppercase", "{v}.upper()"),
    ("lower", "lowercase", "{v}.lower()"),
    ("doubled", "double", "{v} * 2"),
    ("marked", "append {c} to", "{v} + {c}"),
]

# (word, the result in English, expression over the list {s}, the same as a loop or None).
# A loop is (first line, step for each element {e}, returned expression).
COLLECT = ("result = []", "result.append({e})", "result")
COMMON_RESULTS = [
    ("list", "the list of them", "{s}", COLLECT),
    ("count", "how many there are", "len({s})", ("count = 0", "count += 1", "count")),
    ("sorted", "them sorted", "sorted({s})", None),
    ("descending", "them sorted from high to low", "sorted({s}, reverse=True)", None),
    ("different", "how many different ones there are", "len(set({s}))", None),
]
NUMBER_RESULTS = [
    *COMMON_RESULTS,
    ("sum", "their sum", "sum({s})", ("total = 0", "total += {e}", "total")),
    ("product", "their product", None, ("result = 1", "result *= {e}", "result")),
    ("largest", "the largest, or 0 if there are none", "max({s}, default=0)", None),
    ("smallest", "the smallest, or 0 if there are none", "min({s}, default=0)", None),
]
TEXT_RESULTS = [
    *COMMON_RESULTS,
    ("joined", "them joined by {j}", "{j}.join({s})", None),
    ("text", "them as one string", '"".join({s})', ('result = ""', "result += {e}", "result")),
    ("total_length", "their total length", 'len("".join({s}))', ("total = 0", "total += len({e})", "total")),
]


class Family(NamedTuple):
    """Conditions, changes and results that fit one type of element."""

    conditions: list
    changes: list
    results: list


class Source(NamedTuple):
    """Where the elements come from: possible names of the argument and of an element, separated by spaces; the elements
    in English and in Python; and a function that draws the argument of one test."""

    kind: str
    arguments: str
    elements: str
    noun: str
    iterate: str
    draw: Callable[[random.Random], object]
    family: Family


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 15) for _ in range(rng.choice((0, 1, 4, 5, 6, 7, 8)))]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS + "ln") for _ in range(rng.randint(1, 8)))


def _limit(rng: random.Random) -> int:
    return rng.choice((0, 1, 5, 9, 10, 12, 13))


def _mapping(rng: random.Random) -> dict[str, int]:
    return {_word(rng): number for number in _numbers(rng)}


def _sentence(rng: random.Random) -> str:
    return " ".join(_words(rng))


def _words(rng: random.Random) -> list[str]:
    return [_word(rng) for _ in range(rng.choice((0, 3, 4, 5, 6, 7)))]


def _characters(rng: random.Random) -> str:
    return "".join(rng.choice("aaeioorsstTRAE7 3") for _ in range(rng.choice((0, 5, 8, 12))))


NUMBERS = Family(NUMBER_CONDITIONS, NUMBER_CHANGES, NUMBER_RESULTS)
WORDS = Family(WORD_CONDITIONS, WORD_CHANGES, TEXT_RESULTS)
CHARACTERS = Family(CHARACTER_CONDITIONS, CHARACTER_CHANGES, TEXT_RESULTS)
SOURCES = [
    Source("numbers", "values numbers items data", "value number x v", "the numbers in {a}", "{a}", _numbers, NUMBERS),
    Source(
        "range",
        "n limit end stop",
        "i value number x",
        "the numbers from 1 to {a}",
        "range(1, {a} + 1)",
        _limit,
        NUMBERS,
    ),
    Source(
        "mapping",
        "mapping table scores prices",
        "value number x v",
        "the values of the dict {a}",
        "{a}.values()",
        _mapping,
        NUMBERS,
    ),
    Source("words", "words names lines strings", "word name item s", "the strings in {a}", "{a}", _words, WORDS),
    Source(
        "split",
        "text line sentence string",
        "word part item s",
        "the words of the string {a}",
        "{a}.split()",
        _sentence,
        WORDS,
    ),
    Source(
        "characters",
        "text line name string",
        "char c letter ch",
        "the characters of {a}",
        "{a}",
        _characters,
        CHARACTERS,
    ),
]


def _each(change: str, noun: str) -> str:
    """`square` -> `square each`, `multiply by 3` -> `multiply each by 3`, `add 3 to` -> `add 3 to each`."""
    verb, _, rest = change.partition(" ")
    inside = rest.startswith(("by ", "times")) or rest.endswith(" times")
    return f"{verb} {noun} {rest}" if inside else f"{change} {noun}"


def _draw_stream(rng: random.Random) -> Specification:
    source = rng.choice(SOURCES)
    family = source.family
    condition = rng.choice(family.conditions) if rng.random() < 0.75 else None
    change = rng.choice(family.changes) if rng.random() < 0.55 else None
    result = rng.choice(family.results)
    argument, element = rng.choice(source.arguments.split()), rng.choice(source.elements.split())
    constants = [
        {"k": rng.randint(2, 4 if family.results is TEXT_RESULTS else 9), "c": f'"{rng.choice(LETTERS)}"'} for _ in "12"
    ]
    joiner = f'"{rng.choice(["-", ", ", "/", "+", "_", ":"])}"'

    def fill(template: str, constants: dict) -> str:
        return template.format(v=element, a=argument, j=joiner, **constants)

    keep = fill(condition[2], constants[0]) if condition else None
    changed = fill(change[2], constants[1]) if change else element
    iterable, noun, outcome = (fill(part, {}) for part in (source.iterate, source.noun, result[1]))
    if condition:
        noun += " that " + fill(condition[1], constants[0])
    if change:
        docstring = f"Take {noun}, {_each(fill(change[1], constants[1]), 'each')} and return {outcome}."
    else:
        docstring = f"Take {noun} and return {outcome}."
    docstring = docstring.replace('"', "'")

    solutions = _stream_solutions(result, element, iterable, keep, changed, joiner)
    parts = (part and fill(part[1], own) for part, own in zip((condition, change), constants, strict=True))
    key = ("stream", source.kind, *parts, outcome)
    words = tuple(part[0] for part in (result, change, condition) if part)
    return Specification(key, words, (argument,), docstring, solutions, lambda rng: (source.draw(rng),))


def _stream_solutions(
    result: tuple, element: str, iterable: str, keep: str | None, changed: str, joiner: str
) -> tuple[tuple[str, ...], ...]:
    """The bodies of a stream: as one expression over a comprehension, and as a loop."""
    _, _, expression, loop = result
    solutions = []
    if expression:
        stream = f"[{changed} for {element} in {iterable}{f' if {keep}' if keep else ''}]"
        if keep is None and changed == element:
            stream = f"list({iterable})"
        solutions.append((f"return {expression.format(s=stream, j=joiner)}",))
    start, step, end = loop or COLLECT
    inner = [step.format(e=changed)]
    if keep:
        inner = [f"if {keep}:", *_indented(inner)]
    end = end if loop else expression.format(s=end, j=joiner)
    solutions.append((start, f"for {element} in {iterable}:", *_indented(inner), f"return {end}"))
    return tuple(solutions)


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _draw_branch(rng: random.Random) -> Specification:
    """`n + 3` if a condition holds, else `n * 2`; sometimes with a second condition before the last case."""
    argument = rng.choice(("n", "x", "value", "number"))
    conditions = rng.sample(NUMBER_CONDITIONS, rng.choice((1, 1, 2)))
    changes = rng.sample(NUMBER_CHANGES, len(conditions) + 1)
    k = [rng.randint(2, 9) for _ in range(5)]
    questions = [words.format(k=n).replace("are ", "is ") for (_, words, _), n in zip(conditions, k, strict=False)]
    questions = [question.replace("multiples", "a multiple") for question in questions]
    tests = [test.format(v=argument, k=n) for (_, _, test), n in zip(conditions, k, strict=False)]
    actions = [words.format(k=n) for (_, words, _), n in zip(changes, k[2:], strict=False)]
    values = [value.format(v=argument, k=n) for (_, _, value), n in zip(changes, k[2:], strict=False)]

    each = [_each(action, argument) for action in actions]
    parts = [f"if {argument} {question}, {action}" for question, action in zip(questions, each, strict=False)]
    docstring = "; ".join([*parts, f"otherwise {each[-1]}"]) + ". Return the result."
    lines = [line for pair in zip(tests, values, strict=False) for line in (f"if {pair[0]}:", f"    return {pair[1]}")]
    solutions = [(*lines, f"return {values[-1]}")]
    if len(tests) == 1:
        solutions.append((f"return {values[0]} if {tests[0]} else {values[1]}",))
    # The key holds only the constants in use; otherwise one problem could have keys on both sides.
    key = ("branch", *questions, *actions)
    words = (conditions[0][0], changes[0][0], "or", changes[-1][0])
    docstring = docstring[0].upper() + docstring[1:]
    call = lambda rng: (rng.choice((rng.randint(-9, 20), k[0], k[1])),)
    return Specification(key, words, (argument,), docstring, tuple(solutions), call)


# (word, docstring, then every body). {a} and {b} are the arguments, {v} an element, {k} a constant, {z} that many zeros.
OPERATIONS = [
    ("first", "Return the first {k} elements of the list {a}.", "return {a}[:{k}]"),
    ("without_first", "Return the list {a} without its first {k} elements.", "return {a}[{k}:]"),
    ("last", "Return the last {k} elements of the list {a}.", "return {a}[-{k}:]"),
    ("without_last", "Return the list {a} without its last {k} elements.", "return {a}[:-{k}]"),
    ("every", "Return every element of the list {a} at a position that is a multiple of {k}.", "return {a}[::{k}]"),
    ("reversed_first", "Return the first {k} elements of the list {a} in reverse order.", "return {a}[:{k}][::-1]"),
    ("rotated", "Return the list {a} rotated to the left by {k} positions.", "return {a}[{k}:] + {a}[:{k}]"),
    (
        "top",
        "Return the {k} largest elements of the list {a}, the largest first.",
        "return sorted({a}, reverse=True)[:{k}]",
    ),
    ("bottom", "Return the {k} smallest elements of the list {a}, the smallest first.", "return sorted({a})[:{k}]"),
    ("repeated", "Return the list {a} repeated {k} times.", "return {a} * {k}"),
    ("padded", "Return the list {a} with {k} zeros at its end.", "return {a} + [0] * {k}", "return {a} + [{z}]"),
    (
        "clamped",
        "Return the list {a} with every element above {k} replaced by {k}.",
        "return [min({v}, {k}) for {v} in {a}]",
        "result = []\nfor {v} in {a}:\n    result.append(min({v}, {k}))\nreturn result",
    ),
    (
        "raised",
        "Return the list {a} with every element below {k} replaced by {k}.",
        "return [max({v}, {k}) for {v} in {a}]",
        "result = []\nfor {v} in {a}:\n    if {v} < {k}:\n        result.append({k})\n    else:\n        result.append({v})\nreturn result",
    ),
    (
        "positions",
        "Return the positions in the list {a} of elements greater than {k}.",
        "return [i for i, {v} in enumerate({a}) if {v} > {k}]",
        "result = []\nfor i, {v} in enumerate({a}):\n    if {v} > {k}:\n        result.append(i)\nreturn result",
    ),
    (
        "weighted",
        "Return the sum of the elements of the list {a}, each times its position plus {k}.",
        "return sum([{v} * (i + {k}) for i, {v} in enumerate({a})])",
        "total = 0\nfor i, {v} in enumerate({a}):\n    total += {v} * (i + {k})\nreturn total",
    ),
    (
        "running",
        "Return the running totals of the list {a}, starting from {k}.",
        "result = []\ntotal = {k}\nfor {v} in {a}:\n    total += {v}\n    result.append(total)\nreturn result",
    ),
    (
        "grouped",
        "Group the numbers in the list {a} by their remainder by {k}, in a dict of lists.",
        "result = {{}}\nfor {v} in {a}:\n    result.setdefault({v} % {k}, []).append({v})\nreturn result",
    ),
    (
        "tally",
        "Count how often each remainder by {k} occurs among the numbers in the list {a}, as a dict.",
        "counts = {{}}\nfor {v} in {a}:\n    counts[{v} % {k}] = counts.get({v} % {k}, 0) + 1\nreturn counts",
    ),
    (
        "mapped",
        "Return a dict from each number in the list {a} to the number times {k}.",
        "return {{{v}: {v} * {k} for {v} in {a}}}",
        "result = {{}}\nfor {v} in {a}:\n    result[{v}] = {v} * {k}\nreturn result",
    ),
    (
        "until",
        "Return the elements of the list {a} before the first that is greater than {k}.",
        "result = []\nfor {v} in {a}:\n    if {v} > {k}:\n        break\n    result.append({v})\nreturn result",
    ),
    (
        "any",
        "Return True if any number in the list {a} is a multiple of {k}, otherwise False.",
        "return any([{v} % {k} == 0 for {v} in {a}])",
        "for {v} in {a}:\n    if {v} % {k} == 0:\n        return True\nreturn False",
    ),
    (
        "all",
        "Return True if all numbers in the list {a} are less than {k}, otherwise False.",
        "return all([{v} < {k} for {v} in {a}])",
        "for {v} in {a}:\n    if {v} >= {k}:\n        return False\nreturn True",
    ),
    (
        "find",
        "Return the first number in the list {a} that is greater than {k}, or None if there is none.",
        "for {v} in {a}:\n    if {v} > {k}:\n        return {v}\nreturn None",
    ),
    (
        "combined",
        "Return the list of the elements of {a}, each plus {k} times the element of {b} at its position.",
        "return [{v} + {k} * w for {v}, w in zip({a}, {b})]",
        "result = []\nfor {v}, w in zip({a}, {b}):\n    result.append({v} + {k} * w)\nreturn result",
    ),
    (
        "common",
        "Return the elements of the list {a} that are also in {b} and are greater than {k}.",
        "return [{v} for {v} in {a} if {v} in {b} and {v} > {k}]",
        "result = []\nfor {v} in {a}:\n    if {v} in {b} and {v} > {k}:\n        result.append({v})\nreturn result",
    ),
    (
        "steps",
        "Return how often {a} can be divided by {k} without a remainder.",
        "count = 0\nwhile {a} % {k} == 0:\n    {a} //= {k}\n    count += 1\nreturn count",
    ),
    (
        "power",
        "Return the smallest power of {k} that is greater than {a}.",
        "result = 1\nwhile result <= {a}:\n    result *= {k}\nreturn result",
    ),
]
ON_A_NUMBER = ("steps", "power")


def _draw_operation(rng: random.Random) -> Specification:
    word, docstring, *bodies = rng.choice(OPERATIONS)
    k = rng.randint(2, 12)
    number, two = word in ON_A_NUMBER, "{b}" in docstring
    a, b = rng.choice((("n", "m"), ("number", "other")) if number else (("values", "others"), ("items", "more")))
    names = {"a": a, "b": b, "k": k, "z": ", ".join("0" * k), "v": rng.choice(("value", "item", "x", "v"))}
    solutions = tuple(tuple(body.format(**names).split("\n")) for body in bodies)

    def call(rng: random.Random) -> tuple:
        if number:
            return (rng.choice((1, 7, k, k * k, 3 * k, k**3, 100)),)
        first = [rng.randint(-4, 18) for _ in range(rng.choice((0, 3, 8, 12, 14)))]
        return (first, rng.sample(range(-4, 19), len(first))) if two else (first,)

    key = ("operation", word, k)
    return Specification(key, (word, str(k)), (a, b) if two else (a,), docstring.format(**names), solutions, call)


def draw(rng: random.Random) -> Specification:
    """One specification, held out or not."""
    return rng.choices((_draw_stream, _draw_branch, _draw_operation), (6, 2, 4))[0](rng)
