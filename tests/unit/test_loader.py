"""The YAML dialect of the loader, held against the program that defines it.

The tables hold what sigs.k8s.io/yaml v1.6.0 over go.yaml.in/yaml/v2 v2.4.4 (the versions in kubectl 1.37, built with
Go 1.26) printed for each text: a Go program read the list of texts and printed the result of `YAMLToJSONStrict` for
each; for `MERGES`, which the strict reader refuses, that of `YAMLToJSON`, which is what kubectl itself calls.
To add a row, run the text through Go; never write down what it ought to be.
"""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.api.loader import (
    LoadError,
    apply_assignment,
    dump_document,
    format_path,
    load_documents,
    parse_assignment,
)

VALUES = [
    ("2e-5", "0.00002"),
    ("1e-6", "0.000001"),
    ("1e-7", "1e-7"),
    (".5", "0.5"),
    ("0.5", "0.5"),
    ("-.5", "-0.5"),
    ("+.5", "0.5"),
    ("1.0", "1"),
    ("1.", "1"),
    ("1.5", "1.5"),
    ("-1.0", "-1"),
    ("-0", "0"),
    ("-0.0", "-0"),
    ("+1", "1"),
    ("1e5", "100000"),
    ("1E5", "100000"),
    ("1e+5", "100000"),
    ("1.5e3", "1500"),
    ("1e20", "100000000000000000000"),
    ("1e21", "1e+21"),
    ("1e400", '"1e400"'),
    ("-1e400", '"-1e400"'),
    ("1e-400", "0"),
    (".5_0", "0.5"),
    ("1_000.5", "1000.5"),
    ("1_000", "1000"),
    ("1__0", "10"),
    ("0_1", "1"),
    ("1_", "1"),
    ("_1", '"_1"'),
    ("010", "8"),
    ("0o10", "8"),
    ("0O10", "8"),
    ("08", "8"),
    ("09.5", "9.5"),
    ("0x1F", "31"),
    ("0X1f", "31"),
    ("0x_1F", "31"),
    ("-0x1F", "-31"),
    ("0xG", '"0xG"'),
    ("0b11", "3"),
    ("-0b11", "-3"),
    ("0b2", '"0b2"'),
    ("0b+1", "1"),
    ("0b-1", "-1"),
    ("-0b-1", '"-0b-1"'),
    ("0", "0"),
    ("00", "0"),
    ("-1", "-1"),
    ("+", '"+"'),
    (".", '"."'),
    ("..", '".."'),
    ("1:30", '"1:30"'),
    ("190:20:30", '"190:20:30"'),
    ("1.2.3", '"1.2.3"'),
    ("1e", '"1e"'),
    ("e5", '"e5"'),
    ("0x1p4", '"0x1p4"'),
    ("", "null"),
    ("9007199254740993", "9007199254740993"),
    ("9223372036854775807", "9223372036854775807"),
    ("9223372036854775808", "9223372036854775808"),
    ("18446744073709551615", "18446744073709551615"),
    ("18446744073709551616", "18446744073709552000"),
    ("-9223372036854775808", "-9223372036854775808"),
    ("-9223372036854775809", "-9223372036854776000"),
    ("+18446744073709551615", "18446744073709552000"),
    ("0xFFFFFFFFFFFFFFFF", "18446744073709551615"),
    ("0x1FFFFFFFFFFFFFFFF", '"0x1FFFFFFFFFFFFFFFF"'),
    ("123456789012345678901234567890", "1.2345678901234568e+29"),
    ("3.141592653589793238", "3.141592653589793"),
    ("y", "true"),
    ("Y", "true"),
    ("n", "false"),
    ("N", "false"),
    ("yes", "true"),
    ("Yes", "true"),
    ("YES", "true"),
    ("yEs", '"yEs"'),
    ("no", "false"),
    ("No", "false"),
    ("NO", "false"),
    ("on", "true"),
    ("On", "true"),
    ("ON", "true"),
    ("oN", '"oN"'),
    ("off", "false"),
    ("Off", "false"),
    ("OFF", "false"),
    ("true", "true"),
    ("True", "true"),
    ("TRUE", "true"),
    ("tRUE", '"tRUE"'),
    ("false", "false"),
    ("False", "false"),
    ("FALSE", "false"),
    ("t", '"t"'),
    ("f", '"f"'),
    ("yea", '"yea"'),
    ("none", '"none"'),
    ("None", '"None"'),
    ("nan", '"nan"'),
    ("NaN", '"NaN"'),
    ("inf", '"inf"'),
    ("Infinity", '"Infinity"'),
    ("~", "null"),
    ("null", "null"),
    ("Null", "null"),
    ("NULL", "null"),
    ("nULL", '"nULL"'),
    ('""', '""'),
    ("''", '""'),
    ('"null"', '"null"'),
    ('"on"', '"on"'),
    ("'010'", '"010"'),
    ('"1e5"', '"1e5"'),
    ("=", '"="'),
    ("<<", '"\\u003c\\u003c"'),
    ("2001-01-01", '"2001-01-01"'),
    ("2001-1-1", '"2001-1-1"'),
    ("2001-12-14T21:59:43.10Z", '"2001-12-14T21:59:43.10Z"'),
    ("2001-12-14 21:59:43", '"2001-12-14 21:59:43"'),
    ("20010101", "20010101"),
    ("2001-01-01x", '"2001-01-01x"'),
    ("!!str 010", '"010"'),
    ("!!str on", '"on"'),
    ("!!str ~", '"~"'),
    ("!!str", '""'),
    ('!!int "5"', "5"),
    ('!!int "0x1F"', "31"),
    ("!!float 3", "3"),
    ('!!float "2e-5"', "0.00002"),
    ("!!bool yes", "true"),
    ('!!bool "yes"', "true"),
    ('!!null ""', "null"),
    ("!!timestamp 2001-01-01", '"2001-01-01"'),
    ('!!timestamp "2001-01-01"', '"2001-01-01"'),
    ("!!binary aGVsbG8=", '"hello"'),
    ("!foo 12", '"12"'),
    ("!<tag:yaml.org,2002:str> 12", '"12"'),
    ("!!python/name:os.system x", '"x"'),
    ("!!set {a, b}", '{"a":null,"b":null}'),
    ("!!omap [a]", '["a"]'),
    (".iNF", '".iNF"'),
    ("'it''s'", '"it\'s"'),
    ('"a\\nb"', '"a\\nb"'),
    ("word # comment", '"word"'),
    ("word#no comment", '"word#no comment"'),
    ("a:b", '"a:b"'),
    ("http://x/y", '"http://x/y"'),
    ("{a: 1, b: [2, on]}", '{"a":1,"b":[2,true]}'),
    ("{a:1}", '{"a:1":null}'),
    ("[a, b,]", '["a","b"]'),
    ("{a, b: 1}", '{"a":null,"b":1}'),
    ("[a: 1]", '[{"a":1}]'),
    ("&x 1", "1"),
    ("&x", "null"),
    ("é", '"é"'),
    ("\u65e5\u672c", '"\u65e5\u672c"'),
]

