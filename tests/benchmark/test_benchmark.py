"""`featray benchmark`: the arithmetic, the sentences, the picture, and one small run of all of it."""

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
from featray.benchmark import sample as collection
from featray.benchmark.bottleneck import verdict
from featray.benchmark.metrics import Alone, RunFigures, Spread, Stage, WayFigures, core_seconds, way_of
from featray.benchmark.process_monitor import watch
from featray.benchmark.run import benchmark
from featray.benchmark.settings import Plan
from featray.config import load
from featray.errors import ConfigError, FeatrayError
from featray.stages.decode import Decoder
from featray.stages.list import list_scans

CORES = 2
SECONDS = {"read": 0.01, "decompress": 0.2, "resize": 0.05, "decode": 0.3, "model": 0.15, "write": 0.01}
"""Per scan: 0.4 CPU seconds that nobody can do without, so 5 scans/s on two cores."""


def certain(value: float) -> Spread:
    return Spread(value, value, value)


def alone(model_wall_s: float = 0.1) -> Alone:
    seconds = {name: certain(value) for name, value in SECONDS.items()}
    wall = {**seconds, "model_all_cores": certain(model_wall_s)}
    return Alone(seconds, wall, {"decompress": "deflate"}, 3e7, 6e7, 8e6, 1)


def way(rate: float | None, decode_s: float, model_s: float, cpu_s: float, decoders: int = 2) -> WayFigures:
    """Return a way with so many scans/s, whose stages take so many seconds per scan."""
    return WayFigures(
        name="inline",
        scans=(8, 56),
        rate=None if rate is None else certain(rate),
        wall_s=certain(20),
        start_up_s=5,
        first_opened_s=1,
        cpu_s=cpu_s,
        stages={"decode": Stage(decode_s, 0.3, decoders), "model": Stage(model_s, 0.15, 1)},
        cpu_by_role={"driver": 0.2},
        overhead_s=cpu_s - 0.45,
        peak_bytes={"tree": 10**9},
        store_bytes=None,
        spilled=None,
    )


def run(scans: int, wall_s: float, cpu_s: float, decode_wall_s: float = 1.0) -> RunFigures:
    return RunFigures("ray", scans, wall_s, cpu_s, stages={"decode": Stage(decode_wall_s, 1.0, 2)})


def test_the_ideal_is_cores_over_what_nobody_can_do_without() -> None:
    assert alone().ideal_rate(CORES) == pytest.approx(CORES / 0.4)
    assert alone().ideal_rate(4) == pytest.approx(10)


def test_the_ideal_is_the_models_own_rate_where_that_is_lower() -> None:
    assert alone(model_wall_s=0.5).ideal_rate(CORES) == pytest.approx(2)


def test_a_rate_is_the_difference_in_scans_over_the_difference_in_time() -> None:
    found = way_of([run(10, 12.0, 9.0), run(30, 17.0, 19.0), run(10, 14.0, 9.0), run(30, 18.0, 19.0)])
    assert found.rate == Spread(4.5, 4.0, 5.0)
    assert found.cpu_s == pytest.approx(0.5)
    assert found.start_up_s == pytest.approx(13 - 10 / 4.5)
    assert found.efficiency(9.0) == pytest.approx(0.5)
    assert found.efficiency(9.0, listing_s=1 / 4.5) == pytest.approx(0.25)


def test_stages_are_counted_per_further_scan() -> None:
    found = way_of([run(10, 12.0, 9.0, 2.0), run(30, 17.0, 19.0, 8.0)])
    assert found.stages["decode"].wall_s == pytest.approx(0.3)
    assert found.busy("decode") == pytest.approx(0.3 * 4 / 2)


def test_a_larger_run_that_took_no_longer_gives_no_rate() -> None:
    found = way_of([run(10, 12.0, 9.0), run(30, 12.0, 10.0)])
    assert (found.rate, found.start_up_s, found.efficiency(5.0)) == (None, None, None)
    assert "too few scans to tell" in verdict(found, alone(), CORES)


