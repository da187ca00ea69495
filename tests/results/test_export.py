"""Exported tables hold what the replay holds, in every format, with nothing left to join."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from kvscope.core.errors import OutputExists, ResultError, UsageError
from kvscope.core.options import ExportFormat
from kvscope.results import export as export_module
from kvscope.results.export import FILES, JOINED, export
from tests.results.make import METRICS, make, values

LENGTHS = [7, 5]


def read(folder: Path, name: str, form: str) -> pd.DataFrame:
    file = folder / f"{name}.{form}"
    if form == "csv":
        return csv.read_csv(file, convert_options=csv.ConvertOptions(strings_can_be_null=True)).to_pandas()
    table = pq.read_table(file) if form == "parquet" else pa.ipc.open_file(file).read_all()
    return table.to_pandas()


@pytest.mark.parametrize("form", FILES)
def test_every_format_holds_the_same(tmp_path: Path, form: ExportFormat) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    folder = export(replay, tmp_path / "out", form=form)
    assert {file.name for file in folder.iterdir()} == {
        "export.json",
        *(f"{name}.{form}" for name in ("runs", "fidelity", "residency")),
    }
    for name, frame in (("fidelity", replay.fidelity()), ("residency", replay.residency())):
        found = read(folder, name, form)
        assert list(found.columns) == ["run", *JOINED.names, *frame.columns[1:]]
        assert len(found) == len(frame)
        for column in frame.columns:
            expected = frame[column].to_numpy(float, na_value=math.nan)
            assert np.allclose(found[column].to_numpy(float), expected, equal_nan=True, rtol=1e-6), column
        assert set(zip(found["run"], found["policy"], strict=True)) == {(0, "h2o"), (1, "tova")}
        keys = dict(zip(found["sequence"], found["budget_keys"], strict=True))
        assert keys == {0: 3, 1: 2}, "B of the sequence that the row is of"
        assert set(found["budget"]) == {"50%"}
    runs = read(folder, "runs", form)
    assert list(runs["label"]) == ["h2o", "tova"]
    assert list(runs["budget_keys"]) == [2.5, 2.5]
    assert list(runs["params"]) == ["{}", "{}"]
    for run, row in zip(replay.summary.runs, runs.to_dict("records"), strict=True):
        for name, value in run.metrics.items():
            assert row[name] == pytest.approx(value.mean)
            assert row[f"{name}_count"] == value.count
        assert row["decisions"] == run.decisions


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize(
    ("per", "rows"), [("head", 2 * 2 * 2 * 4), ("layer", 2 * 2 * 2), ("sequence", 2 * 2), ("run", 2)]
)
def test_means_of_every_level_equal_plain_loops(tmp_path: Path, per: str, rows: int) -> None:
    found = read(export(make(tmp_path / "r", LENGTHS), tmp_path / "out", per=per), "fidelity", "parquet")
    assert len(found) == rows
    for row in found.to_dict("records"):
        sequences = []
        for sequence, length in enumerate(LENGTHS):
            layers = []
            for layer in (0, 1):
                drawn = values(100 * row["run"] + 10 * sequence + layer, length)["output_error"]
                heads = [mean([float(v) for v in head if not math.isnan(v)]) for head in drawn]
                layers.append(heads[row["head"]] if per == "head" else mean(heads))
            sequences.append(layers[row["layer"]] if "layer" in row else mean(layers))
        expected = sequences[row["sequence"]] if "sequence" in row else mean(sequences)
        assert row["output_error"] == pytest.approx(expected, abs=1e-6)
        assert row["policy"] == ("h2o", "tova")[row["run"]]


def test_long_has_a_row_for_each_value(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    wide = read(export(replay, tmp_path / "wide"), "fidelity", "parquet")
    long = read(export(replay, tmp_path / "long", long=True), "fidelity", "parquet")
    places = ["run", "sequence", "layer", "head", "step"]
    assert list(long.columns) == ["run", *JOINED.names, *places[1:], "metric", "value"]
    assert len(long) == wide[list(METRICS)].notna().sum().sum()
    again = long.pivot(index=places, columns="metric", values="value")
    expected = wide.set_index(places)[list(METRICS)].dropna(how="all")
    assert np.allclose(again[list(METRICS)].sort_index(), expected.sort_index(), equal_nan=True)


def test_no_more_than_a_piece_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups are gathered up to a size, and written before the next one is read."""
    monkeypatch.setattr("kvscope.results.writer.GROUP_ROWS", 1)
    replay = make(tmp_path / "r", [40, 40, 40])
    written: list[int] = []
    original = export_module._writer

    def spy(*arguments: object) -> object:
        writer = original(*arguments)
        write = writer.write_table

        def noted(table: pa.Table) -> None:
            written.append(table.num_rows)
            write(table)

        monkeypatch.setattr(writer, "write_table", noted)
        return writer

    monkeypatch.setattr(export_module, "_writer", spy)
    monkeypatch.setattr(export_module, "ROWS", 300)
    folder = export(replay, tmp_path / "out")
    group = 4 * 40
    assert len(written) > 6
    assert max(written) <= 300 + group
    assert pq.ParquetFile(folder / "fidelity.parquet").metadata.num_rows == len(replay.fidelity())


