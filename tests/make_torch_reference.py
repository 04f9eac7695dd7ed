"""Torchvision's networks with our variables; as a program, writes their stored outputs.

Run as `PYTHONPATH=. python tests/make_torch_reference.py` where torch and torchvision are
installed.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch_transfer
import torchvision
from torch import nn
from torchvision.models import resnet, vgg

OUTPUT = Path(__file__).parent / "data" / "torchvision_logits.json"
VGG_LAYERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


def peer(case, variables):
    """Torchvision's network in float64 and evaluation mode, with these variables."""
    with torch.device("meta"):  # no initial values are drawn
        module = _network(case)
    state = torch_transfer.state_dict(variables)
    state = {name: torch.from_numpy(array) for name, array in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.double().eval()


def _network(case):
    options = {"stem": "cifar", "head": "linear", "width": 1.0, **case.options}
    if case.name.startswith("resnet"):
        module = torchvision.models.get_model(case.name, num_classes=case.num_classes)
        if "depths" in options:
            block = type(module.layer1[0])
            module = resnet.ResNet(block, options["depths"], case.num_classes)
        if options["stem"] == "cifar":
            module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()
        return module
    module = torchvision.models.get_model(f"{case.name}_bn", num_classes=case.num_classes)
    if options["width"] != 1:
        _narrow(module, VGG_LAYERS[case.name], options["width"])
    if options["head"] == "linear":
        channels = [m for m in module.features if isinstance(m, nn.Conv2d)][-1].out_channels
        module.avgpool = nn.AdaptiveAvgPool2d(1)
        module.classifier = nn.Linear(channels, case.num_classes)
    return module


def _narrow(module, letter, width):
    """Fewer channels and units, which torchvision's `vgg11_bn` and others do not offer."""
    layers = [c if c == "M" else round(width * c) for c in vgg.cfgs[letter]]
    module.features = vgg.make_layers(layers, batch_norm=True)
    units = round(width * 4096)
    sizes = [torch_transfer.GRID**2 * layers[-2], units, units]
    for index, size in zip((0, 3, 6), sizes, strict=True):
        wide = module.classifier[index]
        outputs = wide.out_features if index == 6 else units
        module.classifier[index] = nn.Linear(size, outputs)


def forward(module, images):
    """`(logits, features)` in NumPy of images (B, height, width, C)."""
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    inputs = []
    hook = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = module(batch(images))
    hook.remove()
    return logits.numpy(), inputs[0].numpy()


def batch(images):
    """Float64 images (B, C, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).double()


def rounded(array):
    return [[float(f"{x:.7g}") for x in row] for row in array]


def main():
    outputs = {}
    for name in torch_transfer.STORED:
        case = torch_transfer.CASES[name]
        logits, features = forward(peer(case, case.variables()), case.images())
        outputs[name] = {
            "logits": rounded(logits),
            "features": rounded(features[:, : torch_transfer.STORED_FEATURES]),
        }
    record = {
        "made_by": "tests/make_torch_reference.py",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "outputs": outputs,
    }
    OUTPUT.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