def test_core_seconds_add_up_to_the_cores_time() -> None:
    found = way(4.0, decode_s=0.4, model_s=0.15, cpu_s=0.48)
    parts = core_seconds(replace(found, stages={**found.stages, "write": Stage(0, 0, 1)}), alone(), CORES)
    assert sum(parts.values()) == pytest.approx(CORES / 4.0)
    assert parts["idle"] == pytest.approx(0.02)
    assert parts["engine"] == pytest.approx(0.03)
    assert parts["decode more"] == pytest.approx(0.05)


def test_the_verdict_names_decode_workers_that_never_rest_and_what_more_would_do() -> None:
    found = way(2.0, decode_s=0.5, model_s=0.2, cpu_s=0.5, decoders=1)
    assert verdict(found, alone(), CORES).startswith(
        "inline: bound by decompression: 1 more decode worker would lift it from 2.0 to 4.0 scans/s; "
        "the model is idle 60 %. 2.00 of 5.00 scans/s, efficiency 0.40"
    )


def test_the_verdict_names_the_cores_when_they_are_all_busy() -> None:
    found = way(4.0, decode_s=0.45, model_s=0.15, cpu_s=0.49)
    assert "bound by the 2 cores: 2 more cores would lift it from 4.0 to 8.0" in verdict(
        found, alone(), CORES
    )


def test_the_verdict_names_the_model_when_it_never_rests() -> None:
    found = way(2.0, decode_s=0.3, model_s=0.5, cpu_s=0.5)
    assert "bound by the model: 1 more of it at once would lift it from 2.0 to 4.0" in verdict(
        found, alone(), CORES
    )


def test_the_verdict_says_when_everything_waits() -> None:
    found = way(2.0, decode_s=0.4, model_s=0.2, cpu_s=0.5)
    assert "decode workers are idle 60 %, the model is idle 60 %, 1.0 of 2 cores are busy" in verdict(
        found, alone(), CORES
    )


def test_the_verdict_doubts_what_was_measured_beside_other_programs() -> None:
    found = way(2.0, decode_s=0.4, model_s=0.2, cpu_s=0.5)
    assert "quiet machine" not in verdict(found, alone(), CORES)
    assert "measure again on a quiet machine" in verdict(replace(found, others_cores=0.7), alone(), CORES)


def test_the_plot_is_a_picture_with_one_bar_for_each_way() -> None:
    bars = {
        "ideal": {"decompress": 0.2, "model": 0.1},
        "<ray>": {"decompress": 0.2, "engine": 0.1, "idle": 0.3},
    }
    root = ET.fromstring(plot.plot("title", bars, {"ideal": 6.7, "<ray>": 3.3}))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ideal", "<ray>", "6.70/s", "3.30/s", "engine", "idle"} <= set(texts)
    drawn = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if len(one)]
    widths = [float(one.attrib["width"]) for one in drawn]
    assert widths == pytest.approx(
        [2 * widths[1], widths[1], 2 * widths[1], widths[1], 3 * widths[1]], abs=0.2
    )


def test_observed_stages_do_the_same_and_write_down_when(tmp_path: Path) -> None:
    stage = pickle.loads(pickle.dumps(instrument._Observed(_twice, "decode", str(tmp_path))))
    before = time.monotonic()
    assert [stage(3), stage(4)] == [6, 8]
    with pytest.raises(TypeError):
        stage(None)
    (work,) = instrument.noted(tmp_path).values()
    assert (work.calls, work.at_once) == (3, 1)
    assert before <= work.first_s <= work.last_s <= time.monotonic()


