"""The reference of the config, written from its classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from runner.config import (
    AdamConfig,
    AdamWConfig,
    ArchitectureConfig,
    AtomLossConfig,
    BatchConfig,
    ChargesConfig,
    CheckpointsConfig,
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    CoulombConfig,
    DataConfig,
    EarlyStoppingConfig,
    EMAConfig,
    EnergyConfig,
    EnergyLossConfig,
    ExponentialConfig,
    FilterConfig,
    ForeignConfig,
    ForeignOptimizerConfig,
    LabelConfig,
    LinearConfig,
    LoggerConfig,
    MetricsConfig,
    MLflowConfig,
    MuonConfig,
    OneCycleConfig,
    OptimizerConfig,
    OwnLossConfig,
    PaiNNConfig,
    PiecewiseWeight,
    PlateauConfig,
    PositionsConfig,
    PrepareConfig,
    QuadrupoleConfig,
    ScheduleConfig,
    ScheduleFreeConfig,
    SchNetConfig,
    SelfEnergiesConfig,
    SGDConfig,
    SourceConfig,
    SplitConfig,
    StageConfig,
    StressConfig,
    SWAConfig,
    TensorNetConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
    WeightSchedule,
    WeightsConfig,
    ZBLConfig,
)
from runner.fields import LABELS, POSITIONS

TABLES: dict[str, type[BaseModel]] = {
    "[prepare]": PrepareConfig,
    "[[prepare.source]]": SourceConfig,
    "A label of a source": LabelConfig,
    "More keys of `stress`": StressConfig,
    "More keys of `quadrupole`": QuadrupoleConfig,
    "`positions` of a source": PositionsConfig,
    "[prepare.self_energies]": SelfEnergiesConfig,
    "[prepare.split]": SplitConfig,
    "[prepare.filter]": FilterConfig,
    "[train]": TrainConfig,
    "[train.batch]": BatchConfig,
    "[train.data]": DataConfig,
    "`weights` of `[train.data]`": WeightsConfig,
    "`[train.potential]` of any name": ArchitectureConfig,
    "[train.potential.energy]": EnergyConfig,
    "[train.potential.charges]": ChargesConfig,
    "[train.potential.coulomb]": CoulombConfig,
    "[train.potential.zbl]": ZBLConfig,
    "`[train.potential]` with the name `painn`": PaiNNConfig,
    "`[train.potential]` with the name `schnet`": SchNetConfig,
    "`[train.potential]` with the name `tensornet`": TensorNetConfig,
    "`[train.potential]` with another name": ForeignConfig,
    "[train.loss.energy]": EnergyLossConfig,
    "`[train.loss.forces]` and those of other labels": AtomLossConfig,
    "`[train.loss.own.NAME]`": OwnLossConfig,
    "A weight that changes": WeightSchedule,
    "A weight in pieces": PiecewiseWeight,
    "[train.metrics]": MetricsConfig,
    "`[train.optimizer]` of any name": OptimizerConfig,
    "`[train.optimizer]` with the name `adamw`": AdamWConfig,
    "`[train.optimizer]` with the name `adam`": AdamConfig,
    "`[train.optimizer]` with the name `sgd`": SGDConfig,
    "`[train.optimizer]` with the name `muon`": MuonConfig,
    "`[train.optimizer]` with the name `schedule_free`": ScheduleFreeConfig,
    "`[train.optimizer]` with another name": ForeignOptimizerConfig,
    "`[train.schedule]` of any name": ScheduleConfig,
    "`[train.schedule]` with the name `reduce_on_plateau`": PlateauConfig,
    "`[train.schedule]` with the name `constant`": ConstantConfig,
    "`[train.schedule]` with the name `cosine`": CosineConfig,
    "`[train.schedule]` with the name `cosine_restarts`": CosineRestartsConfig,
    "`[train.schedule]` with the name `one_cycle`": OneCycleConfig,
    "`[train.schedule]` with the name `exponential`": ExponentialConfig,
    "`[train.schedule]` with the name `linear`": LinearConfig,
    "`[train.average]` with the name `ema`": EMAConfig,
    "`[train.average]` with the name `swa`": SWAConfig,
    "[[train.stage]]": StageConfig,
    "[train.checkpoints]": CheckpointsConfig,
    "[train.early_stopping]": EarlyStoppingConfig,
    "[train.logger]": LoggerConfig,
    "[train.logger.wandb]": WandbConfig,
    "[train.logger.mlflow]": MLflowConfig,
    "[train.trainer]": TrainerConfig,
}
"""Headings of the reference and the class that each tells of."""

SIMPLE = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
}


def reference() -> str:
    """All keys of the config in Markdown: what may be written, what is meant without, what for."""
    lines: list[str] = []
    for heading, section in TABLES.items():
        lines += [
            "",
            f"### {heading if '`' in heading or '[' not in heading else f'`{heading}`'}",
            "",
        ]
        lines += [_about(section), ""] if section.__doc__ else []
        lines += _table(section)
    lines += ["", "### The labels and their units", "", *_labels()]
    return "\n".join(lines).strip() + "\n"


def _about(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(section: type[BaseModel]) -> Iterator[str]:
    """A row a key; of a class that adds keys to those of another table, only those that it adds."""
    schema = section.model_json_schema()
    shared = [base for base in TABLES.values() if issubclass(section, base) and base is not section]
    below = {key for base in shared for key in base.model_fields} - set(section.__annotations__)
    yield "| key | what | default | meaning |"
    yield "|---|---|---|---|"
    for key, entry in schema["properties"].items():
        if key not in below:
            needed = key in schema.get("required", [])
            default = "needed" if needed else _default(entry.get("default"))
            about = " ".join(entry.get("description", "").split())
            yield f"| `{key}` | {_kind(entry, schema)} | {default} | {about} |".replace(
                "|  |", "| |"
            )


def _default(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, Mapping):
        return "see below"
    return f"`{json.dumps(value)}`"


def _kind(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What may be written for a key, in words."""
    if "enum" in entry:
        return ", ".join(f'`"{value}"`' for value in entry["enum"])
    if "const" in entry:
        return f'`"{entry["const"]}"`'
    if "anyOf" in entry:
        kinds = [_kind(one, schema) for one in entry["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in entry or "oneOf" in entry:
        return "table"
    if entry.get("type") == "array":
        return f"list of {_kind(entry['items'], schema)}s"
    if entry.get("type") == "object":
        inner = entry.get("additionalProperties")
        return f"table of {_kind(inner, schema)}" if isinstance(inner, Mapping) else "table"
    if "examples" in entry:
        return f'quantity, such as `"{entry["examples"][0]}"`'
    return SIMPLE.get(str(entry.get("type")), "value")


def _labels() -> Iterator[str]:
    yield "| label | of | shape | inside the program | without a unit | meaning |"
    yield "|---|---|---|---|---|---|"
    for field in (POSITIONS, *LABELS.values()):
        shape = " × ".join(map(str, field.shape)) or "number"
        assumed = f"`{field.unit}`" if field.assumed_unit and field.unit else ""
        assumed = assumed or (
            "a number" if field.assumed_unit else "an error, unless the file says"
        )
        unit = f"`{field.unit}`" if field.unit else ""
        yield f"| `{field.name}` | {field.per} | {shape} | {unit} | {assumed} | {field.meaning} |"
