"""Checks before a run: a config in, the listing out, or an error that lists every problem at once.

Config, source, output, model and plan are checked. These functions write only the caches for the next listing
(DICOM headers, digests of files) and, in stores other than local folders, a small file that is deleted at
once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from featray import config as configuration
from featray.config import Config, ConfigInput, LimitsConfig
from featray.errors import ConfigError, FeatrayError, UsageError
from featray.job import extra_columns, load_extractor
from featray.model import Extractor
from featray.output.dataset import RUNS
from featray.output.lease import raise_if_locked
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS
from featray.stages.input_cache import InputCache
from featray.stages.list import CachePlace, DigestCache, HeaderCache, Listing, list_scans
from featray.stages.plan import Plan
from featray.stages.report import format_layer_counts
from featray.storage.ray_job import find_package_problem
from featray.storage.store import Store
from featray.storage.urls import hash_texts, mask_url
from featray.storage.user_cache import get_user_cache

log = logging.getLogger(__name__)

HEADER_CACHE = f"{RUNS}/listing.parquet"
"""File with the DICOM headers that listing has read, so that it need not read unchanged files again."""
DIGEST_CACHE = f"{RUNS}/digests.parquet"
"""File with the digests of files that listing has compared, so that it need not read them again."""
ALWAYS_REMOVABLE = 100
"""Number of scans that a refresh may always remove, regardless of `limits.max_removed_fraction`."""


def check(
    config: ConfigInput, overrides: list[str] | None = None, *, show: bool = False
) -> tuple[Config, Listing]:
    """Return the checked config and the listing of its source.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that override the config.
        show: Whether to show progress on stderr while the source is listed.

    Raises:
        ConfigError: The config or the source has problems. Lists all, including those of the model. Problems
            of the model alone are not found here, but when `Job.prepare` loads it.
    """
    checked, problems = configuration.load_partly(config, overrides)
    where = configuration.get_name(config)
    if checked is None:
        raise ConfigError(problems, where)
    problems += _check_folders(checked)
    listing = Listing(())
    try:
        listing = check_source(checked, load_header_cache(checked), show=show)
    except UsageError as error:
        problems += error.problems
    if problems:  # there will be no run; the model is loaded only to report its problems too
        is_size_valid = not any(problem.startswith("preprocess.size") for problem in problems)
        problems += _check_model(checked, is_size_valid=is_size_valid)
        raise ConfigError(problems, where)
    return checked, listing


def check_source(config: Config, header_cache: HeaderCache | None = None, *, show: bool = False) -> Listing:
    """Return the listing of the source, after checking it against the config.

    Args:
        config: Checked config.
        header_cache: Cache of an earlier listing, as for `list_scans`.
        show: Whether to show progress on stderr while the source is listed.

    Raises:
        ConfigError: Lists every problem.
    """
    problems = _check_tags(config)
    listing = Listing(())
    try:
        listing = list_source(config, header_cache, show=show)
        problems += _check_partitions(config, listing) + _check_centers(config, listing)
    except UsageError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return listing


def _check_folders(config: Config) -> list[str]:
    """Return a problem for the output and the cache each if it would be lost with a Ray job."""
    folders = {"output.uri": config.output.uri, "cache.uri": config.cache.uri or ""}
    found = {key: find_package_problem(uri) for key, uri in folders.items() if uri}
    return [f"{key}: {folders[key]} {problem}" for key, problem in found.items() if problem]


def check_stores(output: Store, config: Config) -> None:
    """Raise if the output is locked, or the output or the input cache cannot be written.

    This happens before any slow work begins.
    """
    with _explain_errors(output, "output.uri"):
        output.check_writable()
        raise_if_locked(output)
    cache = InputCache.from_config(config)
    if cache is not None:
        with _explain_errors(cache.store, "cache.uri"):
            cache.store.check_writable()


@contextlib.contextmanager
def _explain_errors(store: Store, key: str) -> Iterator[None]:
    """Raise other errors than featray's own as a ConfigError that names the key of the store."""
    try:
        yield
    except FeatrayError:
        raise
    # each kind of store raises its own errors, whose texts may contain credentials
    except Exception as error:
        problem = f"{key}: {mask_url(store.uri)} cannot be reached ({type(error).__name__})"
        raise ConfigError(f"{problem}; check storage_options, credentials and endpoint") from None


def list_source(config: Config, header_cache: HeaderCache | None, *, show: bool = False) -> Listing:
    """Return the listing of the source; keep the digests of compared files for other commands of this user.

    The arguments and errors are those of `list_scans`.
    """
    output = _open_places(config.output.uri, config.output.storage_options, DIGEST_CACHE)
    user: list[CachePlace] = []
    with contextlib.suppress(RuntimeError):  # no home folder
        user = _open_places(str(get_user_cache("digests")), {}, f"{hash_texts([config.source.uri])}.parquet")
    cache = DigestCache(*output, *user)
    listing = list_scans(config.source, config.policy, header_cache, digest_cache=cache, show=show)
    for place in user:
        with contextlib.suppress(FeatrayError, OSError):  # a folder that cannot be written costs time only
            cache.save(place)
    return listing


