"""What is wrong with an object store's credentials, bucket or options is one clear line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from activation_store.errors import UserError
from activation_store.object_errors import endpoints, request_error
from activation_store.object_storage import ObjectStorage, ObjectStorageOptions
from activation_store.retries import TransientError
from tests.store.gcs import gcs_before, other_key, service_account
from tests.store.s3 import BUCKET, post
from tests.store.test_object_storage import QUICK, address, credentials, endpoint, storage

__all__ = ["credentials", "endpoint"]


# A server refuses either in its own way.
_ASKED: tuple[Callable[[ObjectStorage], object], ...] = (
    lambda at: at.put_if_absent("x", [b"x"]),
    lambda at: at.children(""),
)


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value) and "AWS" not in str(error.value)


def test_credentials_that_are_missing_or_wrong_are_one_clear_line(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no such bucket") as caught:
        ObjectStorage("s3://nobody", ObjectStorageOptions(options={"endpoint": endpoint}, cache_bytes=0)).get("x")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="endpoit"):
        ObjectStorage("s3://bucket", ObjectStorageOptions(options={"endpoit": endpoint}, cache_bytes=0))
    with pytest.raises(UserError, match="secret_access_key is a secret"):
        ObjectStorage("s3://bucket", ObjectStorageOptions(options={"secret_access_key": "x"}, cache_bytes=0))
    with pytest.raises(UserError, match="give s3://BUCKET"):
        ObjectStorage("nonsense://bucket", ObjectStorageOptions(cache_bytes=0))
    post(f"{endpoint}/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(UserError, match="refused these credentials") as caught:
            storage(endpoint, "wrong").put_if_absent("x", [b"x"])
    finally:
        post(f"{endpoint}/moto-api/reset-auth", b"inf")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, both"):
        storage(endpoint, "half")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    # Where a machine of the cloud would be asked for its own: nobody answers here.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"no credentials.*; set AWS_ACCESS_KEY_ID") as caught:
        storage(endpoint, "none").get("x")
    assert "\n" not in str(caught.value)


def test_credentials_of_gcs_that_are_missing_or_wrong_are_one_clear_line(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "key.json"
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key_file))
    with pytest.raises(UserError, match=r"key.json: No such file.*; set GOOGLE_APPLICATION_CREDENTIALS") as caught:
        ObjectStorage(f"gs://{BUCKET}/x", ObjectStorageOptions(cache_bytes=0))
    assert one_line(caught)
    with gcs_before(endpoint) as proxy:
        key_file.write_text(service_account())
        storage(proxy.endpoint, "right", scheme="gs").put("x", b"x")
        options = ObjectStorageOptions(options=address("gs", proxy.endpoint), cache_bytes=0, retries=QUICK)
        nobody = ObjectStorage(f"gs://nobody/{'x' * 300}", options)
        for asked in _ASKED:
            with pytest.raises(UserError, match=r"gs://nobody/x+: there is no such bucket") as caught:
                asked(nobody)
        key_file.write_text(service_account(other_key()))
        for asked in _ASKED:
            with pytest.raises(UserError, match=r"refused these credentials .*401 Unauthorized") as caught:
                asked(storage(proxy.endpoint, "right", scheme="gs"))
            assert one_line(caught)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    # Where a machine of the cloud would be asked for its own: nobody answers here.
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no credentials.*; set GOOGLE_APPLICATION_CREDENTIALS to the key") as caught:
        storage(endpoint, "none", scheme="gs").get("x")
    assert one_line(caught)


def test_a_machine_that_has_had_credentials_is_asked_for_them_again() -> None:
    """The server that gives them to machines of a cloud may be away, as any other."""
    lost = Exception("Error performing GET http://169.254.169.254/computeMetadata/v1 - HTTP error: sending")
    assert isinstance(request_error("gs://b", "x", lost, answered=False), UserError)
    assert isinstance(request_error("gs://b", "x", lost, answered=True), TransientError)
    busy = Exception("Error performing token request: non-2xx status code: 503 Service Unavailable")
    assert isinstance(request_error("s3://b", "x", busy, answered=False), TransientError)
    wrong = Exception("Error performing token request: non-2xx status code: 400 Bad Request")
    assert "refused" in str(request_error("gs://b", "x", wrong, answered=True))


def test_what_passes_is_tried_again_however_long_the_address_is() -> None:
    lost = Exception(f"Generic S3 error: Error performing GET http://host/{'x' * 400} in 1s - HTTP error: sending")
    busy = Exception(f"Generic S3 error: Error performing GET http://host/{'x' * 400} in 1s - non-2xx status code: 503")
    for error in (lost, busy):
        failure = request_error("s3://b", "x", error, answered=False)
        assert isinstance(failure, TransientError)
        assert len(str(failure)) < 400


def test_addresses_of_other_services_are_not_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "resource.openai.example")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:2")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert endpoints("az://b", {}) == ["http://127.0.0.1:2"]
    assert endpoints("s3://b", {"endpoint": "https://host"}) == ["https://host"]


@pytest.mark.parametrize(
    ("url", "options", "line"),
    [
        ("s3://b", {"endpoint": "localhost:9000"}, "'localhost:9000' is no address; give http://HOST:PORT"),
        (
            "s3://b/x",
            {"endpoint": "https://storage.googleapis.com"},
            "does not create objects as S3 does; give gs://b/x",
        ),
        ("gs://b", {"endpoint": "http://h"}, "'endpoint' is not valid.*the address of the server is `base_url`"),
        ("gs://b", {"service_account_key": "{}"}, "is a secret.* leave it out and set GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://b", {"master_key": "x"}, "is a secret.* set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
        ("az://b", {}, "az://b: Invalid Access Key.*; set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_options_that_cannot_be_are_one_clear_line(
    url: str, options: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64!")
    with pytest.raises(UserError, match=line) as caught:
        ObjectStorage(url, ObjectStorageOptions(options=options, cache_bytes=0))
    assert one_line(caught)
