"""Analysis of models: effective receptive fields, and attention maps of scans and softmax attention."""

from mambavision.analysis.attention import (
    MapKind,
    Mode,
    Normalisation,
    attention_maps,
    cell_of_point,
    map_of_point,
    positions_read,
    rollout,
)
from mambavision.analysis.receptive_field import (
    ReceptiveField,
    check_stage,
    display_scale,
    receptive_field,
    receptive_field_maps,
    smallest_square,
)
from mambavision.analysis.recording import AttentionRecord, Layout, ScanRecord, block_name, record_blocks

__all__ = [
    "AttentionRecord",
    "Layout",
    "MapKind",
    "Mode",
    "Normalisation",
    "ReceptiveField",
    "ScanRecord",
    "attention_maps",
    "block_name",
    "cell_of_point",
    "check_stage",
    "display_scale",
    "map_of_point",
    "positions_read",
    "receptive_field",
    "receptive_field_maps",
    "record_blocks",
    "rollout",
    "smallest_square",
]
