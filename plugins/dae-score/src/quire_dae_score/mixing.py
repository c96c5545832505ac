"""How many independent draws chains are worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def autocovariance(chains: Tensor) -> Tensor:
    """Over the draws, [C,K,D] → [C,K,D] in double, by lag; biased (divided by K)."""
    centred = chains.double() - chains.double().mean(1, keepdim=True)
    draws = centred.shape[1]
    spectrum = torch.fft.rfft(centred, n=2 * draws, dim=1)
    return torch.fft.irfft(spectrum.abs().square(), n=2 * draws, dim=1)[:, :draws] / draws


def effective_samples(chains: Tensor) -> Tensor:
    """Independent draws that C chains of K draws are worth together, for each of D coordinates: [C,K,D] → [D].

    Autocorrelations are summed in pairs while these stay positive and fall (Geyer's initial monotone sequence); chains
    that disagree count as correlated, as in Stan. A coordinate that never moves counts one draw. NaN below 4 draws.
    """
    count, draws, width = chains.shape
    if draws < 4:
        return torch.full((width,), float("nan"), dtype=torch.double, device=chains.device)
    covariance = autocovariance(chains).mean(0)  # [K,D]
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0]
    if count > 1:
        total = total + chains.double().mean(1).var(0)
    still = total <= 1e-24 * (1 + chains.double().abs().amax((0, 1)).square())
    correlation = 1 - (within - covariance) / total.clamp_min(1e-300)
    correlation[0] = 1.0
    pairs = correlation[: draws // 2 * 2].view(draws // 2, 2, width).sum(1)
    positive = (pairs > 0).double().cumprod(0)
    time = 2 * (pairs.cummin(0).values * positive).sum(0) - 1
    size = count * draws
    found = size / time.clamp_min(1 / math.log10(size))
    return torch.where(still, 1.0, found)


def effective_of_each(chains: Tensor) -> Tensor:
    """The same for every chain alone, its least coordinate that moves: [B,K,…] → [B]; 1 where nothing moves."""
    count, draws = chains.shape[:2]
    # a coordinate of a chain is a column of its own, so one call does all
    columns = chains.flatten(2).permute(1, 0, 2).reshape(1, draws, -1)
    found = effective_samples(columns).view(count, -1)
    moves = (columns.amax(1) > columns.amin(1)).view(count, -1)
    least = torch.where(moves, found, float("inf")).amin(1)
    return torch.where(torch.isinf(least), torch.ones_like(least), least)
