"""Ways to compute a sparse FFN memory, equal in outputs and gradients: one file, one way."""

from transect.models.memory.backends import gather, grouped, masked, reference
from transect.models.memory.backends.tables import Mix, Read

MIXES: dict[str, Mix] = {
    "reference": reference.mix,
    "masked": masked.mix,
    "grouped": grouped.mix,
    "gather": gather.mix,
}
"""Keys and values."""
READS: dict[str, Read] = {
    "reference": reference.read,
    "masked": reference.read,
    "grouped": gather.read,
    "gather": gather.read,
}
"""Values only, where a selector computed the coefficients; block size 1, so two ways are enough."""
