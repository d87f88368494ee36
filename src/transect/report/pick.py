"""A choice of records that is at the same time a list of Vega-Lite filters on the shared data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transect.report.records import Record


@dataclass(frozen=True)
class Pick:
    """Some of the report's records, and the filters that pick the same ones inside a figure."""

    records: tuple[Record, ...]
    filters: tuple[dict[str, Any] | str, ...] = ()

    def where(self, field: str, *values: object) -> "Pick":
        """The records whose field is one of the values."""
        kept = tuple(record for record in self.records if record[field] in values)
        return Pick(kept, (*self.filters, {"field": field, "oneOf": list(values)}))

    def matching(self, field: str, keep: Callable[[Any], bool]) -> "Pick":
        """The records whose field is there and passes the test."""
        return self.where(field, *(value for value in self.distinct(field) if keep(value)))

    def without(self, field: str) -> "Pick":
        """The records that lack the field."""
        return self.such(lambda record: record[field] is None, f"!isValid(datum.{field})")

    def such(self, keep: Callable[[Record], bool], expression: str) -> "Pick":
        """The records that pass the test; the Vega expression must say the same."""
        return Pick(tuple(record for record in self.records if keep(record)), (*self.filters, expression))

    def distinct(self, field: str) -> list[Any]:
        """The values of a field that are present, in order of appearance."""
        return list(dict.fromkeys(record[field] for record in self.records if record[field] is not None))

    @property
    def present(self) -> list[Record]:
        """The records that have a value."""
        return [record for record in self.records if record["value"] is not None]

    def main_variant(self) -> "Pick":
        """The records of the first convention when the records follow several."""
        variants = sorted(self.distinct("variant"), key=_main_first)
        return self.where("variant", variants[0]) if len(variants) > 1 else self


def _main_first(variant: str) -> tuple[bool, bool]:
    return (not variant.startswith("pre_norm"), not variant.endswith("all"))
