"""Devices: which one computes and in which dtype, and how a tensor gets there."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU.

    MPS is for those who ask for it: its attention has been silently wrong for keys such as ours
    more than once (pytorch/pytorch#163597, #181133).
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, else fp16 on a GPU and fp32 on the CPU."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float16
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids, also where its weights are kept elsewhere meanwhile."""
    embedding = model.get_input_embeddings()
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, without waiting for what the device does.

    Sent from ordinary memory it is copied aside before this returns; never bring anything back to
    the CPU this way.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
