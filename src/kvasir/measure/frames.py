"""Outcomes as a pandas DataFrame. pandas is an extra, imported when a frame is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvasir.core.errors import ConfigError
from kvasir.measure.summary import RequestOutcome, SloReport, good

EXTRA = "frames"


def frame(outcomes: Sequence[RequestOutcome], slo: SloReport | None = None) -> Any:
    """A `pandas.DataFrame`, one row a request in the order in which they ended.

    Columns are the fields of `RequestOutcome` (seconds, tokens; unknown is NaN), with `request_id`
    as index, and `good` when there is an SLO. Raises ConfigError when pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a frame needs pandas ({error.name} is not installed)",
            next_step=f"pip install 'kvasir-llm[{EXTRA}]'",
        ) from None
    columns: dict[str, list[Any]] = {
        field: [getattr(o, field) for o in outcomes]
        for field in RequestOutcome.__struct_fields__
    }
    index = pandas.Index(columns.pop("request_id"), name="request_id")
    seconds = [f.name for f in msgspec.structs.fields(RequestOutcome) if f.name.endswith("_s")]
    table = pandas.DataFrame(columns, index=index).astype(dict.fromkeys(seconds, "float64"))
    if slo is not None:
        table["good"] = [o.ok and good(o, slo) for o in outcomes]
    return table
