"""Each stage alone, in a process of its own: a JSON document on stdin, seconds per scan as JSON on stdout.

In: `config`, `scans`, `repeats`, `model_only`, which leaves out all but the model, and `calls` of it at once.
How many threads the model has is said by the environment, before TensorFlow starts. The floors (`decompress`,
`resize`) are those of the fastest way at hand for each scan; `decode` is what featray does, all its checks
included.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from featray.benchmark import lower_bounds
from featray.config import Config, load
from featray.ct.formats.inflate import GZIP_MAGIC
from featray.ct.volume import Volume
from featray.engines.base import Decoding, Stages
from featray.engines.inline import InlineEngine
from featray.engines.prefetch import parallel_map
from featray.errors import FeatrayError
from featray.job import Job, make_decoding
from featray.model import Extractor
from featray.model.batch_buffers import concatenate_rows
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan
from featray.stages.extract import extract
from featray.stages.preprocess import preprocess
from featray.stages.read import Reader, ReadResult
from featray.storage.urls import open_url

MAX_INPUT_BYTES = 2**30
"""Of model inputs kept in memory for the model's turn."""
MODEL_BATCHES = 4
IN_A_ROW = 4
"""Calls behind each that is under way at once: else the slowest of a few would be all that is timed."""

Seconds = tuple[float, float]
"""CPU, wall."""


def main() -> int:
    """Measure and print."""
    asked = json.load(sys.stdin)
    scans = [Scan.from_json(text) for text in asked["scans"]]
    try:
        config, calls = load(asked["config"]), asked["calls"]
        found = measure(config, scans, asked["repeats"], model_only=asked["model_only"], calls=calls)
    except FeatrayError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(json.dumps(found))
    return 0


def measure(
    config: Config, scans: Sequence[Scan], repeats: int, *, model_only: bool, calls: int = 1
) -> dict[str, Any]:
    """Return {cpu_s, wall_s: {stage: seconds per scan}, fastest: {floor: way}, …}; bytes are per scan.

    With several calls of the model at once, its wall seconds are those per scan of all of them together.

    Raises:
        FeatrayError: No scan can be decoded, or as `Job.prepare`.
    """
    decoding = make_decoding(config)
    job = Job.prepare(config, InlineEngine(0, decoding))
    stages = job.make_stages(Dataset.open(config.output), len(scans))
    tally = _Tally(repeats)
    decoded: list[Decoded] = []
    for scan in scans:
        one = decoding.decoder(scan)
        if one.record.status != "ok":
            continue
        if not model_only:
            _measure_scan(tally, decoding, config, scan, one)
        if sum(other.tensor.nbytes for other in decoded) < MAX_INPUT_BYTES:
            decoded.append(one)
        if model_only and len(decoded) >= MODEL_BATCHES * decoding.batch_scans:
            break
    if not decoded:
        raise FeatrayError("none of the sampled scans can be decoded; see `featray doctor`")
    _measure_model(tally, job.extractor, decoding.batch_scans, decoded, calls)
    if not model_only:
        _measure_write(tally, stages, decoded[: MODEL_BATCHES * decoding.batch_scans])
    layers = [{"name": one.name, "path": one.path, "pool": one.pool} for one in job.extractor.layers]
    return {**tally.result(), "layers": layers, "batch": config.model.batch_size}


