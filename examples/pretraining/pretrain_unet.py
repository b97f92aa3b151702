"""Pretrain diffusers' `UNet2DModel` as `pretrain_dit.py` does a DiT: what diffusion features were before DiT.

    python examples/pretraining/pretrain_unet.py --train_file cifar10/train.parquet --output_dir unet-cifar10 \
        --num_pictures 254000 --optim muon --learning_rate 2e-3 --batch_size 64

Data, noise, loss, optimizer, averaged weights and checkpoints are that script's, and so are all options; those of the
transformer's sizes have no meaning here, and those of flow matching and of a VAE are rejected. The UNet has 5.6
million weights in three stages of 64, 96 and 128 channels, with attention in the two smaller ones. What is written
has `unet/` in place of `transformer/`.
"""

from diffusers import UNet2DModel
from pretrain_dit import Pretraining, PretrainingArguments
from torch import nn
from transformers import HfArgumentParser


class UNetPretraining(Pretraining):
    """The same run with a UNet."""

    part = "unet"
    hidden = r"blocks?\..*(conv\w*|to_\w+|to_out\.0)\.weight"

    def check_arguments(self) -> None:
        """Reject what is for `pretrain_dit.py` alone."""
        super().check_arguments()
        if self.args.prediction_type == "flow_matching":
            raise ValueError(
                "pretrain_unet.py learns DDPM's noise or velocity, got --prediction_type flow_matching. Give epsilon "
                "or v_prediction, or use pretrain_dit.py."
            )
        if self.args.vae_name_or_path is not None:
            raise ValueError(
                f"pretrain_unet.py learns pixels, got --vae_name_or_path {self.args.vae_name_or_path}. Leave it out, "
                "or use pretrain_dit.py."
            )

    def multiple(self) -> int:
        """Return what the side of the images must be a multiple of: it is halved twice."""
        return 4

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
