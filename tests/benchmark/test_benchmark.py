"""`featray benchmark`: the derived figures, the texts, the plot, and one small benchmark from end to end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from featray.benchmark import instrument, lower_bounds, plot
from featray.benchmark.bottleneck import explain_rate
from featray.benchmark.metrics import (
    IsolatedStages,
    RunMetrics,
    Spread,
    StageUsage,
    VariantMetrics,
    combine_runs,
    split_core_seconds,
)
from featray.benchmark.process_monitor import monitor_command
from featray.benchmark.report import BenchmarkReport
from featray.benchmark.run import _BenchmarkRunner, benchmark
from featray.benchmark.sample import count_slices, sample_collection, sample_phantoms
from featray.benchmark.settings import BenchmarkSettings
from featray.benchmark.start_up import combine_start_up
from featray.config import CacheConfig, load
from featray.errors import ConfigError, FeatrayError
from featray.stages.decode import Decoder
from featray.stages.list import list_scans

CORES = 2
SECONDS = {"read": 0.01, "decompress": 0.2, "resize": 0.05, "decode": 0.3, "model": 0.15, "write": 0.01}
"""Seconds per scan. The required stages take 0.4 CPU seconds, so the ideal on two cores is 5 scans/s."""


def make_spread(value: float) -> Spread:
    return Spread(value, value, value)


def make_isolated(model_wall_s: float = 0.1) -> IsolatedStages:
    seconds = {name: make_spread(value) for name, value in SECONDS.items()}
    wall = {**seconds, "model_all_cores": make_spread(model_wall_s)}
    return IsolatedStages(seconds, wall, {"decompress": "deflate"}, 3e7, 6e7, 8e6, 1)


def make_variant(
    rate: float | None, decode_s: float, model_s: float, cpu_s: float, decoders: int = 2
) -> VariantMetrics:
    """Return a variant with a rate in scans/s and with seconds per scan of its stages."""
    return VariantMetrics(
        name="inline",
        scans=(8, 56),
        rate=None if rate is None else make_spread(rate),
        wall_s=make_spread(20),
        start_up_s=5,
        first_opened_s=1,
        cpu_s=cpu_s,
        stages={"decode": StageUsage(decode_s, 0.3, decoders), "model": StageUsage(model_s, 0.15, 1)},
        cpu_by_role={"driver": 0.2},
        overhead_s=cpu_s - 0.45,
        peak_bytes={"tree": 10**9},
        store_bytes=None,
        spilled=None,
    )


def make_run(scans: int, wall_s: float, cpu_s: float, decode_wall_s: float = 1.0) -> RunMetrics:
    return RunMetrics("ray", scans, wall_s, cpu_s, stages={"decode": StageUsage(decode_wall_s, 1.0, 2)})


def test_the_ideal_rate_is_cores_divided_by_the_cpu_seconds_of_the_required_stages() -> None:
    assert make_isolated().compute_ideal_rate(CORES) == pytest.approx(CORES / 0.4)
    assert make_isolated().compute_ideal_rate(4) == pytest.approx(10)


def test_the_ideal_rate_is_the_rate_of_the_model_if_that_is_lower() -> None:
    assert make_isolated(model_wall_s=0.5).compute_ideal_rate(CORES) == pytest.approx(2)


def test_the_rate_is_the_difference_in_scans_divided_by_the_difference_in_time() -> None:
    variant = combine_runs(
        [make_run(10, 12.0, 9.0), make_run(30, 17.0, 19.0), make_run(10, 14.0, 9.0), make_run(30, 18.0, 19.0)]
    )
    assert variant.rate == Spread(4.5, 4.0, 5.0)
    assert variant.cpu_s == pytest.approx(0.5)
    assert variant.start_up_s == pytest.approx(13 - 10 / 4.5)
    assert variant.compute_efficiency(9.0) == pytest.approx(0.5)
    assert variant.compute_efficiency(9.0, listing_s=1 / 4.5) == pytest.approx(0.25)


def test_the_usage_of_stages_is_per_additional_scan() -> None:
    variant = combine_runs([make_run(10, 12.0, 9.0, 2.0), make_run(30, 17.0, 19.0, 8.0)])
    assert variant.stages["decode"].wall_s == pytest.approx(0.3)
    assert variant.compute_utilization("decode") == pytest.approx(0.3 * 4 / 2)


def test_a_larger_run_that_took_no_longer_gives_no_rate() -> None:
    variant = combine_runs([make_run(10, 12.0, 9.0), make_run(30, 12.0, 10.0)])
    assert (variant.rate, variant.start_up_s, variant.compute_efficiency(5.0)) == (None, None, None)
    assert "no rate, because in one round the larger run took no longer than the smaller one" in explain_rate(
        variant, make_isolated(), CORES
    )


def test_core_seconds_add_up_to_the_time_of_all_cores() -> None:
    variant = make_variant(4.0, decode_s=0.4, model_s=0.15, cpu_s=0.48)
    parts = split_core_seconds(
        replace(variant, stages={**variant.stages, "write": StageUsage(0, 0, 1)}), make_isolated(), CORES
    )
    assert sum(parts.values()) == pytest.approx(CORES / 4.0)
    assert parts["idle"] == pytest.approx(0.02)
    assert parts["engine"] == pytest.approx(0.03)
    assert parts["decode more"] == pytest.approx(0.05)


def test_the_explanation_names_busy_decode_workers_and_predicts_the_rate_with_more() -> None:
    variant = make_variant(2.0, decode_s=0.5, model_s=0.2, cpu_s=0.5, decoders=1)
    assert explain_rate(variant, make_isolated(), CORES).startswith(
        "inline: limited by decompression: 1 more decode worker would raise the rate from 2.0 to 4.0 "
        "scans/s; the model is idle 60 % of the time. 2.00 of the ideal 5.00 scans/s, efficiency 0.40"
    )


def test_the_explanation_names_the_cores_if_all_are_busy() -> None:
    variant = make_variant(4.0, decode_s=0.45, model_s=0.15, cpu_s=0.49)
    assert "limited by the 2 cores: 2 more cores would raise the rate from 4.0 to 8.0" in explain_rate(
        variant, make_isolated(), CORES
    )


def test_the_explanation_names_the_model_if_it_is_always_busy() -> None:
    variant = make_variant(2.0, decode_s=0.3, model_s=0.5, cpu_s=0.5)
    assert (
        "limited by the model: 1 more concurrent model call would raise the rate from 2.0 to 4.0"
        in explain_rate(variant, make_isolated(), CORES)
    )


def test_the_explanation_names_waiting_if_no_stage_is_busy() -> None:
    variant = make_variant(2.0, decode_s=0.4, model_s=0.2, cpu_s=0.5)
    assert (
        "limited by waiting, not by a stage: decode workers are idle 60 % of the time, the model is idle "
        "60 % of the time, 1.0 of 2 cores are busy"
    ) in explain_rate(variant, make_isolated(), CORES)


def test_the_explanation_warns_if_other_programs_used_the_cores() -> None:
    variant = make_variant(2.0, decode_s=0.4, model_s=0.2, cpu_s=0.5)
    assert "idle machine" not in explain_rate(variant, make_isolated(), CORES)
    assert "measure again on an idle machine" in explain_rate(
        replace(variant, background_cores=0.7), make_isolated(), CORES
    )


def test_the_plot_is_an_svg_with_one_bar_per_variant() -> None:
    bars = {
        "ideal": {"decompress": 0.2, "model": 0.1},
        "<ray>": {"decompress": 0.2, "engine": 0.1, "idle": 0.3},
    }
    root = ET.fromstring(plot.plot("title", bars, {"ideal": 6.7, "<ray>": 3.3}))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ideal", "<ray>", "6.70/s", "3.30/s", "engine", "idle"} <= set(texts)
    parts = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    widths = [float(part.attrib["width"]) for part in parts]
    assert widths == pytest.approx(
        [2 * widths[1], widths[1], 2 * widths[1], widths[1], 3 * widths[1]], abs=0.2
    )


def test_a_recorded_stage_returns_the_same_and_records_its_calls(tmp_path: Path) -> None:
    stage = pickle.loads(pickle.dumps(instrument._RecordedStage(_double, "decode", str(tmp_path))))
    before = time.monotonic()
    assert [stage(3), stage(4)] == [6, 8]
    with pytest.raises(TypeError):
        stage(None)
    (calls,) = instrument.read_recordings(tmp_path).values()
    assert (calls.calls, calls.max_concurrent) == (3, 1)
    assert before <= calls.first_s <= calls.last_s <= time.monotonic()


def test_the_cpu_time_of_overlapping_calls_counts_once() -> None:
    calls = [
        instrument._Call(1, start=0.0, end=2.0, cpu_start=0.0, cpu_end=3.0),
        instrument._Call(1, start=1.0, end=3.0, cpu_start=1.5, cpu_end=5.0),
        instrument._Call(1, start=4.0, end=5.0, cpu_start=5.5, cpu_end=6.0),
        instrument._Call(2, start=0.0, end=1.0, cpu_start=0.0, cpu_end=1.0),
    ]
    of_processes = instrument._sum_calls(calls, process_clock=True)
    of_threads = instrument._sum_calls(calls, process_clock=False)
    assert (of_processes.cpu_s, of_threads.cpu_s) == (5.0 + 0.5 + 1.0, 3.0 + 3.5 + 0.5 + 1.0)
    assert (of_processes.wall_s, of_processes.max_concurrent) == (6.0, 2)


def _double(value: int) -> int:
    return 2 * value


@pytest.mark.slow
def test_the_monitor_measures_a_command_with_its_child_processes() -> None:
    code = (
        "import subprocess, sys, time; document = sys.stdin.read(); print(document)\n"
        "burn = 'import time; end = time.process_time() + 0.6\\nwhile time.process_time() < end: pass'\n"
        "sys.exit(subprocess.call([sys.executable, '-c', burn]) + 3)"
    )
    usage = monitor_command([sys.executable, "-c", code], {"a": 1})
    assert (usage.exit_code, json.loads(usage.output)) == (3, {"a": 1})
    assert len(usage.cpu_s) == 2
    assert sum(usage.cpu_s.values()) > 0.3
    assert usage.peak_bytes > 10**6
    assert (usage.store_bytes, usage.spilled) == (None, None)


@pytest.mark.slow
def test_an_interrupted_monitor_ends_the_whole_process_tree(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from featray.benchmark import process_monitor\n"
        "process_monitor.END_TIMEOUT_S = 0.5\n"
        "sleep = 'import time; time.sleep(60)'\n"
        'child = f\'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", {sleep!r}]); '
        'print(p.pid, flush=True); open({sys.argv[1]!r}, "w").write(str(p.pid)); p.wait()\'\n'
        "process_monitor.monitor_command([sys.executable, '-c', child], {})"
    )
    pid_file = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", code, str(pid_file)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # the tree is sampled five times a second
    process.send_signal(2)
    process.wait(60)
    try:
        state = psutil.Process(int(pid_file.read_text())).status()
    except psutil.NoSuchProcess:
        return
    assert state == psutil.STATUS_ZOMBIE  # it has ended, but its new parent has not read its exit code


def test_any_number_of_phantoms_has_about_120_slices_on_average() -> None:
    counts = [count_slices(number) for number in range(400)]
    assert 40 <= min(counts) < max(counts) <= 275
    for count in (8, 16, 56, 400):
        assert np.mean(counts[:count]) == pytest.approx(120, rel=0.1)


def test_a_sample_is_spread_over_sizes_and_repeats_its_scans(config_of: Any) -> None:
    config = load(config_of())
    sample = sample_collection(config, 5)
    assert (len(sample.scans), sample.found) == (5, 12)
    ids = [scan.scan_id for scan in sample.take(12)]
    assert len(set(ids)) == 12
    assert ids[5:7] == [f"{ids[0]}#1", f"{ids[1]}#1"]
    sizes = sorted(scan.size for scan in list_scans(config.source).scans)
    assert max(scan.size for scan in sample.scans) == sizes[-2]


@pytest.mark.parametrize(("scale", "orientation"), [((0, 1), "LPS"), ((-1, 1), "RAS")])
def test_the_single_pass_resize_equals_the_resize_of_the_pipeline(
    config_of: Any, scale: tuple[int, int], orientation: str
) -> None:
    config = load(config_of(preprocess={"scale": list(scale), "orientation": orientation}))
    scan = next(scan for scan in list_scans(config.source).scans if scan.format == "nifti")
    decoder = Decoder.from_config(config)
    volume, decoded = decoder.reader.read(scan).content, decoder(scan)
    resizers = lower_bounds.make_resizers(volume, config, decoded.tensor)  # type: ignore[arg-type]
    assert list(resizers) == ["single pass"]
    np.testing.assert_allclose(resizers["single pass"](), decoded.tensor[0], atol=1e-4)


def test_the_single_pass_resize_is_not_used_if_its_result_differs(config_of: Any) -> None:
    config = load(config_of(preprocess={"interpolation": "area"}))
    scan = next(scan for scan in list_scans(config.source).scans if scan.format == "nifti")
    decoder = Decoder.from_config(config)
    volume = decoder.reader.read(scan).content
    assert lower_bounds.make_resizers(volume, config, decoder(scan).tensor) == {}  # type: ignore[arg-type]


def test_an_inflater_is_used_only_if_it_inflates_the_whole_file() -> None:
    import gzip

    member = gzip.compress(b"a" * 1000)
    assert "deflate" in lower_bounds.make_inflaters(member)
    assert lower_bounds.make_inflaters(member + gzip.compress(b"b" * 70)) == {}
    assert lower_bounds.make_inflaters(b"plain") == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engines": ("spark",)}, "engine 'spark': expected some of inline, ray"),
        ({"rounds": 0}, "rounds: expected a whole number above 0, got 0"),
        ({"compare": {"loop": "nowhere.py"}}, "script nowhere.py does not exist"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkSettings(**wrong)


def test_the_larger_run_must_be_larger() -> None:
    assert BenchmarkSettings().choose_run_sizes(16) == (8, 56)
    with pytest.raises(ConfigError, match="--large 4 must be more than --small 8"):
        BenchmarkSettings(large=4).choose_run_sizes(16)


def test_phantoms_are_not_made_for_arrays(tmp_path: Path, config_of: Any) -> None:
    config = load(config_of(source={"uri": "none", "format": "npy"}))
    with pytest.raises(ConfigError, match=r"--phantoms: .* measure your own collection"):
        sample_phantoms(config, 2, tmp_path)


@pytest.mark.slow
def test_a_small_benchmark_measures_every_stage_one_engine_and_the_scripts_that_work(
    config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "zeros.py"
    script.write_text(SCRIPT)
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('this script reads no such file')\n")
    config = config_of(
        source={"uri": config_of()["source"]["uri"], "format": "nifti"},
        run={"engine": "inline", "decode": {"workers": 1}},
    )
    out = tmp_path / "report"
    report = benchmark(
        config,
        settings=BenchmarkSettings(
            rounds=1,
            small=2,
            large=12,
            engines=("inline",),
            compare={"zeros": script, "broken": broken},
        ),
        directory=out,
        show=True,
    )
    assert not Path(config["output"]["uri"]).exists()
    progress = [line.removeprefix("featray: ") for line in capsys.readouterr().err.splitlines()]
    assert progress[1:] == [
        "stages in isolation",
        "engine inline, 2 scans",
        "stages in isolation",
        "engine inline, 12 scans",
        "zeros, 2 scans",
        "zeros, 12 scans",
        "broken, 2 scans",
        "engine inline, 1 scans",
        "zeros, 1 scans",
    ]
    values = json.loads((out / "benchmark.json").read_text())
    assert set(values["alone"]["cpu_s"]) == {"read", "decompress", "resize", "decode", "model", "write"}
    assert [variant["name"] for variant in values["ways"]] == ["inline", "zeros"]
    inline = values["ways"][0]
    assert set(inline["stages"]) == {"decode", "model", "write"}
    assert inline["scans"] == [2, 12]
    assert inline["first_opened_s"] > 0
    assert {"tree", "driver", "largest decoder"} <= set(inline["peak_bytes"])
    assert values["ideal_rate"] > 0
    single, script_single = values["start_up"]
    assert (single["name"], script_single["name"]) == ("inline", "zeros")
    assert single["first_commit_s"] > inline["first_opened_s"]
    assert single["first_commit_cpu_s"] > 0
    assert script_single["first_commit_s"] is None
    assert values["scans"]["source"] == config["source"]["uri"]
    # The script writes zeros, so the relative difference is 1.
    assert [difference["relative"] for difference in values["differences"]["zeros"]] == [1.0] * 4
    ET.parse(out / "benchmark.svg")
    assert "stage in isolation" in report.text()
    assert len(values["verdicts"]) == 2
    assert list(values["failed_scripts"]) == ["broken"], "what was measured of the others is kept"
    assert "ValueError: this script reads no such file" in report.text()


SCRIPT = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
document = json.load(sys.stdin)
widths = {"z_mean": 4, "z_log_var": 4, "pre_latent": 16, "conv_2": 8}
columns = {
    layer["name"]: [[0.0] * widths[layer["path"].split("/")[-1]]] * len(document["files"])
    for layer in document["layers"]
}
pq.write_table(pa.table(columns), document["out"])
"""


