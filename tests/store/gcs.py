"""Google Cloud Storage on a socket: its XML API, which obstore speaks, before moto's S3 server.

The emulators of GCS that are to be had speak the JSON API. Google made the XML API an S3's: requests, listings, uploads
in parts and errors are the same. What differs is done here, on the wire:

- a request carries a JSON Web Token signed by the key of a service account; without a good one it is refused;
- an object is created if absent by `x-goog-if-generation-match: 0`; S3's `If-None-Match` means nothing when writing.
"""

import json
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from functools import cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.store.s3 import Answer, Proxy, proxy_to

_EMAIL = "tests@project.iam.gserviceaccount.com"
# The server's own account at the S3 server, which checks none.
_S3_ACCOUNT = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@cache
def account_key() -> RSAPrivateKey:
    """The key of the one account that may do all."""
    return other_key()


def other_key() -> RSAPrivateKey:
    """A key that nobody knows."""
    return generate_private_key(public_exponent=65537, key_size=2048)


@contextmanager
def gcs_before(s3: str) -> Iterator[Proxy]:
    """A server with the buckets of the S3 server at `s3`, which fails as told."""
    with proxy_to(s3, _as_s3) as made:
        yield made


def service_account(key: RSAPrivateKey | None = None) -> str:
    """What the key file of the account says, or would say with another key."""
    pem = (key or account_key()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return json.dumps({"type": "service_account", "client_email": _EMAIL, "private_key_id": "1", "private_key": pem})


def _as_s3(method: str, headers: Message) -> Answer | None:
    """Makes a request to GCS one to S3, or says why it is refused."""
    token = str(headers["authorization"] or "").removeprefix("Bearer ")
    del headers["authorization"]
    if not _good(token):
        return _refusal(401, "AuthenticationRequired")
    headers["authorization"] = _S3_ACCOUNT
    if method == "PUT":
        del headers["if-none-match"]
    generation = headers["x-goog-if-generation-match"]
    if generation not in (None, "0"):
        return _refusal(501, "NotImplemented")
    if generation == "0":
        headers["if-none-match"] = "*"
    return None


def _refusal(status: int, code: str) -> Answer:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>".encode()
    return status, [("content-type", "application/xml"), ("content-length", str(len(body)))], body


def _good(token: str) -> bool:
    parts = token.split(".")
    if len(parts) != 3:
        return False
    claims, signature = (urlsafe_b64decode(part + "==") for part in parts[1:])
    try:
        account_key().public_key().verify(signature, ".".join(parts[:2]).encode(), PKCS1v15(), SHA256())
    except InvalidSignature:
        return False
    said = json.loads(claims)
    return bool(said["iss"] == _EMAIL and said["iat"] - 60 < time.time() < said["exp"])
