"""An evaluation as a file: the whole document as JSON, or its rows as CSV or Parquet."""

import csv
import io
import json

from raybrats import storage
from raybrats.errors import UsageError
from raybrats.predict.evaluate import Evaluation
from raybrats.predict.summary import SCORES

ENDINGS = (".json", ".csv", ".parquet")
_COLUMNS = ("case_id", "region", *SCORES)
_COUNTS = ("tp", "fp", "fn")


def check_place(uri: str) -> None:
    """Refuses a place that scores are not written to, before there are any.

    Raises:
        UsageError: its ending is none of `ENDINGS`, or it is no URI of a file.

    Example:
        >>> check_place("s3://bucket/scores.parquet")
    """
    if not uri.endswith(ENDINGS):
        raise UsageError(f"--out {uri}: expected a file name in {', '.join(ENDINGS)}")
    storage.check_file(uri)


def write(evaluation: Evaluation, uri: str) -> None:
    """Writes an evaluation in the form that the ending asks for; None is null, empty in CSV.

    Raises:
        UsageError: the ending is none of `ENDINGS`.
        StorageError: it cannot be written.

    Example:
        >>> from raybrats.predict.evaluate import evaluation_of
        >>> row = {"case_id": "a", "region": "WT", "dice": 0.5, "nsd": None}
        >>> write(evaluation_of("brats2020", [row], []), "scores.csv")
        >>> storage.read_bytes("scores.csv").splitlines()[1]
        b'a,WT,0.5,,,,,,,,,,,,,,'
    """
    check_place(uri)
    if uri.endswith(".json"):
        data = json.dumps(evaluation.document(), indent=1).encode()
    else:
        data = _csv(evaluation) if uri.endswith(".csv") else _parquet(evaluation)
    storage.write_bytes(uri, data)


def _csv(evaluation: Evaluation) -> bytes:
    text = io.StringIO()
    lines = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    lines.writeheader()
    lines.writerows(evaluation.rows)
    return text.getvalue().encode()


def _parquet(evaluation: Evaluation) -> bytes:
    """Rows as they are, the rules in the metadata of the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"case_id": pa.string(), "region": pa.string(), **dict.fromkeys(_COUNTS, pa.int64())}
    fields = [pa.field(name, kinds.get(name, pa.float64())) for name in _COLUMNS]
    schema = pa.schema(fields, {"rules": evaluation.rules})
    rows = [{name: row.get(name) for name in _COLUMNS} for row in evaluation.rows]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue().to_pybytes()
