"""Questions as people type them, and what is said of those that are none."""

from __future__ import annotations

import contextlib
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from protocols.analytics.models import Model
from protocols.analytics.parser import SIGNATURES, check_text, parse_query
from protocols.analytics.query import Condition, Operation, Query
from protocols.errors import CommonweightError, UnknownName, UsageError


def test_a_question_is_read_as_it_is_meant() -> None:
    asked = parse_query(
        'count, mean(age), quantile(age, .5), histogram("income a year", 20, -5, 1e5) by sex, city',
        "age >= 18 and city in ('Oslo', 'Bergen') and debt < -2.5",
    )
    assert asked.operations == (
        Operation("count"),
        Operation("mean", ("age",)),
        Operation("quantile", ("age",), (0.5,)),
        Operation("histogram", ("income a year",), (20.0, -5.0, 1e5)),
    )
    assert asked.by == ("sex", "city")
    assert asked.where == (
        Condition("age", ">=", (18.0,)),
        Condition("city", "in", ("Oslo", "Bergen")),
        Condition("debt", "<", (-2.5,)),
    )
    assert asked.columns == ("age", "income a year", "sex", "city", "debt")
    assert str(asked).endswith(
        'by sex, city where age >= 18 and city in ("Oslo", "Bergen") and debt < -2.5'
    )


def test_a_column_may_be_called_as_it_likes() -> None:
    assert parse_query('mean("standby by night") by "day by day"').by == ("day by day",)


@pytest.mark.parametrize("form", SIGNATURES.values(), ids=SIGNATURES)
def test_each_example_is_right(form: object) -> None:
    for example in form.example.split(" or "):  # type: ignore[attr-defined]
        assert parse_query(example)


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("", "", "query is empty"),
        ("maen(age)", "", "no operation 'maen'"),
        ("mean", "", "mean has a wrong number of arguments"),
        ("mean(age, income)", "", "mean has a wrong number of arguments"),
        ("mean(age", "", "not a valid query"),
        ("quantile(age, 5)", "", "between 0 and 1"),
        ("histogram(age, 0)", "", "1 to 1000 bins"),
        ("histogram(age, 9, 5, 5)", "", "start below its end"),
        ("histogram(age, 9, 5)", "", "wrong number of arguments"),
        ("join(a, b)", "", "never combined"),
        ("select(name)", "", "rows never leave"),
        ("count by sex by city", "", "each may be there once"),
        ("mean(age.x)", "", "name of a column"),
        ("mean(__import__('os').system('x'))", "", "name of a column"),
        ("mean(age=1)", "", "no named arguments"),
        ("count", "age", "one comparison"),
        ("count", "age > 1 or age < 0", "only be joined by 'and'"),
        ("count", "1 < age < 5", "one comparison"),
        ("count", "age in 5", "values in parentheses"),
        ("count", "age is None", "unknown comparison"),
        ("count", "age > x", "number or a quoted text"),
    ],
)
def test_what_is_no_question_is_told(text: str, where: str, words: str) -> None:
    with pytest.raises((UsageError, UnknownName), match=words):
        parse_query(text, where)


def test_a_near_name_is_offered() -> None:
    with pytest.raises(UnknownName) as told:
        parse_query("maen(age)")
    assert "did you mean mean" in told.value.hint


@settings(max_examples=40)
@given(st.text(max_size=60), st.text(max_size=30))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_text_does_more_than_be_refused(text: str, where: str) -> None:
    with contextlib.suppress(CommonweightError):
        parse_query(text, where)


_names = st.one_of(
    st.sampled_from(
        ["by", "where", "Epsilon", "in", "None", "a b", "a'b\"c\\", "а", "ﬁ", "x\u200b"]
    ),
    st.text(string.ascii_letters + " '\"\\,()=<_1é", min_size=1, max_size=8),
)
_numbers = st.floats(-1e300, 1e300, allow_nan=False)
_texts = st.one_of(_names, st.text(string.printable, max_size=6).filter(str.isprintable))
_operations = st.one_of(
    st.builds(lambda: Operation("count")),
    st.builds(lambda name: Operation("mean", (name,)), _names),
    st.builds(lambda a, b: Operation("cov", (a, b)), _names, _names),
    st.builds(lambda name, q: Operation("quantile", (name,), (q,)), _names, st.floats(0, 1)),
)
_conditions = st.one_of(
    st.builds(
        lambda name, op, value: Condition(name, op, (value,)),
        _names,
        st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
        st.one_of(_numbers, _texts),
    ),
    st.builds(
        lambda name, values: Condition(name, "in", tuple(values)),
        _names,
        st.lists(st.one_of(_numbers, _texts), min_size=1, max_size=3),
    ),
)
_ranges = st.tuples(_numbers, _numbers).filter(lambda pair: pair[0] < pair[1])


@st.composite
def _queries(draw: st.DrawFn) -> Query:
    query = Query(
        operations=tuple(draw(st.lists(_operations, min_size=1, max_size=3))),
        by=tuple(draw(st.lists(_names, max_size=2))),
        where=tuple(draw(st.lists(_conditions, max_size=2))),
    )
    if not query.columns or not draw(st.booleans()):
        return query
    columns = st.dictionaries(st.sampled_from(query.columns), _ranges, max_size=2)
    epsilon = draw(st.floats(1e-9, 100))
    return Query(
        operations=query.operations,
        by=query.by,
        where=query.where,
        epsilon=epsilon,
        bounds=draw(columns),
    )


@settings(max_examples=300, deadline=None)
@given(_queries())
def test_the_text_is_all_of_the_question(query: Query) -> None:
    """So the owner who approves the text approves the question, and different ones differ."""
    assert parse_query(str(query)) == query
    assert parse_query(str(query)).digest == query.digest
    assert str(query).isprintable()
    check_text(query)


def test_interactions_are_of_terms_of_the_model() -> None:
    """`a * b` is `a + b + a:b`; the text of a question says all of it."""
    short = parse_query("glm(ill ~ age * C(sex) + city + city:age)")
    long = parse_query("glm(ill ~ age + C(sex) + city + C(sex):age + age:city)")
    assert short == long
    model = short.operations[0].model
    assert model is not UNSET
    assert model.products == ((0, 1), (0, 2))
    assert parse_query(str(short)) == short
    for wrong in ("age + age:sex", "age * age", "age + sex + age ** sex", "age * sex * city"):
        with pytest.raises(UsageError):
            parse_query(f"glm(ill ~ {wrong})")
    forged = b'{"terms": [{"column": "a"}], "products": [[0, 1]]}'
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(forged, type=Model)