DOCUMENTS = [
    ("on: 1\n", '{"true":1}'),
    ("y: 1\nn: 2\n", '{"false":2,"true":1}'),
    ("1: a\n", '{"1":"a"}'),
    ("010: a\n", '{"8":"a"}'),
    ("1.5: a\n", '{"1.5":"a"}'),
    ("1e6: a\n", '{"1e+06":"a"}'),
    ("100000.0: a\n", '{"100000":"a"}'),
    ("1e5: a\n", '{"100000":"a"}'),
    ("0.1: a\n", '{"0.1":"a"}'),
    ("1e-5: a\n", '{"1e-05":"a"}'),
    ("0.0001: a\n", '{"0.0001":"a"}'),
    ("1234567.0: a\n", '{"1.234567e+06":"a"}'),
    ("123456.0: a\n", '{"123456":"a"}'),
    ("16777217.0: a\n", '{"1.6777216e+07":"a"}'),
    ("3.14159265358979: a\n", '{"3.1415927":"a"}'),
    ("1e39: a\n", '{".inf":"a"}'),
    ("-0.0: a\n", '{"-0":"a"}'),
    (".inf: a\n", '{".inf":"a"}'),
    ("-.inf: a\n", '{"-.inf":"a"}'),
    (".nan: a\n", '{".nan":"a"}'),
    ("1.0: a\n", '{"1":"a"}'),
    ("-1.5: a\n", '{"-1.5":"a"}'),
    ("9223372036854775807: a\n", '{"9223372036854775807":"a"}'),
    ("2001-01-01: a\n", '{"2001-01-01":"a"}'),
    ("'1': a\n", '{"1":"a"}'),
    ('"": a\n', '{"":"a"}'),
    ("? a\n: b\n", '{"a":"b"}'),
    ("!!str 1: a\n", '{"1":"a"}'),
    ("!!binary aGk=: a\n", '{"hi":"a"}'),
    ("? |\n  x\n  y\n: b\n", '{"x\\ny\\n":"b"}'),
    ("b: &b {x: 1, w: 2}\na:\n  <<: *b\n  z: 3\n", '{"a":{"w":2,"x":1,"z":3},"b":{"w":2,"x":1}}'),
    ("b: &b {x: 1}\nc: &c {w: 2}\na:\n  <<: [*b, *c]\n", '{"a":{"w":2,"x":1},"b":{"x":1},"c":{"w":2}}'),
    ("a:\n  <<: {x: 1}\n  w: 2\n", '{"a":{"w":2,"x":1}}'),
    ("a:\n  <<: [{x: 1}, {w: 2}]\n", '{"a":{"w":2,"x":1}}'),
    ('a:\n  "<<": {x: 1}\n', '{"a":{"\\u003c\\u003c":{"x":1}}}'),
    ("a:\n  !!merge <<: {x: 1}\n", '{"a":{"x":1}}'),
    ("a:\n  <<: []\n", '{"a":{}}'),
    (
        "b: &b {x: 1}\nc: &c\n  <<: *b\n  w: 2\na:\n  <<: *c\n  z: 3\n",
        '{"a":{"w":2,"x":1,"z":3},"b":{"x":1},"c":{"w":2,"x":1}}',
    ),
    ("a: &a 1\nb: *a\n", '{"a":1,"b":1}'),
    ("a: &a {x: [1]}\nb: *a\n", '{"a":{"x":[1]},"b":{"x":[1]}}'),
    ("a: &a 1\nb: &a 2\nc: *a\n", '{"a":1,"b":2,"c":2}'),
    ("&k a: 1\nb: *k\n", '{"a":1,"b":"a"}'),
    ("", "null"),
    ("# only a comment\n", "null"),
    ("---\n", "null"),
    ("---\n# c\n", "null"),
    ("~\n", "null"),
    ("null\n", "null"),
    ("a:\n", '{"a":null}'),
    ("a:\nb: 1\n", '{"a":null,"b":1}'),
    ("a: # c\n  b: 1\n", '{"a":{"b":1}}'),
    ("a:\n- 1\n- 2\n", '{"a":[1,2]}'),
    ("a:\n  - 1\n  -\n  - x: 1\n    w: 2\n", '{"a":[1,null,{"w":2,"x":1}]}'),
    ("a: |\n  x\n  y\n", '{"a":"x\\ny\\n"}'),
    ("a: |-\n  x\n", '{"a":"x"}'),
    ("a: |+\n  x\n\n", '{"a":"x\\n\\n"}'),
    ("a: >\n  x\n  y\n\n  z\n", '{"a":"x y\\nz\\n"}'),
    ("a: |2\n    x\n", '{"a":"  x\\n"}'),
    ("a: one\n  two\n", '{"a":"one two"}'),
    ('a: "one\n  two"\n', '{"a":"one two"}'),
    ("a:\t1\n", '{"a":1}'),
    ("a: 1\t\n", '{"a":1}'),
    ("a: 1\t# c\n", '{"a":1}'),
    ('{\n\t"a": 1\n}\n', '{"a":1}'),
    ("a: [1,\t2]\n", '{"a":[1,2]}'),
    ("a: x\ty\n", '{"a":"x\\ty"}'),
    ("a: |\n  x\ty\n", '{"a":"x\\ty\\n"}'),
    ("a: 1\r\nb: on\r\n", '{"a":1,"b":true}'),
    ("\ufeffa: 1\n", '{"a":1}'),
    ("a: \U0001f600\n", '{"a":"\U0001f600"}'),
    ('{"a": 1.0, "b": [true, null, 1e5]}\n', '{"a":1,"b":[true,null,100000]}'),
    ("%YAML 1.1\n---\na: 1\n", '{"a":1}'),
    ("{}\n", "{}"),
    ("a: {}\nb: []\n", '{"a":{},"b":[]}'),
    ("a: !!map {x: 1}\nb: !!seq [1]\n", '{"a":{"x":1},"b":[1]}'),
    ("a: !!str {x: 1}\n", '{"a":{"x":1}}'),
    ("a: {x: 1, <<: {w: 2}}\n", '{"a":{"w":2,"x":1}}'),
    ("a: <<\n", '{"a":"\\u003c\\u003c"}'),
    ("a: 'x'\nb: \"y\"  # c\n# end\n", '{"a":"x","b":"y"}'),
    ("a:  \n", '{"a":null}'),
    ("a: ''\n", '{"a":""}'),
    ('"a" : 1\n', '{"a":1}'),
    ("a : 1\n", '{"a":1}'),
    ("? a\n", '{"a":null}'),
    ("a: :b\n", '{"a":":b"}'),
    ("a: -b\n", '{"a":"-b"}'),
]

