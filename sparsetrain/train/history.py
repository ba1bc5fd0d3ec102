"""What a run measured, one row an epoch."""

import csv
from pathlib import Path

from sparsetrain import checks
from sparsetrain.files import replacing

COLUMNS = (
    "epoch",
    "step",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "images_per_s",
    "time_s",
    "gradient_sparsity",
)
LAYER_COLUMNS = ("epoch", "layer", "gradient_sparsity", "ms", "angle", "clipped")


class History(list):
    """A list of dicts, one an epoch, with the keys COLUMNS; None where nothing was measured.

    epoch counts from 1; step is the number of steps so far; loss and accuracy are means over the
    epoch's training batches as they went by; lr is the last step's; time_s and images_per_s
    count the training alone. gradient_sparsity is the share of all layers' output gradients that was not used, where
    a method of backprop left some out; a row's "layers" then has {layer: what Method.report() says}. `interrupted` is
    True after Ctrl-C.
    """

    interrupted = False

    def column(self, name):
        """The values of one column, a list."""
        checks.one_of("column", name, COLUMNS)
        return [row[name] for row in self]

    def best(self, monitor):
        """Index of the best row: highest where monitor is an accuracy, else lowest; first wins."""
        values = self.column(monitor)
        if not values or None in values:
            raise ValueError(f"{monitor} was not measured: give fit() a validation set")
        return values.index((max if monitor.endswith("accuracy") else min)(values))

    def write_csv(self, path):
        """Write all rows as CSV, replacing path as a whole; those of the layers, if there are any, beside it as
        <name>-layers.csv."""
        _write(path, COLUMNS, self)
        layers = [
            {"epoch": row["epoch"], "layer": name, **values}
            for row in self
            for name, values in row.get("layers", {}).items()
        ]
        if layers:
            _write(Path(path).with_stem(f"{Path(path).stem}-layers"), LAYER_COLUMNS, layers)


def _write(path, columns, rows):
    with replacing(path) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
