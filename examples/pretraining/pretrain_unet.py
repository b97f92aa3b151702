"""Pretrain diffusers' `UNet2DModel` as `pretrain_dit.py` does a DiT: what diffusion features were before DiT.

    python examples/pretraining/pretrain_unet.py --train_file cifar10/train.parquet --output_dir unet-cifar10 \
        --num_pictures 254000 --optim muon --learning_rate 2e-3 --batch_size 64

Data, noise, loss, optimizer, averaged weights and checkpoints are that script's, and so are all options; those of the
transformer's sizes have no meaning here. The UNet has 5.6 million weights in three stages of 64, 96 and 128 channels,
with attention in the two smaller ones. What is written has `unet/` in place of `transformer/`.
"""

from diffusers import UNet2DModel
from pretrain_dit import Pretraining, PretrainingArguments
from torch import nn
from transformers import HfArgumentParser


class UNetPretraining(Pretraining):
    """The same run with a UNet."""

    part = "unet"
    hidden = r"blocks?\..*(conv\w*|to_\w+|to_out\.0)\.weight"

    def build(self) -> nn.Module:
        """Return the UNet with new weights; its last class is the null label."""
        return UNet2DModel(
            sample_size=self.args.image_size,
            in_channels=self.args.num_channels,
            out_channels=self.args.num_channels,
            block_out_channels=(64, 96, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=32,
            norm_num_groups=32,
            num_class_embeds=self.num_classes + 1,
        )


def main() -> None:
    """Run the training that the command line asks for."""
    training = UNetPretraining(HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()[0])
    training.train()
    training.accelerator.end_training()


if __name__ == "__main__":
    main()
