"""Training: the loop, its history, callbacks and checkpoints."""

from sparsetrain.train.callbacks import (
    Callback,
    Checkpoint,
    CSVLog,
    EarlyStopping,
    EpochLines,
    Progress,
)
from sparsetrain.train.free_tickets import FreeTickets
from sparsetrain.train.history import History
from sparsetrain.train.trainer import Trainer, TrainingDiverged

__all__ = [
    "CSVLog",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "EpochLines",
    "FreeTickets",
    "History",
    "Progress",
    "Trainer",
    "TrainingDiverged",
]
