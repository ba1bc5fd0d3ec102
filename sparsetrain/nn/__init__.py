"""Layers, containers, losses and ready models, with PyTorch's names and meanings."""

from sparsetrain.nn import models
from sparsetrain.nn.batchnorm import BatchNorm1d, BatchNorm2d
from sparsetrain.nn.containers import Residual, Sequential, unfused
from sparsetrain.nn.conv import Conv2d
from sparsetrain.nn.dropout import Dropout
from sparsetrain.nn.flatten import Flatten
from sparsetrain.nn.linear import Linear
from sparsetrain.nn.loss import cross_entropy, mse_loss
from sparsetrain.nn.module import Module, observe
from sparsetrain.nn.pad_channels import PadChannels
from sparsetrain.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from sparsetrain.nn.relu import ReLU
from sparsetrain.nn.replay import no_grad
from sparsetrain.nn.summary import summary
from sparsetrain.sparse import Parameter
from sparsetrain.tape import eager

Module.summary = summary

__all__ = [
    "AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d", "Conv2d", "Dropout", "Flatten", "Linear",
    "MaxPool2d", "Module", "PadChannels", "Parameter", "ReLU", "Residual", "Sequential", "cross_entropy", "eager",
    "models", "mse_loss", "no_grad", "observe", "summary", "unfused",
]  # fmt: skip