def test_processor_time_of_calls_that_overlap_counts_once() -> None:
    calls = [
        instrument._Call(1, start=0.0, end=2.0, cpu_start=0.0, cpu_end=3.0),
        instrument._Call(1, start=1.0, end=3.0, cpu_start=1.5, cpu_end=5.0),
        instrument._Call(1, start=4.0, end=5.0, cpu_start=5.5, cpu_end=6.0),
        instrument._Call(2, start=0.0, end=1.0, cpu_start=0.0, cpu_end=1.0),
    ]
    together, apart = instrument._summed(calls, shared=True), instrument._summed(calls, shared=False)
    assert (together.cpu_s, apart.cpu_s) == (5.0 + 0.5 + 1.0, 3.0 + 3.5 + 0.5 + 1.0)
    assert (together.wall_s, together.at_once) == (6.0, 2)


def _twice(value: int) -> int:
    return 2 * value


def test_a_watched_command_is_counted_with_its_children() -> None:
    code = (
        "import subprocess, sys, time; asked = sys.stdin.read(); print(asked)\n"
        "burn = 'import time; end = time.process_time() + 0.6\\nwhile time.process_time() < end: pass'\n"
        "sys.exit(subprocess.call([sys.executable, '-c', burn]) + 3)"
    )
    seen = watch([sys.executable, "-c", code], {"a": 1})
    assert (seen.exit_code, json.loads(seen.output)) == (3, {"a": 1})
    assert len(seen.cpu_s) == 2
    assert sum(seen.cpu_s.values()) > 0.3
    assert seen.peak_bytes > 10**6
    assert (seen.store_bytes, seen.spilled) == (None, None)


def test_a_watched_command_leaves_nothing_behind_when_it_is_interrupted(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from featray.benchmark import watch\n"
        "watch.GRACE_S = 0.5\n"
        "nap = 'import time; time.sleep(60)'\n"
        'child = f\'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", {nap!r}]); '
        'print(p.pid, flush=True); open({sys.argv[1]!r}, "w").write(str(p.pid)); p.wait()\'\n'
        "watch.watch([sys.executable, '-c', child], {})"
    )
    note = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", code, str(note)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # the tree is looked at five times a second
    process.send_signal(2)
    process.wait(60)
    try:
        state = psutil.Process(int(note.read_text())).status()
    except psutil.NoSuchProcess:
        return
    assert state == psutil.STATUS_ZOMBIE  # dead, and whoever inherited it has not looked yet


def test_phantoms_have_about_120_slices_over_any_number_of_them() -> None:
    counts = [collection.slices(number) for number in range(400)]
    assert 40 <= min(counts) < max(counts) <= 275
    for many in (8, 16, 56, 400):
        assert np.mean(counts[:many]) == pytest.approx(120, rel=0.1)


def test_a_sample_is_spread_over_sizes_and_goes_round(config_of: Any) -> None:
    config = load(config_of())
    sample = collection.sample_of(config, 5)
    assert (len(sample.scans), sample.found) == (5, 12)
    ids = [scan.scan_id for scan in sample.first(12)]
    assert len(set(ids)) == 12
    assert ids[5:7] == [f"{ids[0]}#1", f"{ids[1]}#1"]
    sizes = sorted(scan.size for scan in list_scans(config.source).scans)
    assert max(scan.size for scan in sample.scans) == sizes[-2]


@pytest.mark.parametrize(("scale", "orientation"), [((0, 1), "LPS"), ((-1, 1), "RAS")])
def test_the_single_pass_resize_gives_what_the_pipeline_gives(
    config_of: Any, scale: tuple[int, int], orientation: str
) -> None:
    config = load(config_of(preprocess={"scale": list(scale), "orientation": orientation}))
    scan = next(scan for scan in list_scans(config.source).scans if scan.format == "nifti")
    decoder = Decoder.from_config(config)
    volume, decoded = decoder.reader.read(scan).content, decoder(scan)
    ways = lower_bounds.resizers(volume, config, decoded.tensor)  # type: ignore[arg-type]
    assert list(ways) == ["single pass"]
    np.testing.assert_allclose(ways["single pass"](), decoded.tensor[0], atol=1e-4)


