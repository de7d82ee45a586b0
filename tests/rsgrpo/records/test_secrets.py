"""Secrets of a configuration are in no file that a run writes."""

from __future__ import annotations

import pytest

from rsgrpo.records.secrets import MASK, masked, masked_address


@pytest.mark.parametrize(
    "name",
    ["api_key", "API_KEY", "key", "token", "hf_token", "password", "client-secret", "openai.apikey", "credentials"],
)
def test_a_text_under_a_secrets_name_is_masked_at_any_depth(name):
    settings = {"reward_args": {"judge": {name: "sk-1", "list": [{name: "sk-2"}]}}}
    assert masked(settings) == {"reward_args": {"judge": {name: MASK, "list": [{name: MASK}]}}}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 5), ("token", ""), ("keys", "a"), ("monkey", "m"), ("eos_token", "<end>"), ("api_key", None)],
)
def test_what_is_not_a_secret_is_kept(name, value):
    assert masked({name: value}) == {name: value}


def test_a_password_in_an_address_is_masked_wherever_it_is():
    assert (
        masked_address("http://me:pw@host:80/v1 and https://host/v1") == f"http://{MASK}@host:80/v1 and https://host/v1"
    )
    assert masked({"url": "http://me:p:w@host/v1", "list": ("postgres://a:b@c",)}) == {
        "url": f"http://{MASK}@host/v1",
        "list": (f"postgres://{MASK}@c",),
    }
