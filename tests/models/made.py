"""Networks of many families, made by hand: small, and for images of any size."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distill.models import backbones
from distill.models.grids import Size
from distill.models.network import Description, Network

CLASSES = 5
SQUARE, WIDE = (64, 64), (64, 96)

# A small member of each family, with what makes it smaller still.
CNNS: dict[str, dict[str, Any]] = {
    "timm/resnet10t": {},
    "timm/resnetv2_50": {"layers": (1, 1, 1, 1)},
    "timm/convnext_atto": {"depths": (1, 1, 2, 1)},
    "timm/mobilenetv3_small_050": {},
    "timm/efficientnet_lite0": {},
    "timm/regnetx_002": {},
    "timm/densenet121": {"block_config": (2, 2, 2, 2)},
    "timm/dla46_c": {},
    "timm/edgenext_xx_small": {},
    "timm/fastvit_t8": {},
    "timm/mambaout_femto": {},
    "timm/starnet_s1": {},
    "torchvision/convnext_tiny": {},
    "torchvision/mobilenet_v2": {},
    "torchvision/resnet18": {},
}
SWIN: dict[str, Any] = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
ATTENDING: dict[str, dict[str, Any]] = {
    "timm/vit_tiny_patch16_224": {"depth": 4},
    "timm/deit_tiny_distilled_patch16_224": {"depth": 4},
    "timm/beit_base_patch16_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "timm/eva02_tiny_patch14_224": {"depth": 4, "patch_size": 16},
    "timm/cait_xxs24_224": {"depth": 4},
    "timm/convit_tiny": {"depth": 4, "local_up_to_layer": 2},
    "timm/pit_ti_224": {},
    "timm/levit_128s": {},
    "timm/pvt_v2_b0": {},
    "timm/twins_svt_small": {
        "embed_dims": (32, 64, 96, 128),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 3, 4),
    },
    "timm/swin_tiny_patch4_window7_224": SWIN,
    "timm/swinv2_tiny_window8_256": SWIN,
    "timm/davit_tiny": {
        "embed_dims": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
    },
    "timm/maxvit_tiny_tf_224": {
        "embed_dim": (32, 32, 64, 96),
        "depths": (1, 1, 1, 1),
        "stem_width": 16,
    },
    "timm/hieradet_small": {
        "embed_dim": 32,
        "num_heads": 1,
        "stages": (1, 1, 2, 1),
        "global_att_blocks": (3,),
    },
    "timm/coatnet_0_rw_224": {"embed_dim": (32, 32, 64, 96), "depths": (1, 1, 2, 1)},
    "torchvision/swin_t": {},
    "torchvision/swin_v2_t": {},
    "torchvision/vit_b_16": {},
    "torchvision/maxvit_t": {},
}
OTHERS: dict[str, dict[str, Any]] = {  # without attention that is understood, and no CNNs
    "timm/mixer_s32_224": {},
    "timm/xcit_nano_12_p16_224": {"depth": 4},
    "timm/mobilevit_xxs": {},
}
FAMILIES = {**CNNS, **ATTENDING, **OTHERS}
SQUARE_ONLY = ("timm/convit_tiny", "torchvision/vit_b_16", "torchvision/maxvit_t")


def backbone(model: str, image: Size, **arguments: Any) -> nn.Module:
    """A model for images of this size, with initial weights."""
    library, _, name = model.partition("/")
    if library == "timm":
        import timm

        if timm.get_pretrained_cfg(name).fixed_input_size:
            arguments = {"img_size": image, **arguments}
        made: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments)
        return made
    if library == "torchvision":
        return _torchvision(name, image)
    return backbones.build(model, arguments, num_classes=CLASSES, image_size=image[0])


def _torchvision(name: str, image: Size) -> nn.Module:
    from torchvision import models

    match name:
        case "convnext_tiny":
            widths = (32, 64, 96, 128)
            stages = [
                models.convnext.CNBlockConfig(width, after, 1)
                for width, after in zip(widths, (*widths[1:], None), strict=True)
            ]
            return models.ConvNeXt(stages, num_classes=CLASSES)
        case "swin_t" | "swin_v2_t":
            second = {"block": models.swin_transformer.SwinTransformerBlockV2} | {
                "downsample_layer": models.swin_transformer.PatchMergingV2
            }
            return models.SwinTransformer(
                [4, 4], 32, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], num_classes=CLASSES,
                **(second if "v2" in name else {}),
            )  # fmt: skip
        case "vit_b_16":
            return models.VisionTransformer(image[0], 16, 4, 3, 96, 192, num_classes=CLASSES)
        case "maxvit_t":  # its windows have to tile every grid
            return models.MaxVit(
                image, 16, 2, [32, 64, 96], [1, 1, 1], 32, 0.0, num_classes=CLASSES
            )
    made: nn.Module = models.get_model(name, num_classes=CLASSES)
    return made


def wrapped(module: nn.Module, model: str, image: Size) -> Network:
    """The backbone as a network that leaves images as they are."""
    description = Description(
        model=model,
        arguments={},
        num_classes=CLASSES,
        classes=None,
        image_size=max(image),
        input_size=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return Network(module, description)


def network(model: str, image: Size = SQUARE, **arguments: Any) -> Network:
    """A network for images of this size, looked through at this size."""
    torch.manual_seed(0)
    built = backbone(model, image, **(FAMILIES.get(model, {}) | arguments))
    for module in built.modules():
        # Some classifiers begin at zero, and would hand on no gradient.
        if isinstance(module, nn.Linear) and not (module.weight.is_meta or module.weight.any()):
            nn.init.trunc_normal_(module.weight, std=0.02)
    made = wrapped(built, model, image)
    made.anatomy(image)
    return made.eval()


def images(image: Size = SQUARE, count: int = 2) -> Tensor:
    """The same random ones in every test."""
    return torch.rand(count, 3, *image, generator=torch.Generator().manual_seed(1))


shared = cache(network)  # for those who change nothing
