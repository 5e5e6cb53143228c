"""Azure Blob Storage on a socket: Azurite, where `azurite-blob` is on the PATH (`npm install -g azurite`)."""

import base64
import hashlib
import hmac
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

from tests.store.s3 import BUCKET

# Every Azurite knows this account.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
PROGRAM = shutil.which("azurite-blob")


@contextmanager
def azure_server() -> Iterator[str]:
    """The endpoint, without the account, of a server with an empty container `BUCKET`."""
    # obstore asks for a later version of the interface than any Azurite knows by name.
    options = ["--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    assert PROGRAM is not None
    with subprocess.Popen([PROGRAM, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = (re.search(r"successfully listens on (http://\S+)", line) for line in server.stdout)
            endpoint = next(match[1] for match in found if match)
            _make_container(endpoint)
            yield endpoint
        finally:
            server.terminate()


def _make_container(endpoint: str) -> None:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
    said = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = "PUT" + "\n" * 12 + f"{said}/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
    headers["authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    url = f"{endpoint}/{ACCOUNT}/{BUCKET}?restype=container"
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)):
        pass
