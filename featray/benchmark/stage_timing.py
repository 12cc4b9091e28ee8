"""Time each stage in isolation in a process of its own: a JSON document on stdin, seconds per scan on stdout.

Input: `config`, `scans`, `repeats`, `model_only` (measure only the model) and `calls` (concurrent calls of
    the
model). The environment sets the number of model threads, because TensorFlow reads it when it starts. The
results `decompress` and `resize` are lower bounds, those of the fastest available function for each scan;
`decode` is the whole decoder of featray with all its checks.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featray.benchmark import lower_bounds
from featray.benchmark.lower_bounds import Task
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
"""Bytes of model inputs that are kept in memory to time the model."""
MODEL_BATCHES = 4
"""Number of batches with which the model is timed."""
CALLS_PER_THREAD = 4
"""Number of calls of the model that each thread makes in a row when several calls run concurrently. With few
calls, the slowest one would determine the time."""

Seconds = tuple[float, float]
"""CPU seconds and wall seconds."""


def main() -> int:
    """Measure the stages and print the figures."""
    document = json.load(sys.stdin)
    scans = [Scan.from_json(text) for text in document["scans"]]
    try:
        options = TimingOptions(document["repeats"], document["model_only"], document["calls"])
        figures = measure_stages(load(document["config"]), scans, options)
    except FeatrayError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(json.dumps(figures))
    return 0


@dataclass(frozen=True)
class TimingOptions:
    """How to measure.

    Attributes:
        repeats: Number of times that each function is called for each scan.
        model_only: Whether only the model is measured.
        calls: Number of concurrent calls of the model. The wall seconds of the model are then the wall
            seconds of all calls together, divided by their scans.
    """

    repeats: int
    model_only: bool = False
    calls: int = 1


def measure_stages(config: Config, scans: Sequence[Scan], options: TimingOptions) -> dict[str, Any]:
    """Return the figures of the stages, which are means over the scans.

    Returns:
        `cpu_s` and `wall_s`: seconds per scan by stage. `fastest`: the name of the fastest function by stage.
        `bytes_read`, `bytes_raw`, `bytes_input`, `patches`: per scan, unless only the model is measured.
        `layers`: name, path and pooling of each layer. `batch`: the batch size of the config.

    Raises:
        FeatrayError: No scan can be decoded, or as `Job.prepare`.
    """
    decoding = make_decoding(config)
    job = Job.prepare(config, InlineEngine(0, decoding))
    stages = job.make_stages(Dataset.open(config.output), len(scans))
    times = _StageTimes(options.repeats)
    decoded_scans: list[Decoded] = []
    for scan in scans:
        decoded = decoding.decoder(scan)
        if decoded.record.status != "ok":
            continue
        if not options.model_only:
            _measure_decoding(times, decoding, config, scan, decoded)
        if sum(other.tensor.nbytes for other in decoded_scans) < MAX_INPUT_BYTES:
            decoded_scans.append(decoded)
        if options.model_only and len(decoded_scans) >= MODEL_BATCHES * decoding.batch_scans:
            break
    if not decoded_scans:
        raise FeatrayError("none of the sampled scans can be decoded; `featray doctor` says why")
    stages.load_here()
    _measure_model(times, job.extractor, _make_batches(decoded_scans, decoding.batch_scans), options.calls)
    if not options.model_only:
        _measure_write(times, stages, decoded_scans[: MODEL_BATCHES * decoding.batch_scans])
    layers = [{"name": layer.name, "path": layer.path, "pool": layer.pool} for layer in job.extractor.layers]
    return {**times.summarize(), "layers": layers, "batch": config.model.batch_size}


@dataclass
class _StageTimes:
    """The seconds of every stage and the sizes, scan by scan.

    Attributes:
        repeats: Number of times that each function is called for each scan.
        seconds: CPU and wall seconds of each scan, by stage.
        fastest: Number of scans for which each function was the fastest, by stage.
        sizes: Number of bytes or patches of each scan, by kind of size.
    """

    repeats: int
    seconds: dict[str, list[Seconds]] = field(default_factory=dict)
    fastest: dict[str, Counter[str]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def measure(self, stage: str, tasks: dict[str, Task], scans: int = 1) -> None:
        """Time each of several tasks with the same result in turn, and add the times of the fastest one.

        Args:
            stage: Name of the stage.
            tasks: The tasks by name.
            scans: Number of scans that each task processes.
        """
        is_first = stage not in self.seconds
        measured: dict[str, list[Seconds]] = {name: [] for name in tasks}
        for number in range(self.repeats + is_first):
            for name, task in tasks.items():
                seconds = _time_call(task)
                if number or not is_first:  # the first call of all also imports modules and allocates memory
                    measured[name].append(seconds)
        medians = {
            name: (statistics.median(cpu for cpu, _ in values), statistics.median(wall for _, wall in values))
            for name, values in measured.items()
        }
        fastest = min(medians, key=lambda name: medians[name])
        cpu_s, wall_s = medians[fastest]
        self.add_seconds(stage, fastest, (cpu_s / scans, wall_s / scans))

    def add_seconds(self, stage: str, function: str, seconds: Seconds) -> None:
        """Add the seconds of one scan and the name of the function that took them."""
        self.seconds.setdefault(stage, []).append(seconds)
        self.fastest.setdefault(stage, Counter())[function] += 1

    def add_size(self, kind: str, count: int) -> None:
        """Add the number of bytes or patches of one scan."""
        self.sizes.setdefault(kind, []).append(count)

    def summarize(self) -> dict[str, Any]:
        """Return means over the scans, and the function that was the fastest for most scans."""
        return {
            "cpu_s": {
                stage: statistics.mean(cpu for cpu, _ in values) for stage, values in self.seconds.items()
            },
            "wall_s": {
                stage: statistics.mean(wall for _, wall in values) for stage, values in self.seconds.items()
            },
            "fastest": {stage: counts.most_common(1)[0][0] for stage, counts in self.fastest.items()},
            **{kind: statistics.mean(counts) for kind, counts in self.sizes.items()},
        }


def _time_call(task: Task) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    task()
    return time.process_time() - cpu, time.perf_counter() - wall


def _measure_decoding(
    times: _StageTimes, decoding: Decoding, config: Config, scan: Scan, decoded: Decoded
) -> None:
    reader = decoding.decoder.reader
    result = reader.read(scan)
    times.measure("read", {"fetch": lambda: _fetch_files(reader, scan)})
    times.measure("decompress", _make_decompressors(reader, scan))
    _measure_resize(times, config, scan, result, decoded)
    times.measure("decode", {"featray": lambda: decoding.decoder(scan)})
    times.add_size("bytes_read", result.bytes_read)
    times.add_size("bytes_raw", _count_raw_bytes(result))
    times.add_size("bytes_input", decoded.tensor.nbytes)
    times.add_size("patches", len(decoded.tensor))


def _fetch_files(reader: Reader, scan: Scan) -> list[bytes]:
    """Return the bytes of the scan's files."""
    source = reader.source
    fs, _ = open_url(scan.uri if "://" in scan.uri else source.uri, source.storage_options)
    return [fs.cat_file(path) for path in ([scan.archive] if scan.archive else scan.files)]


