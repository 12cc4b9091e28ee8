"""Translate storage options from fsspec's names to deltalake's, so that users give their credentials once.

In: a URL and the options from the configuration. Out: options for fsspec, with timeouts, and for deltalake.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from featray.storage import retry

_CONNECT_S, _READ_S = 5, 15
"""Seconds to wait for a connection, and for the next byte on it, before a request times out."""
_DELTA_TIMEOUT_S = 20
"""Timeout of a whole request of deltalake, including its body. Log files have a few MB at most."""


def make_fsspec_options(uri: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options to open `uri` with: `options`, and on S3 also timeouts that `options` do not set."""
    if uri.partition("://")[0] not in ("s3", "s3a"):
        return options
    defaults = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _READ_S,
        "retries": {"total_max_attempts": 3, "mode": "standard"},
    }
    return {**options, "config_kwargs": {**defaults, **(options.get("config_kwargs") or {})}}


def make_delta_options(uri: str, options: dict[str, Any], *, with_retries: bool = False) -> dict[str, str]:
    """Return fsspec's options under deltalake's names.

    Only options for S3, Google Cloud Storage and Azure are translated. For other protocols, deltalake takes
    credentials from the environment only.

    Args:
        uri: URL to open with the options.
        options: Options for fsspec.
        with_retries: Whether deltalake retries each request for `retry.OUTPUT_DEADLINE_S`. Leave it False
            for other programs (polars): they know the other options, but not these.
    """
    translate = _TRANSLATORS.get(uri.partition("://")[0])
    translated = {} if translate is None else translate(options)
    return translated | _make_retry_options() if with_retries else translated


def make_delta_uri(uri: str) -> str:
    """Return `uri` with a protocol that deltalake knows, without a trailing slash."""
    protocol, _, path = uri.rstrip("/").partition("://")
    return f"{_PROTOCOLS.get(protocol, protocol)}://{path}"


def _make_retry_options() -> dict[str, str]:
    """Return options that let deltalake retry each request until a deadline, as `run_with_retries` does."""
    return {
        "connect_timeout": f"{_CONNECT_S}s",
        "timeout": f"{_DELTA_TIMEOUT_S}s",
        "max_retries": "1000",
        "retry_timeout": f"{retry.OUTPUT_DEADLINE_S:.0f}s",
        "backoff_config.init_backoff": "200ms",
        "backoff_config.max_backoff": f"{retry.LONGEST_WAIT_S:.0f}s",
        "backoff_config.base": "2",
    }


def _translate_s3(options: dict[str, Any]) -> dict[str, str]:
    flat = {**options, **(options.get("client_kwargs") or {})}
    translated = _rename_options(
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
    endpoint = translated.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint.startswith("http://"):
        translated["AWS_ALLOW_HTTP"] = "true"
    if flat.get("anon"):
        translated["AWS_SKIP_SIGNATURE"] = "true"
    if flat.get("verify") is False:
        translated["allow_invalid_certificates"] = "true"
    s3 = (options.get("config_kwargs") or {}).get("s3") or {}
    if s3.get("addressing_style") == "virtual":
        translated["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"] = "true"
    return translated


def _translate_azure(options: dict[str, Any]) -> dict[str, str]:
    pairs = [part.partition("=") for part in str(options.get("connection_string") or "").split(";")]
    from_connection_string = {key: value for key, _, value in pairs}
    translated = _rename_options(
        from_connection_string,
        AccountName="account_name",
        AccountKey="account_key",
        SharedAccessSignature="sas_token",
        BlobEndpoint="azure_endpoint",
    ) | _rename_options(
        options,
        **{name: name for name in ("account_name", "account_key", "sas_token")},
        **{name: name for name in ("tenant_id", "client_id", "client_secret")},
    )
    if options.get("account_host"):
        translated["azure_endpoint"] = f"https://{options['account_host']}"
    if translated.get("azure_endpoint", "").startswith("http://"):
        translated["azure_allow_http"] = "true"
    if options.get("anon"):
        translated["azure_skip_signature"] = "true"
    return translated


def _translate_gcs(options: dict[str, Any]) -> dict[str, str]:
    token, url = options.get("token"), str(options.get("endpoint_url") or "")
    translated: dict[str, str] = {}
    if token == "anon":
        # Without this, deltalake asks the metadata server of a cloud machine for a token.
        anonymous = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
        translated["google_service_account_key"] = json.dumps(
            anonymous | ({"gcs_base_url": url} if url else {})
        )
    elif isinstance(token, dict):
        translated["google_service_account_key"] = json.dumps(token)
    elif isinstance(token, str) and os.path.isfile(token):
        translated["google_service_account"] = token
    if url.startswith("http://"):
        translated["allow_http"] = "true"
    return translated


def _rename_options(options: dict[str, Any], **names: str) -> dict[str, str]:
    """Return the options that are set, as texts under new names; `names` maps old names to new names."""
    return {to: str(options[name]) for name, to in names.items() if options.get(name) is not None}


_TRANSLATORS: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    **dict.fromkeys(("s3", "s3a"), _translate_s3),
    **dict.fromkeys(("gs", "gcs"), _translate_gcs),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), _translate_azure),
}
_PROTOCOLS = {"gcs": "gs", "adl": "az"}
