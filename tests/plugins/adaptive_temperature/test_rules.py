"""The rules, against literal references that decode text: every step of real source files, every kind of tokenizer."""

import re
import tokenize

import pytest
import torch

from hf_qst_plugins.adaptive_temperature import (
    LANGUAGES,
    AdaptiveTemperatureLogitsProcessor,
    BlockStart,
    LastTokenTemperatureLogitsProcessor,
    VocabularyTable,
)
from tests.plugins.code_tokenizers import KINDS, sources, tokenizer

HOT, COLD = 0.8, 0.5
COMMENT = re.compile(r"(?:^|(?<=[ \t\r\f\v]))#.*")


def starts_indented_line(text):
    """In words: what follows the last line break is whitespace alone, with at least one space or tab."""
    line = text[text.rfind("\n") + 1 :]
    return not line.strip(" \t\r\f\v") and (" " in line or "\t" in line)


def end_of_code(text):
    """How many characters up to the last one of code, comments and whitespace aside, in the lines before the last."""
    end = text.rfind("\n") + 1
    while end > 0:
        start = text.rfind("\n", 0, end - 1) + 1
        code = COMMENT.sub("", text[start : end - 1]).rstrip(" \t\r\f\v")
        if code:
            return start + len(code)
        end = start
    return 0


def starts_block(text):
    """In words: it starts an indented line, and the last line with code before it, without its comment, ends in `:`."""
    return starts_indented_line(text) and text[: end_of_code(text)].endswith(":")


def temperatures(processor, input_ids):
    """The temperature of each row, read off what the processor does to scores of 1."""
    return 1 / processor(input_ids, torch.ones(len(input_ids), 1))[:, 0]


def every_step(processor, ids):
    """The temperature of each token of `ids` as generating it would have met it: the prefixes as rows."""
    window = processor.policy.automaton.window
    short = [temperatures(processor, ids[None, :t]) for t in range(min(window + 1, len(ids)))]
    rows = ids[:-1].unfold(0, window + 1, 1) if len(ids) > window + 1 else ids.new_zeros(0, window + 1)
    return torch.cat([*short, *(temperatures(processor, part) for part in rows.split(4096))])


