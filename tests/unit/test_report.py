"""The report page: self-contained, rows once, absent values with their reason, figures beside it."""

import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from report_rows import assert_valid
from transect.errors import InputError
from transect.report import write_report
from transect.report.figures import figures_of, key_numbers_of
from transect.report.page import sections_of
from transect.report.pick import Pick
from transect.report.records import compact, to_records
from transect.results import Row, Table

ELEMENTS = (
    "ffn", "ffn_up", "attn_heads", "attn", "attn_proj", "attn_residual", "attn_sublayer", "ffn_residual",
    "ffn_sublayer", "layer", "activation", "attn_norm", "ffn_norm",
)  # fmt: skip
VARIANTS = ("pre_norm/all", "pre_norm/skip_first", "post_norm/all", "post_norm/skip_first")


def fake_rows(model: str, layers: int, seed: int = 0) -> Table:
    """Rows as a measurement of one model would write them."""
    rng = np.random.default_rng(seed)
    rows = [*_jump(layers, rng), *_nonlinearity(layers, rng), *_similarity(layers, rng)]
    stamp = {
        "model": model,
        "revision": "main",
        "dtype": "float32",
        "seed": 0,
        "data": "wiki.txt",
        "run": f"run-{model}",
    }
    return Table(rows).stamped(documents=97, **stamp)


def _with_error(metric: str, value: float, unit: str, **columns) -> Row:
    stderr = 0.01 + 0.02 * abs(value)
    error = {"stderr": stderr, "low": value - 2 * stderr, "high": value + 2 * stderr}
    return Row(metric=metric, value=value, unit=unit, n=24_001, **error, **columns)


def _jump(layers, rng):
    for variant in VARIANTS:
        yield from _turns(layers, rng, variant)
    for layer in range(layers + 1):
        yield Row(probe="jump", metric="stream_norm", value=layers / 4 * 1.25**layer, unit="1", layer=layer, n=24_001)


def _turns(layers, rng, variant):
    turn = 0.05 + 0.1 * np.exp(-np.arange(layers) / 2) + 0.01 * rng.random(layers)
    turn[-1] += 0.3 if variant.startswith("post_norm") else 0.15
    columns = {"probe": "jump", "variant": variant}
    for layer in range(layers):
        yield _with_error("displacement", float(turn[layer]), "1", layer=layer, **columns)
        yield Row(metric="update_ratio", value=float(turn[layer] * 3), unit="1", layer=layer, **columns)
        if layer == 0:
            yield Row(metric="jump_rate", value=None, reason="no layer before the first", unit="%", layer=0, **columns)
        else:
            rate = 100 * float(np.maximum(0, np.diff(turn[layer - 1 :])).sum())
            yield Row(metric="jump_rate", value=rate, unit="%", layer=layer, **columns)
        for end in range(layer + 1, layers + 1):
            angle = 1 - math.exp(-float(turn[layer:end].sum()))
            yield Row(metric="angular_distance", value=angle, unit="1", layer=layer, layer_to=end, **columns)


def _nonlinearity(layers, rng):
    for number, element in enumerate(ELEMENTS):
        for layer in range(layers):
            columns = {"probe": "nonlinearity", "element": element, "layer": layer}
            if element == "ffn_norm" and layer == 3:
                yield Row(metric="r2_heldout", value=None, reason="the fit is rank-deficient", unit="1", **columns)
                continue
            score = 1 - 0.05 * number + 0.2 * math.sin(layer / 4 + number) - 0.2 * rng.random()
            score = {("attn", 2): -2.5, ("ffn_up", layers - 1): -1834.2}.get((element, layer), min(score, 0.999))
            yield _with_error("r2_heldout", score, "1", **columns)
            yield Row(metric="r2_insample", value=min(1.0, max(score, 0) + 0.08), unit="1", **columns)
            yield Row(metric="r2_floor", value=0.06, unit="1", **columns)
            if element in ("ffn", "attn"):
                cosine = float(np.clip(score, 0.6, 1))
                yield _with_error("cosine_closed_form", cosine, "1", **columns)
                yield Row(metric="constant_baseline", value=cosine * 0.5, unit="1", **columns)
                yield Row(metric="cone_size", value=cosine**2 * 0.25, unit="1", **columns)


def _similarity(layers, rng):
    for layer in range(layers + 1):
        for end in range(layer, layers + 1):
            alike = math.exp(-((end - layer) / layers) * 1.5)
            yield Row(probe="similarity", metric="cka", value=alike, unit="1", layer=layer, layer_to=end, n=4096)
        columns = {"probe": "similarity", "layer": layer, "n": 24_001}
        yield Row(metric="effective_rank", value=40 + 3 * layer + 5 * rng.random(), unit="directions", **columns)
        yield Row(metric="participation_ratio", value=12 + layer * rng.random(), unit="directions", **columns)
        yield Row(metric="anisotropy", value=0.1 + 0.5 * layer / layers, unit="1", **columns)


@pytest.fixture(scope="module")
def small() -> Table:
    return fake_rows("tiny/encoder", 5).where(probe="similarity") + Table(
        [
            Row(
                metric="loss",
                value=None,
                reason="no tokens </script> & none",
                unit="nats",
                probe="odd",
                model="tiny/encoder",
            )
        ]
    )