def _make_decompressors(reader: Reader, scan: Scan) -> dict[str, Task]:
    """Return the tasks that turn a scan's bytes into voxels, including featray's own reader."""
    own: dict[str, Task] = {"featray": lambda: reader.read(scan)}
    if scan.archive or "://" in scan.uri or not scan.files:  # without files, the reader finds them itself
        return own
    if scan.format == "dicom":
        return {**own, **lower_bounds.make_series_readers(scan.files)}
    if scan.format == "nifti" and len(scan.files) == 1:
        (data,) = _fetch_files(reader, scan)
        uncompressed = {"none": lambda: None} if data[:2] != GZIP_MAGIC else {}
        return {**own, **uncompressed, **lower_bounds.make_inflaters(data)}
    return own


def _measure_resize(
    times: _StageTimes, config: Config, scan: Scan, result: ReadResult, decoded: Decoded
) -> None:
    volume = result.content
    if not isinstance(volume, Volume) or result.mask is not None or volume.slice_origins_lps is not None:
        seconds = decoded.record.preprocess_s  # resizing cannot be timed apart from the other preprocessing
        times.add_seconds("resize", "featray", (seconds, seconds))
        return
    steps, center = config.preprocess, scan.center_lps
    own = {"featray": lambda: preprocess(volume, steps, center_lps=center)}
    times.measure("resize", {**own, **lower_bounds.make_resizers(volume, config, decoded.tensor)})


def _count_raw_bytes(result: ReadResult) -> int:
    """Return the size of the decoded voxels."""
    content = result.content
    values = content.voxels_zyx if isinstance(content, Volume) else content.values
    return int(values.nbytes)


def _make_batches(decoded_scans: Sequence[Decoded], size: int) -> list[Sequence[Decoded]]:
    """Return up to `MODEL_BATCHES` full batches, or the incomplete one if no batch is full."""
    batches = [decoded_scans[start : start + size] for start in range(0, len(decoded_scans), size)]
    full = [batch for batch in batches if len(batch) == size] or batches
    return full[:MODEL_BATCHES]


def _measure_model(
    times: _StageTimes, model: Extractor, batches: Sequence[Sequence[Decoded]], calls: int
) -> None:
    for batch in batches:
        tensors = [decoded.tensor for decoded in batch]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:  # inputs of different shapes share no batch
            tensors = tensors[:1]
        inputs = [concatenate_rows(tensors)[0]] * (1 if calls == 1 else calls * CALLS_PER_THREAD)
        run_model = functools.partial(_run_model, model, inputs, calls)
        times.measure("model", {"bare": run_model}, scans=len(tensors) * len(inputs))


def _run_model(model: Extractor, inputs: Sequence[Any], calls: int) -> None:
    """Call the model on each input, with several concurrent calls in the same way as engine inline."""
    for _ in parallel_map(model, inputs, calls):
        pass


def _measure_write(times: _StageTimes, stages: Stages, decoded_scans: Sequence[Decoded]) -> None:
    file_scans = decoded_scans[: stages.scans_per_file]
    rows = extract(stages.extractor, file_scans, recipe=stages.recipe)
    times.measure("write", {"featray": lambda: stages.write(rows)}, scans=len(file_scans))


if __name__ == "__main__":
    sys.exit(main())
