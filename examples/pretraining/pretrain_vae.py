r"""Pretrain a small `AutoencoderKL` (four times smaller, 4 channels), for a DiT on its latents.

    python examples/pretraining/pretrain_vae.py --train_file cifar10/train.parquet --output_dir vae-cifar10 \
        --label_column none --num_pictures 96000 --batch_size 32
    python examples/pretraining/pretrain_dit.py --train_file cifar10/train.parquet --output_dir dit-cifar10-latents \
        --vae_name_or_path vae-cifar10 --patch_size 1 --num_pictures 160000 --label_dropout 0.5

Data, optimizer, averaged weights and checkpoints are those of `pretrain_dit.py`, and so are all options; those of the
transformer and of the noise have no meaning here. The loss is the squared error of the reconstruction, with a little
of the KL divergence from the normal distribution; there is no perceptual or adversarial loss, so images come out soft.
`scaling_factor` is set so that latents have a deviation of 1. `samples.png` shows images above their reconstructions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from pretrain_dit import Pretraining, PretrainingArguments, to_tensors
from torch import Tensor, nn
from transformers import HfArgumentParser

KL_WEIGHT = 1e-3  # of the mean over latents, against the mean over pixels


class Reconstruction(nn.Module):
    """An autoencoder whose pass returns all that the loss needs: processes share the gradients of a pass alone.

    Args:
        autoencoder: What is trained.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return images made of drawn latents, (B, C, H, W), and the mean divergence of the latents, ()."""
        moments = self.autoencoder.encode(images).latent_dist.parameters
        # In float32: the divergence is a small difference of large numbers.
        posterior = DiagonalGaussianDistribution(moments.float())
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return self.autoencoder.decode(posterior.sample()).sample, divergence


class VAEPretraining(Pretraining):
    """The same run with an autoencoder."""

    part = "vae"
    hidden = r"blocks?\..*conv\w*\.weight"

    def check_arguments(self) -> None:
        """Reject a second autoencoder."""
        super().check_arguments()
        if self.args.vae_name_or_path is not None:
            raise ValueError(
                f"pretrain_vae.py trains a VAE of its own, got --vae_name_or_path {self.args.vae_name_or_path}. Leave "
                "it out, or use pretrain_dit.py."
            )

    def multiple(self) -> int:
        """Return what the side of the images must be a multiple of: it is halved twice."""
        return 4

    def build(self) -> nn.Module:
        """Return the autoencoder with new weights."""
        autoencoder = AutoencoderKL(
            in_channels=self.args.num_channels,
            out_channels=self.args.num_channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
            sample_size=self.args.image_size,
            mid_block_add_attention=False,
        )
        return Reconstruction(autoencoder)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the error of the reconstruction and the weighted divergence."""
        decoded, divergence = self.model(batch["pixels"])
        return nn.functional.mse_loss(decoded.float(), batch["pixels"]) + KL_WEIGHT * divergence

    def images(self, num: int) -> Tensor:
        """Return images from all over the training split, which may be sorted by class, (n, C, H, W)."""
        num = min(num, len(self.dataset))
        rows = self.dataset[np.linspace(0, len(self.dataset) - 1, num).astype(int)]
        # The middle, not a random crop: looking must not draw the random numbers of the steps that follow.
        return torch.stack(to_tensors(rows, dataclasses.replace(self.args, min_crop=1.0))["pixels"])

    def parts(self, model: Any) -> dict[str, Any]:
        """Return the autoencoder, with the factor that gives its latents a deviation of 1."""
        autoencoder = model.float().autoencoder
        with torch.no_grad():
            latents = autoencoder.encode(self.images(256).to(autoencoder.device)).latent_dist.mean
        autoencoder.register_to_config(scaling_factor=1 / float(latents.std()))
        model.to(getattr(torch, self.args.save_dtype))
        return {self.part: autoencoder}

    @torch.no_grad()
    def write_samples(self, model: Any, path: Path) -> None:
        """Draw ten images above their reconstructions."""
        autoencoder = model.autoencoder
        images = self.images(10).to(autoencoder.device)
        decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
        grid = torch.stack([images, decoded]).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        array = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        drawn = Image.fromarray(np.squeeze(array, -1) if array.shape[-1] == 1 else array)
        drawn.resize((3 * drawn.width, 3 * drawn.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Run the training that the command line asks for."""
    training = VAEPretraining(HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()[0])
    training.train()
    training.accelerator.end_training()


if __name__ == "__main__":
    main()
