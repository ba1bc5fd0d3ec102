"""Data: readers of published sets, a small embedded set, and batches. This is the public list."""

from sparsetrain.data.batches import Batches
from sparsetrain.data.cifar import CIFAR10, CIFAR100, read_cifar
from sparsetrain.data.dataset import Dataset
from sparsetrain.data.idx import read_idx
from sparsetrain.data.sets import NAMES, load, where

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "NAMES",
    "Batches",
    "Dataset",
    "load",
    "read_cifar",
    "read_idx",
    "where",
]