def test_the_header_says_what_it_is_and_what_the_columns_are(tmp_path: Path) -> None:
    folder = export(make(tmp_path / "r", LENGTHS), tmp_path / "out", form="csv", per="layer")
    header = json.loads((folder / "export.json").read_text())
    assert (header["kind"], header["complete"], header["per"], header["format"]) == (
        "kvscope-export",
        True,
        "layer",
        "csv",
    )
    assert header["trace"]["identity"] == "abc"
    table = header["tables"]["fidelity"]
    assert table["rows"] == 8
    assert list(table["columns"]) == list(read(folder, "fidelity", "csv").columns)
    assert table["columns"]["layer"] == "layer of the model"
    assert all(table["columns"][name] for name in ("run", *JOINED.names))


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    folder = export(replay, tmp_path / "out")
    with pytest.raises(OutputExists, match="exists"):
        export(replay, tmp_path / "out")
    export(replay, tmp_path / "out", form="csv", force=True)
    assert not list(folder.glob("*.parquet"))
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(ResultError, match=r"holds thesis\.txt, which no export has"):
        export(replay, tmp_path / "out", force=True)
    with pytest.raises(ResultError, match=r"holds (run|summary)\.json|holds .*\.parquet, which no export has"):
        export(replay, replay.path, force=True)
    assert replay.fidelity().shape[0] > 0


@pytest.mark.parametrize("wrong", [{"form": "parkett"}, {"per": "heads"}])
def test_unknown_names_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is unknown\nUse one of: "):
        export(make(tmp_path / "r", LENGTHS), tmp_path / "out", **wrong)
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing_that_passes_for_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = make(tmp_path / "r", LENGTHS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write", full)
    with pytest.raises(ResultError, match="is full"):
        export(replay, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()
    assert export(replay, tmp_path / "out").is_dir()


def test_no_text_of_a_csv_file_begins_a_formula(tmp_path: Path) -> None:
    texts = ["=cmd()", "+1", "-x", "@a", "\t=1", "plain", "1=2", None]
    table = pa.table({"text": pa.array(texts), "number": pa.array([-1.5] * len(texts))})
    export_module._write(tmp_path / "t.csv", ExportFormat.csv, iter([table]))
    read = pd.read_csv(tmp_path / "t.csv")
    assert read["text"].tolist()[:7] == ["'=cmd()", "'+1", "'-x", "'@a", "'\t=1", "plain", "1=2"]
    assert read["text"].isna()[7]
    assert read["number"].tolist() == [-1.5] * len(texts)


def test_half_characters_in_names_are_made_visible(tmp_path: Path) -> None:
    """A label may hold any text of a file name; pyarrow refuses what UTF-8 cannot represent."""
    replay = make(tmp_path / "r", LENGTHS)
    run, summary = replace(replay.info.runs[0], label="\ud800x"), replay.summary
    replay.info = replace(replay.info, runs=(run, *replay.info.runs[1:]))
    replay.summary = replace(summary, runs=(replace(summary.runs[0], label="\ud800x"), *summary.runs[1:]))
    replay._known.update(("fidelity", "residency"))  # their metadata has the label that was recorded
    for form in ("csv", "parquet", "arrow"):
        folder = export(replay, tmp_path / form, form=form, per="run")
        assert read(folder, "runs", form)["label"][0] == "\\ud800x"
        assert "\\ud800x" in set(read(folder, "fidelity", form)["label"])
