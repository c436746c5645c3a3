"""Page tokens: good for the listing that gave them and for no other."""

from __future__ import annotations

import base64
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Reason
from verifier.admin.paging import Listing

LAUNCHES = Listing("ListLaunches", "web", None)


@given(st.from_regex(r"[A-Za-z0-9._+\n-]{1,200}", fullmatch=True))
def test_a_listing_reads_its_own_tokens(cursor: str) -> None:
    assert LAUNCHES.cursor(LAUNCHES.token(cursor)) == cursor


def test_no_token_is_the_first_page() -> None:
    assert (LAUNCHES.cursor(""), LAUNCHES.number(""), LAUNCHES.uuid("")) == ("", 0, None)


def test_a_token_is_of_no_use_in_another_listing() -> None:
    token = LAUNCHES.token("x")
    for other in (
        Listing("ListLaunches", "web", "open"),
        Listing("ListLaunches", None, "web"),
        Listing("ListLaunches", "web"),
        Listing("ListSecrets", "web", None),
    ):
        with pytest.raises(InvalidInput) as caught:
            other.cursor(token)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert caught.value.fields["field"] == "page_token"


def _spoilt() -> list[str]:
    good = LAUNCHES.token("cursor")
    raw = base64.urlsafe_b64decode(good)
    return [
        "garbage",
        "ä",
        "====",
        good.rstrip("=") + "!",
        f" {good}",
        base64.urlsafe_b64encode(b"\x02" + raw[1:]).decode(),
        base64.urlsafe_b64encode(raw[:9]).decode(),
        base64.urlsafe_b64encode(raw[:9] + b"\xff").decode(),
        LAUNCHES.token("x" * 2000),
        LAUNCHES.token("a\0"),
        LAUNCHES.token("ä"),
    ]


@pytest.mark.parametrize("token", _spoilt())
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput):
        LAUNCHES.cursor(token)


@given(st.text(max_size=100))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        cursor = LAUNCHES.cursor(text)
    except InvalidInput:
        return
    assert cursor == "" if not text else LAUNCHES.token(cursor) == text


@pytest.mark.parametrize("cursor", ["-1", "1.0", "¹", "9" * 19, "x", " 1"])
def test_a_listing_that_counts_takes_numbers_only(cursor: str) -> None:
    assert LAUNCHES.number(LAUNCHES.token("12")) == 12
    with pytest.raises(InvalidInput):
        LAUNCHES.number(LAUNCHES.token(cursor))


def test_a_listing_of_launches_takes_ids_only() -> None:
    launch_id = uuid4()
    assert LAUNCHES.uuid(LAUNCHES.token(str(launch_id))) == launch_id
    with pytest.raises(InvalidInput):
        LAUNCHES.uuid(LAUNCHES.token(str(launch_id).upper()))