def test_the_single_pass_resize_is_not_taken_where_it_is_another_one(config_of: Any) -> None:
    config = load(config_of(preprocess={"interpolation": "area"}))
    scan = next(scan for scan in list_scans(config.source).scans if scan.format == "nifti")
    decoder = Decoder.from_config(config)
    volume = decoder.reader.read(scan).content
    assert lower_bounds.resizers(volume, config, decoder(scan).tensor) == {}  # type: ignore[arg-type]


def test_an_inflater_is_only_taken_where_it_gives_the_whole_file() -> None:
    import gzip

    one = gzip.compress(b"a" * 1000)
    assert "deflate" in lower_bounds.inflaters(one)
    assert lower_bounds.inflaters(one + gzip.compress(b"b" * 70)) == {}
    assert lower_bounds.inflaters(b"plain") == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engines": ("spark",)}, "engine 'spark': expected some of inline, ray"),
        ({"rounds": 0}, "rounds: expected a whole number above 0, got 0"),
        ({"beside": {"loop": "nowhere.py"}}, "script nowhere.py does not exist"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**wrong)


def test_the_larger_run_must_be_larger() -> None:
    assert Plan().sizes(16) == (8, 56)
    with pytest.raises(ConfigError, match="--many 4 must be more than --few 8"):
        Plan(many=4).sizes(16)


def test_arrays_are_not_made(tmp_path: Path, config_of: Any) -> None:
    config = load(config_of(source={"uri": "none", "format": "npy"}))
    with pytest.raises(ConfigError, match="measure your own collection"):
        collection.made_for(config, 2, tmp_path)


@pytest.mark.slow
def test_a_small_benchmark_measures_every_stage_and_one_engine_and_a_script(
    config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "copied.py"
    script.write_text(SCRIPT)
    config = config_of(
        source={"uri": config_of()["source"]["uri"], "format": "nifti"},
        run={"engine": "inline", "decode": {"workers": 1}},
    )
    out = tmp_path / "found"
    report = benchmark(
        config,
        plan=Plan(rounds=1, few=2, many=12, engines=("inline",), beside={"zeros": script}),
        directory=out,
        show=True,
    )
    assert not Path(config["output"]["uri"]).exists()
    measured = [line.removeprefix("featray: ") for line in capsys.readouterr().err.splitlines()]
    assert measured[1:] == [
        "stages alone",
        "engine inline, 2 scans",
        "stages alone",
        "engine inline, 12 scans",
        "zeros, 2 scans",
        "zeros, 12 scans",
    ]
    found = json.loads((out / "benchmark.json").read_text())
    assert set(found["alone"]["cpu_s"]) == {"read", "decompress", "resize", "decode", "model", "write"}
    assert [one["name"] for one in found["ways"]] == ["inline", "zeros"]
    inline = found["ways"][0]
    assert set(inline["stages"]) == {"decode", "model", "write"}
    assert inline["scans"] == [2, 12]
    assert inline["first_opened_s"] > 0
    assert {"tree", "driver", "largest decoder"} <= set(inline["peak_bytes"])
    assert found["ideal_rate"] > 0
    # The script writes zeros, so it is off by the whole of the largest value.
    assert [one["relative"] for one in found["differences"]["zeros"]] == [1.0] * 4
    ET.parse(out / "benchmark.svg")
    assert "stage alone" in report.text()
    assert len(found["verdicts"]) == 2


SCRIPT = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
asked = json.load(sys.stdin)
widths = {"z_mean": 4, "z_log_var": 4, "pre_latent": 16, "conv_2": 8}
columns = {
    one["name"]: [[0.0] * widths[one["path"].split("/")[-1]]] * len(asked["files"]) for one in asked["layers"]
}
pq.write_table(pa.table(columns), asked["out"])
"""


def test_a_run_that_ends_with_an_error_says_which_and_why(config_of: Any, tmp_path: Path) -> None:
    config = config_of(model={"uri": str(tmp_path / "gone.keras")})
    with pytest.raises(FeatrayError, match=r"(?s)stages alone ended with exit code 2:.*gone\.keras"):
        benchmark(config, plan=Plan(rounds=1, engines=("inline",)), directory=tmp_path)
