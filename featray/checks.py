"""What speaks against a run, found before work begins: config, source, output, model, plan.

In: a config. Out: what the run needs of each, or every problem at once. Writes nothing but what listing has
found, for the next one.
"""

from __future__ import annotations

import logging

import pyarrow as pa

from featray import config as configuration
from featray.config import Config, ConfigInput, LimitsConfig
from featray.errors import ConfigError, FeatrayError, UsageError
from featray.job import extra_columns, load_extractor
from featray.model import Extractor
from featray.output.dataset import RUNS
from featray.output.lease import raise_if_locked
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS
from featray.stages.list import HeaderCache, Listing, list_scans
from featray.stages.plan import Plan
from featray.storage.store import Store
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)

MEMORY = f"{RUNS}/listing.parquet"
"""What listing has found of DICOM folders, so that headers of unchanged ones are not read again."""
ALWAYS_REMOVABLE = 100
"""Up to so many scans may go at once without `limits.max_removed_fraction` having a say."""


def check(config: ConfigInput, overrides: list[str] | None = None) -> tuple[Config, Listing]:
    """Return the config and the listing once nothing in the YAML or the source speaks against a run.

    Raises:
        ConfigError: Lists every problem; if there is any, also those of the model and its layers.
    """
    checked, problems = configuration.load_partly(config, overrides)
    where = configuration.name_of(config)
    if checked is None:
        raise ConfigError(problems, where)
    listing = Listing(())
    try:
        listing = check_source(checked, _remembered(checked))
    except UsageError as error:
        problems += error.problems
    if problems:  # the run will not happen; the model is loaded only to report its problems too
        size_is_sound = not any(problem.startswith("preprocess.size") for problem in problems)
        problems += _problems_of_model(checked, size_is_sound)
        raise ConfigError(problems, where)
    return checked, listing


def check_source(config: Config, header_cache: HeaderCache | None = None) -> Listing:
    """Return the listing once nothing in the source, or of what the config asks of it, speaks against a run.

    Args:
        config: As loaded.
        header_cache: What an earlier listing found, as for `list_scans`.

    Raises:
        ConfigError: Lists every problem.
    """
    problems = _problems_of_tags(config)
    listing = Listing(())
    try:
        listing = list_scans(config.source, config.policy, header_cache)
        problems += _problems_of_partitions(config, listing) + _problems_of_centers(config, listing)
    except UsageError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return listing


def check_output(store: Store) -> None:
    """Refuse an output that is held or cannot be used, before anything slow is done for nothing."""
    try:
        store.check_writable()
        raise_if_locked(store)
    except FeatrayError:
        raise
    except Exception as error:  # every store has errors of its own, and their texts may hold credentials
        problem = f"output.uri: {mask_url(store.uri)} cannot be reached ({type(error).__name__})"
        raise ConfigError(f"{problem}; check storage_options, credentials and endpoint") from None


def _remembered(config: Config) -> HeaderCache | None:
    """Return what the last run's listing found; None where an output cannot be asked, which is told later."""
    try:
        store = Store(config.output.uri, config.output.storage_options)
        return HeaderCache.from_bytes(store.fs.cat_file(store.path(MEMORY)))
    except FileNotFoundError:
        return HeaderCache()
    except Exception as error:  # every store has errors of its own
        log.debug("no header cache (%s)", type(error).__name__)
        return None


def save_listing_cache(listing: Listing, store: Store) -> None:
    """Keep for the next run what listing has found, if it is other than before."""
    if listing.header_cache is not None and listing.header_cache.is_changed:
        store.write(MEMORY, listing.header_cache.to_bytes())


def refuse_other_recipe(plan: Plan, recipe: str, *, refresh: bool) -> None:
    """Stop an `extract` into a table of another recipe."""
    if plan.other_recipe and not refresh:
        raise ConfigError(
            f"output.uri: {plan.other_recipe} of its scans have features of another recipe than this "
            f"config's ({recipe}), and a table must not mix them. `featray refresh` extracts them anew; or "
            "choose another output.uri, or the earlier config."
        )


def refuse_mass_removal(plan: Plan, limits: LimitsConfig, *, refresh: bool) -> None:
    """Stop a refresh that would drop most of the output: more likely the collection is not all there."""
    stored = sum(plan.counts.values()) - plan.counts["new"]
    allowed = max(ALWAYS_REMOVABLE, limits.max_removed_fraction * stored)
    if refresh and len(plan.removed) > allowed:
        raise ConfigError(
            f"limits.max_removed_fraction: {len(plan.removed)} of {stored} stored scans are no longer in the "
            f"collection, more than {limits.max_removed_fraction:g}. Is all of it mounted, and source.uri "
            "the same? If they shall go: --set limits.max_removed_fraction=1"
        )


def _problems_of_tags(config: Config) -> list[str]:
    if not config.privacy.dicom_tags:
        return []
    from featray.ct.dicom.tags import find_unknown_keywords

    unknown = find_unknown_keywords(config.privacy.dicom_tags)
    return [f"privacy.dicom_tags: DICOM knows no keyword {keyword!r}" for keyword in unknown]


def _problems_of_partitions(config: Config, listing: Listing) -> list[str]:
    texts = [field.name for field in SCAN_COLUMNS if pa.types.is_string(field.type)]
    known = [name for name in texts if name not in FEATURE_COLUMNS.names]  # those are inside the files
    known += [name for name in extra_columns(config, listing) if name not in SCAN_COLUMNS.names]
    further = config.output.partition_by[1:]
    problems = [
        f"output.partition_by: {name!r} is none of {', '.join(known)}"
        for name in further
        if name not in known
    ]
    if len(set(further)) < len(further):
        problems.append(f"output.partition_by: {list(further)} names a column twice")
    return problems


def _problems_of_centers(config: Config, listing: Listing) -> list[str]:
    is_cut = config.preprocess.fit == "crop_pad" and config.preprocess.size is not None
    if is_cut or not listing.has_centers:
        return []
    return ["preprocess.fit: the manifest's center_x, center_y, center_z need fit: crop_pad and a size"]


def _problems_of_model(config: Config, size_is_sound: bool) -> list[str]:
    try:
        load_extractor(config) if size_is_sound else Extractor(config.model)
    except UsageError as error:
        return error.problems
    return []