@pytest.fixture(scope="module")
def written(small, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("run")
    small.write(folder)
    (folder / "config.json").write_text(json.dumps({"seq_len": 127, "probes": {"similarity": {"sample": 4096}}}))
    record = {"torch": "2.13.0", "date": "2031-02-03", "notes": ["The text is the built-in sample."]}
    (folder / "environment.json").write_text(json.dumps(record))
    return write_report(folder, folder / "deep" / "page.html")


@pytest.fixture(scope="module")
def page(written) -> str:
    return written[0].read_text(encoding="utf-8")


def block(page: str, name: str):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)[1])


def test_page_loads_nothing_from_elsewhere(page):
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import|<link""", outside)
    assert "http" not in outside.replace("http-equiv", "")
    assert not re.search(r"""\bimport\s*\(|\bimport\s+[\w{*].*?from\s*["']https?:""", page)
    assert "default-src 'none'" in page


def test_plotting_bundle_is_embedded_once(page):
    assert page.count("window.vegaEmbed=") == 1
    assert page.count("<script>") == 2


def test_rows_stand_on_the_page_once(page, small):
    packed = block(page, "rows-data")
    assert len(packed["rows"]) == len(small)
    assert all(len(cells) == len(packed["columns"]) for cells in packed["rows"])
    assert packed["constant"]["model"] == "tiny/encoder" and "model" not in packed["columns"]
    for figure in block(page, "figures-data"):
        assert "datasets" not in figure["spec"] and '"values": [{' not in json.dumps(figure["spec"])
        assert '"name": "rows"' in json.dumps(figure["spec"])


def test_absent_value_keeps_its_reason_and_cannot_end_the_script(page):
    packed = block(page, "rows-data")
    odd = [dict(zip(packed["columns"], cells, strict=True)) for cells in packed["rows"]][-1]
    assert odd["value"] is None and odd["reason"] == "no tokens </script> & none"
    assert "loss: no tokens &lt;/script&gt; &amp; none (1)" in page


def test_header_and_run_record(page):
    for text in ("tiny/encoder", "wiki.txt", "2031-02-03", "The text is the built-in sample.", "2.13.0", "24,001"):
        assert text in page
    assert "<th>probes.similarity.sample</th><td>4096</td>" in page


def test_figures_beside_the_page_are_valid(written, page):
    names = {figure["id"] for figure in block(page, "figures-data")}
    folder = written[0].with_name("page_figures")
    assert {path.stem for path in written[1:]} == names and len(written) == 1 + 2 * len(names) > 1
    assert sorted(folder.iterdir()) == sorted(written[1:])
    for path in written[1:]:
        if path.suffix == ".svg":
            assert xml.etree.ElementTree.fromstring(path.read_text()).tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 3000


def test_known_probes_have_their_figures():
    records = to_records([*fake_rows("a/encoder", 6), *fake_rows("b/decoder", 30, seed=1)])
    sections = {section.probe: section for section in sections_of(records)}
    assert list(sections) == ["jump", "nonlinearity", "similarity"]
    assert {name: len(section.figures) for name, section in sections.items()} == {
        "jump": 7,
        "nonlinearity": 16,
        "similarity": 5,
    }
    for section in sections.values():
        for figure in section.figures:
            assert_valid(figure)
    titles = [figure.title for figure in sections["nonlinearity"].figures]
    assert "R² held out, every element: encoder" in titles
    notes = " ".join(figure.note for figure in sections["nonlinearity"].figures)
    assert "the lowest is −1,834, ffn_up in layer 29" in notes
    assert dict(sections["jump"].key_rows)["encoder"][0].endswith("(layer 5)")


def test_unknown_probe_gets_generic_figures():
    rows = [
        Row(
            metric="load",
            value=0.1 * layer + 0.01 * part,
            unit="1",
            probe="mine",
            layer=layer,
            part=str(part),
            model=model,
        )
        for layer in range(3)
        for part in range(6)
        for model in ("x", "y")
    ]
    rows += [
        Row(metric="loss", value=2.0, unit="nats", probe="mine", edit=edit, model="x") for edit in ("swap", "drop")
    ]
    records = to_records(rows)
    pick = Pick(tuple(records))
    titles = [figure.title for figure in figures_of("mine", pick)]
    assert titles == ["Load per layer: x", "Load per layer: y", "Loss"]
    assert key_numbers_of("mine", pick) == {}


def test_series_tell_revisions_apart():
    rows = [Row(metric="m", value=1.0, unit="1", model="org/net", revision=name) for name in ("step1", "step2")]
    assert [record["series"] for record in to_records(rows)] == ["net step1", "net step2"]
    same_name = [Row(metric="m", value=1.0, unit="1", model=name) for name in ("a/net", "b/net")]
    assert [record["series"] for record in to_records(same_name)] == ["a/net", "b/net"]


def test_compact_leaves_out_empty_columns():
    packed = compact(to_records([Row(metric="m", value=float(n), unit="1", layer=n) for n in range(2)]))
    assert packed["columns"] == ["layer", "value"] and packed["rows"] == [[0, 0.0], [1, 1.0]]
    assert packed["constant"] == {"metric": "m", "unit": "1", "series": "model"}


def test_user_errors_are_one_clear_line(tmp_path, small):
    (tmp_path / "file").write_text("")
    bad = tmp_path / "bad"
    small.write(bad)
    (bad / "config.json").write_text("{")
    cases = [
        (tmp_path, tmp_path / "a.html", "no rows.jsonl"),
        (Table(), tmp_path / "a.html", "no rows to report"),
        ([], tmp_path / "a.html", "no rows to report"),
        (small, tmp_path / "file" / "a.html", "cannot write"),
        (small, tmp_path, "is a folder"),
        (bad, tmp_path / "a.html", "is not JSON"),
    ]
    for given, output, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            write_report(given, output)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.html").exists()