MERGES = [
    ("b: &b {x: 1, w: 2}\na:\n  <<: *b\n  x: 3\n", '{"a":{"w":2,"x":3},"b":{"w":2,"x":1}}'),
    (
        "b: &b {x: 1, z: 0}\nc: &c {x: 2, w: 2}\na:\n  <<: [*b, *c]\n",
        '{"a":{"w":2,"x":1,"z":0},"b":{"x":1,"z":0},"c":{"w":2,"x":2}}',
    ),
    ("b: &b {x: 1}\nc: &c {x: 2}\na:\n  <<: *b\n  <<: *c\n", '{"a":{"x":2},"b":{"x":1},"c":{"x":2}}'),
]

REFUSED = [
    ("a: -\n", "yaml: block sequence entries are not allowed in this context"),
    ("a: @\n", "yaml: found character that cannot start any token"),
    ("a: !!int 1.0\n", "yaml: cannot decode !!float `1.0` as a !!int"),
    ("a: !!int x\n", "yaml: cannot decode !!str `x` as a !!int"),
    ("a: !!float x\n", "yaml: cannot decode !!str `x` as a !!float"),
    ("a: !!float 18446744073709551615\n", "yaml: cannot decode !!int `18446744073709551615` as a !!float"),
    ("a: !!bool 1\n", "yaml: cannot decode !!int `1` as a !!bool"),
    ("a: !!null x\n", "yaml: cannot decode !!str `x` as a !!null"),
    ('a: !!binary "x"\n', "yaml: !!binary value contains invalid base64 data"),
    ("a: .inf\n", "json: unsupported value: +Inf"),
    ("a: -.inf\n", "json: unsupported value: -Inf"),
    ("a: +.INF\n", "json: unsupported value: +Inf"),
    ("a: .nan\n", "json: unsupported value: NaN"),
    ("a: .NaN\n", "json: unsupported value: NaN"),
    ("a: [1, , 2]\n", "yaml: did not find expected node content"),
    ('a: "open\n', "yaml: line 2: found unexpected end of stream"),
    ("a: @at\n", "yaml: found character that cannot start any token"),
    ("a: `tick\n", "yaml: found character that cannot start any token"),
    ("a: %x\n", "yaml: found character that cannot start any token"),
    ("a: *none\n", "yaml: unknown anchor 'none' referenced"),
    ("a: - 1\n", "yaml: block sequence entries are not allowed in this context"),
    ('a: "a"b\n', "yaml: did not find expected key"),
    ("a: a: b\n", "yaml: mapping values are not allowed in this context"),
    ("~: a\n", 'unsupported map key of type: %!s(<nil>), key: <nil>, value: "a"'),
    ("null: a\n", 'unsupported map key of type: %!s(<nil>), key: <nil>, value: "a"'),
    (": a\n", "yaml: did not find expected key"),
    ("18446744073709551615: a\n", 'unsupported map key of type: uint64, key: 0xffffffffffffffff, value: "a"'),
    ("? [a]\n: b\n", 'yaml: invalid map key: []interface {}{"a"}'),
    ("? {a: 1}\n: b\n", 'yaml: invalid map key: map[interface {}]interface {}{"a":1}'),
    ("[a]: b\n", 'yaml: invalid map key: []interface {}{"a"}'),
    ("a: 1\na: 2\n", 'yaml: unmarshal errors:\n  line 2: key "a" already set in map'),
    ("a:\n  b: 1\n  c: 2\n  b: 3\n", 'yaml: unmarshal errors:\n  line 4: key "b" already set in map'),
    ("a: 1\n'a': 2\n", 'yaml: unmarshal errors:\n  line 2: key "a" already set in map'),
    ("on: 1\nyes: 2\n", "yaml: unmarshal errors:\n  line 2: key true already set in map"),
    ("1: a\n0x1: b\n", "yaml: unmarshal errors:\n  line 2: key 1 already set in map"),
    ("a: 1\nb: {x: 1, x: 2}\n", 'yaml: unmarshal errors:\n  line 2: key "x" already set in map'),
    ("b: &b {x: 1, w: 2}\na:\n  x: 3\n  <<: *b\n", 'yaml: unmarshal errors:\n  line 1: key "x" already set in map'),
    ("a:\n  <<: 1\n", "yaml: map merge requires map or sequence of maps as the value"),
    ("a:\n  <<:\n", "yaml: map merge requires map or sequence of maps as the value"),
    ("a:\n  <<: [1]\n", "yaml: map merge requires map or sequence of maps as the value"),
    ("s: &s [1]\na:\n  <<: *s\n", "yaml: map merge requires map or sequence of maps as the value"),
    ("s: &s [{x: 1}]\na:\n  <<: *s\n", "yaml: map merge requires map or sequence of maps as the value"),
    ("a: &a [*a]\n", "yaml: anchor 'a' value contains itself"),
    ("a: &a {b: *a}\n", "yaml: anchor 'a' value contains itself"),
    ("a: *b\nb: &b 1\n", "yaml: unknown anchor 'b' referenced"),
    ("&k a: 1\n*k : 2\n", 'yaml: unmarshal errors:\n  line 2: key "a" already set in map'),
    ("\ta: 1\n", "yaml: found character that cannot start any token"),
    ("a:\n\tb: 1\n", "yaml: line 2: found character that cannot start any token"),
    ("a:\n  b: 1\n\tc: 2\n", "yaml: line 3: found a tab character that violates indentation"),
    ("a:\n  - x\n\t- y\n", "yaml: line 3: found a tab character that violates indentation"),
    ("a: |\n\tx\n", "yaml: line 2: found a tab character where an indentation space is expected"),
    ("a:\n  b: 1\n \t\nc: 2\n", "yaml: line 3: found a tab character that violates indentation"),
    ('a: "\\ud83d\\ude00"\n', "yaml: found invalid Unicode character escape code"),
    ("a: \x07\n", "yaml: control characters are not allowed"),
    ('a: "\x00"\n', "yaml: control characters are not allowed"),
    ("a: x\x85y\n", "yaml: line 3: could not find expected ':'"),
    ("a: x\u2028y\n", "yaml: line 3: could not find expected ':'"),
    ("a: \x7f\n", "yaml: control characters are not allowed"),
    ("a: b: c\n", "yaml: mapping values are not allowed in this context"),
    ("a: 'x\n", "yaml: line 2: found unexpected end of stream"),
    ("a: [1\n", "yaml: line 1: did not find expected ',' or ']'"),
    ("a: {b\n", "yaml: line 1: did not find expected ',' or '}'"),
    ("a\nb: 1\n", "yaml: line 2: mapping values are not allowed in this context"),
    ("a: 1\n b: 2\n", "yaml: line 2: mapping values are not allowed in this context"),
    ("a: 1\n  b: 2\n", "yaml: line 2: mapping values are not allowed in this context"),
    ("a: 1\n}\n", "yaml: line 1: did not find expected key"),
    ("a: - 1\n", "yaml: block sequence entries are not allowed in this context"),
    ("a: !!int\n", "yaml: cannot decode !!null `` as a !!int"),
    ("a: !!bool\n", "yaml: cannot decode !!null `` as a !!bool"),
    ("a: ? b\n", "yaml: mapping keys are not allowed in this context"),
    ("a: ,b\n", "yaml: did not find expected node content"),
    ("a: [x]y\n", "yaml: did not find expected key"),
]

