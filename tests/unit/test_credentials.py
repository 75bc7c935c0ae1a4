"""What looks like a credential, and what only looks a little odd."""

from __future__ import annotations

import random
import string
import uuid

import pytest

from astrocyte_otel_audit.credentials import looks_like_credential

KNOWN_PREFIXES = [
    "sk-abc", "sk_test_4eC39Hq", "pk_live_abc", "ghp_abc", "gho_abc", "github_pat_11AB", "glpat-abc", "xoxb-1-2-a",
    "AKIAIOSFODNN7EXAMPLE", "AIzaSyD", "ya29.a0", "hf_abc", "npm_abc", "pypi-AgEI", "SG.abc", "hvs.CAES", "whsec_abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.sig",
]  # fmt: skip

RANDOM = [
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs",
    "123456789:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw",
    "T00000000/B00000000/x7Kq2mPzR4vLw9sTbNcE1dFg",
    "q8Zr3vLw9sTbNcE1dFgHj2Kx",
    "Qm9-x2K_pL7.vT4/Zr8-wN3_sG6",
    "V1StGXR8_Z5jdHi6B-myT",
    "k3v9x2m7q8z4w1r6t5y0",
]

ORDINARY = [
    "", "a", "retain", "true", "mcp", "en-US", "2024-01-01", "2024-01-01T00:00:00.123456Z", "1234567890123456789012345",
    "application/json", "/usr/lib/python3.11/site-packages/foo.py", "Europe/Berlin", "v1.2.3-rc.1",
    "semantic_memory.consolidation_pipeline", "internationalization_of_everything", "MAXIMUM_NUMBER_OF_RETRIES",
    "zzzzzzzzzzzzzzzzzzzzzzzzz1", "xyXY1-xyXY1-xyXY1-xyXY1",
    "opentelemetry.sdk.trace.TracerProvider", "user:1234", "bank-prod-eu-west-1",
    "my-service-7d9f8b6c5-x2x9k", "docs/2024/Q3/Report-Final-V2", "20240101T000000Z-backup-A1", "HNSW_ef128_M16",
    "gpt-4o-mini-2024-07-18", "claude-3-5-sonnet-20241022", "text-embedding-3-large", "BAAI/bge-reranker-v2-m3",
    "Qwen2.5-72B-Instruct-GPTQ-Int4", "meta-llama/Meta-Llama-3.1-405B-Instruct-FP8",
    "sentence-transformers/all-MiniLM-L6-v2", "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "us.anthropic.claude-opus-4-20250514-v1:0",
]  # fmt: skip

#: Random by nature, and no secrets: ids of traces, rows, commits and digests.
IDS = [
    "550e8400-e29b-41d4-a716-446655440000",
    "550E8400-E29B-41D4-A716-446655440000",
    "urn:uuid:550e8400-e29b-41d4-a716-446655440000",
    "0af7651916cd43dd8448eb211c80319c",
    "b7ad6b7169203331",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15",
    "9f86d081884c/7D659A2FEAA0",
]


@pytest.mark.parametrize("token", KNOWN_PREFIXES)
@pytest.mark.parametrize("is_id", [True, False], ids=["id", "no id"])
def test_a_known_prefix_gives_a_key_away_whatever_its_field_is_called(token, is_id):
    assert looks_like_credential(token, is_id=is_id)


@pytest.mark.parametrize("token", RANDOM)
def test_a_long_random_token_looks_like_a_credential(token):
    assert looks_like_credential(token, is_id=False)


@pytest.mark.parametrize("token", RANDOM)
def test_under_the_key_of_an_id_randomness_is_expected(token):
    assert not looks_like_credential(token, is_id=True)


@pytest.mark.parametrize("token", ORDINARY)
def test_words_versions_paths_and_times_do_not(token):
    assert not looks_like_credential(token, is_id=False)


@pytest.mark.parametrize("token", IDS)
def test_uuids_and_hexadecimal_ids_do_not(token):
    assert not looks_like_credential(token, is_id=False)


@pytest.mark.parametrize(
    ("length", "alphabet", "may_pass"),
    [
        (43, string.ascii_letters + string.digits + "-_", 0.002),  # secrets.token_urlsafe(32)
        (32, string.ascii_letters + string.digits + "-_", 0.01),
        (22, string.ascii_letters + string.digits + "-_", 0.05),
        (40, string.ascii_letters + string.digits + "/", 0.002),
        (32, string.ascii_letters + string.digits, 0.002),
        (20, string.ascii_letters + string.digits, 0.01),
    ],
)
def test_hardly_a_generated_secret_passes_even_where_separators_cut_it(length, alphabet, may_pass):
    source = random.Random(length)
    secrets = ["".join(source.choices(alphabet, k=length)) for _ in range(4000)]
    passed = [secret for secret in secrets if not looks_like_credential(secret, is_id=False)]
    assert len(passed) <= may_pass * len(secrets)


def test_no_uuid_and_no_digest_is_ever_taken_for_a_credential():
    source = random.Random(1)
    ids = [str(uuid.UUID(int=source.getrandbits(128))) for _ in range(2000)]
    digests = [f"{source.getrandbits(256):064x}" for _ in range(2000)]
    prefixed = [id for id in ids + digests if looks_like_credential(id, is_id=False)]
    assert prefixed == []
