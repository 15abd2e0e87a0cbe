"""S3 and what speaks like it as a source: listing a folder and signing URLs. Standard library only.

Credentials and address come from AWS's own variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION, AWS_ENDPOINT_URL. Without a key, requests are not signed, as for public buckets.
"""

from __future__ import annotations

import hashlib
import hmac
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

from octavo_engine.store.listing import Listing, RemoteFile, wanted

EXPIRES_S = 3600
PAGES_MAX = 100


@dataclass(frozen=True)
class Bucket:
    name: str
    endpoint: str | None
    region: str
    key_id: str | None
    secret: str | None
    session: str | None

    @classmethod
    def of(cls, name: str, environ: Mapping[str, str]) -> Bucket:
        return cls(
            name,
            environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None,
            environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            environ.get("AWS_ACCESS_KEY_ID") or None,
            environ.get("AWS_SECRET_ACCESS_KEY") or None,
            environ.get("AWS_SESSION_TOKEN") or None,
        )

    def url(self, key: str, query: Mapping[str, str], now: datetime) -> str:
        """A GET that works for an hour."""
        if self.endpoint is not None or "." in self.name:  # a name with dots matches no certificate as a host name
            base = (self.endpoint or f"https://s3.{self.region}.amazonaws.com").rstrip("/")
            path = f"{urlsplit(base).path}/{self.name}/{key}"
        else:
            base, path = f"https://{self.name}.s3.{self.region}.amazonaws.com", f"/{key}"
        parts = urlsplit(base)
        path, given = quote(path, safe="/~"), dict(query)
        if self.key_id and self.secret:
            given |= self._signature(parts.netloc, path, given, now)
        text = _query(given)
        return f"{parts.scheme}://{parts.netloc}{path}" + (f"?{text}" if text else "")

    def _signature(self, host: str, path: str, query: Mapping[str, str], now: datetime) -> dict[str, str]:
        """Signature version 4, in the query (AWS: "Authenticating Requests: Using Query Parameters")."""
        stamp, scope = now.strftime("%Y%m%dT%H%M%SZ"), f"{now:%Y%m%d}/{self.region}/s3/aws4_request"
        extra = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self.key_id}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(EXPIRES_S),
            "X-Amz-SignedHeaders": "host",
        }
        if self.session:
            extra["X-Amz-Security-Token"] = self.session
        canonical = "\n".join(["GET", path, _query({**query, **extra}), f"host:{host}\n", "host", "UNSIGNED-PAYLOAD"])
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        signing = f"AWS4{self.secret}".encode()
        for word in scope.split("/"):
            signing = hmac.digest(signing, word.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
        return {**extra, "X-Amz-Signature": hmac.digest(signing, text.encode(), "sha256").hex()}


def list_folder(
    source: str, get: Callable[[str], bytes], environ: Mapping[str, str], *, weights: bool, now: Callable[[], datetime]
) -> Listing:
    """source: s3://bucket/folder. get: the body behind a URL. Raises what `get` raises, and ValueError for no XML."""
    name, _, folder = source.removeprefix("s3://").partition("/")
    bucket, prefix = Bucket.of(name, environ), f"{folder.strip('/')}/" if folder.strip("/") else ""
    found: dict[str, tuple[int, str]] = {}
    page: str | None = None
    for _ in range(PAGES_MAX):
        query = {"list-type": "2", "prefix": prefix, "delimiter": "/"} | ({"continuation-token": page} if page else {})
        try:
            root = ElementTree.fromstring(get(bucket.url("", query, now())))
        except ElementTree.ParseError as error:
            raise ValueError(f"the answer to the list of {source} is no XML: {error}") from error
        for item in root.iter():
            if item.tag.rpartition("}")[2] == "Contents":
                fields = {child.tag.rpartition("}")[2]: child.text or "" for child in item}
                found[fields["Key"].removeprefix(prefix)] = int(fields["Size"]), fields.get("ETag", "").strip('"')
        page = next((e.text for e in root.iter() if e.tag.rpartition("}")[2] == "NextContinuationToken"), None)
        if not page:
            break

    def file(name: str) -> RemoteFile:
        size, etag = found[name]
        # If-Match: an object that is replaced meanwhile is refused, not mixed in.
        headers = {"If-Match": f'"{etag}"'} if etag else {}
        return RemoteFile(
            name, size, f"etag:{etag}" if etag else None, lambda: (bucket.url(prefix + name, {}, now()), headers)
        )

    return Listing(source, None, tuple(file(name) for name in wanted(found, weights=weights)))


def utc_now() -> datetime:
    return datetime.now(UTC)


def _query(given: Mapping[str, str]) -> str:
    return "&".join(f"{quote(k, safe='~')}={quote(v, safe='~')}" for k, v in sorted(given.items()))