def encode(made, text):
    """(ids, how many characters of the text each token follows)"""
    encoded = made(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return torch.tensor(encoded["input_ids"]), starts


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_decoded_text_on_every_prefix(kind):
    """The reference at its most literal: decode the whole prefix at every step."""
    made = tokenizer(kind)
    text = "\n\n  \n" + sources()[0][:2500] + "\r\n\tx = 'é漢'\f\n \r\n   \ty\n"
    ids, _ = encode(made, text)
    found = every_step(AdaptiveTemperatureLogitsProcessor(made, HOT, COLD), ids)
    expected = [HOT if starts_indented_line(made.decode(ids[:t])) else COLD for t in range(len(ids))]
    assert found.tolist() == pytest.approx(expected)
    assert 20 < sum(t == HOT for t in expected) < len(expected) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_line_scope_agrees_on_every_step_of_real_files(kind):
    """1.8 million steps over the five tokenizers; a step is one row of one call of the processor."""
    made = tokenizer(kind)
    processor = AdaptiveTemperatureLogitsProcessor(made, HOT, COLD)
    steps = hot = 0
    for text in sources():
        ids, starts = encode(made, text)
        found = every_step(processor, ids) > (HOT + COLD) / 2
        line_starts = [text.rfind("\n", 0, start) + 1 for start in starts]
        expected = torch.tensor(
            [starts_indented_line(text[a:b]) for a, b in zip(line_starts, starts, strict=True)], dtype=torch.bool
        )
        different = (found != expected).nonzero()[:, 0].tolist()
        assert not different, [(t, made.decode(ids[:t])[-40:]) for t in different[:5]]
        steps, hot = steps + len(ids), hot + int(found.sum())
    assert steps > 250_000 and 0.03 < hot / steps < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_block_scope_agrees_but_for_blocks_far_behind_their_opener(kind):
    made = tokenizer(kind)
    processor = AdaptiveTemperatureLogitsProcessor(made, HOT, COLD, scope="block")
    window = processor.policy.automaton.window
    missed = hot = 0
    for text in sources()[:15]:
        ids, starts = encode(made, text)
        found = every_step(processor, ids) > (HOT + COLD) / 2
        for t in range(len(ids)):
            # No comment is longer than this; it keeps the literal reference from being quadratic.
            cut = max(0, starts[t] - 6000)
            prefix = text[cut : starts[t]]
            expected = starts_indented_line(prefix[-200:]) and starts_block(prefix)
            hot += expected
            if found[t] != expected:
                # The only difference allowed: all code is before the window, so the opener cannot be seen.
                assert t > window and cut + end_of_code(prefix) <= starts[t - window], (t, prefix[-60:])
                missed += 1
    assert hot > 500 and missed < 0.02 * hot


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_path_agrees_with_list_path(kind):
    """The path accelerators take, here on the CPU, over the same rows; also over the whole text at once."""
    made = tokenizer(kind)
    table = VocabularyTable.from_tokenizer(made)
    ids = torch.cat([encode(made, text)[0] for text in sources()[:4]])[:20_000]
    for scope in ("line", "block", "line+col0"):
        policy = BlockStart(table, HOT, COLD, scope=scope)
        rows = ids[:-1].unfold(0, 150, 1)
        listed = torch.tensor(policy.hot_rows(rows))
        states = torch.cat([policy.automaton.states(part) for part in rows.split(2048)])
        assert torch.equal(torch.tensor(policy.automaton.hot_states)[states], listed)
        assert torch.equal(policy.hot_along(ids)[150:], listed)
        assert policy.hot_along(ids)[:150].tolist() == [policy.automaton.is_hot(ids[:t].tolist()) for t in range(150)]


def with_comments_before(line_numbers, lines):
    """These lines, counted from 1, and the blank and comment lines right before each."""
    found = set(line_numbers)
    for number in line_numbers:
        while number > 1 and lines[number - 2].strip()[:1] in ("", "#"):
            number -= 1
            found.add(number)
    return found


def test_block_scope_finds_where_python_itself_sees_blocks():
    """Precision and recall against the INDENT tokens of `tokenize`, by line; the bounds are those of the colon rule.

    `tokenize` indents at the first statement; a comment before it is the block's first line all the same.
    """
    made = tokenizer("cl100k")
    policy = BlockStart(VocabularyTable.from_tokenizer(made), scope="block")
    right = found = recalled = true = 0
    for text in (text for i, text in enumerate(sources()) if i % 5 > 1):
        lines = text.splitlines(keepends=True)
        events = tokenize.generate_tokens(iter(lines).__next__)
        truth = {token.start[0] for token in events if token.type == tokenize.INDENT}
        ids, starts = encode(made, text)
        hot = {text.count("\n", 0, starts[t]) + 1 for t in policy.hot_along(ids).nonzero()[:, 0].tolist()}
        right, found = right + len(hot & with_comments_before(truth, lines)), found + len(hot)
        recalled, true = recalled + len(hot & truth), true + len(truth)
    assert true > 500
    assert right / found >= 0.88 and recalled / true >= 0.90


# --- small vocabularies made by hand ----------------------------------------------------------------------------------


def hand_made(*texts, language="python"):
    """(table, text of a row -> ids): a vocabulary of these texts; None is a boundary."""
    table = VocabularyTable(texts, language=language)
    return table, lambda *tokens: [texts.index(token) for token in tokens]


PIECES = (
    None,
    "x",
    "\n",
    "\t",
    "    ",
    "        ",
    "\n\n",
    ":\n",
    "\r\n",
    "\n    ",
    " ",
    "",
    "# c",
    ":",
    "\r",
    "{",
    "//",
)


@pytest.mark.parametrize(
    ("row", "line", "col0", "block"),
    [
        ([], False, True, False),
        (["\n"], False, True, False),
        (["    "], True, True, False),
        (["x", ":", "\n", "    "], True, True, True),
        (["x", ":\n", "\t"], True, True, True),
        (["x", ":", "\n    "], True, True, True),
        (["x", ":", "\r\n", "    "], True, True, True),
        (["x", ":", "\r\n"], False, True, False),
        (["x", ":", " ", "# c", "\n", "    "], True, True, True),
        (["x", ":", "# c", "\n", "    "], True, True, False),  # without whitespace it may be in a string
        (["x", ":", "\n", "    ", "# c", "\n", "    "], True, True, True),
        (["x", ":", "\n\n", "        "], True, True, True),
        (["x", "\n", "    "], True, True, False),
        (["x", "\n", "    ", "x"], False, False, False),
        (["x", "\n", "    ", ""], True, True, False),
        (["x", "\n", "\r"], False, True, False),
        (["x", " "], False, False, False),
        (["x", ":", "\n", "    ", None], False, True, False),  # a new text begins
        ([None, None, "x", ":\n", "    ", "    "], True, True, True),
    ],
)
def test_scopes(row, line, col0, block):
    table, ids = hand_made(*PIECES)
    for scope, expected in (("line", line), ("line+col0", col0), ("block", block)):
        assert BlockStart(table, scope=scope).automaton.is_hot(ids(*row)) == expected, scope


REFERENCE_STEPS = [
    ("\n", False), ("    ", True), ("x", False), ("\n", False), ("        ", False), ("x", False),
    ("\n\n", False), ("    ", False), ("\n", False), ("\t", True), ("\t", True), ("x", False), ("    ", False),
    ("\n", False), ("    ", True), ("    ", True), ("        ", False), ("    ", False), ("\n    ", False),
]  # fmt: skip


def test_reference_scope_is_the_automaton_of_the_released_code():
    """Eight spaces are one token and stay cold, a double newline does not count, every tab behind a tab is hot."""
    table, ids = hand_made(*PIECES)
    policy = BlockStart(table, scope="reference")
    row = ids(*(text for text, _ in REFERENCE_STEPS))
    assert [policy.automaton.is_hot(row[: t + 1]) for t in range(len(row))] == [hot for _, hot in REFERENCE_STEPS]
    assert policy.hot_along(torch.tensor(row))[1:].tolist() == [hot for _, hot in REFERENCE_STEPS][:-1]


def test_reference_scope_with_overrides_for_ids_that_decode_to_something_else():
    made = tokenizer("gpt2")
    four = made.encode("Ġ" * 4)[0]
    table = VocabularyTable.from_tokenizer(made, overrides={four: "    "})
    newline = table.texts.index("\n")
    assert BlockStart(table, scope="reference").automaton.is_hot([newline, four])
    assert table.texts[four] == "    " and VocabularyTable.from_tokenizer(made).texts[four] != "    "


BRACES = {
    "while (x) {\n    ": True,
    "while (x) {  // once\n    ": True,
    "while (x) { /* a\n   b: */\n    ": True,
    "while (x) {\n\n\t": True,
    'url = "http://{";\n    ': False,
    "a = b;\n    ": False,
    "a = b; // {\n    ": False,
    "a = b / {\n    ": True,
    "a = { / \n    ": False,
    "/* {\n    ": False,
}


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "python"])
@pytest.mark.parametrize("kind", KINDS)
def test_braces_open_blocks(kind, language):
    made = tokenizer(kind)
    policy = BlockStart(VocabularyTable.from_tokenizer(made, language=language), scope="block")
    for text, expected in BRACES.items():
        assert policy.automaton.is_hot(made.encode(text, add_special_tokens=False)) == expected, text


