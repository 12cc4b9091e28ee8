"""One set of storage options, fsspec's, in the words of those who use them; so credentials are given once.

In: a URL and what the config gives. Out: the options for fsspec, with time limits, and for the Delta log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from featray.storage import retry

_CONNECT_S, _READ_S = 5, 15
"""Seconds without a connection, or without a byte on it, after which a server counts as hung."""
_DELTA_S = 20
"""Of a whole request to the Delta log, its body included: entries and checkpoints are a few MB at most."""


def make_fsspec_options(uri: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options to open `uri` with: on S3 a hung server is noticed. `options` win."""
    if uri.partition("://")[0] not in ("s3", "s3a"):
        return options
    ours = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _READ_S,
        "retries": {"total_max_attempts": 3, "mode": "standard"},
    }
    return {**options, "config_kwargs": {**ours, **(options.get("config_kwargs") or {})}}


def make_delta_options(uri: str, options: dict[str, Any], *, with_retries: bool = False) -> dict[str, str]:
    """Return fsspec's options in deltalake's words.

    No credentials for protocols whose words are not known here; deltalake then looks at the environment only.

    Args:
        uri: Where the options lead to.
        options: As given to fsspec.
        with_retries: Also let deltalake try each request for `retry.OUTPUT_DEADLINE_S`. Other programs that
            take the rest of the options do not know these.
    """
    translate = _TRANSLATIONS.get(uri.partition("://")[0])
    found = {} if translate is None else translate(options)
    return found | _make_retry_options() if with_retries else found


def delta_uri(uri: str) -> str:
    """Return `uri` with a protocol that deltalake knows, without a slash at the end."""
    protocol, _, place = uri.rstrip("/").partition("://")
    return f"{_PROTOCOLS.get(protocol, protocol)}://{place}"


def _make_retry_options() -> dict[str, str]:
    """Return options that let deltalake retry each request until a deadline, as `run_with_retries` does."""
    return {
        "connect_timeout": f"{_CONNECT_S}s",
        "timeout": f"{_DELTA_S}s",
        "max_retries": "1000",
        "retry_timeout": f"{retry.OUTPUT_DEADLINE_S:.0f}s",
        "backoff_config.init_backoff": "200ms",
        "backoff_config.max_backoff": f"{retry.LONGEST_WAIT_S:.0f}s",
        "backoff_config.base": "2",
    }


def _s3_options(options: dict[str, Any]) -> dict[str, str]:
    flat = {**options, **(options.get("client_kwargs") or {})}
    found = _renamed(
        flat,
        key="AWS_ACCESS_KEY_ID",
        username="AWS_ACCESS_KEY_ID",
        aws_access_key_id="AWS_ACCESS_KEY_ID",
        secret="AWS_SECRET_ACCESS_KEY",
        password="AWS_SECRET_ACCESS_KEY",
        aws_secret_access_key="AWS_SECRET_ACCESS_KEY",
        token="AWS_SESSION_TOKEN",
        aws_session_token="AWS_SESSION_TOKEN",
        endpoint_url="AWS_ENDPOINT_URL",
        region_name="AWS_REGION",
    )
    endpoint = found.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint.startswith("http://"):
        found["AWS_ALLOW_HTTP"] = "true"
    if flat.get("anon"):
        found["AWS_SKIP_SIGNATURE"] = "true"
    if flat.get("verify") is False:
        found["allow_invalid_certificates"] = "true"
    s3 = (options.get("config_kwargs") or {}).get("s3") or {}
    if s3.get("addressing_style") == "virtual":
        found["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"] = "true"
    return found


def _azure_options(options: dict[str, Any]) -> dict[str, str]:
    pairs = [part.partition("=") for part in str(options.get("connection_string") or "").split(";")]
    given = {key: value for key, _, value in pairs}
    found = _renamed(
        given,
        AccountName="account_name",
        AccountKey="account_key",
        SharedAccessSignature="sas_token",
        BlobEndpoint="azure_endpoint",
    ) | _renamed(
        options,
        **{name: name for name in ("account_name", "account_key", "sas_token")},
        **{name: name for name in ("tenant_id", "client_id", "client_secret")},
    )
    if options.get("account_host"):
        found["azure_endpoint"] = f"https://{options['account_host']}"
    if found.get("azure_endpoint", "").startswith("http://"):
        found["azure_allow_http"] = "true"
    if options.get("anon"):
        found["azure_skip_signature"] = "true"
    return found


def _gcs_options(options: dict[str, Any]) -> dict[str, str]:
    token, url = options.get("token"), str(options.get("endpoint_url") or "")
    found: dict[str, str] = {}
    if token == "anon":
        # Only this keeps deltalake from asking the machine's metadata server for somebody's token.
        nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
        found["google_service_account_key"] = json.dumps(nobody | ({"gcs_base_url": url} if url else {}))
    elif isinstance(token, dict):
        found["google_service_account_key"] = json.dumps(token)
    elif isinstance(token, str) and os.path.isfile(token):
        found["google_service_account"] = token
    if url.startswith("http://"):
        found["allow_http"] = "true"
    return found


def _renamed(options: dict[str, Any], **names: str) -> dict[str, str]:
    return {to: str(options[name]) for name, to in names.items() if options.get(name) is not None}


_TRANSLATIONS: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    **dict.fromkeys(("s3", "s3a"), _s3_options),
    **dict.fromkeys(("gs", "gcs"), _gcs_options),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), _azure_options),
}
_PROTOCOLS = {"gcs": "gs", "adl": "az"}
