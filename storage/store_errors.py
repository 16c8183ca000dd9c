"""What the client of an object store says, as errors that name the address and a remedy.

s3fs turns answers of the store into errors of the operating system, and lets what botocore raises by itself through.
Clients come with extras that need not be installed, so they are known by the modules of their classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import LakeError, LakeNotFound, NoAccess, StorageError, TransientError

_CLIENTS = ("botocore", "aiobotocore", "aiohttp")

_ABSENT = {"404", "NoSuchKey", "NoSuchUpload"}
"""Codes of answers that mean no fault: somebody asked whether there is such an object."""
_MAY_PASS = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "503"}
_NO_ANSWER = {
    "ConnectionError",
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    # aiohttp's
    "ClientError",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "NoAuthTokenError",
    "SSOError",
}
_CREDENTIALS = "(for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"


@contextmanager
def store_named(where: str) -> Iterator[None]:
    """Raise what a store's client raises as an error that names the address; the rest as it is."""
    try:
        yield
    except Exception as err:
        told = None if isinstance(err, StorageError) else _told(where, err)
        if told is None:
            raise
        raise told from err


def is_past_the_end(err: OSError) -> bool:
    """Whether a store says that an object ends before the bytes that it was asked for."""
    return _code(err.__cause__) in ("InvalidRange", "416")


def _told(where: str, err: Exception) -> StorageError | None:
    """None when no store's client is behind it, or for an object that is not there: FileNotFoundError says that."""
    said = next((each for each in (err, err.__cause__) if _is_of_client(each)), None)
    if said is None:
        return None
    code, words = _code(said), " ".join(str(said).split())
    kinds = {kind.__name__ for kind in type(said).__mro__}
    if code in _ABSENT:
        return None
    if code == "NoSuchBucket":
        return LakeNotFound(f"{where}: there is no such bucket; make it, or correct the address")
    if kinds & _NO_CREDENTIALS:
        return NoAccess(
            f"{where}: no credentials for the store ({words}); give some {_CREDENTIALS}"
        )
    if isinstance(err, PermissionError):
        return NoAccess(
            f"{where}: the store refuses this user ({words}); check the credentials {_CREDENTIALS} "
            "and what they are allowed to do there"
        )
    if code in _MAY_PASS or (not code and kinds & _NO_ANSWER):
        return TransientError(
            f"{where}: the store does not answer ({words}); check the network and the store's "
            "address (for S3 AWS_ENDPOINT_URL), and try again: it may pass"
        )
    return LakeError(
        f"{where}: the store cannot be used so ({words}); check the bucket's name, its region (for "
        "S3 AWS_DEFAULT_REGION) and the store's address (AWS_ENDPOINT_URL)"
    )


def _is_of_client(err: BaseException | None) -> bool:
    return type(err).__module__.partition(".")[0] in _CLIENTS


def _code(said: BaseException | None) -> str:
    """The store's word for what is wrong; empty when it gave no answer."""
    response = getattr(said, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