@dataclass
class _Tally:
    """Seconds of every stage, scan by scan, and sizes."""

    repeats: int
    seconds: dict[str, list[Seconds]] = field(default_factory=dict)
    ways: dict[str, Counter[str]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def time(self, stage: str, ways: dict[str, Callable[[], Any]], scans: int = 1) -> None:
        """Time each way in turn, keep the fastest; all of it was for so many scans."""
        first = stage not in self.seconds
        found: dict[str, list[Seconds]] = {name: [] for name in ways}
        for number in range(self.repeats + first):
            for name, way in ways.items():
                took = _timed(way)
                if number or not first:  # the very first call also imports and allocates
                    found[name].append(took)
        medians = {
            name: (statistics.median(cpu for cpu, _ in took), statistics.median(wall for _, wall in took))
            for name, took in found.items()
        }
        best = min(medians, key=lambda name: medians[name])
        self.keep(stage, best, *(seconds / scans for seconds in medians[best]))

    def keep(self, stage: str, way: str, cpu: float, wall: float) -> None:
        """Note the seconds of one scan."""
        self.seconds.setdefault(stage, []).append((cpu, wall))
        self.ways.setdefault(stage, Counter())[way] += 1

    def size(self, kind: str, count: int) -> None:
        """Note a scan's bytes, or patches."""
        self.sizes.setdefault(kind, []).append(count)

    def result(self) -> dict[str, Any]:
        """Return means over scans."""
        return {
            "cpu_s": {stage: statistics.mean(cpu for cpu, _ in took) for stage, took in self.seconds.items()},
            "wall_s": {
                stage: statistics.mean(wall for _, wall in took) for stage, took in self.seconds.items()
            },
            "fastest": {stage: ways.most_common(1)[0][0] for stage, ways in self.ways.items()},
            **{kind: statistics.mean(counts) for kind, counts in self.sizes.items()},
        }


def _timed(way: Callable[[], Any]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    return time.process_time() - cpu, time.perf_counter() - wall


def _measure_scan(tally: _Tally, decoding: Decoding, config: Config, scan: Scan, decoded: Decoded) -> None:
    reader = decoding.decoder.reader
    result = reader.read(scan)
    tally.time("read", {"fetch": lambda: _fetch(reader, scan)})
    tally.time("decompress", _decompressors(reader, scan))
    _measure_resize(tally, config, scan, result, decoded)
    tally.time("decode", {"featray": lambda: decoding.decoder(scan)})
    tally.size("bytes_read", result.bytes_read)
    tally.size("bytes_raw", _raw_bytes(result))
    tally.size("bytes_input", decoded.tensor.nbytes)
    tally.size("patches", len(decoded.tensor))


def _fetch(reader: Reader, scan: Scan) -> list[bytes]:
    source = reader.source
    fs, _ = open_url(scan.uri if "://" in scan.uri else source.uri, source.storage_options)
    return [fs.cat_file(path) for path in ([scan.archive] if scan.archive else scan.files)]


def _decompressors(reader: Reader, scan: Scan) -> dict[str, Callable[[], Any]]:
    """Return the ways from a scan's bytes to its voxels, featray's own reader among them."""
    own: dict[str, Callable[[], Any]] = {"featray": lambda: reader.read(scan)}
    if scan.archive or "://" in scan.uri or not scan.files:  # without files: found where it is read
        return own
    if scan.format == "dicom":
        return {**own, **lower_bounds.series_readers(scan.files)}
    if scan.format == "nifti" and len(scan.files) == 1:
        (data,) = _fetch(reader, scan)
        plain = {"none": lambda: None} if data[:2] != GZIP_MAGIC else {}
        return {**own, **plain, **lower_bounds.inflaters(data)}
    return own


def _measure_resize(tally: _Tally, config: Config, scan: Scan, result: ReadResult, decoded: Decoded) -> None:
    volume = result.content
    if not isinstance(volume, Volume) or result.mask is not None or volume.slice_origins_lps is not None:
        seconds = decoded.record.preprocess_s  # no part of it can be had apart
        tally.keep("resize", "featray", seconds, seconds)
        return
    steps, center = config.preprocess, scan.center_lps
    own = {"featray": lambda: preprocess(volume, steps, center_lps=center)}
    tally.time("resize", {**own, **lower_bounds.resizers(volume, config, decoded.tensor)})


def _raw_bytes(result: ReadResult) -> int:
    content = result.content
    values = content.voxels_zyx if isinstance(content, Volume) else content.values
    return int(values.nbytes)


def _measure_model(
    tally: _Tally, model: Extractor, size: int, decoded: Sequence[Decoded], calls: int
) -> None:
    batches = [decoded[at : at + size] for at in range(0, len(decoded), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    for batch in whole[:MODEL_BATCHES]:
        tensors = [one.tensor for one in batch]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:  # scans at their own sizes share no batch
            tensors = tensors[:1]
        inputs = [concatenate_rows(tensors)[0]] * (1 if calls == 1 else calls * IN_A_ROW)  # taken as they are
        run_model = functools.partial(_run_model, model, inputs, calls)
        tally.time("model", {"bare": run_model}, scans=len(tensors) * len(inputs))


def _run_model(model: Extractor, inputs: Sequence[Any], calls: int) -> None:
    """Call the model on each, on several at once, as the inline engine does."""
    for _ in parallel_map(model, inputs, calls):
        pass


def _measure_write(tally: _Tally, stages: Stages, decoded: Sequence[Decoded]) -> None:
    few = decoded[: stages.scans_per_file]
    rows = extract(stages.extractor, few, recipe=stages.recipe)
    tally.time("write", {"featray": lambda: stages.write(rows)}, scans=len(few))


if __name__ == "__main__":
    sys.exit(main())