# Go reads the first of two documents and drops the rest, or hands on what no resource can be.
REFUSED_HERE_ALONE = [
    "  a: 1\nb: 2\n",
    "a:1\n",
    "- 1\n",
    "[]\n",
    "just text\n",
    "12\n",
    "--- {a: 1}\n",
    "--- text\n",
]


def read(text: str) -> list[dict[str, Any]]:
    return [document.data for document in load_documents(text, origin="run.yaml")]


def refusal(text: str) -> str:
    with pytest.raises(LoadError) as caught:
        load_documents(text, origin="run.yaml")
    return str(caught.value)


def in_json(value: object) -> str:
    """Tell 1 from 1.0 and from true, which Python's `==` does not."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(("text", "go"), VALUES)
def test_a_value_means_what_it_means_to_kubectl(text: str, go: str) -> None:
    assert in_json(read(f"a: {text}\n")) == in_json([{"a": json.loads(go)}])


@pytest.mark.parametrize(("text", "go"), DOCUMENTS + MERGES)
def test_a_document_means_what_it_means_to_kubectl(text: str, go: str) -> None:
    expected = json.loads(go)
    assert in_json(read(text)) == in_json([] if expected is None else [expected])


@pytest.mark.parametrize(("text", "go"), REFUSED)
def test_what_go_refuses_is_refused(text: str, go: str) -> None:
    assert go
    assert refusal(text).startswith("run.yaml:")


@pytest.mark.parametrize("text", REFUSED_HERE_ALONE)
def test_what_kubectl_would_drop_or_could_not_send_is_refused(text: str) -> None:
    assert refusal(text).startswith("run.yaml:")


def test_documents_are_separated_by_dashes_and_empty_ones_are_left_out() -> None:
    documents = load_documents("# head\n---\na: 1\n--- # next\n---\n\nb: 2\n---\n", origin="run.yaml")
    assert [(document.data, document.origin, document.line) for document in documents] == [
        ({"a": 1}, "run.yaml", 3),
        ({"b": 2}, "run.yaml", 7),
    ]


def test_an_anchor_does_not_reach_into_the_next_document() -> None:
    assert "run.yaml:3: *x names no anchor" in refusal("a: &x 1\n---\nb: *x\n")


def test_keys_keep_the_order_of_the_file() -> None:
    assert list(read("b: 1\na: 2\nc: 3\n")[0]) == ["b", "a", "c"]


def test_every_value_knows_its_line() -> None:
    (document,) = load_documents(
        "# head\nspec:\n  datasets:\n    - name: a\n      fraction: 1\n    -\n      name: b\n"
        "  args: {x: 1,\n    y.z: 2}\n",
        origin="run.yaml",
    )
    lines = {path: document.line_of(path) for path in document.lines}
    assert lines == {
        (): 2,
        ("spec",): 2,
        ("spec", "datasets"): 3,
        ("spec", "datasets", 0): 4,
        ("spec", "datasets", 0, "name"): 4,
        ("spec", "datasets", 0, "fraction"): 5,
        ("spec", "datasets", 1): 7,
        ("spec", "datasets", 1, "name"): 7,
        ("spec", "args"): 8,
        ("spec", "args", "x"): 8,
        ("spec", "args", "y.z"): 9,
    }
    assert document.line_of(("spec", "missing")) is None


def test_a_merged_value_is_on_the_line_it_was_written_on_until_a_key_replaces_it() -> None:
    (document,) = load_documents(
        "base: &base\n  x: {in: 1}\n  z: 2\nrun:\n  <<: *base\n  x: {out: 3}\n", origin="run.yaml"
    )
    assert document.data["run"] == {"x": {"out": 3}, "z": 2}
    assert document.line_of(("run", "z")) == 3
    assert document.line_of(("run", "x", "out")) == 6
    assert document.line_of(("run", "x", "in")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: 2\na: 3\n",
            'run.yaml:3: the key "a" is already written on line 1: remove one of the two',
        ),
        (
            '1: a\n"1": b\n',
            'run.yaml:2: the key "1" is already written on line 1: remove one of the two',
        ),
        (
            "b: &b {x: 1}\na:\n  x: 3\n  <<: *b\n",
            'run.yaml:4: "<<" merges the key "x", already written on line 3, and kubectl takes the merged value: '
            'put "<<" before the keys that replace what it merges',
        ),
        (
            "a:\n\tb: 1\n",
            "run.yaml:2: not YAML: while scanning for the next token that begins on line 2, found character that "
            "cannot start any token: replace the tab that indents this line by spaces",
        ),
        (
            "a: b: c\n",
            "run.yaml:1: not YAML: mapping values are not allowed in this context: quote a text that contains ': ', "
            "and check the indentation",
        ),
        (
            "a: @x\n",
            "run.yaml:1: not YAML: while scanning for the next token that begins on line 1, found character that "
            "cannot start any token: quote a text that begins with @, ` or %",
        ),
        (
            "a:\n  b: 'x\n  c: 1\n",
            "run.yaml:4: not YAML: while scanning a quoted scalar that begins on line 2, found unexpected end of "
            "stream: close the quotes, and write a backslash within double quotes twice",
        ),
        (
            "a: .inf\n",
            'run.yaml:1: JSON has no ".inf": write a finite number, or quote it to make it a string',
        ),
        (
            "--- {a: 1}\n",
            "run.yaml:1: only a comment may follow '---': put the document on the next line",
        ),
        (
            "a: 1\n---\n- b\n",
            "run.yaml:3: a resource is a mapping that starts with apiVersion and kind, and this is not one",
        ),
        (
            "a: 1\nb: \x07\n",
            "run.yaml:2: not YAML: a control character (control characters are not allowed): remove it, or escape "
            "it within double quotes",
        ),
        (
            "a: \ud800\n",
            "run.yaml:1: not YAML: half of a surrogate pair: save the file as UTF-8",
        ),
        (
            "a: " + 300 * "[",
            "run.yaml:1: nested more than 200 levels deep: flatten it",
        ),
    ],
)
def test_a_refusal_says_where_what_and_what_to_change(text: str, message: str) -> None:
    assert refusal(text) == message


def test_aliases_that_stand_for_a_billion_values_are_refused() -> None:
    bomb = "a: &a [0,0,0,0,0,0,0,0,0,0]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    assert "aliases stand for more than 100,000 values" in refusal(bomb)


# --- dump_document ---

LOOKS_LIKE_SOMETHING_ELSE = st.sampled_from(
    [
        *("on", "y", "010", "1e5", "0x1F", "1_000", ".5", "~", "", "null", "<<", "=", "1:30", "2001-01-01"),
        *("- x", "a: b", "# x", "a #b", "'", '"', "|", "%x", "---\na", "...", "!x", "&x", "*x", "?", ":", "-", "{"),
        *(" x", "x ", "\n", "\nx", "  a\nb\n", "a\n  b", "x \ny", "a\tb\n", "a\r\nb"),
        *("x\x85y", "x\u2028y\nz", "\ufeff", "\x7f", "\x00"),
    ]
)
TEXT = LOOKS_LIKE_SOMETHING_ELSE | st.text(max_size=30) | st.text(alphabet=" \n\tab:#-'\"|>", max_size=20)
# A whole float beyond 2**53 is read back as the integer that JSON shows, which may differ from it.
FLOATS = st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda value: not value.is_integer() or abs(value) < 2**53 or abs(value) >= 1e21
)
SCALARS = TEXT | FLOATS | st.integers(-(2**63), 2**64 - 1) | st.booleans() | st.none()
VALUE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(TEXT, VALUE, max_size=5))
def test_what_is_dumped_reads_back_the_same(data: dict[str, Any]) -> None:
    (document,) = load_documents(dump_document(data), origin="dump")
    assert document.data == data
    assert list(document.data) == list(data)


def test_a_dump_is_for_a_person() -> None:
    data = {
        "kind": "TrainingRun",
        "answer": "on",
        "rate": 2e-5,
        "steps": 8,
        "none": None,
        "list": [{"name": "a", "size": "0.5"}, [], {}],
        "template": "{% if x %}\n  {{ y }}\n{% endif %}\n",
        "text": "long " * 40 + "日本 😀",
        "date": "2001-01-01",
    }
    assert dump_document(data) == (
        "kind: TrainingRun\n"
        "answer: 'on'\n"
        "rate: 2e-5\n"
        "steps: 8\n"
        "none: null\n"
        "list:\n- name: a\n  size: '0.5'\n- []\n- {}\n"
        "template: |\n  {% if x %}\n    {{ y }}\n  {% endif %}\n"
        f"text: {'long ' * 40}日本 😀\n"
        "date: '2001-01-01'\n"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**64 + 1, -(2**63) - 1])
def test_a_number_that_would_be_read_back_otherwise_is_not_dumped(value: float) -> None:
    with pytest.raises(ValueError, match="cannot be written as YAML"):
        dump_document({"a": value})


# --- assignments ---


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("spec.sft.args.learning_rate=1e-4", ("spec", "sft", "args", "learning_rate"), 0.0001),
        ("spec.datasets[0].fraction='0.5'", ("spec", "datasets", 0, "fraction"), "0.5"),
        ("spec.datasets.0.split=test", ("spec", "datasets", "0", "split"), "test"),
        ("a[1][2]=on", ("a", 1, 2), True),
        ("a=[1, no]", ("a",), [1, False]),
        ("a={b: 010}", ("a",), {"b": 8}),
        ("a=", ("a",), None),
        ("a=''", ("a",), ""),
        ("a=b=c", ("a",), "b=c"),
        (r"metadata.labels.example\.org/a\=b=c", ("metadata", "labels", "example.org/a=b"), "c"),
    ],
)
def test_an_assignment_is_a_path_and_a_value_in_yaml(text: str, path: tuple[str | int, ...], value: object) -> None:
    assert parse_assignment(text) == (path, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec.x", '--set spec.x: there is no "="'),
        ("=1", '--set =1: "" is not a path'),
        ("a..b=1", '--set a..b=1: "a..b" is not a path'),
        (".a=1", '--set .a=1: ".a" is not a path'),
        ("a.=1", '--set a.=1: "a." is not a path'),
        ("a[x]=1", '--set a[x]=1: "a[x]" is not a path'),
        ("a[0]b=1", '--set a[0]b=1: "a[0]b" is not a path'),
        ("[0]=1", '--set [0]=1: "[0]" is not a path'),
        ("a=[1", "--set a:1: not YAML: "),
        ("a=.nan", '--set a:1: JSON has no ".nan"'),
        ("a=1\n---\n2", "--set a: the value is more than one YAML document"),
    ],
)
def test_an_assignment_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(LoadError) as caught:
        parse_assignment(text)
    assert str(caught.value).startswith(message)


SPEC = {"spec": {"datasets": [{"name": "a"}], "args": None, "steps": 3, "none": []}}


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        (("spec", "steps"), {**SPEC["spec"], "steps": "new"}),
        (("spec", "args", "rate"), {**SPEC["spec"], "args": {"rate": "new"}}),
        (("spec", "sft", "args", "rate"), {**SPEC["spec"], "sft": {"args": {"rate": "new"}}}),
        (("spec", "datasets", 0, "name"), {**SPEC["spec"], "datasets": [{"name": "new"}]}),
        (("spec", "datasets", "0", "split"), {**SPEC["spec"], "datasets": [{"name": "a", "split": "new"}]}),
        (("spec", "datasets", 0), {**SPEC["spec"], "datasets": ["new"]}),
    ],
)
def test_an_assignment_changes_a_copy(path: tuple[str | int, ...], spec: object) -> None:
    before = json.dumps(SPEC)
    assert apply_assignment(SPEC, path=path, value="new") == {"spec": spec}
    assert json.dumps(SPEC) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("spec", "datasets", 1, "name"), "spec.datasets ends at [0], so there is no [1]"),
        (("spec", "none", 0), "spec.none is empty, so there is no [0]"),
        (("spec", "datasets", "name"), "spec.datasets is a list: name an entry of it, as in spec.datasets[0]"),
        (("spec", "steps", "x"), "spec.steps is 3, so nothing can be set below it"),
        (("spec", "sft", 0), "spec.sft is not a list, so there is no [0]"),
        ((0,), "the resource is not a list, so there is no [0]"),
    ],
)
def test_an_assignment_that_leads_nowhere_is_refused(path: tuple[str | int, ...], message: str) -> None:
    with pytest.raises(LoadError) as caught:
        apply_assignment(SPEC, path=path, value=1)
    assert str(caught.value).startswith(f"--set {format_path(path)}: {message}")
