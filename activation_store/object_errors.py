"""What an object store, or its configuration, did not like: in one line, with what to do."""

import os
import re
from collections.abc import Mapping

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError, UnknownConfigurationKeyError

from activation_store.errors import UserError
from activation_store.retries import StorageError, TransientError

# Names of options that hold secrets; those that end with `_file` hold a path.
_SECRETS = (
    "secret", "token", "password", "access_key", "account_key", "master_key", "sas_key", "customer_key",
    "encryption_key", "service_account_key",
)  # fmt: skip
_AWS, _GOOGLE, _AZURE = "AWS", "GOOGLE", "AZURE"
_CLOUDS = {"gs": _GOOGLE, "az": _AZURE, "azure": _AZURE, "adl": _AZURE, "abfs": _AZURE, "abfss": _AZURE}
_CREDENTIALS = {
    _AWS: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, both",
    _GOOGLE: "set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account, or run "
    "`gcloud auth application-default login`",
    _AZURE: "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_VARIABLES = {
    _AWS: ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    _GOOGLE: ("GOOGLE_BASE_URL",),
    _AZURE: ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
}
_ENDPOINTS = {_AWS: "endpoint", _GOOGLE: "base_url", _AZURE: "endpoint"}
# Where machines of a cloud ask for their credentials, and what obstore calls asking for them elsewhere.
_TOKENS = ("//169.254.", "/latest/api/token", "/latest/meta-data", "/computeMetadata/", "token request")


def endpoints(url: str, options: Mapping[str, str]) -> list[str]:
    """Addresses of servers that options, or the cloud's environment variables, give."""
    named = re.compile(r"(endpoint|endpoint_url|endpoint_url_s3|base_url)$", re.IGNORECASE)
    given = [value for name, value in options.items() if named.search(name)]
    return [value for value in (*given, *map(os.environ.get, _VARIABLES[_cloud(url)])) if value]


def check_options(url: str, options: Mapping[str, str]) -> None:
    """Raises UserError for a secret, and for an address that is none."""
    for key in options:
        if any(word in key.lower() for word in _SECRETS) and not key.lower().endswith("_file"):
            raise UserError(
                f"the option {key} is a secret, and configs are written beside checkpoints; leave it out and "
                f"{_CREDENTIALS[_cloud(url)]}"
            )
    for given in endpoints(url, options):
        if not re.match(r"https?://[^/\s]", given):
            raise UserError(f"{url}: the endpoint {given!r} is no address; give http://HOST:PORT or https://HOST")
        # It heeds generations when it writes, not `If-None-Match`: of two who create an object both would win.
        if _cloud(url) is _AWS and "storage.googleapis.com" in given:
            there = url.partition("://")[2]
            raise UserError(
                f"{url}: the endpoint {given!r} does not create objects as S3 does; give gs://{there} without it"
            )


def connect_error(url: str, error: BaseError) -> UserError:
    """Why there cannot be such a store, or not with these options and variables."""
    said, cloud = reason(error), _cloud(url)
    if isinstance(error, UnknownConfigurationKeyError):
        return UserError(f"options of {url}: {said} (the address of the server is `{_ENDPOINTS[cloud]}`)")
    if re.search("access ?key|account must be|service account|credential", said, re.I):
        return UserError(f"{url}: {said}; {_CREDENTIALS[cloud]}")
    return UserError(f"store.path={url}: {said}; give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")


def request_error(url: str, key: str, error: Exception, *, answered: bool) -> Exception:
    """What to raise for a failed request. `answered`: the client has had credentials that served."""
    said, whole = reason(error), _first_part(error)
    # The address before it may have any length.
    found = re.search(r"code: (\d+)", whole)
    status = int(found[1]) if found else 0
    # A "builder error" is an address that cannot be asked.
    unsent = "HTTP error" in whole and "builder error" not in whole
    passing = status >= 500 or status in (408, 409, 429) or (unsent and not status)
    refused = f"the server refused these credentials ({said}); check the key, the secret and what they may do"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return UserError(f"{url}: {refused}")
    if any(word in whole for word in _TOKENS) or (not status and not unsent and "credential" in whole.lower()):
        return _token_error(url, said, status, passing=passing and (answered or status > 0))
    # In the server's page, which follows an address of any length.
    if re.search("NoSuchBucket|ContainerNotFound", str(error)):
        return UserError(f"{url}: there is no such bucket; make it, or give another")
    if isinstance(error, FileNotFoundError):
        return error
    if status in (401, 403):
        return UserError(f"{url}: {refused}")
    return (TransientError if passing else StorageError)(f"{url}/{key}: {said}")


def _token_error(url: str, said: str, status: int, *, passing: bool) -> Exception:
    """Why no credentials were to be had from the cloud, or for those of the user."""
    if passing:
        return TransientError(f"{url}: {said}")
    remedy = f"{_CREDENTIALS[_cloud(url)]} (a public bucket: the option skip_signature)"
    if status in (400, 401):
        return UserError(f"{url}: the server refused these credentials ({said}); {remedy}")
    return UserError(f"{url}: no credentials, and this machine has none of its own; {remedy}")


def reason(error: BaseException) -> str:
    """What obstore says first, in a line: servers answer with pages."""
    return re.sub(r"^Generic \w+ error: ", "", _first_part(error))[:300]


def _first_part(error: BaseException) -> str:
    """What comes before obstore describes its inside."""
    return " ".join(str(error).split("\n\nDebug source", maxsplit=1)[0].split())


def _cloud(url: str) -> str:
    return _CLOUDS.get(url.partition("://")[0], _AWS)
