"""What the command line calls by name: models, methods of sparsity and of backprop, and layers to keep dense."""

from sparsetrain import backprop, checks, sparsity
from sparsetrain.nn import models

MODELS = ("small-cnn", "lenet5", "lenet300", "mlp", "resnet20", "resnet20-a", "resnet18", "vgg11")
# Which weights exist: chosen once before training, or changed by a method of sparsity while training
AT_ONCE = sparsity.METHODS
WHILE_TRAINING = {
    "gmp": sparsity.GMP,
    "set": sparsity.SET,
    "rigl": sparsity.RigL,
    "granet": sparsity.GraNet,
    "ac-dc": sparsity.ACDC,
    "n:m": sparsity.NM,
}
METHODS = (*AT_ONCE, *WHILE_TRAINING)
BACKPROP = {
    "exact": None,
    "dithered": backprop.Dithered,
    "resprop": backprop.ReSprop,
    "mem-aop": backprop.MemAOP,
    "top-k": backprop.TopK,
}
DISTRIBUTIONS = sparsity.DISTRIBUTIONS


def model(name, image, classes):
    """The model of MODELS for images of shape `image`, (C, H, W), and so many classes."""
    channels, height, width = image
    fitted = {
        "mlp": {"widths": (height * width, 1024, 1024, classes)},
        "lenet5": {"image_size": height},
        "lenet300": {"image_size": height},
    }
    make = getattr(models, name.replace("-", "_"))
    return make(classes, channels, **fitted.get(name, {}))


def layers(names, model, option="--exclude"):
    """The names with "first" replaced by the layer next to the images, and "last" by the one that gives the classes.

    ValueError, which names the option, for one that matches no layer with weights.
    """
    weights = [name.rpartition(".")[0] for name, p in model.named_parameters() if len(p.shape) > 1]
    ends = {"first": weights[0], "last": weights[-1]}
    return checks.globs(option, [ends.get(name, name) for name in names], weights)
