import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.errors import LONGEST_MESSAGE, InputError, nearest, printable, shown


def test_a_message_is_one_line_whatever_is_put_into_it():
    assert str(InputError("a\nb\r\nc")) == "a b c"


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert nearest("batchsize", ["batch_size", "seed"]) == "; did you mean 'batch_size'?"
    assert nearest("xyz", ["batch_size", "seed"]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;owned\x07\x1b[2J", "\\u001b]0;owned\\u0007\\u001b[2J"),
        ("invoice\u202egpj.exe", "invoice\\u202egpj.exe"),
        ("\u2066a\u2069\u200f\u061c\ufeff\u200b", "\\u2066a\\u2069\\u200f\\u061c\\ufeff\\u200b"),
        ("\x9b31m\x7f\x85", "\\u009b31m\\u007f\\u0085"),
        ("caf\udce9.jpg", "caf\\udce9.jpg"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\U000e0001", "\\udb40\\udc01"),
    ],
)
def test_what_leads_a_terminal_astray_is_written_out(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(
    "text", ["猫", "кошка", "قط", "बिल्ली", "🐈\u200d⬛", "قط\u200cقط", "two words", "[bold]", "a\\b"]
)
def test_letters_of_every_script_stay(text):
    assert printable(text) == text


def test_a_wide_space_is_a_space():
    assert printable("犬\u3000猫\xa0a") == "犬 猫 a"


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_becomes_printable_once_and_for_all(text):
    once = printable(text)
    assert printable(once) == once
    assert once.replace("\u200c", "").replace("\u200d", "").isprintable()
    once.encode("utf-8")


@given(st.text(st.characters(exclude_categories=[])))
def test_json_that_is_made_printable_says_the_same(text):
    written = json.dumps(text, ensure_ascii=False)
    spaces = [c for c in text if c.isspace() and not c.isascii() and c not in "\x85\u2028\u2029"]
    expected = "".join(" " if c in spaces else c for c in text)
    assert json.loads(printable(written)) == expected


@given(st.text(), st.text(), st.integers(0, 2000))
def test_a_message_is_short_and_keeps_its_place_and_its_mend(start, end, length):
    message = str(InputError(f"/data/file.json, annotation 3: {start} {'x' * length} {end}; give it a number"))
    assert len(message) <= LONGEST_MESSAGE < 600
    assert message.startswith("/data/file.json, annotation 3:")
    assert message.endswith("; give it a number")


def test_many_words_are_cut_in_the_middle_of_the_message():
    message = str(InputError(f"a.yaml: {'many words ' * 500}; leave them out"))
    assert len(message) == LONGEST_MESSAGE
    assert message.startswith("a.yaml: many words")
    assert message.endswith("; leave them out")
    assert " ... " in message


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [nested(100_000), 10**5000, -(10**5000), "x" * 10**6, list(range(10**5)), {i: i for i in range(10**5)}],
    ids=["deep", "digits", "negative", "text", "list", "dict"],
)
def test_a_value_is_shown_in_short_however_large_it_is(value):
    assert len(shown(value)) < 120


def test_a_small_value_is_shown_as_it_is():
    assert shown([1, "a", None, {"b": 2.5}]) == "[1, 'a', None, {'b': 2.5}]"