@pytest.mark.slow
def test_a_failed_measurement_is_named_with_its_error(config_of: Any, tmp_path: Path) -> None:
    config = config_of(model={"uri": str(tmp_path / "gone.keras")})
    with pytest.raises(FeatrayError, match=r"(?s)stages in isolation: ended with exit code 2:.*gone\.keras"):
        benchmark(config, settings=BenchmarkSettings(rounds=1, engines=("inline",)), directory=tmp_path)


def test_runs_without_a_cache_do_not_use_that_of_the_config(tmp_path: Path, config_of: Any) -> None:
    user_cache = {"uri": str(tmp_path / "of the user"), "max_gb": 3, "storage_options": {"key": "K"}}
    sample = sample_collection(load(config_of(cache=user_cache)), 2)
    runner = _BenchmarkRunner.create(sample, BenchmarkSettings(), tmp_path, show=False)
    assert load(runner.config).cache == CacheConfig()


def test_each_engine_runs_with_an_empty_cache_and_then_with_the_filled_one(
    tmp_path: Path, config_of: Any
) -> None:
    seen: list[tuple[int, bool]] = []

    class Runner(_BenchmarkRunner):
        def _run_engine(self, engine: str, scans: Any, sections: Any = None) -> RunMetrics:
            count = len(scans)
            folder = Path(sections["cache"]["uri"])
            seen.append((count, folder.exists()))
            folder.mkdir(exist_ok=True)
            (folder / "entries").write_bytes(bytes(100 * count))
            return make_run(count, 10.0 + count, 2.0 * count)

    sample = sample_collection(load(config_of()), 2)
    runner = Runner.create(sample, BenchmarkSettings(small=2, large=6, cache=True), tmp_path, show=False)
    runs = list(runner._run_with_cache("inline"))
    assert seen == [(2, False), (2, True), (6, False), (6, True)]
    assert [run.variant for run in runs] == ["inline, cache empty", "inline, cache filled"] * 2
    assert runner.cache_bytes == 100
    assert not (tmp_path / "cache").exists()


