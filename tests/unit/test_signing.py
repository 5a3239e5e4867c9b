"""Signatures: ours against two other implementations, and all that a signature must not let through."""

import base64
import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone

import openai
import pytest
from standardwebhooks import Webhook

from config import derive
from gpt_worker import signing

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
KEY = bytes(range(32))
NOW = datetime(2026, 1, 31, 12, 0, 0, 999_000, tzinfo=UTC)
BODY = '{"type":"job.finished","data":{"results":{"bye":"à bientôt 👋"}}}'.encode()


@dataclass(frozen=True)
class Message:
    """A good one, of which a test breaks one thing."""

    secret: bytes = KEY
    message_id: str = "msg_1"
    sent_at: str = str(int(NOW.timestamp()))
    signatures: str = signing.sign(KEY, "msg_1", NOW, BODY)
    body: bytes = BODY
    now: datetime = NOW

    def verify(self) -> None:
        signing.verify(
            self.secret,
            message_id=self.message_id,
            sent_at=self.sent_at,
            signatures=self.signatures,
            body=self.body,
            now=self.now,
        )


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", webhook_secret=SECRET) as client:
        yield client


def headers(sent_at: datetime) -> dict[str, str]:
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(signing.timestamp(sent_at)),
        "webhook-signature": signing.sign(signing.secret_bytes(SECRET), "msg_1", sent_at, BODY),
    }


def test_signature_is_the_one_of_the_specification() -> None:
    expected = hmac.new(KEY, b"msg_1.1769860800." + BODY, hashlib.sha256).digest()

    signature = signing.sign(KEY, "msg_1", NOW, BODY)

    assert signature == "v1," + base64.b64encode(expected).decode()


def test_standardwebhooks_takes_our_signature() -> None:
    Webhook(SECRET).verify(BODY, headers(datetime.now(UTC)))


def test_openai_takes_our_signature(client: openai.OpenAI) -> None:
    client.webhooks.verify_signature(BODY, headers(datetime.now(UTC)))


def test_we_take_the_signature_of_standardwebhooks() -> None:
    signature = Webhook(SECRET).sign("msg_1", NOW, BODY.decode())

    replace(Message(), signatures=signature).verify()


def test_zone_of_the_time_makes_no_difference() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))

    assert signing.sign(KEY, "msg_1", elsewhere, BODY) == signing.sign(KEY, "msg_1", NOW, BODY)


def test_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        signing.sign(KEY, "msg_1", NOW.replace(tzinfo=None), BODY)


def test_good_message_passes() -> None:
    Message().verify()


def test_one_good_signature_among_several_is_enough() -> None:
    good = Message().signatures

    replace(Message(), signatures=f"v1,AAAA v1a,BBBB {good}").verify()


@pytest.mark.parametrize(
    "broken",
    [
        replace(Message(), body=BODY + b" "),
        replace(Message(), message_id="msg_2"),
        replace(Message(), message_id=""),
        replace(Message(), secret=KEY[::-1]),
        replace(Message(), sent_at=str(int(NOW.timestamp()) + 1)),
        replace(Message(), sent_at=""),
        replace(Message(), sent_at="1e9"),
        replace(Message(), sent_at="-1"),
        replace(Message(), sent_at="٣"),
        replace(Message(), sent_at="9" * 5000),
        replace(Message(), signatures=""),
        replace(Message(), signatures="v1,"),
        replace(Message(), signatures=Message().signatures.removeprefix("v1,")),
        replace(Message(), signatures=Message().signatures.replace("v1,", "v2,")),
        replace(Message(), signatures=Message().signatures.lower()),
        replace(Message(), signatures="v1,é"),
    ],
)
def test_message_with_one_thing_broken_is_refused(broken: Message) -> None:
    with pytest.raises(signing.SignatureInvalid):
        broken.verify()


@pytest.mark.parametrize(
    ("away_s", "passes"), [(-301, False), (-300, True), (0, True), (300, True), (301, False)]
)
def test_message_passes_within_five_minutes_of_its_time(away_s: int, passes: bool) -> None:
    message = replace(Message(), now=NOW + timedelta(seconds=away_s))

    if passes:
        message.verify()
    else:
        with pytest.raises(signing.SignatureInvalid, match="too far"):
            message.verify()


def test_refusal_does_not_tell_the_good_signature() -> None:
    with pytest.raises(signing.SignatureInvalid) as refusal:
        replace(Message(), signatures="v1,AAAA").verify()

    assert Message().signatures.removeprefix("v1,") not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "whsec", "WHSEC_AAAA", "whsec_A", "whsec_AA AA", "whsec_é"])
def test_secret_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        signing.secret_bytes(text)


def query(job_id: str = "job", expires_at: datetime = NOW + timedelta(days=7)) -> dict[str, str]:
    return dict(pair.split("=") for pair in signing.sign_link(KEY, job_id, expires_at).split("&"))


def test_link_opens_its_job_until_it_expires() -> None:
    link = query()

    assert signing.link_is_valid(KEY, "job", link, NOW)
    assert signing.link_is_valid(KEY, "job", link, NOW + timedelta(days=7, seconds=-1))
    assert not signing.link_is_valid(KEY, "job", link, NOW + timedelta(days=7))


def test_link_stays_good_beside_other_parameters() -> None:
    assert signing.link_is_valid(KEY, "job", query() | {"format": "csv"}, NOW)


@pytest.mark.parametrize(
    ("key", "job_id", "change"),
    [
        (KEY, "job2", {}),
        (KEY[::-1], "job", {}),
        (KEY, "job", {"expires": "9999999999"}),
        (KEY, "job", {"expires": ""}),
        (KEY, "job", {"expires": "9" * 5000}),
        (KEY, "job", {"expires": "-1"}),
        (KEY, "job", {"signature": ""}),
        (KEY, "job", {"signature": "é"}),
    ],
)
def test_link_with_one_thing_broken_opens_nothing(key: bytes, job_id: str, change: dict[str, str]) -> None:
    assert not signing.link_is_valid(key, job_id, query() | change, NOW)


def test_leading_zero_makes_no_second_link() -> None:
    link = query()

    assert not signing.link_is_valid(KEY, "job", link | {"expires": "0" + link["expires"]}, NOW)


def test_link_without_a_signature_opens_nothing() -> None:
    assert not signing.link_is_valid(KEY, "job", {}, NOW)


def test_link_key_is_of_its_app_key_and_its_purpose() -> None:
    assert signing.link_key("a" * 32) != signing.link_key("b" * 32)
    assert signing.link_key("a" * 32) != derive("a" * 32, "webhook")
