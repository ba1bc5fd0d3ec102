"""Ready models, as plain Sequentials of the layers in this package.

Each takes num_classes and in_channels, and (N, in_channels, H, W) images. A convolution in front
of a batch norm has no bias, since the norm would take it away again.
"""

from sparsetrain import checks
from sparsetrain.nn.batchnorm import BatchNorm2d
from sparsetrain.nn.containers import Residual, Sequential
from sparsetrain.nn.conv import Conv2d
from sparsetrain.nn.flatten import Flatten
from sparsetrain.nn.linear import Linear
from sparsetrain.nn.pad_channels import PadChannels
from sparsetrain.nn.pool import AdaptiveAvgPool2d, MaxPool2d
from sparsetrain.nn.relu import ReLU


def mlp(num_classes=None, in_channels=1, widths=(784, 1024, 1024, 10)):
    """Linear layers with ReLU between them: 784-1024-1024-10.

    widths: the pixels of an image (H * W), the hidden features, the classes. The first layer has
    in_channels * widths[0] inputs; num_classes, where given, stands for the last width.
    """
    widths = [checks.integer(f"widths[{i}]", w, low=1) for i, w in enumerate(widths)]
    if len(widths) < 2:
        raise ValueError(f"widths has {len(widths)} numbers, needs at least 2: pixels and classes")
    widths[0] *= checks.integer("in_channels", in_channels, low=1)
    if num_classes is not None:
        widths[-1] = checks.integer("num_classes", num_classes, low=1)
    layers = [Flatten()]
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [Linear(inputs, outputs), ReLU()]
    return Sequential(*layers[:-1])


def lenet300(num_classes=10, in_channels=1, image_size=28):
    """LeNet-300-100: three linear layers, for square images of image_size pixels a side.

    Source: LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 1998.
    Differs: ReLU, as later work on sparsity has it.
    """
    pixels = checks.integer("image_size", image_size, low=1) ** 2
    return mlp(num_classes, in_channels, widths=(pixels, 300, 100, num_classes))


def lenet5(num_classes=10, in_channels=1, image_size=28):
    """LeNet-5 with 20 and 50 channels and 500 features, for square images of image_size a side.

    Source: Caffe's examples/mnist/lenet.prototxt, with 5x5 kernels, no padding and 2x2 pooling.
    """
    size = checks.integer("image_size", image_size, low=16)
    size = ((size - 4) // 2 - 4) // 2
    return Sequential(
        Conv2d(in_channels, 20, 5),
        MaxPool2d(2),
        Conv2d(20, 50, 5),
        MaxPool2d(2),
        Flatten(),
        Linear(50 * size * size, 500),
        ReLU(),
        Linear(500, num_classes),
    )


def small_cnn(num_classes=10, in_channels=1, width=32):
    """Three 3x3 convolutions of width, 2 and 4 times width channels, pooling, one linear layer.

    A good small net for 28x28 and 32x32 images; any size from 4x4 works.
    """
    width = checks.integer("width", width, low=1)
    return Sequential(
        *_conv_bn_relu(in_channels, width),
        MaxPool2d(2),
        *_conv_bn_relu(width, 2 * width),
        MaxPool2d(2),
        *_conv_bn_relu(2 * width, 4 * width),
        AdaptiveAvgPool2d(1),
        Flatten(),
        Linear(4 * width, num_classes),
    )


def vgg11(num_classes=10, in_channels=3):
    """VGG-11 (configuration A) with batch norm and one linear layer, for 32x32 images.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv:1409.1556.
    Differs: batch norm; one linear layer instead of three, as usual on CIFAR; the last pooling
    averages whatever is left (2x2 pixels of 32x32), so that 28x28 images pass too.
    """
    layers = []
    channels = in_channels
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for out_channels in stage:
            layers += _conv_bn_relu(channels, out_channels)
            channels = out_channels
        layers.append(MaxPool2d(2))
    layers[-1] = AdaptiveAvgPool2d(1)
    return Sequential(*layers, Flatten(), Linear(channels, num_classes))


def resnet20(num_classes=10, in_channels=3):
    """ResNet-20 for 32x32 images: three stages of three blocks with 16, 32 and 64 channels.

    Source: He et al., Deep Residual Learning, CVPR 2016, arXiv:1512.03385, section 4.2.
    Differs: where a block changes shape its shortcut is a 1x1 convolution with batch norm (the
    paper's option B); the paper's CIFAR nets pad with zero channels (option A).
    """
    return _resnet(num_classes, in_channels, blocks=(3, 3, 3), widths=(16, 32, 64))


def resnet20_a(num_classes=10, in_channels=3):
    """ResNet-20 with the paper's own shortcuts, which have no weights (option A)."""
    return _resnet(num_classes, in_channels, blocks=(3, 3, 3), widths=(16, 32, 64), shortcut=_padding)


def resnet18(num_classes=10, in_channels=3):
    """ResNet-18 for 32x32 images: four stages of two blocks with 64, 128, 256 and 512 channels.

    Source: He et al., Deep Residual Learning, CVPR 2016, arXiv:1512.03385, table 1.
    Differs: the stem is one 3x3 convolution without max pooling, as usual on CIFAR.
    """
    return _resnet(num_classes, in_channels, blocks=(2, 2, 2, 2), widths=(64, 128, 256, 512))


def _projection(in_channels, out_channels, stride):
    return Sequential(Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), BatchNorm2d(out_channels))


def _padding(in_channels, out_channels, stride):
    before = (out_channels - in_channels) // 2
    return PadChannels(before, out_channels - in_channels - before, stride)


def _resnet(num_classes, in_channels, blocks, widths, shortcut=_projection):
    layers = _conv_bn_relu(in_channels, widths[0])
    channels = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers += [_basic_block(channels, width, stride, shortcut), ReLU()]
            channels = width
    return Sequential(*layers, AdaptiveAvgPool2d(1), Flatten(), Linear(channels, num_classes))


def _basic_block(in_channels, out_channels, stride, shortcut):
    """Two 3x3 convolutions around which the input is added; the ReLU after the sum follows it."""
    body = Sequential(
        *_conv_bn_relu(in_channels, out_channels, stride),
        Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        BatchNorm2d(out_channels),
    )
    if stride == 1 and in_channels == out_channels:
        return Residual(body)
    return Residual(body, shortcut(in_channels, out_channels, stride))


def _conv_bn_relu(in_channels, out_channels, stride=1):
    return [
        Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        BatchNorm2d(out_channels),
        ReLU(),
    ]