def test_the_report_compares_runs_with_a_cache_with_the_model_alone() -> None:
    report = BenchmarkReport(
        machine={},
        scans={"source": "ct", "distinct": 1, "found": 1, "made": False, "small": 1, "large": 2},
        listing_s=0.0,
        isolated=make_isolated(model_wall_s=0.1),
        variants=(),
        cores=CORES,
        rounds=1,
        cached=(make_variant(8.0, 0.1, 0.1, 0.2),),
        cache_bytes=6e6,
    )
    assert report.to_json()["cached"][0]["share_of_model_rate"] == pytest.approx(0.8)
    assert "the cache holds 6.00 MB per scan; its model inputs are 8.00 MB" in report.text()


def test_the_start_up_is_that_of_runs_of_one_scan_and_of_first_commits() -> None:
    single = [replace(make_run(1, wall, 2 * wall), peak_bytes={"tree": 10**9}) for wall in (7.0, 8.0, 9.0)]
    many = [
        replace(make_run(8, 20.0, 40.0), first_commit_s=5.0 + n, first_commit_cpu_s=9.0) for n in range(3)
    ]
    start_up = combine_start_up(single, many)
    assert (start_up.wall_s, start_up.cpu_s) == (Spread(8.0, 7.0, 9.0), Spread(16.0, 14.0, 18.0))
    assert (start_up.first_commit_s, start_up.first_commit_cpu_s) == (6.0, 9.0)
    report = BenchmarkReport(
        machine={},
        scans={"source": "s3://bucket/ct", "distinct": 1, "found": 3, "made": False, "small": 1, "large": 2},
        listing_s=0.0,
        isolated=make_isolated(),
        variants=(),
        cores=CORES,
        rounds=3,
        start_up=(start_up,),
    )
    assert "1 distinct scans (a sample of the 3 scans of s3://bucket/ct)" in report.text()
    (line,) = [line for line in report.text().splitlines() if line.startswith("ray ")]
    assert " ".join(line.split()) == "ray 8.0 (7.0 to 9.0) 16.0 (14.0 to 18.0) 1.00 6.0 9.0"


def test_the_cpu_seconds_until_a_time_are_those_of_the_next_sample() -> None:
    usage = monitor_command([sys.executable, "-c", "import time; time.sleep(0.5)"], {})
    usage = replace(usage, started_s=100.0, samples=((100.2, 0.1), (100.4, 0.3)), cpu_s={1: 0.5})
    assert [usage.get_cpu_s(seconds) for seconds in (0.1, 0.3, 0.9)] == [0.1, 0.3, 0.5]
