import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megdet.errors import InputError
from megdet.plain_yaml import dump_yaml, parse_yaml

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=12)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(TREES)
def test_whatever_is_written_is_read_back(tree):
    assert parse_yaml(dump_yaml(tree), "a.yaml") == tree


@given(st.text(st.characters(exclude_categories=[]), max_size=8))
def test_a_text_survives_whatever_it_looks_like(text):
    assert parse_yaml(dump_yaml([text]), "a.yaml") == [text]


@pytest.mark.parametrize(
    "text", ["yes", "No", "on", "1e5", "0o7", "0b1", "1_000", "2001-01-01", "1:30", "null", "~", "="]
)
def test_a_text_that_looks_like_something_else_is_quoted_for_readers_of_any_version(text):
    assert parse_yaml(dump_yaml(text), "a.yaml") == text
    assert yaml.safe_load(dump_yaml(text)) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("a: 1e-3", {"a": 1e-3}),
        ("a: [1, 1.5, .5, -2, +3, 0x1F, 0o17, 007]", {"a": [1, 1.5, 0.5, -2, 3, 31, 15, 7]}),
        ("a: [.inf, -.INF]", {"a": [math.inf, -math.inf]}),
        ("[true, False, null, ~, ]", [True, False, None, None]),
        ("[yes, off, 2001-99-99, 0b_, 1_000, 190:20:30, =, 12e03x]",
         ["yes", "off", "2001-99-99", "0b_", "1_000", "190:20:30", "=", "12e03x"]),
        ("{1: a, true: b, ~: c, <<: d}", {"1": "a", "true": "b", "~": "c", "<<": "d"}),
        ("'1'", "1"),
        ('"\\uDCFF"', "\udcff"),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("---\na: 1\n...\n", {"a": 1}),
    ],
)  # fmt: skip
def test_the_core_schema_is_read(text, value):
    assert parse_yaml(text, "a.yaml") == value


def test_not_a_number_is_read():
    assert math.isnan(parse_yaml(".NaN", "a.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [*x]", "a.yaml: line 1, column 4: anchors and aliases"),
        ("a: [1, &x 2]", "a.yaml: line 1, column 8: anchors"),
        ("a: *x", "a.yaml: line 1, column 4: anchors"),
        ("&x a: 1", "a.yaml: line 1, column 1: a key must be a plain text"),
        ("a: !!timestamp x", "a.yaml: line 1, column 4: a tag such as tag:yaml.org,2002:timestamp is not read"),
        ("a: !!python/object:os.system {}", "a.yaml: line 1, column 4: a tag"),
        ("!x a: 1", "a.yaml: line 1, column 1: a key must"),
        ("a: 1\nb: 2\na: 3", "a.yaml: line 3, column 1: key 'a' is given twice"),
        ("? [a]\n: 1", "a.yaml: line 1, column 3: a key must be a plain text"),
        ("a: 1\n---\nb: 2", "a.yaml: line 2, column 1: a second document starts"),
        ("[" * 33 + "]" * 33, "a.yaml: line 1, column 33: nested more than 32 deep"),
        ("[" * 100_000, "a.yaml: line 1, column 33: nested more than 32 deep"),
        ("{a: " * 100_000, "a.yaml: line 1, column 129: nested more than 32 deep"),
        ("- " * 100_000, "a.yaml: line 1, column 65: nested more than 32 deep"),
        ("1" * 5000, "a.yaml: line 1, column 1: a number of 5000 digits"),
        ("x" * 2**21, "a.yaml: 2097152 characters of YAML, more than 1048576"),
        ("a: [", "a.yaml: not valid YAML: while parsing a flow node"),
        ("a: \x00", "a.yaml: not valid YAML: unacceptable character"),
        ("a: \udcff", "a.yaml: not valid YAML: unacceptable character"),
        ("a: b: c", "a.yaml: not valid YAML: mapping values are not allowed here"),
        ("%YAML 9.0\n---\na", "a.yaml: not valid YAML: found incompatible YAML document"),
    ],
    ids=range(21),
)
def test_what_is_not_plain_is_refused_with_its_line(text, message):
    with pytest.raises(InputError) as refused:
        parse_yaml(text, "a.yaml")
    assert str(refused.value).startswith(message)
    assert len(str(refused.value)) < 600