def _open_places(uri: str, options: dict[str, Any], name: str) -> list[CachePlace]:
    """Return the file in a folder as a place for digests; nothing if the folder cannot be opened."""
    try:
        return [CachePlace(Store(uri, options), name)]
    except Exception as error:  # of any kind of store; an output that cannot be used is reported later
        log.debug("no place for digests (%s)", type(error).__name__)
        return []


def load_header_cache(config: Config) -> HeaderCache | None:
    """Return the cache of the last run; empty if no cache exists, None if it cannot be read.

    An unreachable output is reported later.
    """
    try:
        store = Store(config.output.uri, config.output.storage_options)
        return HeaderCache.from_bytes(store.fs.cat_file(store.path(HEADER_CACHE)))
    except FileNotFoundError:
        return HeaderCache()
    except Exception as error:  # each kind of store raises its own errors
        log.debug("no header cache (%s)", type(error).__name__)
        return None


def save_listing_caches(listing: Listing, store: Store) -> None:
    """Save the headers and digests that listing has read for the next run, if they have changed."""
    if listing.header_cache is not None and listing.header_cache.is_changed:
        store.write(HEADER_CACHE, listing.header_cache.to_bytes())
    listing.digest_cache.save(CachePlace(store, DIGEST_CACHE))


def refuse_mixed_recipes(plan: Plan, *, refresh: bool) -> None:
    """Raise if `extract` would write a layer of which the output has cells of another recipe."""
    if not plan.other_recipe or refresh:
        return
    stale = [name for name, work in plan.layers.items() if work.stale]
    layers = f" (layers {', '.join(stale)})" if stale else ""
    names = (
        "To keep both, give the layers of this config other names: {layer: ..., as: NAME}."
        if plan.can_keep_both
        else "Reading or preprocessing differ, so one output cannot hold both; choose another output.uri."
    )
    raise ConfigError(
        f"output.uri: {plan.other_recipe} scans of the output have features of another recipe than this "
        f"config's{layers}, and a layer must not mix recipes. `featray refresh` extracts them again. {names}"
    )


def refuse_layer_loss(plan: Plan, *, refresh: bool, drop_layers: bool) -> None:
    """Raise if a refresh would remove layers that the config does not name, without being asked to.

    It replaces scans that were read or preprocessed in another way, with all their cells.
    """
    if not plan.incompatible_layers or drop_layers or not refresh:
        return
    names = format_layer_counts(plan.incompatible_layers)
    raise ConfigError(
        f"model.layers: the output has layers that this config does not name: {names}. They were read or "
        "preprocessed in another way, and one output cannot hold both, so a refresh would remove them. Name "
        "them in model.layers to compute them again, add --drop-layers to remove them, or choose another "
        "output.uri."
    )


def refuse_mass_removal(plan: Plan, limits: LimitsConfig, *, refresh: bool) -> None:
    """Raise if a refresh would remove too many scans: part of the collection is probably not mounted."""
    stored = sum(plan.counts.values()) - plan.counts["new"]
    allowed = max(ALWAYS_REMOVABLE, limits.max_removed_fraction * stored)
    if refresh and len(plan.removed) > allowed:
        raise ConfigError(
            f"limits.max_removed_fraction: {len(plan.removed)} of {stored} stored scans are no longer in the "
            f"collection, a share above {limits.max_removed_fraction:g}. Check that all of it is mounted and "
            "that source.uri is right. To remove these scans, use --set limits.max_removed_fraction=1"
        )


def _check_tags(config: Config) -> list[str]:
    if not config.privacy.dicom_tags:
        return []
    from featray.ct.dicom.tags import find_unknown_keywords

    unknown = find_unknown_keywords(config.privacy.dicom_tags)
    return [f"privacy.dicom_tags: {keyword!r} is not a DICOM keyword" for keyword in unknown]


def _check_partitions(config: Config, listing: Listing) -> list[str]:
    texts = [field.name for field in SCAN_COLUMNS if pa.types.is_string(field.type)]
    # A column inside the files of `features` cannot also be a partition column.
    known = [name for name in texts if name not in FEATURE_COLUMNS.names]
    known += [name for name in extra_columns(config, listing) if name not in SCAN_COLUMNS.names]
    columns = config.output.partition_by[1:]
    problems = [
        f"output.partition_by: {name!r} cannot be a partition column; possible columns are {', '.join(known)}"
        for name in columns
        if name not in known
    ]
    if len(set(columns)) < len(columns):
        problems.append(f"output.partition_by: {list(columns)} names a column twice")
    return problems


def _check_centers(config: Config, listing: Listing) -> list[str]:
    is_cut = config.preprocess.fit == "crop_pad" and config.preprocess.size is not None
    if is_cut or not listing.has_centers:
        return []
    return ["preprocess.fit: the manifest's center_x, center_y, center_z need fit: crop_pad and a size"]


def _check_model(config: Config, *, is_size_valid: bool) -> list[str]:
    try:
        load_extractor(config) if is_size_valid else Extractor(config.model)
    except UsageError as error:
        return error.problems
    return []