def test_own_rule_gets_the_table_and_decides():
    made = tokenizer("gpt2")

    def after_return(table):
        returns = torch.tensor([(text or "").strip() == "return" for text in table.texts])
        return lambda input_ids, scores: torch.where(returns[input_ids[:, -1]], 1.5, 0.25)

    processor = AdaptiveTemperatureLogitsProcessor(made, rule=after_return)
    rows = torch.tensor([made.encode("x return")[-2:], made.encode("return x")[-2:]])
    assert temperatures(processor, rows).tolist() == pytest.approx([1.5, 0.25])


def test_fenced_region_is_hot_inside_fences_alone():
    table, ids = hand_made(*PIECES, "```", "```python\n")
    policy = BlockStart(table, region="fenced")
    text = ["x", "\n", "    ", "x", "\n", "```python\n", "    ", "x", "\n", "```", "\n", "    ", "```", "\n", "\t", "x"]
    row = torch.tensor(ids(*text))
    hot = [t in (7, 15) for t in range(len(text))]
    assert policy.hot_along(row).tolist() == hot
    assert [policy.hot_rows(row[None, :t])[0] for t in range(len(text))] == hot


def test_fenced_region_without_a_fence_token_is_refused():
    with pytest.raises(ValueError, match="needs a token that holds a whole ``` fence"):
        BlockStart(hand_made(*PIECES)[0], region="fenced")


@pytest.mark.parametrize("kind", KINDS)
def test_last_token_alone_finds_nearly_all_hot_steps(kind):
    made = tokenizer(kind)
    table = VocabularyTable.from_tokenizer(made)
    last = LastTokenTemperatureLogitsProcessor(table, HOT, COLD)
    right = all_hot = wrong = 0
    for text in sources()[2:30:5]:
        ids, _ = encode(made, text)
        truth = BlockStart(table).hot_along(ids)[1:]
        found = 1 / last(ids[:-1], torch.ones(len(ids) - 1, 1))[:, 0] > (HOT + COLD) / 2
        right, all_hot = right + int((truth & found).sum()), all_hot + int(truth.sum())
        wrong += int((~truth & found).sum())
    assert right / all_hot >= 0.97 and wrong / all_hot < 0.03
